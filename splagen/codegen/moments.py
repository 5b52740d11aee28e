"""Statistics of keys as moments: a variable over cells in terms of the mean and variance of a window of keys.

The factors of a covariance (LowRank) come from the same centred keys.

M1 and M2 stand for the mean of k and of k^2 over a window of w neighbouring cells.  Variables over cells are
polynomials in them, so a kernel may compute any of them from the mean and the variance of its window: the
equations may go through differences that would lose digits, the kernel does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy as sp

from splagen.codegen.affine import intervals, terms
from splagen.codegen.geometry import Geometry, is_key_row
from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.program import Contract, Equation, Iota, LowRank, Map, Program, Reduce, Rename, Var, placeholder
from splagen.ir.text import equation_text

KEY, MEAN, VARIANCE, FACTOR = symbol("key"), symbol("mu"), symbol("var"), symbol("factor")
BLOCK, HERE, THERE, POSITION, LENGTH = (symbol(x) for x in ("block", "here", "there", "position", "L"))


def moment(power: int, cells: int) -> sp.Symbol:
    """The mean of the keys' powers over a window of `cells` cells."""
    return symbol(f"M{power}_{cells}")


def predicate(program: Program, v: Var, places: dict[tuple[str, ...], sp.Expr]) -> sp.Basic:
    """A mask over positions; `places` gives the value of each Iota by its axes."""
    eq = program.definitions.get(v)
    match eq and eq.op:
        case Iota(axes) if axes in places:
            return places[axes]
        case Map(expr):
            assert eq is not None
            values = {placeholder(i): predicate(program, a, places) for i, a in enumerate(eq.args)}
            return expr.xreplace(values)
    raise PartitionError(f"`{v}` is not a predicate over {', '.join(' '.join(a) for a in places)}")


def offsets(program: Program, mask: Var, places: dict[tuple[str, ...], sp.Expr], origin: sp.Expr) -> tuple[int, int]:
    """(first, count) of a mask that holds where origin + first <= THERE < origin + first + count."""
    found = intervals(predicate(program, mask, places), THERE, {})
    if len(found) == 1 and len(found[0].lows) == len(found[0].highs) == 1 and not found[0].guards:
        low, high = found[0].lows[0], found[0].highs[0]
        ends = [sp.expand(b.numerator - origin) for b in (low, high)]
        if low.divisor == high.divisor == 1 and all(e.is_Integer for e in ends):
            return int(ends[0]), int(ends[1] - ends[0])
    raise PartitionError(f"`{equation_text(program.definitions[mask])}` is not a band of fixed width")


@dataclass
class Moments:
    """The moments of one program's keys; remembers which equations and which key rows went into them."""

    program: Program
    geometry: Geometry
    equations: dict[Equation, None] = field(default_factory=dict)
    keys: dict[Var, None] = field(default_factory=dict)

    def statistic(self, v: Var) -> tuple[sp.Expr, int]:
        """A variable over cells as an expression in MEAN and VARIANCE of a window, and the window's cells."""
        if self._low_rank(v):
            return FACTOR, 1
        expr = self.of(v)
        widths = {int(s.name.split("_")[1]) for s in expr.free_symbols if s.name.startswith("M")}
        if len(widths) != 1 or expr.has(KEY) or len(self.keys) != 1:
            raise PartitionError(f"{v} is not a statistic of one window of keys")
        (w,) = widths
        second = VARIANCE + MEAN**2
        return sp.expand(expr.xreplace({moment(1, w): MEAN, moment(2, w): second})), w

    def of(self, v: Var) -> sp.Expr:
        """The variable as an expression in moments, or in KEY where it still has an entry per key."""
        eq = self.program.definitions.get(v)
        if eq is None and is_key_row(v):
            self.keys[v] = None
            return KEY
        if eq is not None:
            self.equations[eq] = None
            match eq.op:
                case Map(expr):
                    values = {placeholder(i): self.of(a) for i, a in enumerate(eq.args)}
                    return sp.expand(expr.xreplace(values))
                case Rename():
                    return self.of(eq.args[0])
                case Reduce("mean", ("n",)) if len(eq.args) == 2:
                    return self._mean(eq)
                case Contract():
                    return self._window(eq)
        raise PartitionError(f"{v} is not a statistic of keys")

    def _low_rank(self, v: Var) -> LowRank | None:
        """The operation behind factors of the covariance of a cell's keys; None for other statistics."""
        eq = self.program.definitions.get(v)
        if eq is None or not isinstance(eq.op, LowRank):
            return None
        self.equations[eq] = None
        rows = self.of(eq.args[0])
        if len(eq.args) != 2 or not self._exist(eq.args[1]) or sp.expand(rows - KEY + moment(1, 1)) != 0:
            raise PartitionError(f"`{equation_text(eq)}` is not over the centred keys of a cell that exist")
        if len(self.keys) != 1:
            raise PartitionError(f"{v} is not a statistic of one window of keys")
        return eq.op

    def _exist(self, mask: Var) -> bool:
        """True for the mask of the keys inside the sequence."""
        exists = predicate(self.program, mask, {("J", "C", "n"): POSITION})
        return terms(exists) == [(LENGTH - 1 - POSITION,)]

    def _mean(self, eq: Equation) -> sp.Expr:
        """Mean over the existing keys of a cell."""
        if not self._exist(eq.args[1]):
            raise PartitionError(f"`{equation_text(eq)}` is not a mean over the keys that exist")
        try:
            powers = sp.Poly(self.of(eq.args[0]), KEY).terms()
        except sp.PolynomialError:
            powers = [((3,), sp.S.One)]
        if any(p > 2 for (p,), _ in powers):
            raise PartitionError(f"`{equation_text(eq)}` needs more than the second moment of the keys")
        return sp.Add(*(c * (moment(p, 1) if p else 1) for (p,), c in powers))

    def _window(self, eq: Equation) -> sp.Expr:
        """Sum over a band of neighbouring cells: a moment of the window, if every cell in it is full."""
        masks = [v for v in eq.args if v.kind == "bool"]
        values = [v for v in eq.args if v.kind == "real"]
        if len(masks) != 1 or len(values) != 1:
            raise PartitionError(f"`{equation_text(eq)}` is not a sum over a window of cells")
        places: dict[tuple[str, ...], sp.Expr] = {("J", "C"): HERE, ("Jw", "Cw"): THERE}
        first, count = offsets(self.program, masks[0], places, HERE)
        sums = sp.Poly(self.of(values[0]), moment(1, 1), moment(2, 1))
        if first or sums.total_degree() > 1 or sums.free_symbols_in_domain:
            raise PartitionError(f"`{equation_text(eq)}` is not a sum of moments over a window that starts at its cell")
        total = sp.S.Zero
        for (p, p2), c in sums.terms():
            total += c * count * (moment(1, count) if p else moment(2, count) if p2 else 1)
        return total


@dataclass(frozen=True)
class CellStatistics:
    """The statistics of a cell as a kernel forms them.

    `values` lists (statistic, source, columns of its array that the source is for), None for all columns; `second` says
    whether there is a variance, `factors` are those of the covariance, one call after the other.
    """

    values: tuple[tuple[Var, str, str | None], ...]
    second: bool
    factors: tuple[Mapping[str, object], ...]

    @property
    def holes(self) -> dict[str, object]:
        """Those of a template."""
        return {"second": self.second, "factors": self.factors}

    @classmethod
    def of(cls, moments: Moments, statistics: Iterable[Var]) -> CellStatistics:
        """From the mean, the variance and the factors of each window; PartitionError where something else is needed."""
        values: list[tuple[Var, str, str | None]] = []
        factors: list[dict[str, object]] = []
        second = False
        for v in statistics:
            expr, _ = moments.statistic(v)
            second |= expr.has(VARIANCE)
            op = moments.program.definitions[v].op
            if not isinstance(op, LowRank):
                values.append((v, triton_text(expr, {MEAN.name: "mu", VARIANCE.name: "var"}), None))
                continue
            for i in range(moments.geometry.rank):
                name = f"{v.name}_{i}"
                factors.append({"name": name, "number": i, "steps": op.steps})
                values.append((v, name, moments.geometry.factor_columns(i)))
        return cls(tuple(values), second, tuple(factors))
