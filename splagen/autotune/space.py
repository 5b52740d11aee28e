"""The Schedules that a kernel may have on a device: dimensions with their values, and what rules combinations out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, cast

from splagen.autotune.device import Device
from splagen.autotune.footprint import carried, shared_floor
from splagen.codegen import schedule as attention
from splagen.codegen import sequence_schedule as recurrences
from splagen.codegen.compile import Module
from splagen.codegen.decoding import OVERLAPS, Decoding, check_decode_schedule, decode_schedule
from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Choice, Kernel, Splitting
from splagen.codegen.schedule import REGISTER_BOUND, Agreement, Constraint, Schedule, check_constraints
from splagen.codegen.sequence_partition import SequencePartition
from splagen.errors import ScheduleError
from splagen.spec import Spec
from splagen.sse_spec import SSESpec

Check: TypeAlias = Callable[[Schedule], None]

UNLIMITED = 0  # of maxnreg: the compiler decides, and the Schedule does not have the name
TILES = (16, 32, 64, 128)
CELLS = (64, 128, 256, 512, 1024, 2048)  # of a scan over the elements of states; blocks that one program chooses from
ROWS = (16, 32, 64, 128, 256, 512, 1024)  # that read the same state one after the other
WAVES = (1, 2, 3, 4, 6, 8, 12)  # programs of a splitting, in halves of the multiprocessors
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
REGISTER_LIMITS = (64, 96, 128, 168, 255, UNLIMITED)
# Their tiles are small for 16 warps: triton 3.6 then reads beyond its arrays on an H200, or computes wrong gradients
# (block_sparse_dkv with tiles of 32 x 64), and of 1500 Schedules of such kernels none with 16 was the fastest.
PRODUCTS = REGISTER_BOUND | {"score_lse", "score_topk", "block_sparse_parts"}
STAGED = frozenset({"decode_attend"})  # with one stage it faulted on an H200, with triton 3.6
LOOPLESS = frozenset({"rows", "statistics", "step", "route", "route_gradient"})  # num_stages pipelines loops
THREAD_REGISTERS = {True: 255, False: 512}  # of one thread; whether the device is NVIDIA's


@dataclass(frozen=True)
class Dimension:
    """One number of a Schedule: its values in an order in which neighbours are alike."""

    name: str
    default: int
    values: tuple[int, ...]

    def legal(self, value: int) -> bool:
        """True for one of the values."""
        return value in self.values

    def neighbours(self, value: int) -> tuple[int, ...]:
        """The values before and after a value."""
        i = self.values.index(value)
        return self.values[max(i - 1, 0) : i] + self.values[i + 1 : i + 2]


@dataclass(frozen=True)
class Space:
    """The Schedules of one kernel: those that take a value of every dimension and that `rule` does not refuse."""

    kernel: str
    dimensions: tuple[Dimension, ...]
    rule: Check

    @property
    def default(self) -> dict[str, int]:
        """The Schedule that the kernel has before tuning; always in the space."""
        return _schedule({d.name: d.default for d in self.dimensions})

    @property
    def size(self) -> int:
        """Combinations of values, legal or not."""
        product = 1
        for d in self.dimensions:
            product *= len(d.values)
        return product

    def check(self, schedule: Schedule) -> None:
        """Raise ScheduleError for a Schedule that is not in the space."""
        names = {d.name for d in self.dimensions}
        if not schedule.keys() <= names:
            raise ScheduleError(f"{self.kernel} takes {sorted(names)}, the Schedule gives {sorted(schedule)}")
        for d in self.dimensions:
            value = schedule.get(d.name, UNLIMITED)
            if not d.legal(value):
                raise ScheduleError(f"{d.name}={value} of {self.kernel} is none of {d.values}")
        self.rule(schedule)

    def legal(self, schedule: Schedule) -> bool:
        """True for a Schedule of the space."""
        try:
            self.check(schedule)
        except ScheduleError:
            return False
        return True

    def neighbours(self, schedule: Schedule) -> list[dict[str, int]]:
        """Schedules of the space that differ by one step in one dimension."""
        return self._moved(schedule, 1)

    def trades(self, schedule: Schedule) -> list[dict[str, int]]:
        """Those that differ by one step in each of two dimensions: a way past a Schedule that is not legal."""
        return self._moved(schedule, 2)

    def all(self) -> Iterator[dict[str, int]]:
        """Every Schedule of the space, in a fixed order."""
        for values in itertools.product(*(d.values for d in self.dimensions)):
            found = _schedule(dict(zip((d.name for d in self.dimensions), values, strict=True)))
            if self.legal(found):
                yield found

    def fixed(self, name: str, value: int) -> Space:
        """The part of the space where one number has one value: see `within`."""
        return self.within(name, lambda x: x == value)

    def within(self, name: str, allowed: Callable[[int], bool]) -> Space:
        """The part of the space where one number has an allowed value; its default is the nearest to this default.

        Raises:
            ScheduleError: no Schedule has such a value.
        """
        points = [s for s in self.all() if allowed(s.get(name, UNLIMITED))]

        def steps(schedule: Schedule) -> int:
            pairs = ((d, schedule.get(d.name, UNLIMITED)) for d in self.dimensions)
            return sum(abs(d.values.index(x) - d.values.index(d.default)) for d, x in pairs)

        nearest = min(points, key=steps, default=None)
        if nearest is None:
            values = {d.name: d.values for d in self.dimensions}.get(name, ())
            raise ScheduleError(f"{self.kernel} has no Schedule with such a {name}", f"some of {values}")
        kept = {d.name: tuple(v for v in d.values if d.name != name or allowed(v)) for d in self.dimensions}
        chosen = (replace(d, default=nearest.get(d.name, UNLIMITED), values=kept[d.name]) for d in self.dimensions)
        return replace(self, dimensions=tuple(chosen))

    def _moved(self, schedule: Schedule, count: int) -> list[dict[str, int]]:
        found = []
        for moved in itertools.combinations(self.dimensions, count):
            steps = [[(d.name, x) for x in d.neighbours(schedule.get(d.name, UNLIMITED))] for d in moved]
            for changes in itertools.product(*steps):
                near = _schedule({**schedule, **dict(changes)})
                if self.legal(near):
                    found.append(near)
        return found


def scheduled(part: Module) -> tuple[Kernel | Choice | Splitting, ...]:
    """Everything of a spec that has a Schedule under its name."""
    return (*part.kernels, *part.strategies, *((part.splitting,) if isinstance(part, Decoding) else ()))


def spaces(spec: Spec, part: Module, device: Device, dtype: str) -> dict[str, Space]:
    """The space of everything `scheduled`, by name; `part` holds the kernels, `dtype` is bf16, fp16 or fp32.

    What kernels must agree on is not in them: see `part.constraints` and `codegen.schedule.check_constraints`.
    """
    found = {k.name: _space(k, _rules(k, spec, part, device, dtype), device, dtype) for k in part.kernels}
    if isinstance(part, SequencePartition):
        return found
    if isinstance(part, Decoding):
        return found | {part.splitting.name: _splitting(part, device)}
    geometry = Geometry.of(part.program)
    return found | {
        c.name: _strategies(c, attention.default_strategy(c, geometry, dtype)["strategy"]) for c in part.strategies
    }


def _strategies(choice: Choice, default: int) -> Space:
    return Space(choice.name, (Dimension("strategy", default, tuple(range(len(choice.options)))),), lambda _: None)


def _splitting(part: Decoding, device: Device) -> Space:
    """Programs in halves of what the device has multiprocessors; blocks that one program chooses from."""
    values = {n: CELLS if n == "chunk" else [w * device.sms // 2 for w in WAVES] for n in part.splitting.numbers}
    if not part.budget:  # no scores, no lists
        values |= {n: [] for n in values if n != "attend"}
    default = part.default_splitting
    dimensions = [Dimension(n, default[n], tuple(sorted({*v, default[n]}))) for n, v in values.items()]
    return Space(part.splitting.name, tuple(dimensions), lambda _: None)


def check_together(
    found: Mapping[str, Space], constraints: Sequence[Constraint], schedules: Mapping[str, Schedule]
) -> None:
    """Raise ScheduleError where a kernel does not take its Schedule, or where the Schedules do not go together."""
    for name, schedule in schedules.items():
        found[name].check(schedule)
    check_constraints(constraints, schedules)


def common_values(found: Mapping[str, Space], agreement: Agreement) -> tuple[int, ...]:
    """The values that every kernel of an agreement can take, those near to the default first."""
    dimensions = [d for k in agreement.kernels for d in found[k].dimensions if d.name == agreement.name]
    values = [v for v in dimensions[0].values if all(d.legal(v) for d in dimensions)]
    at = values.index(dimensions[0].default)
    return tuple(sorted(values, key=lambda v: (abs(values.index(v) - at), v)))


@dataclass(frozen=True)
class _Rules:
    default: dict[str, int]
    check: Check
    rows: int | None = None  # query rows that share a list of blocks: a tile of more is empty


def _rules(kernel: Kernel, spec: Spec, part: Module, device: Device, dtype: str) -> _Rules:
    if isinstance(part, SequencePartition):
        made = cast(SSESpec, spec)
        default = recurrences.default_schedule(kernel, made, device.arch, dtype)
        return _Rules(default, partial(recurrences.check_schedule, kernel, made))
    geometry = Geometry.of(part.program)
    if isinstance(part, Decoding):
        default = decode_schedule(kernel, geometry, device.arch, dtype)
        return _Rules(default, partial(check_decode_schedule, kernel, geometry))
    default = attention.default_schedule(kernel, geometry, device.arch, dtype)
    by_list = kernel.template in ("block_sparse_forward", "block_sparse_dq")
    rows = attention.rows_alike(kernel, geometry) if by_list else None
    return _Rules(default, partial(attention.check_schedule, kernel, geometry), rows)


def _space(kernel: Kernel, rules: _Rules, device: Device, dtype: str) -> Space:
    default = rules.default

    def alone(name: str, value: int) -> bool:
        """A value that no choice of the others makes legal is none of the dimension."""
        if name == "BLOCK_M" and rules.rows and value >= 2 * max(rules.rows, 8):
            return value == default[name]
        others = {n: x for n, x in default.items() if n != "maxnreg"}
        try:
            rules.check({**others, name: value} if value != UNLIMITED else others)
        except ScheduleError:
            return False
        return True

    dimensions = []
    for name, values in _values(kernel, device).items():
        start = default.get(name, UNLIMITED)
        order = values if start in values else tuple(sorted((*values, start)))
        dimensions.append(Dimension(name, start, tuple(v for v in order if alone(name, v))))

    shared = max(device.shared_bytes, shared_floor(kernel, default, dtype))

    def rule(schedule: Schedule) -> None:
        rules.check(schedule)
        threads = schedule["num_warps"] * device.warp
        if schedule == default:
            return
        if shared_floor(kernel, schedule, dtype) > shared:
            raise ScheduleError(f"{dict(schedule)} of {kernel.name} needs more than {shared} bytes of shared memory")
        registers = min(schedule.get("maxnreg", THREAD_REGISTERS[device.nvidia]), device.registers // threads)
        if carried(kernel, schedule) >= registers * threads:
            raise ScheduleError(f"{dict(schedule)} of {kernel.name} carries more than its {registers} registers hold")

    return Space(kernel.name, tuple(dimensions), rule)


def _values(kernel: Kernel, device: Device) -> dict[str, Sequence[int]]:
    """Values of every number, before anything is ruled out."""
    scan = kernel.template in ("state_scan", "group_scan")
    long = {"BLOCK_R": ROWS} | ({"BLOCK_E": CELLS} if scan else {})
    found: dict[str, Sequence[int]] = {n: long.get(n, TILES) for n in kernel.tunable}
    found["num_warps"] = WARPS[:-1] if kernel.template in PRODUCTS else WARPS
    found |= dict.fromkeys({*OVERLAPS} & found.keys(), ())  # alone a kernel has none to overlap with: the default
    stages = (1,) if kernel.template in LOOPLESS else STAGES if device.nvidia else STAGES[:2]
    found["num_stages"] = stages[1:] if kernel.template in STAGED else stages
    if kernel.template in REGISTER_BOUND and device.nvidia:
        found["maxnreg"] = REGISTER_LIMITS
    return found


def _schedule(point: Mapping[str, int]) -> dict[str, int]:
    """The Schedule of a value for every dimension."""
    return {n: x for n, x in point.items() if (n, x) != ("maxnreg", UNLIMITED)}
