"""Walks over the union of the lists of blocks that consecutive query tiles chose.

A program whose rows have several lists visits each block of their union once.  It makes the union itself, in memory of
its own: how many lists it has follows from its BLOCK_M, so that no other kernel's Schedule must agree with it.
"""

from __future__ import annotations

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array, Kernel

UNION = Array("union", "unions", width=(2,), dtype="int64")  # a block, and a bit for each list that has it
MOST_LISTS = 64  # bits of a mask
SPAN = "CHUNK"  # the rows among which a program has its own: they see the same blocks by position


def has_unions(geometry: Geometry) -> bool:
    """True where rows that see the same blocks by position have more than one list."""
    return geometry.chunk > geometry.tile


def visits_union(kernel: Kernel) -> bool:
    """True for a kernel that walks over unions."""
    return UNION in kernel.scratch


def lists_met(block_m: int, rows: int) -> int:
    """Lists of `rows` rows each that the rows of one program belong to, at the most."""
    if block_m % rows == 0 or rows % block_m == 0:
        return max(1, block_m // rows)
    return (block_m - 1) // rows + 2


def lists_text(rows: int) -> str:
    """Source of a power of two that is no less than `lists_met`, in Triton and on the host."""
    below = 1 << (rows.bit_length() - 1)
    whole = f"(BLOCK_M + {below - 1}) // {below}" if below > 1 else "BLOCK_M"
    return whole if below == rows else f"{whole} * 2"  # rows of a program may begin inside a list


def union_walk(geometry: Geometry, budget: int) -> tuple[list[str], str, str, list[str]]:
    """The walk over the union of a program's lists: set-up, number of visits, block of a visit, lines of each visit.

    A block is read the visit before: the loop's loads of its rows can then be under way during that visit.
    """
    rows = geometry.tile * geometry.group
    lists = lists_text(rows)
    last = f"(tl.program_id(0) % CHUNKS * BLOCK_M + BLOCK_M - 1) // {rows}"
    program = "tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)"
    setup = [
        f"first = tl.program_id(0) % CHUNKS * BLOCK_M // {rows}  # list of the program's first row",
        f"last = tl.minimum({last}, {geometry.chunk // geometry.tile - 1})",
        "lists = tl.minimum(last + 1, (L + TILE - 1) // TILE - tile) - first",
        "at = (b * Hkv + h) * ((L + TILE - 1) // TILE) + tile + first",
        f"room = ({program}) * tl.minimum(nJ, {lists} * {budget}) * 2",
        f"visits = union_of(block_indices_ptr, block_counts_ptr, at, lists, union_ptr + room, {lists}, BUDGET)",
        f"own = row // {rows} - first  # [BLOCK_M]: the list of each row",
        "chosen = tl.load(block_counts_ptr + at + own, mask=row_ok, other=0)  # [BLOCK_M]",
        "ahead = tl.load(union_ptr + room, mask=visits > 0, other=0)",
        "choosers = tl.load(union_ptr + room + 1, mask=visits > 0, other=0)",
    ]
    visit = [
        "picked = ((choosers >> own) & 1) != 0  # [BLOCK_M]",
        "following = (step + 1) // PARTS",
        "ahead = tl.load(union_ptr + room + 2 * following, mask=following < visits, other=0)",
        "choosers = tl.load(union_ptr + room + 2 * following + 1, mask=following < visits, other=0)",
    ]
    return setup, "visits", "ahead", visit


def union_shape(rows: int, budget: int) -> list[str]:
    """Host source of what the unions of all programs take at the most; `rows` of a list."""
    return ["grid[0] * grid[1]", f"min(n.nJ, {lists_text(rows)} * {budget})", *map(str, UNION.width)]
