"""Bytes and FLOPs of the kernels of block-sparse attention, from their equations, arrays and walks over blocks.

Every axis of an equation has its extent, but for query tile T and key block J together: then the blocks count that a
tile visits.  Those that it sees by position are intervals of its masks, averaged over tiles; it chooses its whole
budget.  A union of lists counts as one list, as if all tiles of a program chose alike: no formula knows by how much
it is longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from splagen.autotune.formula import Cost, axes_of, is_product, programs, tidy
from splagen.codegen.affine import Bound, Interval, intervals
from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.moments import BLOCK, predicate
from splagen.codegen.predicates import LENGTH, T
from splagen.codegen.schedule import DTYPES, Schedule
from splagen.codegen.selection import CELL, PLACES, QUERY, TILE, Selection
from splagen.codegen.tile_code import Walk
from splagen.expression import symbol
from splagen.ir.program import Equation, Program, TopK, Var

BATCH, HEADS = symbol("B"), symbol("Hkv")
TILES = frozenset({"T", "J"})
LONG = 2**40  # positions: which of several bounds an interval meets far from both ends


@dataclass(frozen=True)
class Attention:
    """The sizes of one program's kernels, in a dtype."""

    program: Program
    dtype: str

    @cached_property
    def geometry(self) -> Geometry:
        """Extents of tiles, blocks and heads."""
        return Geometry.of(self.program)

    @cached_property
    def tiles(self) -> sp.Expr:
        """Query tiles of a sequence."""
        return LENGTH / self.geometry.tile

    @cached_property
    def blocks(self) -> sp.Expr:
        """Key blocks of a sequence."""
        return LENGTH / self.geometry.block

    @cached_property
    def budget(self) -> int:
        """Blocks that a tile chooses."""
        return next((eq.op.k for eq in self.program.equations if isinstance(eq.op, TopK)), 0)

    @cached_property
    def forced(self) -> sp.Expr:
        """Blocks that a tile sees by position, on average."""
        return mean_length(Walk.of(self.program).intervals("J"), T, self.tiles, self.blocks)

    @cached_property
    def far(self) -> sp.Expr:
        """Blocks that a tile may choose from, on average."""
        selection = self._selection
        assert selection
        found = intervals(predicate(self.program, selection.far, PLACES), BLOCK, {})
        return mean_length(found, TILE, self.tiles, self.blocks)

    @cached_property
    def usable(self) -> sp.Expr:
        """Cells over which the metric of a query is normalised, in blocks, on average."""
        selection = self._selection
        assert selection
        cells = self.geometry.cells
        found = intervals(predicate(self.program, selection.usable, PLACES), CELL, {})
        return mean_length(found, QUERY, LENGTH, self.blocks * cells) / cells

    @cached_property
    def _selection(self) -> Selection | None:
        return Selection.of(self.program)

    def cost(self, kernel: Kernel, schedule: Schedule) -> Cost:
        """The formulas of one kernel with a Schedule."""
        count = programs(kernel.grid, self._sizes(schedule))
        arrays = {a.name: a for a in (*kernel.inputs, *kernel.outputs)}
        moved = sp.Add(*(self._bytes(kernel, a, schedule, count) for a in arrays.values()))
        return Cost(kernel.name, tidy(moved), tidy(self._flops(kernel)), count)

    def _sizes(self, schedule: Schedule) -> dict[str, sp.Expr | int]:
        g = self.geometry
        return {
            "L": LENGTH,
            "B": BATCH,
            "Hkv": HEADS,
            "Hq": HEADS * g.group,
            "nT": self.tiles,
            "nJ": self.blocks,
            "nC": self.blocks * g.cells,
            "TILE": g.tile,
            "GROUP": g.group,
            "BLOCK": g.block,
            "CHUNK": g.chunk,
            "work.segments": self.segments,
            **schedule,
        }

    @property
    def segments(self) -> sp.Expr:
        """Pieces of the inverse index: of the mean length, so that no more than one per block is not full."""
        return 2 * self.blocks

    # -- products -------------------------------------------------------------------------------------------------

    def _flops(self, kernel: Kernel) -> sp.Expr:
        if kernel.template == "state_total":  # the products are in the parts that it adds
            return sp.S.Zero
        merged = any(a.layout == "segments" for a in kernel.inputs)  # sums over tiles come as segments
        total = sp.S.Zero
        for eq in kernel.covers:
            axes = axes_of(eq)
            if not is_product(eq) or (merged and axes >= TILES):
                continue
            if _merges(kernel) and axes >= TILES and self._masked(eq):
                continue
            pairs = self.tiles * self._visited(kernel, eq.out) if axes >= TILES else sp.S.One
            alone = axes - TILES if axes >= TILES else axes
            total += 2 * pairs * sp.Mul(*(self._extent(a) for a in alone))
        return total

    def _extent(self, axis: str) -> sp.Expr:
        places = {symbol("nT"): self.tiles, symbol("nJ"): self.blocks}
        return sp.sympify(self.program.extents[axis]).xreplace(places)

    def _visited(self, kernel: Kernel, v: Var) -> sp.Expr:
        """Blocks per query tile for which a kernel forms or reads `v`."""
        match kernel.template:
            case "score_lse":
                return self.usable
            case "score_topk":
                return self.far
            case "block_sparse_parts":
                return sp.Integer(self.budget)
        if _merges(kernel):
            return self.forced
        masked = any(self._masked(eq) for eq in kernel.covers if eq.out == v)
        chosen = sp.Integer(self.budget)
        return chosen if masked or self._only_chosen(kernel, v.name) else self.forced + chosen

    def _masked(self, eq: Equation) -> bool:
        """True for a sum over chosen blocks."""
        return any(_depends_on_choice(self.program, v) for v in eq.args)

    def _only_chosen(self, kernel: Kernel, name: str) -> bool:
        """True if all that a kernel makes of a variable is summed over chosen blocks alone."""
        readers = [eq for eq in kernel.covers if any(v.name == name for v in eq.args)]
        return bool(readers) and all(self._masked(eq) or self._only_chosen(kernel, eq.out.name) for eq in readers)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _bytes(self, kernel: Kernel, a: Array, schedule: Schedule, count: sp.Expr) -> sp.Expr:
        size = DTYPES[self.dtype] if a.dtype == "input" else 4
        return size * math.prod(a.width) * self._rows(kernel, a, schedule, count)

    def _rows(self, kernel: Kernel, a: Array, schedule: Schedule, count: sp.Expr) -> sp.Expr:
        """Rows of an array that all `count` programs of a kernel read or write together."""
        g, pairs = self.geometry, BATCH * HEADS
        once = self._once(a, count)
        match kernel.template, a.layout:
            case "block_sparse_forward" | "block_sparse_dq", "key_rows":  # the visited blocks, by every program
                return count * self._blocks_read(kernel, a) * g.block
            case "block_sparse_dkv", "query_rows" | "query_scalars":  # by every slice of a block that they visit
                rows = pairs * self.tiles * self._blocks_read(kernel, a) * g.tile * g.group
                return rows * sp.Rational(g.block, schedule["BLOCK_N"])
            case "block_sparse_parts", "query_rows" | "query_scalars":
                return pairs * self.tiles * self.budget * g.tile * g.group
            case "block_sparse_dkv" | "block_sparse_parts", "key_rows":
                return pairs * self.segments * g.block
            case "block_sparse_dkv", "segments" if kernel.holes["whole"]:  # at best a block is one segment
                return sp.S.Zero
            case "merge_segments", "segments" | "key_rows" if kernel.holes["finished"]:
                return sp.S.Zero
            case "merge_segments", "work":
                return pairs * self.blocks
            case "score_lse" | "score_topk", "cell_rows":
                return count * g.cells * (self.usable if kernel.template == "score_lse" else self.far)
            case "score_topk", "query_rows" | "query_scalars" if kernel.number_of("rows_of_tile") > schedule["BLOCK_M"]:
                # a tile of more rows than fit passes by piece by piece, for every tile of blocks
                return once * self.far * g.cells / schedule["BLOCK_C"]
            case "block_states", "query_rows" | "key_rows" | "query_scalars" if "e" not in a.features:
                return once * sp.Rational(kernel.number_of("right_size"), schedule["BLOCK_E"])
            case "remaining_state", "states" if a in kernel.inputs:  # those of each list, which is one of either side
                return pairs * self.tiles * (self.forced + self.budget)
            case "remaining_state", "sequences":
                return pairs * LENGTH / kernel.number_of("chunk")
            case "remaining_state", "query_rows" | "key_rows" if a in kernel.inputs:
                return once * sp.Rational(kernel.number_of("right_size"), schedule["BLOCK_E"])
            case "state_scan", "states":  # in place
                return 2 * once
            case "read_out", "states":  # the ends of intervals that are not 0, or slices of them, by every program
                ends = kernel.holes["intervals"]
                assert isinstance(ends, Sequence)
                return count / self._slices(kernel, schedule) * sum(1 + bool(e["low"]) for e in ends)
            case "read_out", _ if a in kernel.inputs:
                return once * self._slices(kernel, schedule)
        return once

    def _slices(self, kernel: Kernel, schedule: Schedule) -> sp.Expr:
        """Programs that share the columns of a read-out."""
        return sp.S.One if kernel.holes["held"] else sp.Rational(kernel.number_of("kept_size"), schedule["BLOCK_E"])

    def _blocks_read(self, kernel: Kernel, a: Array) -> sp.Expr:
        if _merges(kernel):
            return self.forced
        chosen = sp.Integer(self.budget)
        return chosen if self._only_chosen(kernel, a.name) else self.forced + chosen

    def _once(self, a: Array, count: sp.Expr) -> sp.Expr:
        """Rows of an array as it lies in memory."""
        g, pairs = self.geometry, BATCH * HEADS
        match a.layout:
            case "query_rows" | "query_scalars":
                return pairs * LENGTH * g.group
            case "key_rows":
                return pairs * LENGTH
            case "cell_rows":
                return pairs * self.blocks * g.cells
            case "head_rows":
                return HEADS * g.group
            case "kv_head_scalars":
                return HEADS
            case "states":
                return pairs * (LENGTH / a.chunk + 1)
            case "sequences":
                return pairs
            case "indices":
                return pairs * self.tiles * self.budget
            case "counts":
                return pairs * self.tiles
            case "work":
                return pairs * (self.tiles * self.budget + self.segments + 2 * self.blocks)
            case "segments":
                return pairs * self.segments * g.block
            case "parts":
                return pairs * self.tiles * self.budget * g.tile * g.group
            case "partials":
                return count
        raise AssertionError(a.layout)


def _depends_on_choice(program: Program, v: Var) -> bool:
    """True for the result of a top-k."""
    eq = program.definitions.get(v)
    return eq is not None and isinstance(eq.op, TopK)


def _merges(kernel: Kernel) -> bool:
    """True for a kernel that adds what chosen blocks gave to a row elsewhere."""
    return any(a.layout == "parts" for a in kernel.inputs)


# -- intervals -----------------------------------------------------------------------------------------------------


def mean_length(found: Sequence[Interval], position: sp.Symbol, count: sp.Expr, extent: sp.Expr) -> sp.Expr:
    """The length of intervals below `extent`, averaged over a position from 0 to `count`."""
    return _length(found, position, count / 2, extent, lambda b: _mean(b, position, count))


def last_length(found: Sequence[Interval], position: sp.Symbol, extent: sp.Expr) -> sp.Expr:
    """The length of intervals below `extent` at the last position of a sequence of whole blocks."""
    last = LENGTH - 1

    def value(bound: Bound) -> sp.Expr:
        reached = sp.expand(bound.numerator.xreplace({position: last}))
        rest = reached.subs(LENGTH, 0)
        return (reached - rest) / bound.divisor + sp.floor(sp.Rational(rest, bound.divisor))

    return _length(found, position, last, extent, value)


def _length(
    found: Sequence[Interval], position: sp.Symbol, at: sp.Expr, extent: sp.Expr, value: Callable[[Bound], sp.Expr]
) -> sp.Expr:
    """Each interval counts with the bounds that it has at a position far from the ends of a long sequence."""
    total = sp.S.Zero

    def far(x: sp.Expr) -> sp.Expr:
        return x.xreplace({position: at}).xreplace({LENGTH: sp.Integer(LONG)})

    def where(b: Bound) -> sp.Expr:
        return far(b.numerator / b.divisor)

    for interval in found:
        if any(far(guard) < 0 for guard in interval.guards):
            continue
        low = max((Bound(sp.S.Zero, 1), *interval.lows), key=where)
        high = min((Bound(extent, 1), *interval.highs), key=where)
        if where(high) > where(low):
            length = sp.expand(value(high) - value(low))
            total += sp.Max(0, length) if length.as_coeff_Add()[0] < 0 else length  # none in a short sequence
    return total


def _mean(bound: Bound, position: sp.Symbol, count: sp.Expr) -> sp.Expr:
    """The mean of floor(numerator / divisor) over the position."""
    slope = bound.numerator.coeff(position)
    rest = sp.expand(bound.numerator - slope * position)
    if not slope.is_Integer or not rest.is_Integer:  # a length: the quotient stands
        return bound.numerator.xreplace({position: (count - 1) / 2}) / bound.divisor
    step = math.gcd(int(slope), bound.divisor)  # remainders are rest mod step, and that plus multiples of step
    remainder = int(rest) % step + sp.Rational(bound.divisor - step, 2)
    return (slope * (count - 1) / 2 + rest - remainder) / bound.divisor
