"""Default Schedules of the kernels of recurrences."""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Kernel
from splagen.codegen.region import padded_extent
from splagen.codegen.schedule import DTYPES, TARGETS, Schedule, check_fields
from splagen.codegen.sequence_partition import STATE_TILE
from splagen.errors import ScheduleError
from splagen.sse_spec import SSESpec

LONGEST_CHUNK = 128  # rows whose decays are factored, and a divisor of the length of every group


def default_schedule(kernel: Kernel, spec: SSESpec, arch: str, dtype: str) -> dict[str, int]:
    """A legal Schedule that is reasonable before tuning."""
    schedule = _schedule(kernel, spec, dtype)
    if kernel.template == "chunk_loop" and arch.startswith("sm_"):
        # left alone, ptxas gives some of these kernels 32 registers and spills the rest
        schedule["maxnreg"] = 255 if schedule["num_warps"] <= 8 else 128
    check_schedule(kernel, spec, schedule)
    return schedule


def check_schedule(kernel: Kernel, spec: SSESpec, schedule: Schedule) -> None:
    """Raise ScheduleError if a Schedule is not legal for a kernel of its own accord.

    What the kernels of a spec must agree on stands in `SequencePartition.constraints`.
    """
    check_fields(kernel, schedule)
    chunk = schedule.get("CHUNK", 16)
    if kernel.template == "chunk_loop" and chunk > LONGEST_CHUNK:
        raise ScheduleError(f"CHUNK={chunk} of {kernel.name} is more than {LONGEST_CHUNK}")
    columns = padded_extent(spec.value_dim or spec.head_dim)
    if schedule.get("BLOCK_E", 16) > columns:
        raise ScheduleError(f"BLOCK_E={schedule['BLOCK_E']} of {kernel.name} is more than {columns} columns of v")


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
    block_e = e
    while d * block_e > STATE_TILE and block_e > 16:
        block_e //= 2
    small = d * block_e <= STATE_TILE // 4
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
    return {"CHUNK": chunk, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages}


def default_schedules(kernels: Sequence[Kernel], spec: SSESpec) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel by architecture and dtype."""
    return {
        arch: {t: {k.name: default_schedule(k, spec, arch, t) for k in kernels} for t in DTYPES} for arch in TARGETS
    }
