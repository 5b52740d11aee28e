"""The kernels of block selection: key statistics, normaliser of the metric, streaming top-k over blocks.

Scores of (query, cell) live in registers only: the normaliser is a first pass over the cells, and the second
pass adds up the shares of a tile block by block and keeps the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp

from splagen.codegen.base_two import LOG2_E
from splagen.codegen.geometry import Geometry, Rows, array_of, features_of
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.moments import BLOCK, CellStatistics, Moments
from splagen.codegen.region import Dim, Region
from splagen.codegen.row_code import RowCode
from splagen.codegen.selection import CELL, QUERY, TILE, Product, Selection
from splagen.codegen.tile_code import COUNTS, INDICES
from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.ir.program import Equation, Iota, TopK, Var, slice_back
from splagen.ir.text import equation_text

LAST_FIRST = "tl.num_programs(0) - 1 - tl.program_id(0)"


class CellRows(Rows):
    """Rows of cells: one statistic of a window of keys per row."""

    @property
    def mask(self) -> str:
        """The vector that says which cells exist."""
        return "cell_ok"

    @property
    def position(self) -> str:
        """The vector of cells, wide enough for addresses."""
        return "cell.to(tl.int64)"


def selection_kernels(selection: Selection, available: Mapping[Var, Array]) -> list[Kernel]:
    """`statistics`, `score_lse` and `score_topk`, in launch order."""
    code = SelectionCode(selection, dict(available))
    return [code.statistics(), code.score_lse(), code.score_topk()]


@dataclass
class SelectionCode:
    """Prints the three kernels; `available` grows by what the earlier ones store."""

    selection: Selection
    available: dict[Var, Array]
    row_type: type[Rows] = Rows
    cell_type: type[Rows] = CellRows

    def __post_init__(self) -> None:
        self.program, self.geometry = self.selection.program, self.selection.geometry
        self.cells = self.cell_type(self.geometry, "key")
        lse = array_of(self.selection.lse.out, self.geometry, internal=True)
        self.lse_array = replace(lse, missing='float("inf")')  # rows that do not exist have no share

    # -- statistics ---------------------------------------------------------------------------------------

    def statistics(self) -> Kernel:
        """Every statistic of every cell, from the mean and the centred second moment of its window."""
        geometry = self.geometry
        moments = Moments(self.program, geometry)
        statistics = CellStatistics.of(moments, self.selection.statistics)
        width = self.selection.window(moments)
        (keys,) = moments.keys
        arrays = {v: _cell_array(v, geometry) for v in self.selection.statistics}
        lines = []
        for v, value, columns in statistics.values:
            if geometry.is_padded(("d",)):
                value = f"tl.where(d_ok[None, :], {value}, 0.0)"
            lines.append(self.cells.store(arrays[v], value, columns))
        self.available.update(arrays)
        holes = {
            "keys": keys.name,
            "cell_size": geometry.cell,
            "cells": geometry.cells,
            "width": width * geometry.cell,
            "columns": "\n".join(geometry.columns(("d",))),
            "column_ok": " & d_ok[None, None, :]" if geometry.is_padded(("d",)) else "",
            **statistics.holes,
            "store": "\n".join(lines),
        }
        return Kernel(
            "statistics",
            "statistics",
            self.program.in_order(moments.equations),
            (self.available[keys],),
            tuple(arrays.values()),
            holes,
            f"(cdiv(nC * {geometry.cell}, BLOCK_N), B * Hkv)",
            tunable=("BLOCK_N",),
        )

    # -- scores -------------------------------------------------------------------------------------------

    def score_lse(self) -> Kernel:
        """The log-sum-exp of the metric over the cells that a query may use."""
        selection = self.selection
        exponent, weight = selection.mass()
        lines, names = self.scores()
        usable = names.pop(selection.usable.name)
        text = triton_text(exponent, names)
        mass = _times("tl.exp2(exponent - safe[:, None])", weight, names)
        rows = Rows(self.geometry, "query")
        where = selection.usable, CELL, QUERY, ("first_query", "last_query"), "nC"
        holes = {
            "cells": self.geometry.cells,
            "columns": "\n".join(self.geometry.columns(("d",))),
            "rows": "\n".join(self.rows()),
            "bounds": "\n".join(selection.bounds(*where)),
            "of_all": selection.of_all(*where),
            "loads": "\n".join(self.loads()),
            "scores": "\n".join(lines),
            "exponent": text,
            "masked_exponent": text if usable == "True" else f'tl.where({usable}, {text}, -float("inf"))',
            "mass": mass,
            "store": rows.store(self.lse_array, "lse"),
        }
        return Kernel(
            "score_lse",
            "score_lse",
            self.covers([selection.lse.out], [*self.program.inputs, *selection.statistics]),
            (*self.inputs(),),
            (self.lse_array,),
            holes,
            "(cdiv(L * GROUP, BLOCK_M), B * Hkv)",
            tunable=("BLOCK_M", "BLOCK_C"),
            number=LAST_FIRST,
        )

    def score_topk(self) -> Kernel:
        """The blocks of the largest share among those that a tile may choose from."""
        selection, geometry = self.selection, self.geometry
        lse = selection.lse.out
        exponent, weight = selection.mass()
        lines, names = self.scores()
        usable = names.pop(selection.usable.name)
        load = Rows(geometry, "query").load(self.lse_array)
        rows = [
            *_ROW_INDEX,
            *self.rows(),
            f"norm = {load} * {float(LOG2_E)}  # base 2; rows that do not exist have no share",
        ]
        share = _times(f"tl.exp2({triton_text(exponent, names)} - norm[:, None])", weight, names)
        bare = usable == "True" or selection.usable_where_far()
        lines.append(f"share = {share if bare else f'tl.where({usable}, {share}, 0.0)'}")
        heads = 1 << (geometry.group - 1).bit_length()
        carried, pool = self.pool()
        holes = {
            "heads": heads,
            "rows_of_tile": geometry.tile * heads,
            "kept": kept(selection),
            "cells": geometry.cells,
            "columns": "\n".join(geometry.columns(("d",))),
            "rows": "\n".join(rows),
            "bounds": "\n".join(selection.bounds(selection.far, BLOCK, TILE, ("first_tile", "last_tile"), "nJ")),
            "loads": "\n".join(self.loads()),
            "share": "\n".join(lines),
            "carried": "\n".join(carried),
            "pool": "\n".join(pool),
            "far": "\n".join(self.far()),
            "any_array": self.lse_array.name,
        }
        rows_of_tile = holes["rows_of_tile"]
        return Kernel(
            "score_topk",
            "score_topk",
            self.covers([selection.topk.out], [*self.program.inputs, *selection.statistics, lse]),
            (*self.inputs(), self.lse_array),
            (INDICES, COUNTS),
            holes,
            f"(cdiv(nT * {rows_of_tile}, max(BLOCK_M, {rows_of_tile})), B * Hkv)",
            tunable=("BLOCK_M", "BLOCK_C"),
            number=LAST_FIRST,
        )

    def inputs(self) -> list[Array]:
        """The arrays that the scores read: rows of queries, then statistics."""
        loaded = self._loaded()
        rows = [array for v, array in self.available.items() if v in loaded]
        return [*rows, *(self.available[v] for v in self.selection.statistics)]

    def _loaded(self) -> set[Var]:
        """The rows in memory behind the rows that the products read."""
        equations = slice_back(self.program, self.selection.rows, self.available)
        return {v for eq in equations for v in eq.args if v in self.available} | {
            v for v in self.selection.rows if v in self.available
        }

    def rows(self) -> list[str]:
        """Lines that load and compute the rows of the products, as their operands."""
        code = RowCode(self.program, self.geometry, "query", "BLOCK_M", self.available, row_type=self.row_type)
        code.defined_columns.add("d")
        scales = {p.row: triton_text(p.scale, {}) for p in self.selection.all_products if p.scale != 1}
        return list(code.operands(self.selection.rows, scales).lines)

    def loads(self) -> list[str]:
        """Lines that load the statistics of a tile of cells."""
        width = self.geometry.width(("d",), pad=True)
        factors = range(self.geometry.rank)
        columns = {
            v: {f"{v.name}_{i}": self.geometry.factor_columns(i) for i in factors} if "r" in v.axes else {v.name: None}
            for v in self.selection.statistics
        }
        return [
            f"{name} = {self.cells.load(self.available[v], column=column)}  # [BLOCK_C, {width}]"
            for v, of_v in columns.items()
            for name, column in of_v.items()
        ]

    def scores(self) -> tuple[list[str], dict[str, str]]:
        """Lines that bring the products, the mask and what else the metric reads; source by name."""
        selection = self.selection
        lines = [_dot(p, p.cell.name) for p in selection.products]
        for s in selection.factor_sums:
            names = {p.out.name: p.out.name for p in s.products}
            for i in range(self.geometry.rank):
                lines += [_dot(p, f"{p.cell.name}_{i}") for p in s.products]
                lines.append(f"{s.out.name} {'+=' if i else '='} {triton_text(s.term, names)}")
        dims = (Dim(frozenset("bhgTm")), Dim(frozenset("JC")))
        places: dict[tuple[str, ...], str] = {("T", "m"): "query[:, None]", ("J", "C"): "cell[None, :]"}
        wanted = [*selection.others, selection.usable]
        more, names = self.emit(wanted, dims, places)
        if not selection.holds(selection.usable, _inside(self.geometry.cell, CELL)):
            mask = names[selection.usable.name]
            names[selection.usable.name] = "cell_ok[None, :]" if mask == "True" else f"{mask} & cell_ok[None, :]"
        held = [*(p.out.name for p in selection.products), *(s.out.name for s in selection.factor_sums)]
        return lines + more, names | {name: name for name in held}

    def far(self) -> list[str]:
        """Lines that define `far` [TILES, BLOCK_J]."""
        selection = self.selection
        dims = (Dim(frozenset("T")), Dim(frozenset("J")))
        lines, names = self.emit([selection.far], dims, {("T",): "tile[:, None]", ("J",): "block[None, :]"})
        far = names[selection.far.name]
        if not selection.holds(selection.far, _inside(self.geometry.block, BLOCK)):
            far = "(block < nJ)[None, :]" if far == "True" else f"{far} & (block < nJ)[None, :]"
        return [*lines, f"far = {far}"] if far != "far" else lines

    def pool(self) -> tuple[list[str], list[str]]:
        """Lines before the loop, and lines that turn the mass of cells [TILES, BLOCK_C] into that of blocks.

        Windows of the block before may reach into a block: the largest of them is handed on, from the last block of a
        step to the first of the next.  A mass is an exponential: 0 stands for no window.
        """
        cells = self.geometry.cells
        split = f"tl.reshape(mass, (TILES, BLOCK_J, {cells}))"
        if self.selection.pooled is None:
            return [], [f"mass = tl.sum({split}, axis=2)"] if cells > 1 else []
        first, count = self.selection.band()
        if not 0 < -first <= cells or first + count != cells:
            eq = self.program.definitions[self.selection.pooled]
            raise PartitionError(f"`{equation_text(eq)}` takes windows beyond its block and the one before")
        start = [
            "low = tl.maximum(low - 1, 0)  # its windows reach into the first block",
            "before = tl.zeros((TILES,), tl.float32)",
        ]
        return start, [
            f"split = {split}",
            f"last = tl.max(tl.where(tl.arange(0, {cells})[None, None, :] >= {cells + first}, split, 0.0), axis=2)",
            "lane = tl.arange(0, BLOCK_J)[None, :]",
            "left = tl.gather(last, tl.broadcast_to(tl.maximum(lane - 1, 0), (TILES, BLOCK_J)), axis=1)",
            "mass = tl.maximum(tl.max(split, axis=2), tl.where(lane == 0, before[:, None], left))",
            "before = tl.sum(tl.where(lane == BLOCK_J - 1, last, 0.0), axis=1)",
        ]

    def emit(
        self, wanted: list[Var], dims: tuple[Dim, ...], places: Mapping[tuple[str, ...], str]
    ) -> tuple[list[str], dict[str, str]]:
        """Region lines for variables that follow from positions; source of the wanted ones by name."""
        equations = slice_back(self.program, wanted, self.program.inputs)
        bound = {eq.out: places[eq.op.axes] for eq in equations if isinstance(eq.op, Iota) and eq.op.axes in places}
        region = Region(dims, self.program.order, self.program.extents, simplify=self.selection.simplify)
        lines, names = region.emit(equations, bound)
        return lines, {v.name: names[v] for v in wanted}

    def covers(self, wanted: list[Var], stop: list[Var]) -> tuple[Equation, ...]:
        """The equations between, but for positions."""
        equations = slice_back(self.program, wanted, stop)
        return tuple(eq for eq in equations if not isinstance(eq.op, Iota))


def kept(selection: Selection) -> int:
    """Entries of a list of candidates: the budget, padded."""
    op = selection.topk.op
    assert isinstance(op, TopK)
    return max(2, 1 << (op.k - 1).bit_length())


_ROW_INDEX = (
    "query = first_tile * TILE + row // HEADS  # [BLOCK_M]",
    "qpos = query.to(tl.int64)",
    "head = h * GROUP + row % HEADS",
    "row_ok = (row % HEADS < GROUP) & (query < L)",
)


def _cell_array(v: Var, geometry: Geometry) -> Array:
    """The array of a statistic of every cell."""
    features = features_of(v)
    return Array(v.name, "cell_rows", features, (geometry.width(features, pad=True),), "input", True)


def _dot(product: Product, cell: str) -> str:
    """Line that multiplies rows of queries with the statistic of that name."""
    operands = f"{product.row.name}, tl.trans({cell})"
    return f'{product.out.name} = tl.dot({operands}, input_precision="ieee")  # [BLOCK_M, BLOCK_C]'


def _inside(size: int, place: sp.Symbol) -> sp.Expr:
    """The atom that says that a cell or block starts inside the sequence."""
    return sp.Symbol("L", real=True) - 1 - size * place


def _times(source: str, weight: sp.Expr, names: Mapping[str, str]) -> str:
    return source if weight == 1 else f"{source} * ({triton_text(weight, names)})"
