"""Default Schedules of the kernels of recurrences."""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Kernel
from splagen.codegen.region import padded_extent
from splagen.codegen.schedule import DTYPES, TARGETS
from splagen.codegen.sequence_partition import STATE_TILE
from splagen.sse_spec import SSESpec


def default_schedule(kernel: Kernel, spec: SSESpec, dtype: str) -> dict[str, int]:
    """A legal Schedule that is reasonable before tuning."""
    wide = DTYPES[dtype] == 4
    d, e = padded_extent(spec.head_dim), padded_extent(spec.value_dim or spec.head_dim)
    match kernel.template:
        case "chunk_loop":
            # the kernels of a backward pass agree on chunks: states are kept per chunk
            chunk = 16 if wide else 64
            block_e = e
            while d * block_e > STATE_TILE and block_e > 16:
                block_e //= 2
            warps = 8 if d * block_e > 8192 else 4
            return {"CHUNK": chunk, "BLOCK_E": block_e, "num_warps": warps, "num_stages": 1 if wide else 2}
        case "group_scan":
            return {"BLOCK_M": 512, "num_warps": 4, "num_stages": 3}
        case "sum_slots":
            return {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
        case "route" | "route_gradient":
            return {"CHUNK": 64, "num_warps": 4, "num_stages": 1}
        case "route_totals":
            return {"num_warps": 1, "num_stages": 4}
    raise AssertionError(kernel.template)


def default_schedules(kernels: Sequence[Kernel], spec: SSESpec) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel by architecture and dtype."""
    return {arch: {t: {k.name: default_schedule(k, spec, t) for k in kernels} for t in DTYPES} for arch in TARGETS}
