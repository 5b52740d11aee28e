"""Floors: the least time that an op's own operations and bytes take on an H200, whatever the kernels are.

A floor is the larger of operations over the rate of large bf16 products and bytes over the rate of a device copy.  Each
product counts once, each input is read once and each output written once; blocks are counted by the cost model
(splagen/autotune/attention_cost.py), averaged over the sequence.  A kernel's own floor takes the operations that the
cost model finds in its equations, and the bytes of its tensors, each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from splagen import pipeline
from splagen.autotune.attention_cost import Attention
from splagen.autotune.cost import costs, default_schedules, evaluate, sizes_of
from splagen.autotune.device import DEVICES
from splagen.codegen.partition import Partition
from splagen.spec import Spec, SPLASpec
from splagen.verification import Shape

H200 = DEVICES["NVIDIA H200"]
PEAK_FLOPS, PEAK_BYTES = H200.flops, H200.bandwidth  # what it gives to a large bf16 product and to a device copy
LINEAR_CHUNK = 64  # rows of a chunk of linear attention

Stage: TypeAlias = Literal["selection", "attention"]
BOTH: tuple[Stage, ...] = ("selection", "attention")


@dataclass(frozen=True)
class Floor:
    """Operations (2 for a multiplication and an addition) and bytes."""

    flops: float
    bytes: float

    @property
    def ms(self) -> float:
        """Milliseconds on an H200."""
        return 1e3 * max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def floors(spec: Spec, shape: Shape, stages: tuple[Stage, ...] = BOTH) -> dict[str, Floor]:
    """The floors of forward and backward, 16-bit, at a shape (B, H, L).

    Args:
        spec: what is computed; of SSE only the shared state alone without a decay, that is plain linear attention.
        shape: B, heads of queries (SSE: of values), L.
        stages: "selection" is the statistics, the scores and the choice; "attention" everything behind them, for which
            the chosen blocks are an input unless the selection is there too.
    """
    if isinstance(spec, SPLASpec):
        return _block_sparse(spec, shape, stages)
    if spec.router is not None or spec.backbone != "none":
        raise ValueError(f"no floor for {spec.name}: only for linear attention with one state and no decay")
    return _linear(shape, spec.head_dim)


def recurrence_flops(states: int, dim: int, chunk: int = LINEAR_CHUNK) -> float:
    """Operations of a token and head of linear attention with so many states: q k^T and A v in a chunk, q S, k^T v."""
    return states * (4 * chunk * dim + 4 * dim * dim)


def _linear(shape: Shape, dim: int) -> dict[str, Floor]:
    """Backward is 2.5 times forward, as five products are to two; it reads q, k, v, do and writes dq, dk, dv."""
    batch, heads, length = shape
    rows = batch * heads * length
    flops, row = rows * recurrence_flops(1, dim), 2 * dim * rows
    return {"forward": Floor(flops, 4 * row), "backward": Floor(2.5 * flops, 7 * row)}


def _block_sparse(spec: SPLASpec, shape: Shape, stages: tuple[Stage, ...]) -> dict[str, Floor]:
    """Selection: two passes over the cells, one for the normaliser and one for the scores.

    Softmax: two products forward, five backward.  Residual over chosen blocks: two and five, of features and of values.
    Its states: one product per key and one per query forward, backward two of each.
    """
    select = spec.select
    assert select is not None
    batch, heads, length = shape
    if length < spec.dense_below:
        return _dense(spec, shape)
    keys, rows = batch * length * (heads // spec.group_size), batch * length * heads
    counts = block_counts(spec, shape)
    d, e, size = spec.head_dim, spec.value_dim, select.block_size
    indices = 4 * keys / select.tile * select.budget
    forward, backward, read = 0.0, 0.0, 2 * (rows * d + keys * d)
    if "selection" in stages:
        cells = 1 if select.statistics.cell is None else size // select.statistics.cell
        products = 1 + select.metric.rank if select.metric.rank else select.metric.order
        forward += 2 * rows * cells * products * d * (counts["usable"] + counts["far"])
    if "attention" not in stages:
        return {"forward": Floor(forward, read + indices)}
    pairs = rows * size * (counts["forced"] + counts["chosen"])
    forward += 2 * pairs * (d + e)
    backward += 2 * pairs * (3 * d + 2 * e)
    if spec.linear is not None:
        width = spec.linear.feature_map.width(d)
        chosen, states = rows * size * counts["chosen"], (rows + keys) * width * e
        forward += 2 * chosen * (width + e) + 2 * states
        backward += 2 * chosen * (3 * width + 2 * e) + 4 * states
    given = 0.0 if "selection" in stages else indices
    moved = 2 * (rows * (d + e) + keys * (d + e))
    return {"forward": Floor(forward, moved + given), "backward": Floor(backward, 2 * moved + indices)}


def _dense(spec: SPLASpec, shape: Shape) -> dict[str, Floor]:
    """Two products forward, five backward, over the pairs that are not masked; nothing is selected or left over."""
    batch, heads, length = shape
    rows, keys, d, e = (
        batch * length * heads,
        batch * length * (heads // spec.group_size),
        spec.head_dim,
        spec.value_dim,
    )
    pairs = rows * ((length + 1) / 2 if spec.causal else length)
    moved = 2 * (rows + keys) * (d + e)
    forward, backward = 2 * pairs * (d + e), 2 * pairs * (3 * d + 2 * e)
    return {"forward": Floor(forward, moved), "backward": Floor(backward, 2 * moved)}


def block_counts(spec: SPLASpec, shape: Shape) -> dict[str, float]:
    """Blocks per query, averaged over the sequence: forced, chosen, far (to choose from), usable (normalised over)."""
    part = pipeline.kernels(spec)
    assert isinstance(part, Partition)
    whole, sizes = Attention(part.program, "bf16"), sizes_of(spec, shape)
    formulas = {"forced": whole.forced, "far": whole.far, "usable": whole.usable}
    found = {name: evaluate(formula, sizes, spec.name) for name, formula in formulas.items()}
    return found | {"chosen": _mean_choice(whole.budget, found["far"], growing=spec.causal)}


def _mean_choice(budget: int, far: float, *, growing: bool) -> float:
    """The mean of min(budget, x), where x has the mean `far` and grows from 0 along the sequence, or is constant."""
    if growing and budget < 2 * far:
        return budget - budget**2 / (4 * far)
    return min(budget, far)


def kernel_flops(spec: Spec, shape: Shape) -> Mapping[str, float]:
    """Operations of every kernel of a spec by name, from the cost model."""
    part, sizes = pipeline.kernels(spec), sizes_of(spec, shape)
    formulas = costs(spec, part, default_schedules(spec, part, H200.arch, "bf16"))
    return {name: evaluate(cost.flops, sizes, name) for name, cost in formulas.items()}
