"""The kernels of the inverse index: a counting sort of the chosen blocks, and the cut of all work into segments.

Tiles are cut into chunks.  A program walks the tiles of its chunk in order and counts, in a tally of its own, how many
have chosen each block: to each choice it is the rank of its tile among them.  Prefix sums of the tallies say where the
tiles of each chunk begin in the list of each block, and so where every choice belongs.  The kernels cover no equation,
and there is nothing to tune in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.tile_code import CHOICES, COUNTS, INDICES, Walk
from splagen.ir.program import Program

SCHEDULE = {"WIDTH": 128, "num_warps": 8, "num_stages": 1}
LEAST = 16  # tiles of a chunk: a walk is not worth its program for fewer
TILES = "(L + TILE - 1) // TILE"

TALLY = Array("tally", "index", dtype="int32")  # [heads, chunks, nJ]
RANKS = Array("ranks", "index", dtype="int32")  # [heads, nT, budget]: tiles of the chunk that chose it before
TOTALS = Array("totals", "index", dtype="int32")  # [heads, nJ]: how many tiles chose each block
OFFSETS, BLOCKS, FIRSTS, ENTRIES = (
    Array(name, "index", dtype="int32") for name in ("offsets", "blocks", "firsts", "entries")
)


def index_kernels(program: Program, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """What is launched to make the inverse index that these kernels read: nothing, where no blocks are chosen."""
    layouts = {a.layout for k in kernels for a in k.inputs}
    if not {"work", "indices"} <= layouts:
        return ()
    walk = Walk.of(program)
    return tally(walk), starts(walk), cut(walk), entries(walk)


def chunks(walk: Walk) -> int:
    """Into how many chunks the tiles of a head are cut at the most: enough of them, and tallies that are small."""
    geometry = walk.geometry
    return min(max(geometry.block * walk.budget // (2 * geometry.tile), 64), 512)


def schedule_of(kernel: Kernel) -> dict[str, int]:
    """How a kernel of the inverse index runs; one warp walks, so that its barriers are its own."""
    match kernel.template:
        case "index_tally":
            places = kernel.holes["places"]
            assert isinstance(places, int)
            return {"ROWS": max(1, 32 // places), "num_warps": 1, "num_stages": 1}
        case "index_starts":
            return {"WIDTH": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 1}
        case "index":
            return {"WIDTH": 128, "DEPTH": 1024, "num_warps": 4, "num_stages": 1}
        case "index_entries":
            return {"WIDTH": 1024, "num_warps": 4, "num_stages": 1}
    return dict(SCHEDULE)


def tally(walk: Walk, tiles: str = TILES) -> Kernel:
    """The walk; `tiles` is source of the tiles of a head."""
    doc = "How many tiles of each chunk chose each block, and for each choice how many did before."
    holes = {"doc": doc, "places": 1 << (walk.budget - 1).bit_length(), **_chunked(walk, tiles)}
    return _kernel("index_tally", (INDICES,), (TALLY, RANKS), holes, ("ROWS",))


def starts(walk: Walk, tiles: str = TILES) -> Kernel:
    """Prefix sums of the tallies, in place."""
    doc = "How many tiles of the chunks before chose each block, in place of those of each chunk."
    return _kernel("index_starts", (), (TALLY, TOTALS), {"doc": doc, **_chunked(walk, tiles)}, ("WIDTH", "DEPTH"))


def cut(walk: Walk) -> Kernel:
    """Where the list of each block begins, and the segments of all work."""
    setup, count, _ = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    totals = "tl.load(totals_ptr + head * nJ + j, mask=j < nJ, other=0)"
    holes = {
        "doc": "Where the list of each block begins, and the cut of all work into segments.",
        "listed": totals if walk.chosen else "j * 0",
        "setup": "\n".join(setup),
        "count": count,
    }
    inputs, scalars = (TOTALS,) if walk.chosen else (), ("L", "SEGMENTS", "SEGMENT")
    return _kernel("index", inputs, (OFFSETS, BLOCKS, FIRSTS), holes, ("WIDTH", "DEPTH"), scalars)


def entries(walk: Walk, tiles: str = TILES, first: str = "0") -> Kernel:
    """The list of each block; `first` is source of the first tile that is there."""
    holes = {
        "doc": "The places at which each block was chosen, in order.",
        "entry": "listed" if first == "0" else f"({first} * BUDGET + listed).to(tl.int32)",
        **_chunked(walk, tiles),
    }
    return _kernel("index_entries", (INDICES, RANKS, TALLY, OFFSETS), (ENTRIES,), holes, ("WIDTH",))


def choices_kernel(budget: int) -> Kernel:
    """The chosen blocks of each tile as the bits of a number, where the blocks of a sequence are no more than bits."""
    holes = {"doc": "The chosen blocks of each tile as bits.", "places": 1 << (budget - 1).bit_length()}
    grid = "(cdiv(nT, BLOCK_M), B * Hkv)"
    return Kernel("choices", "choices", (), (INDICES, COUNTS), (CHOICES,), holes, grid, tunable=("BLOCK_M",))


def _kernel(
    name: str,
    inputs: tuple[Array, ...],
    outputs: tuple[Array, ...],
    holes: Mapping[str, object],
    tunable: tuple[str, ...],
    scalars: tuple[str, ...] = ("L",),
) -> Kernel:
    return Kernel(
        name=name,
        template=name,
        covers=(),
        inputs=inputs,
        outputs=outputs,
        holes=holes,
        grid="",  # inverse_index.jinja launches these kernels
        scalars=scalars,
        tunable=tunable,
        batch="head = tl.program_id(1).to(tl.int64)",
    )


def _chunked(walk: Walk, tiles: str) -> dict[str, object]:
    most = chunks(walk)
    return {"tiles": tiles, "chunks": most, "steps": f"tl.maximum((nT + {most - 1}) // {most}, {LEAST})"}
