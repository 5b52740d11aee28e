"""Hypothesis strategies for the IR: random valid Programs, sizes of their run-time axes, and small specs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy as sp
import torch
from hypothesis import strategies as st
from torch import Tensor

from splagen.expression import log1p, symbol
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.program import Program, Var
from splagen.library import topk_softmax
from splagen.spec import SPLASpec
from splagen.sse_spec import Router, SSESpec
from tests.strategies import specs
from tests.test_sse_spec import sse_specs

AXES = (("i", symbol("N")), ("j", symbol("N")), ("l", symbol("N")), ("t", symbol("M")), ("c", 3), ("d", 2))
NAMES = tuple(a for a, _ in AXES if a != "l")  # l is the third axis of a unit inverse: its gradient sums over it
LENGTH = 3.0  # the scalar L of random Programs
LARGEST = 1e3  # bound of a value before the next product squashes it

SMOOTH = (
    lambda x, y: sp.tanh(x + y),
    lambda x, y: x * sp.tanh(y),
    lambda x, y: x * sp.exp(-(y**2)),
    lambda x, y: sp.exp(sp.tanh(x) - y**2),
    lambda x, y: x - y / 3,
    lambda x, y: log1p(x**2) + sp.tanh(y),
    lambda x, y: x / sp.sqrt(1 + y**2),
    lambda x, y: symbol("L") * sp.tanh(x) / symbol("N") + sp.tanh(y),
    lambda x, y: sp.log(2 + sp.tanh(x)) + sp.sqrt(2 + sp.tanh(y)),
)


class _Growing:
    """A Program under construction, with a bound on the size of every real variable."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.b = Builder("random", AXES, scalars=("L", "N", "M"))
        self.bound: dict[Var, float] = {}
        self.masks: list[Var] = []

    @property
    def reals(self) -> list[Var]:
        return list(self.bound)

    def any_of(self, choices: Sequence[object]) -> object:
        return self.draw(st.sampled_from(choices))

    def some_axes(self, axes: Sequence[str], least: int = 0) -> list[str]:
        return self.draw(st.lists(st.sampled_from(axes), min_size=least, max_size=len(axes), unique=True))

    def keep(self, v: Var, bound: float) -> None:
        if bound > LARGEST:
            v, bound = self.b.map("small", sp.tanh(symbol("x0") / 8), v), 1.0
        self.bound[v] = bound

    def real(self, *, over: bool = False) -> Var:
        return self.any_of([v for v in self.reals if v.axes or not over])

    def mask(self) -> Var | None:
        return self.any_of([None, *self.masks])

    def union(self, *variables: Var | None) -> tuple[str, ...]:
        carried = {a for v in variables if v for a in v.axes}
        return tuple(a for a, _ in AXES if a in carried)

    def map(self) -> None:
        x, y = self.real(), self.real()
        if self.masks and self.draw(st.booleans()):
            out = self.b.map("pick", lambda a, c, m: sp.Piecewise((a, m), (c, True)), x, y, self.any_of(self.masks))
        else:
            out = self.b.map("map", self.any_of(SMOOTH), x, y)
        self.keep(out, 1 + 3 * (self.bound[x] + self.bound[y]))

    def contract(self) -> None:
        factors = [self.real() for _ in range(self.draw(st.integers(1, 3)))]
        masks = [self.any_of(self.masks) for _ in range(self.draw(st.integers(0, 2)))] if self.masks else []
        carried = self.union(*factors, *masks)
        out = self.b.contract("con", self.some_axes(carried) if carried else [], *factors, *masks)
        terms = 4 ** (len(carried) - len(out.axes))
        self.keep(out, terms * math.prod(self.bound[v] for v in factors))

    def distinct(self, x: Var, axes: Sequence[str]) -> Var:
        """X plus an offset along `axes`: no ties, which rounding would break differently."""
        place = self.b.iota("place", *axes)
        return self.b.map("distinct", lambda v, i: v + sp.Rational(377, 1000) * i, x, place)

    def reduce(self) -> None:
        x, mask = self.real(over=True), self.mask()
        axes = self.some_axes(self.union(x, mask), 1)
        how = self.any_of(["sum", "mean", "max"])
        operand = self.distinct(x, axes) if how == "max" else x
        many = 4 ** len(axes)
        self.keep(self.b.reduce(str(how), how, axes, operand, mask), (self.bound[x] + 1) * many)

    def softmax(self) -> None:
        x, mask = self.real(over=True), self.mask()
        self.keep(self.b.softmax("soft", self.some_axes(self.union(x, mask), 1), x, mask), 1.0)

    def lse(self) -> None:
        x, mask = self.real(over=True), self.mask()
        raw = self.b.lse("lse", self.some_axes(self.union(x, mask), 1), x, mask)
        kept = self.b.map("finite", lambda v: sp.Piecewise((v, v > -(10**6)), (0, True)), raw)
        self.keep(kept, self.bound[x] + 6)

    def cumsum(self) -> None:
        x = self.real(over=True)
        axes = self.some_axes(x.axes, 1)
        self.keep(self.b.cumsum("sums", axes, x), self.bound[x] * 4 ** len(axes))

    def rename(self) -> None:
        pairs = (("i", "j"), ("j", "i"))
        able = [(v, old, new) for v in self.reals for old, new in pairs if old in v.axes and new not in v.axes]
        if able:
            v, old, new = self.any_of(able)
            self.keep(self.b.rename("renamed", v, **{old: new}), self.bound[v])

    def unit_inverse(self) -> None:
        i, j = self.b.iota("at_row", "i"), self.b.iota("at_column", "j")
        slope = sp.Rational(self.draw(st.integers(-3, 3)), 3)
        mixing = self.b.map("mixing", lambda v, r, c: sp.tanh(v + slope * r - c / 3), self.real(), i, j)
        row, column = self.any_of([("i", "j"), ("j", "i")])
        self.keep(self.b.unit_inverse("inverse", mixing, row, column), 8.0)

    def low_rank(self) -> None:
        able = [(v, features, rank) for v in self.reals for features, rank in ("cd", "dc")
                if features in v.axes and rank not in v.axes and len(v.axes) > 1]  # fmt: skip
        if able:
            v, features, rank = self.any_of(able)
            rows = self.any_of([a for a in v.axes if a != features])
            masks = [m for m in self.masks if not {features, rank} & set(m.axes)]
            mask, steps = self.any_of([None, *masks]), self.draw(st.integers(1, 3))
            out = self.b.low_rank("factor", v, mask, rows=rows, features=features, rank=rank, steps=steps)
            self.keep(out, 2 * self.bound[v])

    def affine(self) -> None:
        left = self.b.iota("left", *self.some_axes(NAMES[:3], 1))
        right = self.b.iota("right", *self.some_axes(NAMES, 1))
        shift = self.draw(st.integers(-2, 2))
        rule = self.any_of(
            [
                lambda p, r: sp.Le(p, r + shift),
                lambda p, r: sp.Or(sp.Lt(p, symbol("L") - 1), sp.Ge(r, 1)),
                lambda p, r: sp.And(sp.Ge(2 * p, r + shift), sp.Lt(r, symbol("L"))),
            ]
        )
        self.masks.append(self.b.map("affine", rule, left, right))

    def above(self) -> None:
        self.masks.append(self.b.map("above", lambda v: v > sp.Rational(2917, 10000), self.real()))

    def topk(self) -> None:
        x, mask = self.real(over=True), self.mask()
        axis = self.any_of(self.union(x, mask))
        chosen = self.b.topk("chosen", self.draw(st.integers(1, 3)), axis, self.distinct(x, [axis]), mask)
        self.masks.append(chosen)
        if mask and self.draw(st.booleans()):
            self.complement(mask, chosen)

    def complement(self, whole: Var | None = None, chosen: Var | None = None) -> None:
        if self.masks:
            whole, chosen = whole or self.any_of(self.masks), chosen or self.any_of(self.masks)
            rest = self.b.map("rest", lambda p, f: sp.And(p, sp.Not(f)), whole, chosen)
            self.masks.append(rest)
            if rest.axes:
                self.keep(self.b.reduce("count", "sum", rest.axes[:1], rest), 4.0)


STEPS = ("map", "contract", "contract", "reduce", "softmax", "lse", "cumsum", "rename", "unit_inverse", "low_rank")
MASK_STEPS = ("affine", "above", "topk", "topk", "complement")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A valid Program whose every input reaches an output; real variables that nothing reads are outputs."""
    grow = _Growing(draw)
    given = [grow.b.input(n, grow.some_axes(NAMES, 1)) for n in "xyz"]
    grow.bound.update(dict.fromkeys(given, 1.0))
    for _ in range(draw(st.integers(2, 3))):
        getattr(grow, grow.any_of(MASK_STEPS))()
        for _ in range(draw(st.integers(2, 4))):
            getattr(grow, grow.any_of(STEPS))()
    anchors = [grow.b.contract("anchor", [], v, v) for v in given]
    total = grow.b.map("total", sum(symbol(f"x{n}") for n in range(len(anchors))), *anchors)
    read = {a for eq in grow.b.equations for a in eq.args}
    outputs = [eq.out for eq in grow.b.equations if eq.out.kind == "real" and eq.out not in read]
    return check(grow.b.program(*dict.fromkeys([*outputs, total])))


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Extents of the run-time axes of `programs()`."""
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {"i": n, "j": n, "l": n, "t": m}


def inputs(program: Program, extents: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Uniform numbers in [-1, 1) (or coins) for every input, cotangents included, by name."""
    generator = torch.Generator().manual_seed(seed)
    known = {a: e for a, e in program.axes if isinstance(e, int)} | dict(extents)
    made = {}
    for v in program.inputs:
        x = 2 * torch.rand([known[a] for a in v.axes], generator=generator, dtype=torch.float64) - 1
        made[v.name] = x > 0 if v.kind == "bool" else x
    return made


def small(spec: SPLASpec) -> SPLASpec:
    """The same kind of spec at sizes that the oracle evaluates in milliseconds."""
    select = spec.select
    if select:
        select = replace(
            select,
            block_size=32 if select.statistics.width else min(select.block_size, 32),
            budget=1 + select.budget % 3,
            sinks=select.sinks % 3,
            local=select.local % 2,
            tile=min(select.tile, 32),
        )
    value_dim = 16 if spec.value_dim == spec.head_dim else 24
    return replace(
        spec, head_dim=16, value_dim=value_dim, group_size=1 + spec.group_size % 2, select=select,
        scale=min(spec.scale, 0.5), dense_below=spec.dense_below if spec.dense_below < 8192 else 0,
    )  # fmt: skip


def small_specs() -> st.SearchStrategy[SPLASpec]:
    """Specs of every kind, at sizes that the oracle evaluates in milliseconds."""
    return specs().map(small)


def small_sse(spec: SSESpec) -> SSESpec:
    """The same kind of spec at sizes that a loop over tokens evaluates in milliseconds."""
    router = spec.router
    if router:
        partitions = 1 + (router.partitions - 1) % 5
        writers, readers = min(router.writers, partitions), min(router.readers, partitions)
        router = replace(router, partitions=partitions, writers=writers, readers=readers)
    return replace(
        spec, head_dim=16, value_dim=16 if spec.value_dim == spec.head_dim else 20, group_size=1 + spec.group_size % 2,
        router=router, scale=min(spec.scale, 0.5),
    )  # fmt: skip


def small_sse_specs() -> st.SearchStrategy[SSESpec]:
    """SSE specs of every kind, at sizes that a loop over tokens evaluates in milliseconds."""
    return sse_specs().map(small_sse)


ROUTES: dict[str, dict[str, object]] = {
    "no router": {"router": None},
    "sorted": {"router": Router(partitions=4, writers=2)},
    "masked, k_w != k_r": {"router": Router(writers=1, readers=3), "form": "masked"},
    "per-head router": {"router": Router(partitions=5, scope="head"), "group_size": 2},
    "gates of the selected": {"router": Router(partitions=5, writers=2, normalise="selected"), "group_size": 2},
    "gate of writers": {"router": Router(gate="write"), "k_map": topk_softmax(4)},
    "gate of readers, no shared state": {"router": Router(writers=3, gate="read"), "shared": False},
    "no gate": {"router": Router(gate="none"), "q_map": "softmax", "k_map": "relu"},
}
BACKBONES = [("none", None), ("constant", None), ("scalar", None), ("vector", None)]
BACKBONES += [("delta", "pre_norm"), ("delta", "post_norm")]
CASES: dict[str, SSESpec] = {
    " ".join(filter(None, (backbone, site, route))): SSESpec(
        head_dim=16, value_dim=20, backbone=backbone, gate_site=site, **changes  # type: ignore[arg-type]
    )
    for backbone, site in BACKBONES
    for route, changes in ROUTES.items()
}  # fmt: skip
