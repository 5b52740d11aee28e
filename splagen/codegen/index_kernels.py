"""The kernels of the inverse index: a counting sort of the chosen blocks, and the cut of all work into segments.

Tiles are cut into chunks.  A program walks the tiles of its chunks in order and counts, in a tally of its own, how many
have chosen each block; prefix sums of the tallies say where the tiles of each chunk begin in the list of each block; a
second walk writes them there.  They cover no equation, and there is nothing to tune in them.
"""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.tile_code import INDICES, Walk
from splagen.ir.program import Program

SCHEDULE = {"WIDTH": 128, "num_warps": 8, "num_stages": 1}
LEAST = 16  # tiles of a chunk: a walk is not worth its program for fewer
_LANES = 32  # of a program that walks: its barrier is then that of one warp

TALLY = Array("tally", "index", dtype="int32")  # [heads, chunks, nJ]
TOTALS = Array("totals", "index", dtype="int32")  # [heads, nJ]: how many tiles chose each block
OFFSETS, BLOCKS, FIRSTS, ENTRIES = (
    Array(name, "index", dtype="int32") for name in ("offsets", "blocks", "firsts", "entries")
)
_ZEROS = """\
for start in range(0, nJ, PLACES):
    j = start + place
    tl.store(tally + j, 0, mask=(j < nJ) & (chunk * steps < nT))
tl.debug_barrier()"""
_ADD = "tl.store(tally + j, earlier + 1, mask=j >= 0)"
_BATCH = "head = tl.program_id(1).to(tl.int64)"


def index_kernels(program: Program, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """What is launched to make the inverse index that these kernels read: nothing, where no blocks are chosen."""
    layouts = {a.layout for k in kernels for a in k.inputs}
    if not {"work", "indices"} <= layouts:
        return ()
    walk = Walk.of(program)
    return (*counting(walk), cut(walk), listing(walk))


def chunks(walk: Walk) -> int:
    """Into how many chunks the tiles of a head are cut at the most: their tallies are no larger than half its list."""
    geometry = walk.geometry
    return max(64, geometry.block * walk.budget // (2 * geometry.tile))


def schedule_of(kernel: Kernel) -> dict[str, int]:
    """How a kernel of the inverse index runs."""
    match kernel.template:
        case "index_walk":
            return {"ROWS": max(1, _LANES // _places(kernel)), "num_warps": 1, "num_stages": 1}
        case "index_starts":
            return {"WIDTH": 32, "DEPTH": 128, "num_warps": 8, "num_stages": 1}
    return dict(SCHEDULE)


def counting(walk: Walk, tiles: str = "(L + TILE - 1) // TILE") -> tuple[Kernel, Kernel]:
    """How many tiles of each chunk, then of the chunks before it, chose each block; `tiles` is source of a head's."""
    starts = Kernel(
        name="index_starts",
        template="index_starts",
        covers=(),
        inputs=(),
        outputs=(TALLY, TOTALS),
        holes={
            "doc": "How many tiles of the chunks before chose each block, in place of those of each chunk.",
            "tiles": tiles,
            **_chunked(walk),
        },
        grid="",  # inverse_index.jinja launches these kernels
        scalars=("L",),
        tunable=("WIDTH", "DEPTH"),
        batch=_BATCH,
    )
    doc = "How many tiles of each chunk chose each block."
    return _walking("index_tally", walk, tiles, (INDICES,), TALLY, before=_ZEROS, visit=_ADD, doc=doc), starts


def listing(walk: Walk, tiles: str = "(L + TILE - 1) // TILE", first: str = "0") -> Kernel:
    """The list of each block; `first` is source of the first tile that is there."""
    entry = "tile * BUDGET + place" if first == "0" else f"({first} + tile) * BUDGET + place"
    visit = [
        "begin = tl.load(offsets_ptr + head * (nJ + 1) + j, mask=j >= 0, other=0)",
        f"entry = ({entry}).to(tl.int32)",
        "tl.store(entries_ptr + head * nT * BUDGET + begin + earlier, entry, mask=j >= 0)",
        _ADD,
    ]
    doc = "The places at which each block was chosen, in order."
    inputs = (INDICES, OFFSETS, TALLY)
    return _walking("index_entries", walk, tiles, inputs, ENTRIES, before="", visit="\n".join(visit), doc=doc)


def cut(walk: Walk) -> Kernel:
    """Where the list of each block begins, and the segments of all work."""
    setup, count, _ = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    totals = "tl.load(totals_ptr + head * nJ + j, mask=j < nJ, other=0)"
    return Kernel(
        name="index",
        template="index",
        covers=(),
        inputs=(TOTALS,) if walk.chosen else (),
        outputs=(OFFSETS, BLOCKS, FIRSTS),
        holes={
            "doc": "Where the list of each block begins, and the cut of all work into segments.",
            "listed": totals if walk.chosen else "tl.zeros((WIDTH,), tl.int32)",
            "setup": "\n".join(setup),
            "count": count,
        },
        grid="",
        scalars=("L", "SEGMENTS", "SEGMENT"),
        tunable=("WIDTH",),
        batch=_BATCH,
    )


def _walking(
    name: str, walk: Walk, tiles: str, inputs: tuple[Array, ...], output: Array, *, before: str, visit: str, doc: str
) -> Kernel:
    places = 1 << (walk.budget - 1).bit_length()
    return Kernel(
        name=name,
        template="index_walk",
        covers=(),
        inputs=inputs,
        outputs=(output,),
        holes={"doc": doc, "places": places, "tiles": tiles, "before": before, "visit": visit, **_chunked(walk)},
        grid="",
        scalars=("L",),
        tunable=("ROWS",),
        batch=_BATCH,
    )


def _chunked(walk: Walk) -> dict[str, object]:
    most = chunks(walk)
    return {"chunks": most, "steps": f"tl.maximum((nT + {most - 1}) // {most}, {LEAST})"}


def _places(kernel: Kernel) -> int:
    places = kernel.holes["places"]
    assert isinstance(places, int)
    return places
