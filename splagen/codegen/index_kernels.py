"""The kernel of the inverse index: it covers no equation, and there is nothing to tune in it."""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Array, Kernel

SCHEDULE = {"WIDTH": 128, "num_warps": 8, "num_stages": 1}

INDEX = Kernel(
    name="index",
    template="index",
    covers=(),
    inputs=(
        Array("places", "index", dtype="int64"),  # [heads, N]: where the chosen blocks stood, by head and block
        Array("begins", "index", dtype="int32"),  # [heads, nJ + 1]: where those of each block begin among all heads
        Array("seen", "index", dtype="int32"),  # [nJ]
    ),
    outputs=tuple(Array(name, "index", dtype="int32") for name in ("entries", "offsets", "blocks", "firsts")),
    holes={
        "doc": "The places of a head counted from its own first, and the cut of all work into segments.",
        "sorted": "head * N",  # where the places of a head begin
        "first": "head * N",  # and the first of them
    },
    grid="",  # inverse_index.jinja launches it
    scalars=("nJ", "N", "SEGMENTS", "SEGMENT"),
    tunable=("WIDTH",),
    batch="head = tl.program_id(1).to(tl.int64)",
)


def index_kernels(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """What is launched to make the inverse index that these kernels read: nothing, where no blocks are chosen."""
    layouts = {a.layout for k in kernels for a in k.inputs}
    return (INDEX,) if {"work", "indices"} <= layouts else ()
