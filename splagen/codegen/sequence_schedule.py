"""Default Schedules of the kernels of recurrences."""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Kernel
from splagen.codegen.region import padded_extent
from splagen.codegen.schedule import DTYPES, TARGETS
from splagen.codegen.sequence_partition import LEAST_COLUMNS, STATE_TILE
from splagen.ir.frontend_sse import SUFFIX
from splagen.sse_spec import SSESpec


def default_schedule(kernel: Kernel, spec: SSESpec, arch: str, dtype: str) -> dict[str, int]:
    """A legal Schedule that is reasonable before tuning."""
    schedule = _schedule(kernel, spec, dtype)
    if kernel.template == "chunk_loop" and arch.startswith("sm_"):
        # left alone, ptxas gives some of these kernels 32 registers and spills the rest
        schedule["maxnreg"] = 255 if schedule["num_warps"] <= 8 else 128
    return schedule


def _schedule(kernel: Kernel, spec: SSESpec, dtype: str) -> dict[str, int]:
    wide = DTYPES[dtype] == 4
    d, e = padded_extent(spec.head_dim), padded_extent(spec.value_dim or spec.head_dim)
    match kernel.template:
        case "chunk_loop":
            return _loop_schedule(kernel, spec, d, e, wide=wide)
        case "step":
            return {"BLOCK_E": min(e, 32), "num_warps": 4, "num_stages": 1}
        case "group_scan":
            return {"BLOCK_M": 256, "num_warps": 1, "num_stages": 2}
        case "sum_slots":
            return {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
        case "route" | "route_gradient":
            return {"CHUNK": 64, "num_warps": 4, "num_stages": 1}
        case "route_totals":
            return {"num_warps": 1, "num_stages": 4}
    raise AssertionError(kernel.template)


def _loop_schedule(kernel: Kernel, spec: SSESpec, d: int, e: int, *, wide: bool) -> dict[str, int]:
    """Measured on an H200 at D = E = 128; the kernels that share the states of chunks have one CHUNK."""
    states = carried_states(kernel, spec)
    block_e = e
    while states * d * block_e > STATE_TILE and block_e > LEAST_COLUMNS:
        block_e //= 2
    small = states * d * block_e <= STATE_TILE // 4
    warps = 4 if small else 8
    if wide:  # products without tensor cores
        return {"CHUNK": 16, "BLOCK_E": block_e, "num_warps": warps, "num_stages": 1}
    stem = kernel.name.rstrip("12")
    heavy = spec.backbone in ("vector", "delta")
    chunk, stages = 32, 1
    match stem:
        case "add" | "dadd":
            chunk, stages, warps = 64, 2 if heavy else 3, 4
        case "states" | "dstates" if not heavy:
            stages = 3
        case "dvalues":
            warps = 4
        case "output" if not heavy:
            chunk, stages, warps = (64, 2, 4) if kernel.name.endswith("1") else (32, 3, 4)
    if states > 1:  # the gates of all partitions are alive at once
        warps, chunk, stages = 8, min(chunk, 32), 1 if stem == "output" else stages
    if states > 2 and stem in ("states", "dstates", "dvalues", "gradient"):  # and a gradient's sums over columns
        chunk = 16
    return {"CHUNK": chunk, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages}


def carried_states(kernel: Kernel, spec: SSESpec) -> int:
    """How many states the programs of a loop have to do with: those of all partitions in form "routed"."""
    together = spec.form == "routed" and kernel.name.endswith(SUFFIX["sparse"])
    return spec.router.partitions if spec.router and together else 1


def default_schedules(kernels: Sequence[Kernel], spec: SSESpec) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel by architecture and dtype."""
    return {
        arch: {t: {k.name: default_schedule(k, spec, arch, t) for k in kernels} for t in DTYPES} for arch in TARGETS
    }
