"""Training that stops and goes on, with the same result as without a stop."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from examples.fidelity import recall
from examples.fidelity.model import Decoder
from examples.fidelity.presets import Shape, Training
from examples.fidelity.text import Bytes, Corpus, spread, windows

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


def batch(text: Bytes, shape: Shape, training: Training, seed: int, step: int) -> tuple[Bytes, NDArray[np.bool_]]:
    """Windows of a step, uint8 [batch, context + 1] or more and shorter ones early, and which bytes are asked for.

    They follow from seed and step alone: variants see the same ones, and so does a run that goes on.
    """
    rng = np.random.default_rng([seed, step])
    context = training.early_context if step < training.early_steps else shape.context
    length, count = context + 1, training.batch * shape.context // context
    rows = windows(text, rng.integers(len(text) - length + 1, size=count), length)
    asked, most = np.zeros(rows.shape, np.bool_), min(training.recall_pairs, recall.most_pairs(length))
    for row, values in zip(rows, asked, strict=True):
        if rng.random() < training.recall_share:
            values[recall.insert(row, rng, int(rng.integers(1, most, endpoint=True)))] = True
    return rows, asked


def on(rows: Bytes | NDArray[np.bool_], device: torch.device) -> Tensor:
    """Bytes, or which of them, as int64 on a device."""
    return torch.from_numpy(rows).to(device, torch.int64)


def losses(forward: Forward, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy [B, L - 1] in nats of each byte of windows [B, L] but the first, and the sum of balance losses.

    On a GPU the model runs in bfloat16.
    """
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits, balance = forward(rows[:, :-1])
    return F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none"), balance


@torch.no_grad()
def by_position(forward: Forward, text: Bytes, length: int, count: int, device: torch.device) -> Tensor:
    """Mean loss in nats, float64 [length], at each position over `count` fixed windows, one at a time."""
    total = torch.zeros(length, dtype=torch.float64)
    for row in spread(text, length + 1, count):
        total += losses(forward, on(row[None], device))[0][0].double().cpu()
    return total / count


class Run:
    """A model on its way: weights, optimizer, curves.

    Attributes:
        step: steps done.
        loss: nats per byte of the batches of every step.
        validation: (step, nats per byte), before the first step and after the last one too.
        step_s: seconds per step, the mean of each chunk but the first of a process.
    """

    def __init__(self, model: Decoder, training: Training, key: str) -> None:
        """`key` says what a checkpoint has to be of: shape, training, seed, text."""
        self.model, self.training, self.key = model, training, key
        self.step = 0
        self.loss: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.step_s: list[float] = []
        self.named = dict(model.named_parameters())
        matrices = {n for n, p in self.named.items() if p.ndim == 2 and n.endswith("weight")}
        self.groups = [sorted(matrices), sorted(self.named.keys() - matrices)]  # gains and biases do not decay
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.named[n] for n in names], "weight_decay": decay}
                for names, decay in zip(self.groups, (training.weight_decay, 0.0), strict=True)
            ],
            lr=training.lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda,
        )  # fmt: skip

    @property
    def done(self) -> bool:
        """Whether all steps are taken, and the last validation."""
        return bool(self.validation) and self.validation[-1][0] == self.training.steps

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds of a step, or None before there are any."""
        return 1e3 * statistics.median(self.step_s) if self.step_s else None

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all: a dict of tensors."""
        kept = {f"model.{n}": x for n, x in self.model.state_dict().items()}
        kept |= {f"adam.{n}.{k}": x for n, p in self.named.items() for k, x in self.adam.state.get(p, {}).items()}
        kept |= {
            "key": _as_bytes(self.key),
            "step": torch.tensor(self.step),
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            "validation": torch.tensor(self.validation, dtype=torch.float64).reshape(-1, 2),
            "step_s": torch.tensor(self.step_s, dtype=torch.float64),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(kept, file)
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of another study.
        """
        kept: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
        if bytes(kept["key"].numpy()).decode() != self.key:
            raise ValueError(f"{path} is of other sizes, text or seed: delete it, or give another --work")
        self.model.load_state_dict(_below(kept, "model."))
        numbered = [n for names in self.groups for n in names]
        moments = {i: _below(kept, f"adam.{n}.") for i, n in enumerate(numbered)}
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": {i: m for i, m in moments.items() if m}, "param_groups": groups})
        self.step = int(kept["step"])
        self.loss, self.step_s = kept["loss"].tolist(), kept["step_s"].tolist()
        self.validation = [(int(s), x) for s, x in kept["validation"].tolist()]

    def train(
        self,
        corpus: Corpus,
        shape: Shape,
        seed: int,
        stop: Callable[[int], bool] = lambda step: False,
        *,
        checkpoint: Path | None = None,
        first_batch: int = 0,
        compiled: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        """Take steps until all are taken or `stop(step)` after a chunk of them; step s has batch `first_batch` + s.

        `checkpoint` is written after each validation and in the end.
        """
        t, device = self.training, next(self.model.parameters()).device
        forward: Forward = torch.compile(self.model) if compiled else self.model
        warm = False
        while not self.done:
            due = self.step % t.validate_every == 0 or self.step == t.steps
            if due and (not self.validation or self.validation[-1][0] != self.step):
                found = by_position(self.model, corpus.validation, shape.context, t.validation_windows, device).mean()
                self.validation.append((self.step, found.item()))
                report(f"step {self.step:6d}  validation {found.item():.4f}  ms {self.step_ms or 0:.1f}")
            ended = self.done or stop(self.step)
            if checkpoint is not None and (due or ended):
                self.save(checkpoint)
            if ended:
                return
            begun, steps = time.perf_counter(), min(t.chunk - self.step % t.chunk, t.steps - self.step)
            made = [self._advance(forward, *batch(corpus.train, shape, t, seed, first_batch + s), s, device)
                    for s in range(self.step, self.step + steps)]  # fmt: skip
            self.loss += torch.stack(made).double().tolist()
            if warm:
                self.step_s.append((time.perf_counter() - begun) / steps)
            self.step, warm = self.step + steps, True

    def _advance(
        self, forward: Forward, rows: Bytes, asked: NDArray[np.bool_], step: int, device: torch.device
    ) -> Tensor:
        for group in self.adam.param_groups:
            group["lr"] = self.training.lr_at(step)
        each, balance = losses(forward, on(rows, device))
        loss, values = each.mean(), on(asked[:, 1:], device)
        recalled = (each * values).sum() / values.sum().clamp(min=1)
        self.adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + self.training.recall_weight * recalled + self.training.balance * balance)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.adam.step()
        return loss.detach()


def key_of(**parts: Any) -> str:
    """What a checkpoint is of, as text."""
    return json.dumps(parts, sort_keys=True)


def weights(path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint, by name."""
    return _below(torch.load(path, weights_only=True, map_location="cpu"), "model.")


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def _below(kept: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in kept.items() if n.startswith(prefix)}
