"""Schedules: how a kernel runs.  A Schedule sets tile extents, warps and stages, and can never change a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Kernel
from splagen.errors import ScheduleError

Schedule: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class Target:
    """What a Schedule may use on an architecture: shared memory per program in bytes."""

    arch: str
    shared_bytes: int


TARGETS = {
    t.arch: t
    for t in (
        Target("sm_80", 163 << 10),
        Target("sm_90", 227 << 10),
        Target("sm_100", 227 << 10),
        Target("gfx942", 64 << 10),
    )
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def default_schedule(kernel: Kernel, geometry: Geometry, arch: str, dtype: str) -> dict[str, int]:
    """A legal Schedule that is reasonable before tuning."""
    size, shared = DTYPES[dtype], TARGETS[arch].shared_bytes
    wide = sum(a.width[-1] for a in kernel.inputs if a.layout == "key_rows" and a.width)
    rows = 1 << (geometry.tile * geometry.group - 1).bit_length()
    schedule: dict[str, int]
    match kernel.template:
        case "block_sparse_forward" | "block_sparse_dq":
            block_n = min(geometry.block, 64)
            while block_n > 16 and 2 * block_n * wide * size > shared:
                block_n //= 2
            stages = 2 if 2 * block_n * wide * size <= shared else 1
            block_m = max(16, min(rows, 64))
            schedule = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": stages}
        case "block_sparse_dkv":
            block_n = min(geometry.block, 64)
            accumulators = sum(a.width[-1] for a in kernel.outputs)
            while block_n > 16 and block_n * (accumulators * 4 + wide * size) > 192 << 10:
                block_n //= 2
            schedule = {"BLOCK_M": 64 if size == 2 else 32, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 1}
        case "merge_segments":
            schedule = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        case "rows":
            schedule = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
        case "block_states":
            rows_of_chunk = int(str(kernel.holes["chunk"]))
            schedule = {"BLOCK_M": min(32, rows_of_chunk), "BLOCK_E": 16, "num_warps": 4, "num_stages": 2}
        case "state_scan":
            schedule = {"BLOCK_E": 256, "num_warps": 4, "num_stages": 4}
        case "read_out":
            schedule = {"BLOCK_M": 64 if size == 2 else 32, "BLOCK_E": 16, "num_warps": 4, "num_stages": 1}
        case _:
            raise ScheduleError(f"no default Schedule for template {kernel.template}")
    check_schedule(kernel, geometry, schedule)
    return schedule


def check_schedule(kernel: Kernel, geometry: Geometry, schedule: Schedule) -> None:
    """Raise ScheduleError if a Schedule is not legal for a kernel."""
    wanted = {*kernel.tunable, "num_warps", "num_stages"}
    if schedule.keys() != wanted:
        raise ScheduleError(f"{kernel.name} takes {sorted(wanted)}, the Schedule gives {sorted(schedule)}")
    for name, value in schedule.items():
        if name.startswith("BLOCK") and (value < 16 or value & (value - 1)):
            raise ScheduleError(f"{name}={value} of {kernel.name} is not a power of two >= 16")
    block_n = schedule.get("BLOCK_N", 16)
    if geometry.block % block_n:
        raise ScheduleError(f"BLOCK_N={block_n} does not divide the block of {geometry.block} in {kernel.name}")


def default_schedules(kernels: list[Kernel], geometry: Geometry) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel by architecture and dtype."""
    return {
        arch: {d: {k.name: default_schedule(k, geometry, arch, d) for k in kernels} for d in DTYPES} for arch in TARGETS
    }
