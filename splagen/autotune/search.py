"""Search for the fastest Schedule of a kernel with a given way to measure one: nothing here knows a GPU."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from splagen.autotune.space import Space, common_values
from splagen.codegen.schedule import Agreement, Schedule
from splagen.errors import SplagenError, TuningError

Reason: TypeAlias = Literal["out of resources", "compile-time assertion", "wrong result", "crash"]


@dataclass(frozen=True)
class Measurement:
    """Median of a kernel's times and their spread (largest minus smallest), in milliseconds."""

    ms: float
    spread: float = 0.0


@dataclass(frozen=True)
class Lost:
    """A Schedule that does not run, for a reason that a search expects."""

    reason: Reason
    message: str = ""

    def __post_init__(self) -> None:
        if self.reason not in get_args(Reason):
            raise TuningError(f"a Schedule is lost for {self.reason!r}", f"raise, or take {get_args(Reason)}")

    @classmethod
    def of(cls, error: BaseException) -> Lost | None:
        """What an exception of triton means, None for one that no search expects.  Causes are looked at as well."""
        link: BaseException | None = error
        while link is not None:
            if type(link).__module__.split(".")[0] == "triton" and type(link).__name__ in _EXPECTED:
                return cls(_EXPECTED[type(link).__name__], str(link))
            link = link.__cause__
        return None


_EXPECTED: Mapping[str, Reason] = {
    "OutOfResources": "out of resources",
    "CompileTimeAssertionFailure": "compile-time assertion",
}

Outcome: TypeAlias = Measurement | Lost
Measure: TypeAlias = Callable[[Schedule], Outcome]
Cost: TypeAlias = Callable[[Schedule], float]


@dataclass(frozen=True)
class Effort:
    """How much a search may do.

    Attributes:
        name: of the preset.
        candidates: Schedules measured at the most, the default included.
        exhaustive: spaces of up to as many Schedules are measured whole.
        seeds: Schedules beside the default from which a descent may start.
        repetitions: runs of one measurement; for who measures.
        seconds: no measurement of a spec starts later; for who measures.
        margin: part of the default's time that must be won before it is given up.
    """

    name: str
    candidates: int
    exhaustive: int
    seeds: int
    repetitions: int
    seconds: float = math.inf
    margin: float = 0.01

    def of_share(self, share: float) -> Effort:
        """The effort for kernels that take this part of a spec's time: all of it from an eighth on.

        The least is an eighth of the candidates, for what took no time with one Schedule may take some with another.
        """
        return replace(self, candidates=math.ceil(self.candidates * min(1.0, max(8 * share, 1 / 8))))


QUICK = Effort("quick", candidates=48, exhaustive=20, seeds=3, repetitions=10, seconds=70)
FULL = Effort("full", candidates=160, exhaustive=150, seeds=16, repetitions=30, seconds=540)
EFFORTS = {e.name: e for e in (QUICK, FULL)}


@dataclass(frozen=True)
class Progress:
    """Where a search stands: Schedules measured, how many may follow, the best so far, seconds since its start."""

    kernel: str
    done: int
    left: int
    best: Measurement | None
    elapsed: float


@dataclass(frozen=True)
class Trial:
    """A Schedule and what came of it."""

    schedule: Schedule
    outcome: Outcome


@dataclass(frozen=True)
class Result:
    """The Schedule that a search chose, with its measurement, and every trial in order; the first is the default."""

    kernel: str
    schedule: Schedule
    measurement: Measurement
    trials: tuple[Trial, ...]

    @property
    def default(self) -> Outcome:
        """What came of the default Schedule."""
        return self.trials[0].outcome

    @property
    def lost(self) -> tuple[Trial, ...]:
        """The Schedules that do not run."""
        return tuple(t for t in self.trials if isinstance(t.outcome, Lost))


@dataclass(frozen=True)
class Watch:
    """What a search tells while it runs, and until when it may start new measurements.

    Attributes:
        prepare: told the Schedules that are measured next, so that they can be compiled side by side.
        progress: told after each measurement.
        deadline: in the time of `time.monotonic`; at least the default is measured.
    """

    prepare: Callable[[Sequence[Schedule]], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
    deadline: float = math.inf


def search(
    space: Space, measure: Measure, *, effort: Effort = QUICK, cost: Cost | None = None, watch: Watch | None = None
) -> Result:
    """The fastest Schedule of a space that `effort` finds; never one slower than the default was measured.

    A small space is measured whole.  In a larger one each step measures the neighbours of the best Schedule so far,
    then its trades, and moves to the best of these until none is faster; then the same from the next seed.

    Args:
        space: what is searched; nothing else is ever measured.
        measure: times a Schedule, or says why it does not run.  What it raises is `Lost` if triton's exception means
            that (`Lost.of`); anything else passes, with the Schedule in its message.
        effort: QUICK, FULL or another.
        cost: lower is tried first, and chooses the seeds; None spreads them over the space.
        watch: who is told.

    Raises:
        TuningError: a measurement failed for no reason that a Schedule explains, or no Schedule runs.
    """
    return _Search(space, measure, effort, cost, watch or Watch()).run()


def search_together(
    spaces: Mapping[str, Space],
    agreement: Agreement,
    measure: Callable[[str, Schedule], Outcome],
    *,
    effort: Effort = QUICK,
    cost: Callable[[str, Schedule], float] | None = None,
    watch: Callable[[str], Watch] | None = None,
) -> dict[str, Result]:
    """The Schedules of kernels that must agree on a number: those of the value with the least sum of medians.

    For each common value every kernel is searched with its part of the candidates.  A value with which a kernel does
    not run is left out.  `measure` and `cost` take the kernel's name first, `watch` takes it alone;
    `spaces` has at least these kernels.

    Raises:
        TuningError: as `search`.
    """
    values = common_values(spaces, agreement)
    share = replace(effort, candidates=max(1, effort.candidates // max(1, len(values))))
    best: dict[str, Result] = {}
    least, failure = math.inf, TuningError(f"{', '.join(agreement.kernels)} have no {agreement.name} in common")
    first = True
    for value in values:
        if best and watch is not None and time.monotonic() >= watch(agreement.kernels[0]).deadline:
            break
        found: dict[str, Result] = {}
        try:
            for kernel in agreement.kernels:
                part = spaces[kernel].fixed(agreement.name, value)
                found[kernel] = search(
                    part,
                    lambda schedule, kernel=kernel: measure(kernel, schedule),  # type: ignore[misc]
                    effort=share,
                    cost=None if cost is None else lambda schedule, kernel=kernel: cost(kernel, schedule),  # type: ignore[misc]
                    watch=watch and watch(kernel),
                )
        except NoScheduleRuns as error:
            failure = error
            continue
        total = sum(r.measurement.ms for r in found.values())
        if total < least * (1.0 if first else 1.0 - effort.margin):
            best, least, first = found, total, False
    if not best:
        raise failure
    return best


class NoScheduleRuns(TuningError):
    """Every Schedule of a kernel that was tried is lost."""


@dataclass
class _Search:
    space: Space
    measure: Measure
    effort: Effort
    cost: Cost | None
    watch: Watch
    trials: dict[frozenset[tuple[str, int]], Trial] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def run(self) -> Result:
        default = self.space.default
        points = list(self.space.all())
        if len(points) <= min(self.effort.exhaustive, self.effort.candidates):
            self.try_all([default, *self.ordered(points)], len(points))
        else:
            seeds = [default, *self.seeds(points)]
            self.try_all(seeds, self.effort.candidates)
            for seed in sorted(self.running(seeds, points), key=self.ms):
                self.descend(seed)
        return self.result(default)

    def running(self, seeds: list[dict[str, int]], points: list[dict[str, int]]) -> list[dict[str, int]]:
        """The seeds that run; where none does, the first other Schedules that do."""
        left = iter(self.ordered(points))
        while all(self.ms(seed) == math.inf for seed in seeds):
            seeds = list(itertools.islice(left, len(seeds)))
            if not seeds or len(self.trials) >= self.effort.candidates or self.late:
                return []
            self.try_all(seeds, self.effort.candidates)
        return [seed for seed in seeds if self.ms(seed) < math.inf]

    def seeds(self, points: list[dict[str, int]]) -> list[dict[str, int]]:
        count = self.effort.seeds
        if self.cost is None:
            return [points[(2 * i + 1) * len(points) // (2 * count)] for i in range(count)]
        return self.ordered(points)[:count]

    def descend(self, here: Schedule) -> None:
        while True:
            for near in (self.space.neighbours, self.space.trades):
                found = self.ordered(near(here))
                self.try_all(found, self.effort.candidates)
                best = min(found, key=self.ms, default=here)
                if self.ms(best) < self.ms(here):
                    here = best
                    break
            else:
                return

    def ordered(self, schedules: Iterable[dict[str, int]]) -> list[dict[str, int]]:
        """By cost; without one as they are."""
        return sorted(schedules, key=self.cost) if self.cost else list(schedules)

    def try_all(self, schedules: Iterable[Schedule], most: int) -> None:
        """Measure the Schedules that were not tried before, as long as there is room."""
        fresh = {identity(s): s for s in schedules if identity(s) not in self.trials}
        batch = list(fresh.values())[: most - len(self.trials)]
        if batch and not self.late:
            self.watch.prepare(batch)
        for schedule in batch:
            if self.late:
                return
            self.trials[identity(schedule)] = Trial(schedule, outcome_of(self.space.kernel, schedule, self.measure))
            best = min((t.outcome for t in self.trials.values()), key=_ms)
            self.watch.progress(
                Progress(
                    self.space.kernel,
                    len(self.trials),
                    most - len(self.trials),
                    best if isinstance(best, Measurement) else None,
                    time.monotonic() - self.start,
                )
            )

    @property
    def late(self) -> bool:
        return bool(self.trials) and time.monotonic() >= self.watch.deadline

    def ms(self, schedule: Schedule) -> float:
        """The time of a Schedule; infinite where it is lost or was not tried."""
        trial = self.trials.get(identity(schedule))
        return _ms(trial.outcome) if trial else math.inf

    def result(self, default: Schedule) -> Result:
        trials = tuple(self.trials.values())
        best = min(trials, key=lambda t: _ms(t.outcome))
        if _ms(best.outcome) > (1 - self.effort.margin) * self.ms(default):
            best = self.trials[identity(default)]
        if isinstance(best.outcome, Lost):
            what = f"none of {len(trials)} Schedules of {self.space.kernel} runs; the default is {best.outcome.reason}"
            raise NoScheduleRuns(f"{what}: {best.outcome.message}".removesuffix(": "), "allow more candidates")
        return Result(self.space.kernel, best.schedule, best.outcome, trials)


def outcome_of(kernel: str, schedule: Schedule, measure: Measure) -> Outcome:
    """What comes of a Schedule.

    Raises:
        TuningError: the measurement failed for no reason that a Schedule explains, or is no time; the kernel and the
            Schedule are named.  Other errors of splagen keep their type.
    """
    where = f"{kernel} with Schedule {dict(schedule)}"
    try:
        found = measure(schedule)
    except Exception as error:
        lost = Lost.of(error)
        if lost is not None:
            return lost
        if isinstance(error, SplagenError):
            raise type(error)(f"{where}: {error.message}", error.hint) from error
        raise TuningError(f"{where}: {type(error).__name__}: {error}") from error
    if isinstance(found, Measurement) and not 0 < found.ms < math.inf:
        raise TuningError(f"{where} took {found.ms} ms")
    return found


def identity(schedule: Schedule) -> frozenset[tuple[str, int]]:
    """What a Schedule is known by: its numbers, in no order."""
    return frozenset(schedule.items())


def _ms(outcome: Outcome) -> float:
    return outcome.ms if isinstance(outcome, Measurement) else math.inf
