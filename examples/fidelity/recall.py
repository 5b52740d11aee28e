"""Recall of a value by its key out of a long window: lines that are written over text.

    @wqzk4029       somewhere
    @wqzk4029       later; the value is asked for

Some training windows carry such lines.  Text alone repeats too little for a small model to learn in a short time to
look a name up; a task of its own would need a model beside each model of text, and would say nothing of recall among
text.  All variants see the same lines in the same windows, and validation of the language model has none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.fidelity.text import Bytes, spread

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
DIGITS = np.frombuffer(b"0123456789", np.uint8)
KEY, VALUE = 4, 4
LINE = len(b"\n@") + KEY + VALUE + 1
SLOT = 16  # lines begin at multiples of it


def _pair(rng: np.random.Generator) -> tuple[bytes, bytes]:
    return rng.choice(LETTERS, KEY).tobytes(), rng.choice(DIGITS, VALUE).tobytes()


def _write(row: Bytes, start: int, pair: tuple[bytes, bytes]) -> None:
    line = b"\n@" + pair[0] + pair[1] + b"\n"
    row[start : start + LINE] = np.frombuffer(line, np.uint8)


def insert(row: Bytes, rng: np.random.Generator, pairs: int) -> None:
    """Write `pairs` pairs and, somewhere behind each, its question, into a window in place.

    Raises:
        ValueError: they do not fit.
    """
    slots = len(row) // SLOT
    if 2 * pairs > slots:
        raise ValueError(f"{2 * pairs} lines for a window of {slots} places: fewer pairs, or a longer window")
    places = rng.choice(slots, (pairs, 2), replace=False)
    for early, late in np.sort(places, 1).tolist():
        pair = _pair(rng)
        _write(row, early * SLOT, pair)
        _write(row, late * SLOT, pair)


def questions(text: Bytes, length: int, depth: float, count: int, distractors: int) -> Bytes:
    """Windows uint8 [count, length] that end with a question; its pair stands at `depth` between 0 and 1.

    Windows, pairs and places follow from the arguments: they are the same for every model.

    Raises:
        ValueError: the text or a window is too short.
    """
    rows = spread(text, length, count)
    slots = (length - LINE) // SLOT
    if distractors >= slots:
        raise ValueError(f"{distractors} other pairs for a window of {slots} places: fewer, or a longer window")
    needle = round(depth * (slots - 1))
    others = np.delete(np.arange(slots), needle)
    rng = np.random.default_rng([length, round(1000 * depth)])
    for row in rows:
        for place in rng.choice(others, distractors, replace=False).tolist():
            _write(row, place * SLOT, _pair(rng))
        pair = _pair(rng)
        _write(row, needle * SLOT, pair)
        _write(row, length - LINE, pair)
    return rows


def answers(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which questions are answered, bool [B], and the loss in nats per digit [B], from logits [B, L, 256] at windows.

    Every digit has to be the likeliest byte after those before it: that is when greedy generation gives the value.
    Who knows nothing but that digits come has a loss of log 10 = 2.3.
    """
    found, value = logits[:, -2 - VALUE : -2].float(), rows[:, -1 - VALUE : -1]
    loss = F.cross_entropy(found.transpose(1, 2), value, reduction="none")
    return torch.eq(found.argmax(-1), value).all(-1), loss.mean(-1)
