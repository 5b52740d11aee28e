"""One importable module per spec for packed sequences: the kernels of the partition, launchers, Schedules, the op."""

from __future__ import annotations

from splagen.codegen.geometry import Geometry
from splagen.codegen.head_rounds import heads_are_alike, parts_text
from splagen.codegen.index_kernels import LEAST, chunks, schedule_of
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.module import FUNCTIONS, constants_of, launcher, passes
from splagen.codegen.module_holes import (
    computed,
    content_of,
    equations_text,
    head,
    op_holes,
    parameters,
    schedule_text,
    sources,
)
from splagen.codegen.packed_partition import PackedPartition
from splagen.codegen.packing import BOUNDS, Packing
from splagen.codegen.render import kernel_text, render
from splagen.codegen.schedule import default_schedules
from splagen.codegen.tile_code import Walk

_ROWS = ("query_rows", "query_scalars", "key_rows")


def packed_module_text(part: PackedPartition, *, name: str, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    program = part.program
    geometry, walk = Geometry.of(program), Walk.of(program)
    packing = Packing.of(walk)
    returned = {a.name for a in part.outputs} | {v.name for _, v in part.gradients}
    host = PackedHost(packing, returned)
    constants = constants_of(geometry, walk)
    given = [*part.inputs, BOUNDS]
    tensors, behind = [a.name for a in given], [a.name for a in (*part.residuals, *part.cotangents)]
    made = [*part.outputs, *part.saved]
    kernels = sources(part.op_kernels, lambda k: host.launcher(k, constants))
    index = packed_index_text(walk, packing, part.index)
    schedules = default_schedules(part.batch, geometry, part.strategies)
    stem, equations = f"{name}_varlen_{digest}", equations_text(program.equations)
    return render(
        "packed_module",
        {
            **head(stem, ": packed sequences", equations, spec_text, kernels, FUNCTIONS),
            **op_holes(part, geometry),
            "constants": constants,
            "cells": geometry.cells,
            "places": packing.tiles_text(),
            "parts": parts_text(constants, packing.tiles_text(), by_heads=heads_are_alike(program)),
            "inverse_index": index,
            "name": f"{name}_varlen",
            "op": f"{stem}_{content_of(kernels, index, schedules)}",
            "tensors": tensors,
            "computed": computed(
                part, "n", ", ".join([*tensors, "longest"]), ", ".join([*tensors, *behind, "longest"])
            ),
            "passes": passes(part, given, "longest"),
            "schedules": schedule_text(schedules),
            "fakes": [host.empty(None, a) for a in made],
            "parameters": parameters(part.inputs, geometry, queries="n.T", keys="n.T"),
            "packed": [a.name for a in part.inputs if a.layout in _ROWS],
        },
    )


def packed_index_text(walk: Walk, packing: Packing, kernels: tuple[Kernel, ...]) -> str:
    """The kernels and the function `inverse_index` of a module."""
    rooms = {"blocks": packing.blocks, "ends": packing.ends, "segments": packing.segments}
    return render(
        "packed_index",
        {
            **{name: room.text("n.T", "n.B") for name, room in rooms.items()},
            "tiles": packing.tiles_text(),
            "bounds": ", ".join(a.name for a in packing.bounds),
            "kernels": [kernel_text(k) for k in kernels],
            "schedules": {k.name: schedule_of(k) for k in kernels},
            "chunks": chunks(walk),
            "least": LEAST,
            "chosen": bool(walk.chosen),
            "budget": walk.budget,
        },
    )


class PackedHost:
    """Launchers: what a caller or a sum reads beyond all sequences is 0."""

    def __init__(self, packing: Packing, returned: set[str]) -> None:
        """`returned` are the arrays that a caller reads."""
        self.packing, self.returned = packing, returned

    def launcher(self, kernel: Kernel, constants: dict[str, int]) -> str:
        """The launcher of a kernel."""
        return launcher(kernel, constants, lambda a: self.allocation(kernel, a))

    def allocation(self, kernel: Kernel, a: Array) -> str:
        """Host source that allocates an array: zeros where no program need write what is read."""
        if a.layout in ("partials", "token_rows") or (a.layout in _ROWS and a.name in self.returned):
            shape, options = self._array(kernel, a)
            return f"host(n, functools.partial(torch.zeros, ({shape},), {options}))"
        return self.empty(kernel, a)

    def empty(self, kernel: Kernel | None, a: Array) -> str:
        """Host source of an array that holds nothing yet."""
        shape, options = self._array(kernel, a)
        return f"torch.empty({shape}, {options})"

    def _array(self, kernel: Kernel | None, a: Array) -> tuple[str, str]:
        dtype = "n.dtype" if a.dtype == "input" else f"torch.{a.dtype}"
        return ", ".join(self.packing.shape(kernel, a)), f"dtype={dtype}, device=n.device"
