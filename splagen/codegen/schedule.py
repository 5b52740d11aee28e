"""Schedules: how a kernel runs.  A Schedule sets tile extents, warps and stages, and can never change a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Choice, Kernel
from splagen.codegen.pretuned import ARCH, pretuned
from splagen.codegen.unions import MOST_LISTS, lists_met, visits_union
from splagen.errors import ScheduleError

Schedule: TypeAlias = Mapping[str, int]

# Templates whose products want more registers than a compiler gives them by itself, or fewer: maxnreg may be set.
REGISTER_BOUND = frozenset(
    {"block_sparse_forward", "block_sparse_dq", "block_sparse_dkv", "block_states", "read_out", "chunk_loop"}
    | {"remaining_state"}
    | {"decode_append", "decode_score", "decode_attend"}
)
REGISTERS = 65_536  # 32 bits each, of an NVIDIA multiprocessor: what one program can have
WARP = 32


@dataclass(frozen=True)
class Target:
    """What a Schedule may use on an architecture: shared memory per program in bytes."""

    arch: str
    shared_bytes: int


@dataclass(frozen=True)
class Agreement:
    """The Schedules of some kernels of a spec must give `name` one value."""

    name: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Divides:
    """The value of `name` in the Schedules of some kernels must divide the one in the Schedule of `measured`."""

    name: str
    kernels: tuple[str, ...]
    measured: str


Constraint: TypeAlias = Agreement | Divides

TARGETS = {
    t.arch: t
    for t in (
        Target("sm_80", 163 << 10),
        Target("sm_90", 227 << 10),
        Target("sm_100", 227 << 10),
        Target("gfx942", 64 << 10),
    )
}
WITHOUT_E4M3 = frozenset({"sm_80"})
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def default_schedule(kernel: Kernel, geometry: Geometry, arch: str, dtype: str) -> dict[str, int]:
    """The legal Schedule that a kernel has before tuning: what ships for its sizes, else what the rules give."""
    if arch == ARCH and DTYPES[dtype] == 2 and (found := pretuned(kernel, geometry)):
        check_schedule(kernel, geometry, found)
        return found
    return rule_schedule(kernel, geometry, arch, dtype)


def rule_schedule(kernel: Kernel, geometry: Geometry, arch: str, dtype: str) -> dict[str, int]:
    """A legal Schedule by rules of thumb."""
    size, shared = DTYPES[dtype], TARGETS[arch].shared_bytes
    schedule: dict[str, int]
    match kernel.template:
        case "block_sparse_forward" | "block_sparse_dq":
            schedule = _query_schedule(kernel, geometry, size, shared)
        case "block_sparse_dkv":
            schedule = _key_schedule(kernel, geometry, size, shared)
        case "block_sparse_parts":
            block_m = 16 if size == 4 else 32 if _width(kernel, "query_rows") > 128 else 64
            buffers = size * (2 * block_m * _width(kernel, "query_rows") + geometry.block * _width(kernel, "key_rows"))
            schedule = {"BLOCK_M": block_m, "num_warps": 4, "num_stages": 2 if buffers <= shared // 2 else 1}
        case "merge_segments":
            schedule = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        case "rows":
            most = 512 if kernel.holes["sums"] else 1024  # sums stay in registers beside the rows that they add up
            schedule = {"BLOCK_M": 16, "num_warps": 4 if _columns(kernel) > most else 2, "num_stages": 1}
        case "block_states":
            left, right = kernel.outputs[0].width
            block_m = max(16, min(64, 1 << (_rows_of_chunk(kernel, geometry).bit_length() - 1)))
            block_e, stages = (right, 3) if size == 2 else (min(right, 32), 1)
            block_m = block_m if size == 2 else 16
            while block_e > 16 and left * block_e > 32768:
                block_e //= 2
            warps = 8 if left * block_e > 16384 else 4
            most = shared * 2 // 3 if warps == 8 else shared // 2  # 8 warps with such sums: one program, for registers
            while size * stages * block_m * (left + block_e) > most and (stages > 1 or block_m > 16):
                stages, block_m = (stages - 1, block_m) if stages > 1 else (1, block_m // 2)
            if (
                size == 2 and kernel.outputs[0].dtype == "input" and left * block_e >= 16384
            ):  # a turn of the loop in all
                warps, stages = 4 if left * block_e > 16384 else 8, 1
            schedule = {"BLOCK_M": block_m, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages}
        case "choices":
            schedule = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
        case "state_scan":
            schedule = {"BLOCK_M": 32, "BLOCK_E": 128, "num_warps": 4, "num_stages": 1}
        case "carried_state":
            schedule = {"BLOCK_E": 1024, "num_warps": 4, "num_stages": 1}
        case "state_total":
            many = kernel.inputs[0].dtype == "input"  # states of all chunks, not parts of a total
            block_e, stages = (1024, 1) if many else (128, 2)
            schedule = {"BLOCK_M": 16, "BLOCK_E": block_e, "num_warps": 4, "num_stages": stages}
        case "remaining_state":
            schedule = _remaining_schedule(kernel, geometry, arch, size)
        case "read_out":
            schedule = _read_schedule(kernel, geometry, size, shared)
        case "statistics":
            width, cell = (kernel.number_of(x) for x in ("width", "cell_size"))
            block_n = geometry.block
            while block_n > max(cell, 16) and block_n // cell * width * kernel.outputs[0].width[0] > 8192:
                block_n //= 2
            wide_tile = block_n // cell * width * kernel.outputs[0].width[0] > 8192
            schedule = {"BLOCK_N": block_n, "num_warps": 8 if wide_tile else 4, "num_stages": 1}
        case "score_lse" | "score_topk":
            schedule = _score_schedule(kernel, geometry, size, shared)
        case _:
            raise ScheduleError(f"no default Schedule for template {kernel.template}")
    check_schedule(kernel, geometry, schedule)
    return schedule


def _read_schedule(kernel: Kernel, geometry: Geometry, size: int, shared: int) -> dict[str, int]:
    """Many rows pass by a slice of the state, both halves of which stay in shared memory; few rows are held there."""
    summed, kept = (kernel.number_of(x) for x in ("summed_size", "kept_size"))
    rows = max(16, 1 << (_rows_of_chunk(kernel, geometry).bit_length() - 1))
    if "BLOCK_R" not in kernel.tunable:
        half = any(a.layout == "states" and a.dtype == "input" for a in kernel.inputs)
        block_m, block_e = min(rows, 128) if size == 2 else 32, min(64 if half and size == 2 else 32, kept)
        while (block_m + block_e) * summed * 4 > shared and (block_m > 16 or block_e > 16):
            block_m, block_e = (block_m // 2, block_e) if block_m > block_e else (block_m, block_e // 2)
        return {"BLOCK_M": block_m, "BLOCK_E": block_e, "num_warps": 4, "num_stages": 1}
    block_r = min(rows, 1024)
    block_m, block_e, warps, stages = (64, 64, 4, 3 if block_r > 256 else 1) if size == 2 else (32, 32, 4, 1)
    if block_r > 256 and size == 2 and summed <= 128 <= kept:
        block_m, block_e, warps, stages = 128, 128, 8, 3
    block_e = min(block_e, kept)

    def used() -> int:
        return summed * size * (2 * block_e + stages * block_m) + 4 * block_m * block_e

    while used() > shared and (stages > 1 or block_m > 16 or block_e > 16):
        if stages > 2 or (stages > 1 and block_m <= 64):
            stages -= 1
        elif block_m > block_e:
            block_m //= 2
        else:
            block_e //= 2
    warps = min(warps, max(4, block_m // 16))
    return {"BLOCK_R": block_r, "BLOCK_M": block_m, "BLOCK_E": block_e, "num_warps": warps, "num_stages": stages}


def _remaining_schedule(kernel: Kernel, geometry: Geometry, arch: str, size: int) -> dict[str, int]:
    """A program holds some columns of a difference and of the state that it reads ahead: many of them hide latency."""
    left, right = (kernel.number_of(x) for x in ("left_size", "right_size"))
    block_e = max(16, min(right, 64 if size == 2 else 4096 // left, 16384 // left))
    schedule = {"BLOCK_E": block_e, "num_warps": 4, "num_stages": 1}
    if size == 2 and left * block_e <= 8192 and arch.startswith("sm_"):
        schedule["maxnreg"] = 128  # a program more on each multiprocessor
    if "BLOCK_M" not in kernel.tunable:
        return schedule
    rows = max(16, 1 << (_rows_of_chunk(kernel, geometry).bit_length() - 1))
    return {"BLOCK_M": min(rows, 64 if size == 2 else 16), **schedule}


def _rows_of_chunk(kernel: Kernel, geometry: Geometry) -> int:
    """Rows that sum to one state, or that read one."""
    return kernel.number_of("chunk") * (geometry.group if kernel.holes["rows_per_position"] == "GROUP" else 1)


def _columns(kernel: Kernel) -> int:
    """Columns of all rows that a kernel reads and writes."""
    return sum(a.width[-1] for a in (*kernel.inputs, *kernel.outputs) if a.layout.endswith("_rows") and a.width)


def _width(kernel: Kernel, layout: str) -> int:
    return sum(a.width[-1] for a in kernel.inputs if a.layout == layout and a.width)


def rows_alike(kernel: Kernel, geometry: Geometry) -> int:
    """Query rows for which a kernel by query visits the same blocks."""
    return (geometry.chunk if kernel.holes["span"] == "CHUNK" else geometry.tile) * geometry.group


def _query_schedule(kernel: Kernel, geometry: Geometry, size: int, shared: int) -> dict[str, int]:
    """Few rows share a list of blocks: small tiles and few warps, so that many programs hide the latency of loads."""
    rows = rows_alike(kernel, geometry)
    merged = sum(a.width[-1] for a in kernel.inputs if a.layout == "parts" and a.width)
    block_m = max(16, min(16 if merged > 128 else 64, 1 << (rows - 1).bit_length()))
    few = block_m < 64
    block_n, stages = min(geometry.block, 32 if few or merged else 64), 3 if merged > 128 else 2
    keys, queries = _width(kernel, "key_rows"), _width(kernel, "query_rows")
    warps = 2 if few else 4
    if not merged and size == 2:
        wide = keys > 2 * geometry.head_dim  # features beside k and v
        if kernel.template == "block_sparse_forward" and few and geometry.head_dim <= 128:
            block_n, warps = 16, 1
        elif kernel.template == "block_sparse_forward" and wide:
            block_n = min(block_n, 32)
        elif wide and not few:
            warps = 8
        stages = 3 if kernel.template == "block_sparse_forward" and not few and not wide else 2
        if kernel.template == "block_sparse_dq" and wide and not few and not _reads_numbers(kernel):
            # one warpgroup keeps scores in registers between its products, and two programs share a multiprocessor
            block_n, warps, stages = min(block_n, 32), 4, 3
    if size == 4:  # products of float32 are unrolled into single multiplications: only small tiles fit registers
        block_m, block_n, stages, warps = min(block_m, 32), 16, 1, 4

    def used() -> int:
        return size * (stages * block_n * keys + block_m * queries) + 4 * block_m * block_n

    while used() > shared and (stages > 1 or block_n > 16 or block_m > 16):
        if stages > 1:
            stages -= 1
        elif block_n > 16 and block_n >= block_m:
            block_n //= 2
        elif block_m > 16:
            block_m //= 2
        else:
            block_n //= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _key_schedule(kernel: Kernel, geometry: Geometry, size: int, shared: int) -> dict[str, int]:
    """The accumulators of a key tile stay in registers: narrow tiles where the rows are wide."""
    accumulators = _accumulators(kernel)
    keys, queries = _width(kernel, "key_rows"), _width(kernel, "query_rows")
    wide, whole = accumulators > 256, _gives_parts(kernel)
    rows = geometry.tile * geometry.group
    block_m, block_n, stages = (16, 16, 1) if size == 4 else (32, 64, 2 if whole else 3)
    if size == 2 and not _segmented(kernel):  # few blocks: narrow ones, for more programs, where rows lie close
        block_m, block_n, stages = (32, 64, 3) if rows >= 64 else (64, 32, 2)
    elif size == 2 and whole and (wide or rows > 1):  # rows of few tiles: their numbers lie close
        block_m = 64
    elif size == 2 and not whole and (wide or (rows < 64 and _reads_numbers(kernel))):  # few registers beside the sums
        block_m, stages = 16, 4
    block_n = geometry.block if whole else min(geometry.block, block_n)
    while not whole and block_n > 16 and block_n * accumulators > 24576:
        block_n //= 2

    def used() -> int:
        return size * (block_n * keys + stages * block_m * queries) + 4 * block_m * block_n

    while used() > shared and (stages > 1 or block_m > 16 or (block_n > 16 and not whole)):
        if stages > 1:
            stages -= 1
        elif block_m > 16:
            block_m //= 2
        else:
            block_n //= 2
    warps = 8 if (wide and whole) or block_n * accumulators > 24576 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _reads_numbers(kernel: Kernel) -> bool:
    """True where rows come with numbers, such as the log-sum-exp of a softmax: linear sums alone need none."""
    return any(a.layout == "query_scalars" for a in kernel.inputs)


def _accumulators(kernel: Kernel) -> int:
    """Columns of the sums that a program carries for each of its keys."""
    summed = "segments" if _segmented(kernel) else "key_rows"
    return sum(a.width[-1] for a in kernel.outputs if a.layout == summed)


def _segmented(kernel: Kernel) -> bool:
    """True where the rows that see a block are cut into segments, a program each."""
    return any(a.layout == "work" for a in kernel.inputs)


def _gives_parts(kernel: Kernel) -> bool:
    return any(a.layout == "parts" for a in kernel.outputs)


def _score_schedule(kernel: Kernel, geometry: Geometry, size: int, shared: int) -> dict[str, int]:
    """Scores of (query, cell): the largest tiles whose operands fit into shared memory.

    A top-k sorts every tile of blocks once per tile of queries: few tiles per program where the lists are long.
    """
    cells = [a.width[0] for a in kernel.inputs if a.layout == "cell_rows"]
    rows = len(cells) * min(cells)  # a row operand for each statistic
    factors = sum(cells) > rows  # of a covariance: more products, and their operands, than rows
    if kernel.template == "score_lse":
        block_m, block_c, warps, stages = (128, 64, 8, 3) if size == 2 else (32, 32, 4, 2)
        if size == 2 and len(cells) == 1:
            warps, stages = 4, 2
        if rows > 256:  # operands stay in registers
            block_m, block_c, warps, stages = min(block_m, 64), 32, 8 if factors and size == 2 else 4, 2
        if factors or sum(cells) > 512:
            block_c = min(block_c, 32)
        least = 16
    else:
        rows_of_tile, kept = (kernel.number_of(x) for x in ("rows_of_tile", "kept"))
        block_m, block_j = (128 if rows_of_tile >= 16 else 64, 32) if rows_of_tile > 1 else (32, 64)
        while block_m > 16 and block_m // rows_of_tile * max(kept, block_j) > 2048:
            block_m //= 2
        least = max(16, 2 * geometry.cells)
        most = 128 if len(cells) == 1 and rows <= 128 else 64 if rows <= 256 else 32
        block_c = max(least, min(block_j * geometry.cells, most))
        warps, stages = (8, 3) if factors and size == 2 and block_m == 128 else (4, 2)
    if size == 4:  # products without tensor cores
        most = 32 if rows <= 256 and not factors else 16
        block_m, block_c = min(block_m, most), max(least, min(block_c, most))
    while size * (block_m * rows + stages * block_c * sum(cells)) > shared:
        if stages > 1:
            stages -= 1
        elif block_c > least and block_c * sum(cells) >= block_m * rows:
            block_c //= 2
        elif block_m > 16:
            block_m //= 2
        else:
            break
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": warps, "num_stages": stages}


def check_schedule(kernel: Kernel, geometry: Geometry, schedule: Schedule) -> None:
    """Raise ScheduleError if a Schedule is not legal for a kernel."""
    check_fields(kernel, schedule)
    block_n, block_m = schedule.get("BLOCK_N", 16), schedule.get("BLOCK_M", 16)
    if geometry.block % block_n:
        raise ScheduleError(f"BLOCK_N={block_n} does not divide the block of {geometry.block} in {kernel.name}")
    if kernel.template == "block_sparse_dkv" and _gives_parts(kernel) and block_n != geometry.block:
        what = f"BLOCK_N={block_n} of {kernel.name} is not the block of {geometry.block}"
        raise ScheduleError(what, "what a block gives to a row is one sum over all of its keys")
    if visits_union(kernel) and lists_met(schedule["BLOCK_M"], geometry.tile * geometry.group) > MOST_LISTS:
        what = f"the rows of BLOCK_M={schedule['BLOCK_M']} in {kernel.name} have more than {MOST_LISTS} lists"
        raise ScheduleError(what)
    if kernel.template == "statistics" and block_n % geometry.cell:
        what = f"BLOCK_N={block_n} of {kernel.name} is not a multiple of the cell of {geometry.cell}"
        raise ScheduleError(what)
    if kernel.template in ("block_states", "read_out", "remaining_state"):
        columns = kernel.number_of("kept_size" if kernel.template == "read_out" else "right_size")
        if columns % schedule["BLOCK_E"]:
            what = f"BLOCK_E={schedule['BLOCK_E']} does not divide the {columns} columns of a state in {kernel.name}"
            raise ScheduleError(what)
    if schedule.get("BLOCK_R", block_m) % block_m:
        what = f"BLOCK_R={schedule['BLOCK_R']} of {kernel.name} is no multiple of BLOCK_M={block_m}"
        raise ScheduleError(what)


def check_fields(kernel: Kernel, schedule: Schedule) -> None:
    """Raise ScheduleError if a Schedule lacks a name, has one too many, or gives a number that no kernel takes."""
    wanted = {*kernel.tunable, "num_warps", "num_stages"}
    allowed = wanted | ({"maxnreg"} if kernel.template in REGISTER_BOUND else set())
    if not wanted <= schedule.keys() <= allowed:
        raise ScheduleError(f"{kernel.name} takes {sorted(wanted)}, the Schedule gives {sorted(schedule)}")
    for name, value in schedule.items():
        if name.startswith(("BLOCK", "CHUNK")) and (value < 16 or value & (value - 1)):
            raise ScheduleError(f"{name}={value} of {kernel.name} is not a power of two >= 16")
    warps = schedule["num_warps"]
    if warps not in (1, 2, 4, 8, 16, 32):
        raise ScheduleError(f"num_warps={warps} of {kernel.name} is not a power of two from 1 to 32")
    if schedule["num_stages"] < 1:
        raise ScheduleError(f"num_stages={schedule['num_stages']} of {kernel.name} is less than 1")
    registers = schedule.get("maxnreg", 16)
    if not 16 <= registers <= 255 or registers * warps * WARP > REGISTERS:
        what = f"maxnreg={registers} of {kernel.name} with {warps} warps"
        raise ScheduleError(what, f"16 to 255, and at most {REGISTERS} registers over all threads")


def check_constraints(constraints: Sequence[Constraint], schedules: Mapping[str, Schedule]) -> None:
    """Raise ScheduleError if the Schedules of a spec's kernels, by name, do not go together."""
    for c in constraints:
        values = {k: schedules[k][c.name] for k in c.kernels}
        match c:
            case Agreement() if len(set(values.values())) > 1:
                raise ScheduleError(f"these kernels need one {c.name} in their Schedules: {values}")
            case Divides(measured=measured) if any(schedules[measured][c.name] % x for x in values.values()):
                least = f"{c.name}={schedules[measured][c.name]} of {measured}"
                raise ScheduleError(f"{least} is no multiple of that of the kernels that rely on it: {values}")


def default_strategy(choice: Choice, geometry: Geometry, dtype: str) -> dict[str, int]:
    """By key where few rows share a list of blocks and the sums of keys fit registers.

    By row, a block is read for these rows alone; by key, its parts are written and read again.  On an H200 the two
    take the same time at about 16 rows where the tiles serve the softmax alone, below it where they serve more.
    """
    by_key = [k for k in choice.options[1] if _gives_parts(k)]
    few = geometry.tile * geometry.group < (32 if len(by_key) == 1 else 16) and DTYPES[dtype] == 2
    fit = all(geometry.block * _accumulators(k) <= 32768 for k in by_key)
    return {"strategy": int(few and fit)}


def default_schedules(
    kernels: Sequence[Kernel], geometry: Geometry, choices: Sequence[Choice] = ()
) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules of every kernel, and of every choice, by architecture and dtype."""
    return {
        arch: {
            d: {c.name: default_strategy(c, geometry, d) for c in choices}
            | {k.name: default_schedule(k, geometry, arch, d) for k in kernels}
            for d in DTYPES
        }
        for arch in TARGETS
    }
