"""Default Schedules of the kernels of recurrences."""

from __future__ import annotations

from collections.abc import Sequence

from splagen.codegen.kernel import Kernel
from splagen.codegen.region import padded_extent
from splagen.codegen.schedule import DTYPES, TARGETS, Schedule, check_fields
from splagen.codegen.sequence_partition import LEAST_COLUMNS, STATE_TILE
from splagen.errors import ScheduleError
from splagen.ir.frontend_sse import SUFFIX
from splagen.sse_spec import SSESpec

WHOLE = ("dreads", "dwrites")  # kernels that carry all columns of a state
LITTLE_SHARED = 96 << 10  # bytes of shared memory that columns of 128 do not fit
LONGEST_CHUNK = 128  # rows whose decays are factored, and a divisor of the length of every group


def default_schedule(kernel: Kernel, spec: SSESpec, arch: str, dtype: str) -> dict[str, int]:
    """A legal Schedule that is reasonable before tuning."""
    schedule = _schedule(kernel, spec, dtype)
    if kernel.name.startswith(WHOLE):
        _fit(schedule, kernel, DTYPES[dtype], TARGETS[arch].shared_bytes)
    elif kernel.template == "chunk_loop" and TARGETS[arch].shared_bytes < LITTLE_SHARED:
        schedule["BLOCK_E"] = min(schedule["BLOCK_E"], 64)
    if not arch.startswith("sm_"):
        schedule.pop("maxnreg", None)  # left alone, ptxas gives some loops 32 registers and spills the rest
    check_schedule(kernel, spec, schedule)
    return schedule


def _fit(schedule: dict[str, int], kernel: Kernel, size: int, shared: int) -> None:
    """Fewer rows ahead, then shorter chunks, until the rows of a loop and its state as an operand fit."""
    rows = sum(a.width[-1] for a in kernel.inputs if a.layout in ("token_rows", "value_rows") and a.width)
    d, e = (kernel.number_of(x) for x in ("d_extent", "e_extent"))

    def used() -> int:
        return size * (schedule["CHUNK"] * (schedule["num_stages"] * rows + d) + d * e)

    while used() > shared and (schedule["num_stages"] > 1 or schedule["CHUNK"] > 16):
        if schedule["num_stages"] > 1:
            schedule["num_stages"] -= 1
        else:
            schedule["CHUNK"] //= 2
    if used() > shared:  # tiles pass through less of it between products where fewer warps hold them
        schedule["num_warps"] = min(schedule["num_warps"], 4)


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
    if kernel.name.startswith(WHOLE) and schedule["BLOCK_E"] != columns:
        what = f"BLOCK_E={schedule['BLOCK_E']} of {kernel.name} is not {columns}, all columns of v"
        raise ScheduleError(what, "its rows are sums over them")


def _schedule(kernel: Kernel, spec: SSESpec, dtype: str) -> dict[str, int]:
    wide = DTYPES[dtype] == 4
    d, e = padded_extent(spec.head_dim), padded_extent(spec.value_dim or spec.head_dim)
    match kernel.template:
        case "chunk_loop":
            return _loop_schedule(kernel, spec, d, e, wide=wide)
        case "step":
            return {"BLOCK_E": min(e, 64), "num_warps": 4, "num_stages": 1}
        case "group_scan":
            return {"BLOCK_M": 256, "num_warps": 1, "num_stages": 2}
        case "sum_slots":
            return {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
        case "route" | "route_gradient":
            return {"CHUNK": 64, "num_warps": 4, "num_stages": 1}
        case "route_totals":
            return {"num_warps": 1, "num_stages": 4}
    raise ScheduleError(f"no default Schedule for template {kernel.template}")


# CHUNK, BLOCK_E at most, num_warps, num_stages and maxnreg of 16-bit kernels, measured on an H200 at D = E = 128.
# The kernels that share the states of chunks have one CHUNK.
SHARED = {"spans": (64, 128, 4, 3, 255), "add": (64, 128, 4, 3, 255), "dadd": (64, 128, 4, 3, 255)}
SCALAR = SHARED | {
    "output1": (64, 128, 4, 2, 255),
    "output2": (32, 128, 4, 3, 255),  # gates take registers
    "states": (32, 128, 4, 2, 255),
    "dstates": (32, 128, 8, 3, 255),
    "dvalues": (32, 128, 4, 3, 255),
    # (64, 64, 8, 3) is as fast, but triton 3.6 miscompiles it without decay at D = 64, E = 128: dq is wrong by 4e-2
    "gradient": (32, 32, 4, 3, 255),
    "dreads": (64, 1024, 8, 2, 255),
    "dwrites": (64, 1024, 8, 2, 255),
}
VECTOR = SHARED | {
    "add": (64, 128, 4, 2, 255),
    "dadd": (64, 128, 4, 2, 255),
    "output": (32, 128, 8, 1, 255),
    "states": (32, 128, 4, 3, 255),
    "dstates": (32, 128, 4, 2, 255),
    "dvalues": (32, 128, 4, 3, 255),
    "gradient": (32, 32, 4, 3, 255),
}
DELTA = SHARED | {
    "output": (32, 128, 8, 1, 255),
    "states": (32, 64, 4, 2, 255),
    "dstates": (32, 64, 4, 2, 255),
    "dvalues": (32, 64, 8, 2, 255),
    "gradient": (32, 64, 8, 1, 255),
}


def _loop_schedule(kernel: Kernel, spec: SSESpec, d: int, e: int, *, wide: bool) -> dict[str, int]:
    stem = kernel.name.rstrip("12").removesuffix("_strong")
    rules = {"vector": VECTOR, "delta": DELTA}.get(spec.backbone, SCALAR)
    chunk, block_e, warps, stages, registers = rules.get(kernel.name) or rules[stem]
    states = carried_states(kernel, spec)
    block_e = min(block_e, e)
    while states * d * block_e > STATE_TILE and block_e > LEAST_COLUMNS:
        block_e //= 2
    warps = min(warps, 4) if states * d * block_e <= STATE_TILE // 4 and stem != "gradient" else warps
    if states > 1:  # the gates of all partitions are alive at once
        warps, chunk, stages = 8, min(chunk, 32), 1 if stem == "output" else stages
    if states > 2 and stem in ("states", "dstates", "dvalues", "gradient"):  # and a gradient's sums over columns
        chunk = 16
    if d > 128:
        chunk = min(chunk, 32)
    if wide:  # products without tensor cores
        chunk, stages = 16, 1
    return {"CHUNK": chunk, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages, "maxnreg": registers}


def carried_states(kernel: Kernel, spec: SSESpec) -> int:
    """How many states the programs of a loop have to do with: those of all partitions in form "routed"."""
    together = spec.form == "routed" and kernel.name.endswith(SUFFIX["sparse"])
    return spec.router.partitions if spec.router and together else 1


def default_schedules(kernels: Sequence[Kernel], spec: SSESpec) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel by architecture and dtype."""
    return {
        arch: {t: {k.name: default_schedule(k, spec, arch, t) for k in kernels} for t in DTYPES} for arch in TARGETS
    }
