"""One importable module per spec for the last queries of packed sequences: kernels, launchers, Schedules, the op."""

from __future__ import annotations

from splagen.codegen.geometry import Geometry
from splagen.codegen.head_rounds import parts_text
from splagen.codegen.index_kernels import SCHEDULE
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.module import FUNCTIONS, chosen_calls, constants_of
from splagen.codegen.module_holes import (
    content_of,
    equations_text,
    head,
    launch_line,
    parameters,
    schedule_text,
    sizes,
    sources,
)
from splagen.codegen.packed_module import PackedHost, packed_index_text
from splagen.codegen.packing import BOUNDS
from splagen.codegen.prefill_packing import ALIGNED, FIELDS, QUERIES, PrefillPacking
from splagen.codegen.prefill_partition import PrefillPartition, pools_of, scaled_pools
from splagen.codegen.prefill_rows import token_array
from splagen.codegen.render import render
from splagen.codegen.schedule import default_schedules
from splagen.codegen.step_rows import scale_array
from splagen.codegen.tile_code import INDICES, Walk

_BY_QUERY = ("query_rows", "query_scalars")
_ROWS = (*_BY_QUERY, "key_rows")
_KEPT = ("kept_numbers", "kept_statistics")  # what is launched behind the kernels of the op
PAGED = ("round_e4m3", "as_paged")  # device functions of kernels that write pages


def prefill_module_text(part: PrefillPartition, *, name: str, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    geometry, walk = Geometry.of(part.program), Walk.of(part.program)
    packing = PrefillPacking.of(walk)
    host = PackedHost(packing, set())
    constants = constants_of(geometry, walk)
    inputs = [a.name for a in part.inputs]
    before = [a for a, _ in part.before]
    by_query = [a.name for a in part.inputs if a.layout in _BY_QUERY]
    rows = [token_array(a).name if a.name in by_query else a.name for a in part.inputs]
    given = [token_array(a).name if a.layout in _ROWS else a.name for a in part.inputs]
    tensors = [*rows, *(a.name for a in before), BOUNDS.name, QUERIES.name]
    returned = [token_array(part.output).name, *(a.name for a in part.kept)]
    pools = [a.name for a in pools_of(part)]
    scales = [scale_array(a).name for a in scaled_pools(part)]
    kernels = sources(part.kernels, lambda k: host.launcher(k, constants))
    index = packed_index_text(walk, packing, part.index)
    schedules = default_schedules(part.batch, geometry, part.strategies)
    covered = {eq for k in part.kernels for eq in k.covers}
    equations = equations_text(eq for eq in part.program.equations if eq in covered)
    stem = f"{name}_prefill_{digest}"
    held = {*tensors, *returned, *([INDICES.name] if walk.chosen else [])}  # the inverse index is made of the choice
    last = f"return {', '.join(returned)},"
    return render(
        "prefill_module",
        {
            **head(stem, ": the last queries of sequences", equations, spec_text, kernels, (*PAGED, *FUNCTIONS)),
            **sizes(geometry),
            "constants": constants,
            "cells": geometry.cells,
            "aligned": ALIGNED,
            "places": packing.tiles_text(),
            "parts": parts_text(constants, packing.tiles_text()),
            "inverse_index": index,
            "name": f"{name}_prefill",
            "op": f"{stem}_{content_of(kernels, index, schedules)}",
            "inputs": inputs,
            "by_query": by_query,
            "given": given,
            "pools": pools,
            "scales": scales,
            "fields": len(FIELDS),
            "carried": [_sum(a) for a, _ in part.states],
            "fetched": [_launch(k) for k in part.paged.values() if k.name not in _KEPT],
            "kept": [_launch(part.paged[name]) for name in _KEPT if name in part.paged],
            "place_schedule": SCHEDULE,
            "tensors": tensors,
            "before": [_sum(a) for a in before],
            "returned": returned,
            "forward": chosen_calls(list(part.forward), part.strategies, held, last),
            "schedules": schedule_text(schedules),
            "fakes": [host.empty(None, a) for a in part.kept],
            "parameters": [
                {**p, "packed": a.layout in _ROWS}
                for p, a in zip(
                    parameters(part.inputs, geometry, queries="tokens", keys="n.T"), part.inputs[3:], strict=True
                )
            ],
        },
    )


def _sum(a: Array) -> dict[str, str]:
    """Name and host source of the shape of what a sequence carries for each KV head."""
    return {"name": a.name, "shape": ", ".join(["n.B", "n.Hkv", *map(str, a.width)])}


def _launch(kernel: Kernel) -> str:
    return launch_line(kernel.name, kernel.inputs, kernel.outputs)
