"""Tuning a spec on the GPU at hand: every kernel's fastest Schedule, checked together, kept in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from splagen import step_verification
from splagen.autotune import cache
from splagen.autotune.bench import STEP_WORKER, WORKER, Bench
from splagen.autotune.cost import schedule_cost
from splagen.autotune.device import Device
from splagen.autotune.entry import Entry, now
from splagen.autotune.key import Bucket, key_of
from splagen.autotune.ranks import decided_by_first, several
from splagen.autotune.search import (
    QUICK,
    Effort,
    Measurement,
    Outcome,
    Progress,
    Result,
    Watch,
    outcome_of,
    search,
    search_together,
)
from splagen.autotune.space import Space, check_together, scheduled, spaces
from splagen.codegen.compile import Compiler, Module
from splagen.codegen.decoding import Decoding
from splagen.codegen.kernel import Choice, Kernel
from splagen.codegen.schedule import Agreement, Divides, Schedule
from splagen.errors import WrongResult
from splagen.kinds import kind_of, oracle
from splagen.spec import Spec, SPLASpec, to_toml
from splagen.verification import DTYPES, Shape

VERIFIED_LENGTH = 1000  # off the grid of blocks and of chunks
SEARCHES = 8  # kernels that are searched side by side: their candidates are compiled together, and timed in turn

Cost: TypeAlias = Callable[[str, Schedule], float]


@dataclass(frozen=True)
class Target:
    """What is tuned: the module of a spec at a shape (B, H, L) in bf16, fp16 or fp32 on a device.

    Of a module of decoding, B are sequences, H heads of queries and L the tokens that a sequence may get.

    `alike`, 0 to 1, is how much neighbouring queries of the inputs have in common: see `tune`.
    """

    spec: Spec
    part: Module
    path: Path
    shape: Shape
    dtype: str
    device: Device
    alike: float = 0.0


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        entries: by kernel, the Schedule with its time.
        results: by kernel, everything that was measured; empty where the entries came from the cache.
        wrong: kernel, Schedule and what was seen, of those that give other results than the default, or crash.
        seconds: what it took.
    """

    entries: Mapping[str, Entry]
    results: Mapping[str, Result] = field(default_factory=dict)
    wrong: Sequence[tuple[str, Schedule, str]] = ()
    seconds: float = 0.0

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The Schedules by kernel."""
        return {name: e.schedule for name, e in self.entries.items()}


def tune(
    target: Target,
    module: ModuleType,
    *,
    effort: Effort = QUICK,
    progress: Callable[[Progress], None] = lambda _: None,
    seconds: float | None = None,
    jobs: int | None = None,
    force: bool = False,
) -> Tuned:
    """The Schedules of every kernel: those in the cache, else what a search finds, verified and stored.

    In a torch.distributed job every rank calls it, rank 0 searches, and all have its Schedules.  Keys in the cache do
    not know how alike queries are: such a search is always a new one, and what it finds replaces what was there.

    Args:
        target: what is tuned.
        module: its generated module, for the comparison with the oracle.
        effort: how much is tried.
        progress: told after each measurement.
        seconds: no measurement starts later, None is the effort's; every kernel's default is measured all the same.
        jobs: compilers side by side, None is one per CPU.
        force: search again where the cache has an answer.

    Raises:
        TuningError: a measurement failed for no reason that a Schedule explains.
        WrongResult: the chosen Schedules do not agree with the oracle; nothing is stored.
    """
    bucket = Bucket.of(target.spec, target.shape)
    keys = {k.name: key_of(target.spec, k, target.dtype, bucket, target.device) for k in scheduled(target.part)}
    made = spaces(target.spec, target.part, target.device, target.dtype)
    found = Tuned({})
    force = force or target.alike > 0

    def find() -> Mapping[str, Entry]:
        nonlocal found
        found = _search(target, made, bucket, effort, progress, effort.seconds if seconds is None else seconds, jobs)
        _verify(target, module, found.schedules)
        return found.entries

    def known() -> Mapping[str, Entry]:
        if force:
            return find()
        return cache.get_or_find_together(keys, find, check=partial(check_together, made, target.part.constraints))

    entries = decided_by_first(known) if several() else known()
    if force or several():  # otherwise the cache has them already
        for name, key in keys.items():
            cache.put(key, entries[name])
    return found if found.entries else Tuned(entries)


def _search(
    target: Target,
    made: Mapping[str, Space],
    bucket: Bucket,
    effort: Effort,
    progress: Callable[[Progress], None],
    seconds: float,
    jobs: int | None,
) -> Tuned:
    start = time.monotonic()
    cost = schedule_cost(target.spec, target.part, bucket, target.device, target.dtype)
    with (
        Compiler(target.path, target.part, jobs, target.shape[1] // target.spec.group_size) as compiler,
        Bench(
            target.path,
            compiler,
            target.dtype,
            target.device.arch,
            target.shape,
            target.alike,
            STEP_WORKER if isinstance(target.part, Decoding) else WORKER,
        ) as bench,  # fmt: skip
        ThreadPoolExecutor(SEARCHES) as pool,
    ):
        results: dict[str, Result] = {}
        try:
            shares = _shares(target, made, bench, effort)
            searches = _Searches(target, made, bench, effort, shares, cost, progress, start + seconds)
            for found in pool.map(lambda run: run(), searches.first()):
                results |= found
            for found in pool.map(lambda run: run(), searches.behind(results)):
                results |= found
            if isinstance(target.part, Decoding):
                results |= searches.splitting(target.part, results)
        except BaseException:
            bench.stop()
            raise
        wrong = list(bench.wrong)
    entries = {
        name: Entry(dict(r.schedule), r.measurement.ms, r.measurement.spread, effort.name, now())
        for name, r in results.items()
    }
    for choice in target.part.strategies:
        entries[choice.name] = _fastest(choice, made[choice.name].default["strategy"], entries, effort)
    return Tuned(entries, results, wrong, time.monotonic() - start)


def _fastest(choice: Choice, default: int, entries: Mapping[str, Entry], effort: Effort) -> Entry:
    """The option whose kernels take the least time together, each with its best Schedule; the default in doubt."""
    totals = [sum(entries[k.name].ms for k in option) for option in choice.options]
    best = totals.index(min(totals))
    if totals[best] > (1 - effort.margin) * totals[default]:
        best = default
    spread = sum(entries[k.name].spread for k in choice.options[best])
    return Entry({"strategy": best}, totals[best], spread, effort.name, now())


def _shares(target: Target, made: Mapping[str, Space], bench: Bench, effort: Effort) -> dict[str, float]:
    """The part of the op's time that each kernel takes with its default Schedule."""
    defaults = [(k, made[k.name].default) for k in target.part.kernels]
    bench.prepare(defaults)
    times = {}
    for kernel, schedule in defaults:
        measure = partial(bench.measure, kernel, shared={}, repetitions=effort.repetitions)
        outcome = outcome_of(kernel.name, schedule, measure)
        times[kernel.name] = outcome.ms if isinstance(outcome, Measurement) else 0.0
    total = sum(times.values()) or 1.0
    return {name: ms / total for name, ms in times.items()}


@dataclass(frozen=True)
class _Searches:
    target: Target
    made: Mapping[str, Space]
    bench: Bench
    effort: Effort
    shares: Mapping[str, float]
    cost: Cost
    progress: Callable[[Progress], None]
    deadline: float

    def first(self) -> list[Callable[[], dict[str, Result]]]:
        """The searches that depend on no other: kernels that agree on a number together, others alone.

        Those that may win most come first.
        """
        constraints = self.target.part.constraints
        measured = {c.measured for c in constraints if isinstance(c, Divides)}
        agreed = [c for c in constraints if isinstance(c, Agreement)]
        together = {name for c in agreed for name in c.kernels}
        found = [(self.share(*c.kernels), partial(self.together, c)) for c in agreed]
        found += [
            (self.share(name), partial(self.alone, name, self.made[name]))
            for name in (k.name for k in self.target.part.kernels)
            if name not in together | measured
        ]
        return [run for _, run in sorted(found, key=lambda x: -x[0])]

    def share(self, *names: str) -> float:
        return sum(self.shares[name] for name in names)

    def behind(self, results: Mapping[str, Result]) -> list[Callable[[], dict[str, Result]]]:
        """The searches of kernels whose number the others' must divide."""
        longest: dict[str, tuple[str, int]] = {}
        for c in self.target.part.constraints:
            if isinstance(c, Divides):
                most = max(results[k].schedule[c.name] for k in c.kernels)
                longest[c.measured] = c.name, max(most, longest.get(c.measured, (c.name, 0))[1])
        found: list[Callable[[], dict[str, Result]]] = []
        for name, (number, most) in longest.items():
            part = self.made[name].within(number, lambda x, most=most: x % most == 0)  # type: ignore[misc]
            found.append(partial(self.alone, name, part))
        return found

    def splitting(self, part: Decoding, results: Mapping[str, Result]) -> dict[str, Result]:
        """How the work is split, by the time of a whole step whose kernels have the Schedules found."""
        name, schedules = part.splitting.name, {n: r.schedule for n, r in results.items()}
        found = search(
            self.made[name],
            lambda s: self.bench.measure(part.splitting, s, {}, self.effort.repetitions, schedules),
            effort=self.effort,
            watch=Watch(progress=self.progress, deadline=self.deadline),
        )
        return {name: found}

    def alone(self, name: str, part: Space) -> dict[str, Result]:
        kernel = self.kernel(name)
        found = search(
            part,
            lambda s: self.measure(kernel, s, {}),
            effort=self.effort.of_share(self.share(name)),
            cost=lambda s: self.cost(name, s),
            watch=self.watch(name),
        )
        return {name: found}

    def together(self, agreement: Agreement) -> dict[str, Result]:
        begun: set[int] = set()

        def measure(name: str, schedule: Schedule) -> Outcome:
            value = schedule[agreement.name]
            if value not in begun:  # the run that all of them are timed in
                begun.add(value)
                start = [(self.kernel(k), {**self.made[k].default, agreement.name: value}) for k in agreement.kernels]
                self.bench.prepare(start)
            return self.measure(self.kernel(name), schedule, self.shared(agreement, value))

        values = {name: self.made[name] for name in agreement.kernels}
        effort = self.effort.of_share(self.share(*agreement.kernels))
        return search_together(values, agreement, measure, effort=effort, cost=self.cost, watch=self.watch)

    def shared(self, agreement: Agreement, value: int) -> dict[str, int]:
        """The chunks of a run in which these kernels have the value, and others what then is legal."""
        found = dict.fromkeys(agreement.kernels, value)
        for c in self.target.part.constraints:
            if isinstance(c, Divides) and set(c.kernels) & found.keys():
                default = self.made[c.measured].default[c.name]
                others = [self.made[k].default[c.name] for k in c.kernels if k not in found]
                found[c.measured] = max(default, value, *others)
        return found

    def measure(self, kernel: Kernel, schedule: Schedule, shared: Mapping[str, int]) -> Outcome:
        self.bench.prepare([(kernel, schedule)])
        return self.bench.measure(kernel, schedule, shared, self.effort.repetitions)

    def watch(self, name: str) -> Watch:
        kernel = self.kernel(name)
        return Watch(lambda batch: self.bench.prepare([(kernel, s) for s in batch]), self.progress, self.deadline)

    def kernel(self, name: str) -> Kernel:
        return next(k for k in self.target.part.kernels if k.name == name)


def _verify(target: Target, module: ModuleType, schedules: Mapping[str, Schedule]) -> None:
    """Compare the op with its oracle, all Schedules at once.  Raises WrongResult that names a Schedule at fault."""
    kind, truth = kind_of(target.spec), oracle(to_toml(target.spec))
    options: dict[str, Any] = {"dtypes": [DTYPES[target.dtype]], "device": "cuda"}

    def wrong(chosen: Mapping[str, Schedule]) -> str:
        shapes = [(1, target.shape[1], VERIFIED_LENGTH)]  # these heads: what was compiled serves again
        if isinstance(target.part, Decoding):
            assert isinstance(target.spec, SPLASpec)
            first = target.spec.dense_below  # shorter sequences choose nothing
            shapes = [(1, target.shape[1], first + VERIFIED_LENGTH)]
            report = step_verification.verify(
                module, truth, target.part, shapes=shapes, dense_below=first, schedules=chosen,
                **options,
            )  # fmt: skip
        else:
            report = kind.verify(module, truth, shapes=shapes, schedules=chosen, **options)
        try:
            report.raise_if_wrong()
        except WrongResult as error:
            return error.message
        return ""

    found = wrong(schedules)
    if not found:
        return
    groups = [c.kernels for c in target.part.constraints if isinstance(c, Agreement)]
    alone = [(name,) for name in schedules if not any(name in group for group in groups)]
    guilty = [
        {k: dict(schedules[k]) for k in group} for group in (*groups, *alone) if wrong({k: schedules[k] for k in group})
    ]
    raise WrongResult(f"{found}; Schedules at fault: {guilty or dict(schedules)}", "nothing was stored")
