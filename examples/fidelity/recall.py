"""Recall of a value by its key out of a long window: lines that are written over text.

    ~aQ       somewhere
    ~aQ       later; the value is asked for

Key and value are a letter each, for a model of bytes a token each: how far a model remembers is asked, not how it
spells.  Training windows carry such lines.  Text alone repeats too little for a small model to learn in a short
time to look a name up; a task of its own would need a model beside each model of text, and would say nothing of recall
among text.  All variants see the same lines in the same windows, and validation of the language model has none.
"""

from __future__ import annotations

import string

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from examples.fidelity.text import Bytes, spread

LETTERS = np.frombuffer(string.ascii_letters.encode(), np.uint8)
LINE = len(b"\n~aQ\n")
SLOT = 8  # lines begin at multiples of it
PLACES = 4  # of a pair in a training window: it is learned once and asked for three times


def _pairs(rng: np.random.Generator, count: int) -> list[bytes]:
    """So many keys, all different, each with a value."""
    keys, values = rng.choice(LETTERS, count, replace=False), rng.choice(LETTERS, count)
    return [bytes(pair) for pair in zip(keys.tolist(), values.tolist(), strict=True)]


def _write(row: Bytes, start: int, pair: bytes) -> None:
    row[start : start + LINE] = np.frombuffer(b"\n~" + pair + b"\n", np.uint8)


def _check(pairs: int, lines: int, slots: int) -> None:
    if pairs > len(LETTERS) or lines > slots:
        what = f"{pairs} pairs of {len(LETTERS)} keys, {lines} lines for a window of {slots} places"
        raise ValueError(f"{what}: fewer pairs, or a longer window")


def most_pairs(length: int) -> int:
    """How many pairs `insert` can write into a window of `length` bytes."""
    return min(len(LETTERS), length // SLOT // PLACES)


def insert(row: Bytes, rng: np.random.Generator, pairs: int) -> NDArray[np.int64]:
    """Write `pairs` pairs into a window in place, each at several places; where the values stand that are asked for.

    The places of a pair lie within a span of their own, from a few lines to the window: near ones are learned first.

    Raises:
        ValueError: they do not fit.
    """
    slots = len(row) // SLOT
    _check(pairs, PLACES * pairs, slots)
    free, asked = np.ones(slots, np.bool_), []
    for pair in _pairs(rng, pairs):
        span = int(np.exp(rng.uniform(np.log(2 * PLACES), np.log(max(slots, 2 * PLACES)))))
        first = int(rng.integers(max(slots - span, 0) + 1))
        within = first + np.flatnonzero(free[first : first + span])
        places = np.sort(rng.choice(within if len(within) >= PLACES else np.flatnonzero(free), PLACES, replace=False))
        free[places] = False
        for place in places.tolist():
            _write(row, place * SLOT, pair)
        asked.append(places[1:] * SLOT + LINE - 2)
    return np.concatenate(asked)


def questions(text: Bytes, length: int, depth: float, count: int, distractors: int) -> Bytes:
    """Windows uint8 [count, length] that end with a question; its pair stands at `depth` between 0 and 1.

    Windows, pairs and places follow from the arguments: they are the same for every model.

    Raises:
        ValueError: the text or a window is too short, or there are too few keys.
    """
    rows = spread(text, length, count)
    slots = (length - LINE) // SLOT
    _check(distractors + 1, distractors + 1, slots)
    needle = round(depth * (slots - 1))
    others = np.delete(np.arange(slots), needle)
    rng = np.random.default_rng([length, round(1000 * depth)])
    for row in rows:
        pair, *rest = _pairs(rng, distractors + 1)
        for place, other in zip(rng.choice(others, distractors, replace=False).tolist(), rest, strict=True):
            _write(row, place * SLOT, other)
        _write(row, needle * SLOT, pair)
        _write(row, length - LINE, pair)
    return rows


def answers(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which questions are answered, bool [B], and the loss in nats [B], from logits [B, L, 256] at windows.

    The value has to be the likeliest byte.  Who knows nothing but that a letter comes has a loss of log 52 = 4.0.
    """
    found, value = logits[:, -3].float(), rows[:, -2]
    return torch.eq(found.argmax(-1), value), F.cross_entropy(found, value, reduction="none")
