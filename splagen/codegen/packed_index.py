"""The kernels of the inverse index of packed sequences. What a length decides is found on the device."""

from __future__ import annotations

from dataclasses import replace

from splagen.codegen.index_kernels import INDEX
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.packing import BOUNDS, LENGTHS, Packing
from splagen.codegen.tile_code import INDICES, Walk

_SEEN = Array("seen", "index", dtype="int32")  # by key block
_LENGTHS = Array(LENGTHS, "index", dtype="int32")  # [sequences]
_KEYS = Array("keys", "index", dtype="int32")  # where block_indices has a block: its number among those of all heads


def packed_index_kernels(walk: Walk, packing: Packing) -> tuple[Kernel, ...]:
    """In launch order: lengths of segments, keys of chosen blocks where there are any, the index."""
    lengths = _segment_lengths(walk, packing)
    return (lengths, *([_block_keys(packing)] if walk.chosen else []), _index(packing))


def _segment_lengths(walk: Walk, packing: Packing) -> Kernel:
    """A segment of a sequence takes what blocks take on average, as in a batch of its length."""
    setup, count, _ = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    kernel = Kernel(
        name="segment_lengths",
        template="segment_lengths",
        covers=(),
        inputs=(BOUNDS,),
        outputs=(_SEEN, _LENGTHS),
        holes={
            "doc": "How many tiles see each block by position, and how many a segment of a sequence has at the most.",
            "budget": packing.budget,
            "setup": "\n".join(setup),
            "count": count,
        },
        grid="",  # packed_index.jinja launches these kernels
        scalars=("LONGEST", "Hkv"),
        tunable=("WIDTH",),
    )
    seen = f"seen_ptr += {packing.blocks.before()}"
    return replace(kernel, batch="\n".join([*packing.place("tl.program_id(1)"), seen]))


def _block_keys(packing: Packing) -> Kernel:
    before = packing.before_entries()
    kernel = Kernel(
        name="block_keys",
        template="block_keys",
        covers=(),
        inputs=(*packing.bounds, INDICES),
        outputs=(_KEYS,),
        holes={
            "doc": "Chosen blocks by number, all sequences and heads in one row; no block (-1) stands before a head's.",
            "ends": packing.ends.before(1),
            "tiles": packing.own_tiles(),
        },
        grid="",
        scalars=("LONGEST", "Hkv"),
        tunable=("WIDTH",),
    )
    lines = [*packing.place("tl.program_id(1) // Hkv"), f"block_indices_ptr += {before}", f"keys_ptr += {before}"]
    return replace(kernel, batch="\n".join(lines))


def _index(packing: Packing) -> Kernel:
    geometry = packing.geometry
    lines = [
        *packing.place("tl.program_id(1) // Hkv"),
        "head = (tl.program_id(1) % Hkv).to(tl.int64)",
        f"nJ = (L + {geometry.block - 1}) // {geometry.block}",
        f"N = {packing.own_tiles()} * {packing.budget}",
        f"first = {packing.number_of_entry()} + head * N",
        f"seen_ptr += {packing.blocks.before()}",
        f"begins_ptr += {packing.ends.before(1)} + 1  # the first key of a head is that of no block",
        *packing.move_index(""),
        "found = tl.load(begins_ptr + head * (nJ + 1) - 1)",
    ]
    return replace(
        INDEX,
        inputs=(*INDEX.inputs, _LENGTHS, *packing.bounds),
        holes={**INDEX.holes, "sorted": "found", "first": "first"},
        scalars=("LONGEST", "Hkv"),
        batch="\n".join(lines).replace(f"work_{LENGTHS}_ptr", f"{LENGTHS}_ptr"),
    )
