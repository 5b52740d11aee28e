"""The kernels of the inverse index of packed sequences. What a length decides is found on the device."""

from __future__ import annotations

from dataclasses import replace

from splagen.codegen.index_kernels import chunks, cut, entries, starts, tally
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.packing import BOUNDS, LENGTHS, Packing
from splagen.codegen.tile_code import Walk

_LENGTHS = Array(LENGTHS, "index", dtype="int32")  # [sequences]


def packed_index_kernels(walk: Walk, packing: Packing) -> tuple[Kernel, ...]:
    """In launch order: lengths of segments, tallies of chosen blocks where there are any, the index, its lists."""
    lengths, index = _segment_lengths(walk, packing), _packed(cut(walk), walk, packing, _LENGTHS)
    if not walk.chosen:
        return lengths, index
    tiles, first = packing.own_tiles(), packing.first_tile()
    counts, places = (tally(walk, tiles), starts(walk, tiles)), entries(walk, tiles, first)
    return (lengths, *(_packed(k, walk, packing) for k in counts), index, _packed(places, walk, packing))


def _segment_lengths(walk: Walk, packing: Packing) -> Kernel:
    """A segment of a sequence takes what blocks take on average, as in a batch of its length."""
    setup, count, _ = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    return Kernel(
        name="segment_lengths",
        template="segment_lengths",
        covers=(),
        inputs=(BOUNDS,),
        outputs=(_LENGTHS,),
        holes={
            "doc": "How many tiles a segment of a sequence has at the most.",
            "budget": packing.budget,
            "setup": "\n".join(setup),
            "count": count,
        },
        grid="",  # packed_index.jinja launches these kernels
        scalars=("LONGEST", "Hkv"),
        tunable=("WIDTH",),
        batch="\n".join(packing.place("tl.program_id(1)")),
    )


def _packed(kernel: Kernel, walk: Walk, packing: Packing, *more: Array) -> Kernel:
    """The kernel, of the sequence and head that a program has."""
    before = {
        "block_indices": packing.before_entries(),
        "ranks": packing.before_entries(),
        "tally": packing.blocks.before(chunks(walk)),
        "totals": packing.blocks.before(1),
        **packing.before_index(),
    }
    lines = [
        *packing.place("tl.program_id(1) // Hkv", index=""),
        *(f"{a.name}_ptr += {before[a.name]}" for a in kernel.arrays),
        "head = (tl.program_id(1) % Hkv).to(tl.int64)",
    ]
    return replace(
        kernel,
        inputs=(*kernel.inputs, *more, *packing.bounds),
        scalars=("LONGEST", "Hkv"),
        batch="\n".join(lines),
    )
