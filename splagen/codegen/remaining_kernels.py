"""The kernels of states of what a list leaves over: one total less the states in the list, and its products with rows.

States of the chunks of one side (blocks of keys, or tiles of queries) are stored in the input type and their total is
the sum of what is stored, so that the difference is exactly the sum of the states that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy as sp

from splagen.codegen.geometry import ChunkRows, Geometry, features_of, is_query_row, is_state
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.predicates import J, T, visit
from splagen.codegen.row_code import RowCode
from splagen.codegen.state_kernels import StateChain, read_store, row_index, state_widths, states_of
from splagen.codegen.tile_code import COUNTS, INDICES, WORK, Walk
from splagen.ir.program import Contract, Equation, Map, Program, Var, placeholder


@dataclass(frozen=True)
class Remaining(StateChain):
    """remaining[x] = sum of all states - sum of those that the list of x has; reads = contract(row of x, remaining)."""

    total_of: Equation
    listed: Equation
    difference: Equation

    @property
    def total(self) -> bool:
        """False: its total is an array of its own."""
        return False

    @property
    def mask(self) -> Var:
        """Which states a list has."""
        return next(v for v in self.listed.args if v.kind == "bool")

    def chunk(self, geometry: Geometry) -> int:
        """Positions of a tile of queries, or of a block of keys."""
        return geometry.tile if self.from_queries else geometry.block

    def array(self, geometry: Geometry) -> Array:
        """The states as they are stored, in the input type."""
        return states_of(self.states.out, geometry, self.chunk(geometry), "input")

    def total_array(self, geometry: Geometry) -> Array:
        """The sum of all states of a sequence: [B, Hkv, left, right] float32."""
        v = self.total_of.out
        return Array(v.name, "sequences", features_of(v), state_widths(v, geometry), "float32", True)

    def read_array(self, geometry: Geometry) -> Array:
        """What the list of each chunk leaves, in the input type."""
        chunk = self.readers(geometry, to_queries=not self.from_queries)
        return states_of(self.difference.out, geometry, chunk, "input")

    def readers(self, geometry: Geometry, *, to_queries: bool) -> int:
        """Positions that have one list."""
        return geometry.tile if to_queries else geometry.block

    def ends(self, walk: Walk, state: Var, *, to_queries: bool) -> tuple[list[str], list[dict[str, str]]]:
        """The one state that is a chunk's own."""
        return ["# entry c + 1 is what the list of chunk c leaves"], [{"low": "", "high": "(chunk + 1)"}]

    def product(self) -> Equation | None:
        """The read that multiplies rows by what a program holds of the difference: all left features, some right."""
        return next((eq for eq in self.reads if any("d" in v.axes and not is_state(v) for v in eq.args)), None)


def differences(program: Program) -> list[Remaining]:
    """Every difference of a total of states and listed ones, with what reads it."""
    found = []
    definitions = program.definitions
    for eq in program.equations:
        if not (isinstance(eq.op, Map) and is_state(eq.out) and eq.op.expr == placeholder(0) - placeholder(1)):
            continue
        total, listed = (definitions[v] for v in eq.args)
        states = definitions[total.args[0]]
        reads = tuple(e for e in program.equations if eq.out in e.args and isinstance(e.op, Contract))
        from_queries = any(is_query_row(v) for v in states.args)
        found.append(Remaining(states, (), reads, from_queries, total, listed, eq))
    return found


def remaining_kernel(
    chain: Remaining, walk: Walk, available: Mapping[Var, Array], product: Array | None, *, kept: bool
) -> Kernel:
    """What each list leaves, and the one product of rows with it that needs no other columns of it.

    `product` is the array of that read, if there is one; the difference is `kept` in memory for other reads.
    """
    program, geometry = walk.program, walk.geometry
    to_queries = not chain.from_queries
    chunk = chain.readers(geometry, to_queries=to_queries)
    index = row_index(chunk, to_queries)
    states, total, left = chain.array(geometry), chain.total_array(geometry), chain.read_array(geometry)
    lists = _list_of_tile(chain, walk) if to_queries else _list_of_block(chain, walk)
    inputs = [INDICES, COUNTS] if to_queries else [WORK]
    covers, lines, operand, store = [chain.listed, chain.difference], [], "", ""
    if product:
        read = chain.product()
        assert read
        code = RowCode(program, geometry, index.side, "BLOCK_M", available, row_type=ChunkRows)
        (row,) = [v for v in read.args if v.kind == "real" and not is_state(v)]
        piece = code.operands([row])
        lines, operand = list(piece.lines), row.name
        inputs += piece.arrays
        store = "\n".join(read_store(product, ChunkRows(geometry, index.side), "right"))
        covers += [*piece.equations, read]
    holes = {
        "chunk": chunk,
        "source_chunk": states.chunk,
        "rows_per_position": index.per_position,
        "row_index": index.lines,
        "left_size": left.width[0],
        "right_size": left.width[1],
        "list": lists,
        "state": states.name,
        "total": total.name,
        "remaining": left.name,
        "kept": kept,
        "operand": operand,
        "prologue": "\n".join(lines),
        "store": store,
    }
    return Kernel(
        left.name,
        "remaining_state",
        program.in_order(covers),
        (states, total, *inputs),
        (*([left] if kept else []), *([product] if product else [])),
        holes,
        f"({'nT' if to_queries else 'nJ'} * ({left.width[1]} // BLOCK_E), B * Hkv)",
        tunable=("BLOCK_M", "BLOCK_E") if product else ("BLOCK_E",),
    )


def _list_of_tile(chain: Remaining, walk: Walk) -> dict[str, str]:
    """Blocks that a tile of queries sees by position, and those that it chose: entry i is `source`."""
    setup, count, place = _forced(chain, walk, J, {"T": "tile", "L": "L"}, "nJ")
    lines = ["tile = chunk", *setup, "at = bh * nT + tile"]
    entry = "tl.load(block_indices_ptr + at * BUDGET + {0}, mask=({0} >= 0) & ({0} < BUDGET), other=0)"
    return {
        "setup": "\n".join(lines),
        "forced": count,
        "chosen": "tl.load(block_counts_ptr + at)",
        "entry": _entry(entry.format("(i - forced)"), count, place),
    }


def _list_of_block(chain: Remaining, walk: Walk) -> dict[str, str]:
    """Tiles that see a block of keys by position, and those that chose it, in order."""
    setup, count, place = _forced(chain, walk, T, {"J": "j", "L": "L"}, "nT")
    offsets = "tl.load(work_offsets_ptr + bh * (nJ + 1) + j{0})"
    lines = ["j = chunk", *setup, f"first = {offsets.format('')}", f"chosen = {offsets.format(' + 1')} - first"]
    entry = "tl.load(work_entries_ptr + bh * nT * BUDGET + first + {0}, mask=({0} >= 0) & ({0} < chosen), other=0)"
    return {
        "setup": "\n".join(lines),
        "forced": count,
        "chosen": "chosen",
        "entry": _entry(f"{entry.format('(i - forced)')} // BUDGET", count, place),
    }


def _forced(
    chain: Remaining, walk: Walk, variable: sp.Symbol, names: Mapping[str, str], extent: str
) -> tuple[list[str], str, str]:
    """What a list has by position: set-up lines, the count, and source of entry i."""
    facts = {walk.chosen: False} if walk.chosen else {}
    return visit(walk.predicates.intervals(chain.mask, variable, facts), "forced", names, extent, "i")


def _entry(chosen: str, count: str, place: str) -> str:
    if count == "0":
        return f"source = tl.maximum({chosen}, 0).to(tl.int64)"
    return f"source = tl.where(i < forced, {place}, tl.maximum({chosen}, 0)).to(tl.int64)"
