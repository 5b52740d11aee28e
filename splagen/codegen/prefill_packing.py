"""Packed sequences of which the last queries alone are there: where their rows and tiles lie.

Queries of a sequence of L keys are its last positions.  What a program sees of it begins at `query_origin`, a multiple
of ALIGNED positions: the rows from there to the first query are zeros, which no other row depends on.  So every tile,
chunk and program is whole, positions are those of the whole sequence, and the kernels are those of packed sequences,
but for the programs before the origin, which are not there, and the begin of arrays by query.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.packing import BOUNDS, Packing, heads_of
from splagen.codegen.unions import union_shape

ALIGNED = 128  # positions: a multiple of every tile, block and number of rows of a program
FIELDS = {  # what `queries` [sequences, fields] says of each, by name
    "query_origin": "the position at which its rows of queries begin",
    "query_row": "and the first of these rows",
    "settled": "the position of the query whose sums are given",
    "first_query": "the position of the first query",
    "first_token_of_query": "and the token that it belongs to",
    "query_count": "tokens whose outputs are asked for",
    "query_refused": "1 if they are NaN, since there is no room for their keys",
}
QUERIES = Array("queries", "bounds", dtype="int32")
_BY_QUERY = ("query_rows", "query_scalars", "indices", "counts")
_HEAD = "(tl.program_id(1) % Hkv).to(tl.int64)"


@dataclass(frozen=True)
class PrefillPacking(Packing):
    """Where a sequence's part of every array begins if its first queries are not there.

    `begin` is the line of kernels of states that finds the first chunk they have: those before are in a given sum.
    """

    begin: str = ""

    def kernel(self, kernel: Kernel, *, of_queries: bool = False) -> Kernel:
        """The kernel for the last queries of packed sequences; `of_queries`: it is for their positions alone."""
        if not of_queries and not self._by_query(kernel):
            return super().kernel(kernel)
        sequence = f"tl.program_id(1) // {heads_of(kernel)}"
        before = self.programs(kernel, f"tl.load({QUERIES.name}_ptr + {sequence} * {len(FIELDS)})")
        made = super().kernel(replace(kernel, number=f"({kernel.number} + {before})"))
        return replace(made, grid=re.sub(r"\bL\b", "n.LQ", kernel.grid))

    def _by_query(self, kernel: Kernel) -> bool:
        """True if programs are numbered by positions of queries."""
        layouts = {a.layout for a in kernel.arrays}
        return bool(layouts & {*_BY_QUERY}) and "work" not in layouts and bool(self.programs(kernel, "L"))

    @property
    def bounds(self) -> tuple[Array, ...]:
        """What tells kernels where sequences lie."""
        return (BOUNDS, QUERIES)

    def place(self, sequence: str, index: str = "work_") -> list[str]:
        """Those of all packed sequences, from where queries are there, and the first chunk of states."""
        return [
            *super().place(sequence, index),
            *[
                f"{field} = tl.load({QUERIES.name}_ptr + sequence * {len(FIELDS)} + {i}).to(tl.int64)"
                for i, field in enumerate(FIELDS)
            ],
            *([self.begin] if self.begin else []),
        ]

    def moves(self, kernel: Kernel) -> list[str]:
        """Those of all packed sequences; readers of the inverse index count its entries from tile 0 of each head."""
        lines = super().moves(kernel)
        if self.budget and any(a.layout == "work" for a in kernel.inputs):
            lines.append(f"work_entries_ptr -= {_HEAD} * {self.first_tile()} * {self.budget}")
        return lines

    def _move_union(self, a: Array, kernel: Kernel) -> list[str]:
        """Programs number their room by their place in the whole grid: so it lies."""
        return []

    def first_tile(self) -> str:
        """Source of the first tile that is there."""
        return f"(query_origin // {self.geometry.tile})"

    def first_row(self) -> str:
        """Source of the row at which position 0 would lie."""
        return "(query_row - query_origin)"

    def before_tiles(self, size: int) -> str:
        """Source of the element at which tile 0 of the sequence's first head would lie, were all heads' there."""
        before = f"query_row // {self.geometry.tile} * Hkv"
        found = f"({before} - ({_HEAD} + 1) * {self.first_tile()})"
        return f"{found} * {size}" if size > 1 else found

    def before_entries(self) -> str:
        """Source of the chosen blocks of sequences before, of all heads."""
        return f"query_row // {self.geometry.tile} * Hkv * {self.budget}"

    def own_tiles(self) -> str:
        """Source of the tiles of the sequence that are there, of a head."""
        return f"((L + TILE - 1) // TILE - {self.first_tile()})"

    # -- the host -----------------------------------------------------------------------------------------

    def shape(self, kernel: Kernel | None, a: Array) -> list[str]:
        """Host source of the shape of an array that a kernel fills."""
        match a.layout:
            case "query_rows" | "query_scalars":
                return ["1", "n.R", "n.Hq", *map(str, a.width)]
            case "indices" | "counts" | "parts":
                return [self.tiles_text(), "n.Hkv", *map(str, self._widths(a))]
            case "unions":
                return union_shape(self.geometry.tile * self.geometry.group, self.budget)
            case "token_rows":
                return ["n.Q", "n.Hq", *map(str, a.width)]
        return super().shape(kernel, a)

    def tiles_text(self) -> str:
        """Host source of the tiles of queries of all sequences at the most."""
        return f"(n.R // {self.geometry.tile})"
