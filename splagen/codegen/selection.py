"""Block selection as equations: what a top-k over blocks is made of, found from the top-k backwards.

    free  = topk over blocks J of score where far
    score = sum, or max over a band of cells, of the sum over the rows of a tile of share
    share = exp(metric - lse) where usable,  lse = log-sum-exp of metric over cells where usable
    metric = any expression in products of rows of q with statistics of keys, in sums over factors of a covariance of
             expressions in such products, and in positions

The log of a factor of exp(metric) is never taken: exp(e + log(w)) is exp(e) * w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy as sp

from splagen.codegen.affine import Atom, Interval, atom, implied, intervals, terms
from splagen.codegen.base_two import LOG2_E
from splagen.codegen.geometry import Geometry, features_of, is_query_row
from splagen.codegen.moments import BLOCK, LENGTH, THERE, Moments, offsets, predicate
from splagen.codegen.triton_expr import interval_text
from splagen.errors import PartitionError
from splagen.expression import log1p, symbol
from splagen.ir.program import (
    Contract,
    Equation,
    Iota,
    Lse,
    Map,
    Program,
    Reduce,
    Rename,
    TopK,
    Var,
    placeholder,
)
from splagen.ir.text import equation_text

TILE, QUERY, CELL = symbol("tile"), symbol("query"), symbol("cell")
PLACES: dict[tuple[str, ...], sp.Expr] = {("T",): TILE, ("T", "m"): QUERY, ("J",): BLOCK, ("J", "C"): CELL}
ROW_EXISTS: tuple[Atom, ...] = (LENGTH - 1 - QUERY,)


@dataclass(frozen=True)
class Product:
    """out = rows of queries . statistics of cells, over features; `scale` is folded into computed rows."""

    equation: Equation
    row: Var
    cell: Var
    scale: sp.Rational

    @property
    def out(self) -> Var:
        """The product."""
        return self.equation.out


@dataclass(frozen=True)
class FactorSum:
    """out = sum over the factors r of a covariance of `term`, an expression over the names of products with r."""

    out: Var
    term: sp.Expr
    products: tuple[Product, ...]


@dataclass(frozen=True)
class Selection:
    """The parts of one top-k over blocks."""

    program: Program
    geometry: Geometry
    topk: Equation
    pooled: Var | None  # the band of cells whose maximum is a block's score; None where they are summed
    lse: Equation
    products: tuple[Product, ...]
    factor_sums: tuple[FactorSum, ...]
    metric: sp.Expr  # over the names of products, of sums over factors, and of `others`
    others: tuple[Var, ...]  # what else the metric reads: numbers that follow from positions

    @classmethod
    def of(cls, program: Program) -> Selection | None:
        """Match the program's top-k over blocks; None if it has none."""
        found = [eq for eq in program.equations if isinstance(eq.op, TopK)]
        if not found:
            return None
        if len(found) > 1 or len(found[0].args) != 2:
            quoted = ", ".join(f"`{equation_text(eq)}`" for eq in found)
            raise PartitionError(f"a selection is one top-k over blocks under a mask, not {quoted}")
        share, pooled = _pooling(program, found[0])
        lse = _normaliser(program, share)
        metric, leaves = _inlined(program, lse.args[0])
        scales: dict[Var, sp.Rational] = {}
        scaled, products = _products(program, metric, leaves, scales)
        factor_sums = []
        for v in leaves:
            eq = program.definitions[v]
            if eq.op == Reduce("sum", ("r",)) and len(eq.args) == 1:
                term, read = _inlined(program, eq.args[0])
                term, inside = _products(program, term, read, scales)
                if {p.out for p in inside} != {*read}:
                    raise PartitionError(f"`{equation_text(eq)}` sums more than products of a query with factors")
                factor_sums.append(FactorSum(v, term, inside))
        taken = [*(p.out for p in products), *(s.out for s in factor_sums)]
        others = tuple(v for v in leaves if v not in taken)
        geometry = Geometry.of(program)
        return cls(program, geometry, found[0], pooled, lse, products, tuple(factor_sums), scaled, others)

    @property
    def far(self) -> Var:
        """The blocks that a tile may choose from."""
        return self.topk.args[1]

    @property
    def usable(self) -> Var:
        """The cells that a query may use."""
        return self.lse.args[1]

    @property
    def statistics(self) -> tuple[Var, ...]:
        """The statistics that the products read, each once."""
        return tuple(dict.fromkeys(p.cell for p in self.all_products))

    @property
    def all_products(self) -> tuple[Product, ...]:
        """Those with a factor of a covariance too."""
        return (*self.products, *(p for s in self.factor_sums for p in s.products))

    @property
    def rows(self) -> tuple[Var, ...]:
        """The rows of queries that the products read, each once."""
        return tuple(dict.fromkeys(p.row for p in self.all_products))

    def window(self, moments: Moments) -> int:
        """Cells per window of the statistics.  Only sums over complete windows are moments."""
        widths = {moments.statistic(v)[1] for v in self.statistics}
        if len(widths) != 1:
            raise PartitionError(f"the statistics of {self.topk.out} are over windows of different widths")
        (width,) = widths
        if width > 1:
            complete = LENGTH - self.geometry.cell * (CELL + width)
            if not self.holds(self.usable, complete):
                raise PartitionError(f"{self.usable} admits windows that end outside the sequence")
        return width

    def band(self) -> tuple[int, int]:
        """(first, count) of the cells that make a block's score, counted from the block's first cell."""
        if self.pooled is None:
            return 0, self.geometry.cells
        places: dict[tuple[str, ...], sp.Expr] = {("J",): BLOCK, ("Jw", "Cw"): THERE}
        return offsets(self.program, self.pooled, places, self.geometry.cells * BLOCK)

    # -- masks --------------------------------------------------------------------------------------------

    def holds(self, mask: Var, target: Atom, *known: Atom) -> bool:
        """True if `target >= 0` wherever the mask holds, for rows and tiles that exist, and where `known` are >= 0."""
        exist = (*ROW_EXISTS, LENGTH - 1 - self.geometry.tile * TILE, *known)
        cases = terms(predicate(self.program, mask, PLACES))
        return all(implied(sp.expand(target), (*case, *exist), {}) for case in cases)

    def simplify(self, expr: sp.Basic, args: tuple[Var, ...]) -> sp.Basic:
        """Drops comparisons that hold for every query row that exists: nothing is kept of the others."""
        values = {}
        for i, v in enumerate(args):
            eq = self.program.definitions.get(v)
            if eq is not None and isinstance(eq.op, Iota) and eq.op.axes in PLACES:
                values[placeholder(i)] = PLACES[eq.op.axes]
        proven = {}
        for part in expr.atoms(sp.core.relational.Relational):
            where = part.xreplace(values)
            if where.free_symbols <= {LENGTH, QUERY} and all(implied(a, ROW_EXISTS, {}) for a in atom(where)):
                proven[part] = sp.true
        return expr.xreplace(proven) if proven else expr

    def bounds(self, mask: Var, variable: sp.Symbol, of: sp.Symbol, ends: tuple[str, str], extent: str) -> list[str]:
        """Lines that define low <= variable < high around what the mask admits for `of` between its ends."""
        lows, highs = zip(*self._admitted(mask, variable, of, ends, extent), strict=True)
        return [f"low = {_nested('tl.minimum', lows)}", f"high = {_nested('tl.maximum', highs)}"]

    def of_all(self, mask: Var, variable: sp.Symbol, of: sp.Symbol, ends: tuple[str, str], extent: str) -> str:
        """The number below which, from `low` of `bounds` on, the mask holds for all of `of` between its ends.

        `low` where that is not known: then it holds for none.
        """
        some, every = (self._admitted(mask, variable, of, ends, extent, every=x) for x in (False, True))
        alike = len(some) == len(every) == 1 and some[0][0] == every[0][0]
        return every[0][1] if alike else "low"

    def _admitted(
        self,
        mask: Var,
        variable: sp.Symbol,
        of: sp.Symbol,
        ends: tuple[str, str],
        extent: str,
        *,
        every: bool = False,
    ) -> list[tuple[str, str]]:
        """Source of the intervals that the mask admits for some, or for `every` one, of `of` between its ends."""
        first, last = (symbol(e) for e in ends)
        unit = self.geometry.tile if of == TILE else 1
        exist = [LENGTH - 1 - unit * end for end in (first, last)]
        cases = []
        for case in terms(predicate(self.program, mask, PLACES)):
            at = [sp.expand(a.subs(of, last if (a.coeff(of) > 0) != every else first)) for a in case]
            cases.append(sp.And(*(sp.Ge(a, 0) for a in at if not implied(a, exist, {}))))
        found: list[Interval] = intervals(sp.Or(*cases), variable, {})
        names = {s: s for s in (*ends, "L")}
        return [interval_text(i, names, extent) for i in found]

    def usable_where_far(self) -> bool:
        """Whether the queries that exist of a tile may use every cell of a block that the tile may choose."""
        tile, cells, (first, count) = self.geometry.tile, self.geometry.cells, self.band()
        exists = LENGTH - 1 - self.geometry.block * BLOCK
        ends = [
            {QUERY: tile * TILE + m, CELL: cells * BLOCK + first + c} for m in (0, tile - 1) for c in (0, count - 1)
        ]
        for case in terms(predicate(self.program, self.usable, PLACES)):
            asked = [a.xreplace(end) for a in case if not implied(a, ROW_EXISTS, {}) for end in ends]
            if all(self.holds(self.far, a, exists) for a in asked):
                return True
        return False

    # -- the metric ---------------------------------------------------------------------------------------

    def mass(self) -> tuple[sp.Expr, sp.Expr]:
        """(x, w) such that exp(metric) = 2**x * w, with as few logarithms in x as there can be."""
        exponent, weight = sp.S.Zero, sp.S.One
        for term in sp.Add.make_args(self.metric):
            match term:
                case sp.log():
                    weight *= term.args[0]
                case log1p():
                    weight *= 1 + term.args[0]
                case _:
                    exponent += term
        return sp.expand(LOG2_E * exponent), weight


def _nested(function: str, items: Sequence[str]) -> str:
    out = items[0]
    for item in items[1:]:
        out = f"{function}({out}, {item})"
    return out


def _pooling(program: Program, topk: Equation) -> tuple[Equation, Var | None]:
    """From the score back to the share of one row and cell: (its equation, the band of a maximum)."""
    eq, pooled, summed = program.definitions[topk.args[0]], None, set[str]()
    while True:
        match eq.op:
            case Reduce("sum", axes) if len(eq.args) == 1:
                summed |= set(axes)
            case Reduce("max", ("Jw", "Cw")) if len(eq.args) == 2 and not summed:
                pooled = eq.args[1]
            case Rename():
                pass
            case _:
                break
        eq = program.definitions[eq.args[0]]
    if summed != {"g", "m"} | (set() if pooled else {"C"}):
        raise PartitionError(f"the score of `{equation_text(topk)}` is not a sum over heads and the queries of a tile")
    return eq, pooled


def _normaliser(program: Program, share: Equation) -> Equation:
    """The log-sum-exp behind share = exp(metric - lse) where usable."""
    for i, v in enumerate(share.args):
        lse = program.definitions.get(v)
        if lse is None or not isinstance(lse.op, Lse) or lse.op.axes != ("J", "C") or len(lse.args) != 2:
            continue
        if set(share.args) != {v, *lse.args} or not isinstance(share.op, Map):
            continue
        x, mask = (placeholder(share.args.index(a)) for a in lse.args)
        if share.op.expr == sp.Piecewise((sp.exp(x - placeholder(i)), mask), (0, True)):
            return lse
    raise PartitionError(f"`{equation_text(share)}` is not a masked softmax over cells")


def _inlined(program: Program, v: Var) -> tuple[sp.Expr, list[Var]]:
    """The Maps over (row, cell) behind a variable as one expression over names, and what it reads."""
    leaves: dict[Var, None] = {}

    def expand(v: Var) -> sp.Expr:
        eq = program.definitions.get(v)
        if eq is not None and isinstance(eq.op, Map) and {"m", "C"} <= set(v.axes):
            return eq.op.expr.xreplace({placeholder(i): expand(a) for i, a in enumerate(eq.args)})
        if eq is None:
            raise PartitionError(f"no kernel brings {v} to the scores of cells")
        leaves[v] = None
        return symbol(v.name)

    return expand(v), list(leaves)


def _products(
    program: Program, expr: sp.Expr, leaves: Sequence[Var], scales: dict[Var, sp.Rational]
) -> tuple[sp.Expr, tuple[Product, ...]]:
    """The products among the leaves of an expression, and the expression over them scaled; a row has one scale."""
    products: list[Product] = []
    scaled = expr
    for v in leaves:
        eq = program.definitions[v]
        if isinstance(eq.op, Contract):
            product = _product(program, eq, expr)
            product = replace(product, scale=scales.setdefault(product.row, product.scale))
            products.append(product)
            scaled = scaled.xreplace({symbol(v.name): symbol(v.name) / product.scale})
    return scaled, tuple(products)


def _product(program: Program, eq: Equation, metric: sp.Expr) -> Product:
    """One product of rows and statistics, with the smallest factor that the metric multiplies it by.

    Computed rows are rounded to the input type: with the factor inside, factor_sums of queries do not overflow
    float16.
    """
    rows = [v for v in eq.args if is_query_row(v) and features_of(v) == ("d",)]
    cells = [v for v in eq.args if {"J", "C", "d"} <= set(v.axes) and not {"n", "m"} & set(v.axes)]
    if len(rows) != 1 or len(cells) != 1 or len(eq.args) != 2 or "d" in eq.out.axes:
        raise PartitionError(f"`{equation_text(eq)}` is not one product of a query row and a statistic of keys")
    x, scale = symbol(eq.out.name), sp.S.One
    if rows[0] in program.definitions:
        factors = [abs(t.as_coeff_Mul()[0]) for t in metric.atoms(sp.Mul) if x in t.args]
        scale = min([f for f in factors if f.is_Rational], default=sp.S.One)
    return Product(eq, rows[0], cells[0], scale)
