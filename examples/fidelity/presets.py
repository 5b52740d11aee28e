"""Sizes of a study: model, training and evaluation, for a CPU in seconds or for a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from examples.byte_lm import learning_rate


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, alike for every variant, and of the attention that a variant gives it.

    Attributes:
        layers: decoder layers.
        heads: query heads of softmax attention, and heads of linear attention.
        kv_heads: key and value heads of softmax attention.
        head_dim: channels of a head.
        context: bytes of a training window.
        block_size: keys per block of sparse attention.
        budget: blocks that a query chooses beside the first, the one before its own and its own.
        partitions: sparse states of SSE; a token writes one.
    """

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 8192
    block_size: int = 64
    budget: int = 8
    partitions: int = 4

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Channels inside the MLP of a dense layer: 8/3 of the width, a multiple of 32."""
        return 32 * math.ceil(8 * self.width / (3 * 32))

    @property
    def exact_keys(self) -> int:
        """Keys that a query of sparse attention sees at most: first, previous, own and chosen blocks."""
        return self.block_size * (3 + self.budget)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps: steps of the optimizer.
        batch: windows per step.
        early_steps: steps whose windows are `early_context` bytes long, as many bytes a step: what is looked up stands
            near, and looking up is learned several times as fast.
        lr: the highest learning rate: after `warmup` steps, before a cosine to a tenth.
        recall_share: of the windows of a step, about so many carry pairs to recall.
        recall_pairs: pairs in such a window, 1 to so many where they fit; there are 52 keys.
        recall_weight: of the mean loss of values that are asked for, beside that of all bytes: they are few.
        chunk: steps between two looks at the clock and the losses, which wait for the GPU.
        validate_every: steps, a multiple of `chunk`.
        validation_windows: windows of a validation, the same each time.
        balance: weight of SSE's balance loss.
    """

    steps: int = 2000
    batch: int = 2
    early_steps: int = 300
    early_context: int = 256
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    recall_share: float = 1.0
    recall_pairs: int = 48
    recall_weight: float = 1.0
    chunk: int = 10
    validate_every: int = 250
    validation_windows: int = 32
    balance: float = 0.01

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(step, self.steps, self.lr, self.warmup)


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a trained model.

    Attributes:
        lengths: of windows with a pair to recall, in contexts.
        depths: where the pair stands, from 0 at the start to 1 right before the question.
        samples: windows for each length and depth.
        distractors: other pairs in the window.
        position_contexts: length of windows whose loss is told by position, in contexts.
        position_windows: how many of them.
        buckets: ranges of positions.
    """

    lengths: tuple[float, ...] = (0.25, 0.5, 1, 2)
    depths: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)
    samples: int = 32
    distractors: int = 31
    position_contexts: int = 2
    position_windows: int = 64
    buckets: int = 64


@dataclass(frozen=True)
class Preset:
    """A study: everything but variant and seed."""

    name: str
    shape: Shape = field(default_factory=Shape)
    training: Training = field(default_factory=Training)
    conversion: Training = field(default_factory=lambda: Training(steps=300, lr=3e-4, warmup=30, validate_every=50))
    evaluation: Evaluation = field(default_factory=Evaluation)


_TINY_TRAINING = Training(
    steps=4, batch=2, early_steps=1, early_context=64, lr=3e-3, warmup=1, recall_share=0.5, recall_pairs=2, chunk=1,
    validate_every=2, validation_windows=2,
)  # fmt: skip
H200 = Preset("h200")
TINY = Preset(
    "tiny",
    Shape(layers=2, heads=2, kv_heads=1, head_dim=16, context=256, block_size=32, budget=1, partitions=2),
    _TINY_TRAINING,
    replace(_TINY_TRAINING, steps=2, lr=1e-3),
    Evaluation(lengths=(0.5, 1, 2), depths=(0, 0.5, 1), samples=2, distractors=1, position_windows=2, buckets=4),
)
PRESETS = {p.name: p for p in (H200, TINY)}
