"""Cost model: bytes and FLOPs of every kernel as formulas, and the time that a roofline gives them on a device.

time = launch + max(bytes / bandwidth, FLOPs / rate) / part of the multiprocessors that have a program

It knows neither caches nor registers, and of a Schedule only what decides how often something is read or formed.  So
it puts Schedules and kernels in order; what is fastest is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import sympy as sp

from splagen.autotune.attention_cost import Attention
from splagen.autotune.device import Device
from splagen.autotune.formula import Cost
from splagen.autotune.key import Bucket, sizes_of
from splagen.autotune.recurrence_cost import Recurrences
from splagen.autotune.step_cost import Step, step_sizes
from splagen.codegen import schedule as attention
from splagen.codegen import sequence_schedule as recurrences
from splagen.codegen.compile import Module
from splagen.codegen.decoding import SPLITTING, Decoding, decode_schedule
from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Kernel
from splagen.codegen.schedule import DTYPES, Schedule
from splagen.codegen.sequence_partition import SequencePartition
from splagen.errors import InputError
from splagen.spec import Spec
from splagen.sse_spec import SSESpec

__all__ = [
    "LAUNCH_MS", "Cost", "Prediction", "costs", "default_schedules", "evaluate", "predict", "rank_correlation",
    "run_sizes", "schedule_cost", "sizes_of",
]  # fmt: skip

LAUNCH_MS = 0.005  # of a kernel that does nothing, between events on an H200
UNLIKE = 1e-3  # part of the time, per step away from the default: equals get an order

Sizes: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class Prediction:
    """The time of a kernel in milliseconds, launch included, and which side of the roofline binds."""

    ms: float
    bound: Literal["bytes", "flops"]


def costs(spec: Spec, part: Module, schedules: Mapping[str, Schedule], dtype: str = "bf16") -> dict[str, Cost]:
    """The formulas of every kernel of a spec, by name, with the Schedules put in.

    Args:
        spec: what is computed.
        part: its kernels.
        schedules: of every kernel, by name.
        dtype: of q, k and v: bf16, fp16 or fp32.

    Raises:
        InputError: unknown dtype.
    """
    one = _formulas(spec, part, dtype)
    return {k.name: one(k, schedules) for k in part.kernels}


def run_sizes(spec: Spec, part: Module, shape: tuple[int, int, int]) -> Sizes:
    """The sizes that formulas take for a shape (B, H, L); of decoding with the splits that defaults choose.

    Raises:
        InputError: as `sizes_of`.
    """
    sizes = sizes_of(spec, shape)
    if isinstance(part, Decoding):
        return step_sizes(part, sizes["B"], sizes["Hkv"], sizes["L"], SPLITTING)
    return sizes


def predict(cost: Cost, sizes: Sizes, device: Device) -> Prediction:
    """The time of a kernel at run-time sizes (`sizes_of`) on a device.

    Raises:
        InputError: a size is missing.
    """
    moved, flops, programs = (evaluate(x, sizes, cost.kernel) for x in (cost.bytes, cost.flops, cost.programs))
    busy = min(1.0, programs / device.sms)  # a small grid leaves the other multiprocessors idle
    by_bytes, by_flops = (1e3 * x / busy for x in (moved / device.bandwidth, flops / device.flops))
    return Prediction(LAUNCH_MS + max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "flops")


def evaluate(formula: sp.Expr, sizes: Sizes, kernel: str) -> float:
    """The value of a kernel's formula at run-time sizes.

    Raises:
        InputError: a size is missing.
    """
    names = {s.name: s for s in formula.free_symbols}
    if missing := sorted(names.keys() - sizes.keys()):
        raise InputError(f"the cost of {kernel} needs {', '.join(missing)}", "sizes come from `sizes_of`")
    return float(formula.xreplace({s: sp.Integer(sizes[n]) for n, s in names.items()}))


def default_schedules(spec: Spec, part: Module, arch: str, dtype: str) -> dict[str, dict[str, int]]:
    """The Schedule that every kernel of a spec has before tuning, by name.

    Raises:
        InputError: unknown dtype.
    """
    _check_dtype(dtype)
    if isinstance(part, SequencePartition):
        made = cast(SSESpec, spec)
        return {k.name: recurrences.default_schedule(k, made, arch, dtype) for k in part.kernels}
    geometry = Geometry.of(part.program)
    if isinstance(part, Decoding):
        return {k.name: decode_schedule(k, geometry, arch, dtype) for k in part.kernels}
    return {k.name: attention.default_schedule(k, geometry, arch, dtype) for k in part.kernels}


def schedule_cost(
    spec: Spec, part: Module, bucket: Bucket, device: Device, dtype: str
) -> Callable[[str, Schedule], float]:
    """What `search` orders Schedules by: the predicted milliseconds of a kernel, by name, with a Schedule.

    The formulas know nothing of warps, stages and registers, and little of tiles: of equals those nearest to the
    default come first.

    Raises:
        InputError: unknown dtype.
    """
    sizes = {"T": bucket.length, "S": 1, "HV": bucket.batch, "L": bucket.length, "B": 1, "Hkv": bucket.batch}
    if isinstance(part, Decoding):
        sizes = step_sizes(part, 1, bucket.batch, bucket.length, SPLITTING)
    one, defaults = _formulas(spec, part, dtype), default_schedules(spec, part, device.arch, dtype)
    kernels = {k.name: k for k in part.kernels}
    known: dict[tuple[str, tuple[int, ...]], float] = {}

    def cost(name: str, schedule: Schedule) -> float:
        kernel = kernels[name]
        tiles = name, tuple(schedule[t] for t in kernel.tunable)
        if tiles not in known:
            known[tiles] = predict(one(kernel, {**defaults, name: schedule}), sizes, device).ms
        return known[tiles] * (1 + UNLIKE * _steps(schedule, defaults[name]))

    return cost


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's: 1 where both have one order, −1 where the orders are opposite; equal values share a mean rank.

    Raises:
        InputError: the lengths differ, there are fewer than two values, or all of one side are equal.
    """
    if len(predicted) != len(measured) or len(predicted) < 2:
        raise InputError(f"{len(predicted)} predicted and {len(measured)} measured", "as many of both, at least two")
    if len(set(predicted)) == 1 or len(set(measured)) == 1:
        raise InputError("all values of one side are equal: they have no order", "compare different kernels")
    return statistics.correlation(_ranks(predicted), _ranks(measured))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(x) + (order.count(x) - 1) / 2 for x in values]


def _formulas(spec: Spec, part: Module, dtype: str) -> Callable[[Kernel, Mapping[str, Schedule]], Cost]:
    _check_dtype(dtype)
    if isinstance(part, SequencePartition):
        return Recurrences(cast(SSESpec, spec), part, dtype).cost
    whole = Step.of(part, dtype) if isinstance(part, Decoding) else Attention(part.program, dtype)
    return lambda kernel, schedules: whole.cost(kernel, schedules[kernel.name])


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}", f"one of {', '.join(DTYPES)}")


def _steps(schedule: Schedule, default: Schedule) -> int:
    """How far a Schedule is from the default: doublings of tiles and warps, stages, and whether registers differ."""
    doubled = [n for n in schedule if n not in ("num_stages", "maxnreg")]
    steps = sum(abs(schedule[n].bit_length() - default[n].bit_length()) for n in doubled)
    registers = schedule.get("maxnreg") != default.get("maxnreg")
    return steps + abs(schedule["num_stages"] - default["num_stages"]) + int(registers)
