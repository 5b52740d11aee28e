"""Which attention each layer of a model has, by the name of a variant.

Softmax variants differ in one thing at a time: order of the metric, covariance, residual, combination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import splagen
from examples.fidelity.presets import Shape
from splagen.nn import layout

ALWAYS = 1 << 30  # dense_below: every length


def _sparse(shape: Shape, metric: splagen.Metric, **change: Any) -> splagen.SPLASpec:
    select = splagen.Select(block_size=shape.block_size, budget=shape.budget, sinks=1, local=1, metric=metric)
    group = shape.heads // shape.kv_heads
    spec = splagen.SPLASpec(head_dim=shape.head_dim, group_size=group, select=select, linear=None)
    return replace(spec, **change)


def _spla(shape: Shape, metric: splagen.Metric, combine: str = "rms_residual") -> splagen.SPLASpec:
    return _sparse(shape, metric, linear=splagen.Residual(), combine=combine)


def _infllm(shape: Shape) -> splagen.SPLASpec:
    spec = _sparse(shape, ORDER_1)
    assert spec.select is not None
    return replace(spec, select=replace(spec.select, statistics=splagen.windows()))


def _window(shape: Shape) -> splagen.SPLASpec:
    group = shape.heads // shape.kv_heads
    near = splagen.sliding_window(shape.exact_keys)
    return splagen.SPLASpec(head_dim=shape.head_dim, group_size=group, select=None, linear=None, score=near)


def _states(shape: Shape, backbone: Any, router: splagen.Router | None = None) -> splagen.SSESpec:
    return splagen.SSESpec(head_dim=shape.head_dim, backbone=backbone, router=router)


ORDER_1, DIAGONAL = splagen.taylor(order=1), splagen.taylor(order=2, covariance="diag")
RANK_2 = splagen.taylor(order=2, covariance="rank2")
RANK_4 = splagen.taylor(order=2, covariance="rank4")
CUMULANT_2 = splagen.cumulant(order=2, covariance="rank2")

KINDS: dict[str, Callable[[Shape], splagen.Spec]] = {
    "dense": lambda s: _sparse(s, ORDER_1, dense_below=ALWAYS),
    "window": _window,
    "infllm": _infllm,
    "sparse1": lambda s: _sparse(s, ORDER_1),
    "sparse2": lambda s: _sparse(s, DIAGONAL),
    "sparse2r2": lambda s: _sparse(s, RANK_2),
    "sparse2r4": lambda s: _sparse(s, RANK_4),
    "sparse2c2": lambda s: _sparse(s, CUMULANT_2),
    "spla1": lambda s: _spla(s, ORDER_1),
    "spla2": lambda s: _spla(s, DIAGONAL),
    "spla2r4": lambda s: _spla(s, RANK_4),
    "spla2rms": lambda s: _spla(s, DIAGONAL, "rms"),
    "linear": lambda s: _states(s, "none"),
    "gla": lambda s: _states(s, "vector"),
    "gdn": lambda s: _states(s, "delta"),
    "sse": lambda s: _states(s, "vector", splagen.Router(partitions=s.partitions, writers=1)),
}
"""What one layer computes.  Where a layer is dense, 16-bit rows on a GPU take torch's attention."""

ABOUT = {
    "dense": "softmax over every key",
    "window": "softmax over the last keys, as many as sparse attention sees",
    "infllm": "blocks by order 1 over overlapping windows (InfLLM-v2), no residual",
    "sparse1": "blocks by order 1, no residual",
    "sparse2": "blocks by order 2, diagonal, no residual",
    "sparse2r2": "blocks by order 2, rank 2, no residual",
    "sparse2r4": "blocks by order 2, rank 4, no residual",
    "sparse2c2": "blocks by the cumulant of order 2, rank 2, no residual",
    "spla1": "blocks by order 1, residual o_s + RMS(o_r)",
    "spla2": "blocks by order 2, diagonal, residual o_s + RMS(o_r)",
    "spla2r4": "blocks by order 2, rank 4, residual o_s + RMS(o_r)",
    "spla2rms": "blocks by order 2, diagonal, residual RMS(o_s) + RMS(o_r)",
    "linear": "linear attention without decay",
    "gla": "linear attention, decay by token and feature",
    "gdn": "linear attention, gated delta rule",
    "sse": "gla and sparse states, one of them per token",
    "sse_dense": "sse; every 4th layer dense",
    "gla_spla2": "gla; every 4th layer spla2",
    "spla2_dense": "spla2; every 4th layer dense",
}
"""Variants in the order of tables and pictures."""


@dataclass(frozen=True)
class Variant:
    """A kind for each layer."""

    name: str
    kinds: tuple[str, ...]


def variant(name: str, layers: int) -> Variant:
    """The variant of a name: a kind for all layers, or `<rest>_<kind>` with the kind in the last of every 4 layers.

    In a model of fewer than 4 layers it is the last one.

    Raises:
        ValueError: no such variant.
    """
    if name not in ABOUT:
        raise ValueError(f"no variant {name!r}: one of {', '.join(ABOUT)}")
    rest, _, other = name.partition("_")
    every = {other: min(4, layers)} if other else None
    return Variant(name, layout(layers, rest, every=every))
