"""The partition of a spec for packed sequences: the same kernels, each with the lines of packing.py."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from splagen.codegen.kernel import Kernel
from splagen.codegen.packed_index import packed_index_kernels
from splagen.codegen.packing import Packing
from splagen.codegen.partition import Partition
from splagen.codegen.tile_code import Walk


@dataclass
class PackedPartition(Partition):
    """Kernels for packed sequences; `index` has those that make the inverse index.

    Sequences of one call may be short and long: `dense` is None, the kernels hold for every length.  `batch` has the
    kernels of a batch, by whose arrays Schedules are chosen: a sequence gets the bits that it gets alone.
    """

    index: tuple[Kernel, ...] = ()
    batch: tuple[Kernel, ...] = ()


def packed_partition(part: Partition) -> PackedPartition:
    """The kernels of a partition for packed sequences, under the same names: Schedules of either serve both."""
    walk = Walk.of(part.program)
    packing = Packing.of(walk)
    made = {k.name: packing.kernel(k) for k in part.op_kernels}

    def packed(one: Partition) -> Partition:
        forward, backward = ([made[k.name] for k in kernels] for kernels in (one.forward, one.backward))
        return replace(one, forward=forward, backward=backward, strategies=[c.between(made) for c in one.strategies])

    whole = packed(part)
    return PackedPartition(
        **{f.name: getattr(whole, f.name) for f in fields(Partition) if f.name not in ("dense", "direct")},
        direct=part.direct and replace(part.direct, part=packed(part.direct.part)),
        index=packed_index_kernels(walk, packing),
        batch=tuple(part.op_kernels),
    )
