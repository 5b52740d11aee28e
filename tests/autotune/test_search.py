"""The search: it finds the optimum of convex costs, keeps inside the space, and loses only what is expected."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splagen import pipeline
from splagen.autotune.device import DEVICES
from splagen.autotune.search import (
    EFFORTS,
    FULL,
    QUICK,
    Effort,
    Lost,
    Measurement,
    Outcome,
    Progress,
    Reason,
    Result,
    Watch,
    search,
    search_together,
)
from splagen.autotune.space import UNLIMITED, Dimension, Space, spaces
from splagen.codegen.schedule import Agreement, Schedule, check_constraints
from splagen.errors import ScheduleError, TuningError, WrongResult
from splagen.spec import Spec, read_spec

ROOT = Path(__file__).parents[2]
H200 = DEVICES["NVIDIA H200"]
EXACT = replace(FULL, margin=0.0)


def anything(_: Schedule) -> None:
    """No rule."""


def free(*extents: int) -> Space:
    """A space without rules: values 1 to n in each dimension, the default in a corner."""
    return Space("k", tuple(Dimension(f"x{i}", 1, tuple(range(1, n + 1))) for i, n in enumerate(extents)), anything)


def bowl(space: Space, target: Schedule) -> Callable[[Schedule], Measurement]:
    """A time that grows with the square of the steps to a target."""

    def measure(schedule: Schedule) -> Measurement:
        steps = [
            d.values.index(schedule.get(d.name, UNLIMITED)) - d.values.index(target.get(d.name, UNLIMITED))
            for d in space.dimensions
        ]
        return Measurement(1.0 + sum(s * s for s in steps))

    return measure


@given(extents=st.lists(st.integers(2, 8), min_size=1, max_size=5), data=st.data())
def test_the_optimum_of_a_convex_cost_is_found(extents: list[int], data: st.DataObject) -> None:
    space = free(*extents)
    target = {d.name: data.draw(st.sampled_from(d.values)) for d in space.dimensions}
    effort = replace(EXACT, candidates=2000, seeds=1)
    assert search(space, bowl(space, target), effort=effort).schedule == target


def real_spaces() -> list[Space]:
    found = []
    for name in ("spla", "sse_gla"):
        spec: Spec = read_spec(ROOT / f"examples/specs/{name}.toml")
        found += spaces(spec, pipeline.kernels(spec), H200, "bf16").values()
    return found


@pytest.mark.parametrize("space", real_spaces(), ids=lambda s: s.kernel)
def test_in_real_spaces_nothing_illegal_is_tried_and_the_optimum_is_found(space: Space) -> None:
    points = list(space.all())
    for target in points[:: max(1, len(points) // 5)]:
        measure = bowl(space, target)
        tried: list[Schedule] = []

        def timed(schedule: Schedule, measure=measure, tried=tried) -> Outcome:  # type: ignore[no-untyped-def]
            space.check(schedule)
            tried.append(schedule)
            return measure(schedule)  # type: ignore[no-any-return]

        result = search(space, timed, effort=EXACT, cost=lambda s, m=measure: m(s).ms)  # type: ignore[misc]
        assert result.schedule == target
        assert tried[0] == space.default
        assert len({frozenset(s.items()) for s in tried}) == len(tried) <= EXACT.candidates


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS)
@pytest.mark.parametrize("space", real_spaces()[::3], ids=lambda s: s.kernel)
def test_the_presets_find_what_a_good_cost_knows_and_keep_to_their_candidates(space: Space, effort: Effort) -> None:
    points = list(space.all())
    target = points[len(points) // 3]
    measure = bowl(space, target)
    result = search(space, measure, effort=effort, cost=lambda s: measure(s).ms)
    assert result.measurement.ms <= measure(space.default).ms
    assert result.schedule == target
    assert len(result.trials) <= effort.candidates


def test_small_spaces_are_measured_whole() -> None:
    space = free(4, 5)
    rugged = {frozenset(s.items()): 1.0 + (i * 7 % 20) for i, s in enumerate(space.all())}
    result = search(space, lambda s: Measurement(rugged[frozenset(s.items())]), effort=replace(QUICK, margin=0))
    assert len(result.trials) == 20
    assert result.measurement.ms == 1.0


def test_the_default_stays_unless_something_is_clearly_faster() -> None:
    space = free(3)

    def time(best: float) -> Callable[[Schedule], Measurement]:
        return lambda s: Measurement(best if s["x0"] == 2 else 1.0)

    assert search(space, time(0.995)).schedule == space.default
    assert search(space, time(0.9)).schedule == {"x0": 2}


def test_a_trade_leads_past_what_is_not_legal() -> None:
    def rule(schedule: Schedule) -> None:
        if schedule["x0"] + schedule["x1"] != 9:
            raise ScheduleError("they do not fit")

    values = tuple(range(1, 9))
    space = Space("k", (Dimension("x0", 1, values), Dimension("x1", 8, values)), rule)
    result = search(space, lambda s: Measurement(9.0 - s["x0"]), effort=replace(FULL, exhaustive=1, seeds=0))
    assert result.schedule == {"x0": 8, "x1": 1}


# -- failures ----------------------------------------------------------------------------------------------


def made_by_triton(name: str) -> Exception:
    kind = type(name, (Exception,), {"__module__": "triton.runtime.errors"})
    return kind(f"{name} happened")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("OutOfResources", "out of resources"), ("CompileTimeAssertionFailure", "compile-time assertion")],
)
def test_expected_failures_lose_quietly(name: str, reason: Reason) -> None:
    space = free(6)

    def measure(schedule: Schedule) -> Outcome:
        if schedule["x0"] == 3:
            raise RuntimeError("while compiling") from made_by_triton(name)
        if schedule["x0"] == 5:
            return Lost(reason)
        return Measurement(7.0 - schedule["x0"])

    result = search(space, measure)
    assert result.schedule == {"x0": 6}
    assert [(t.schedule["x0"], t.outcome.reason) for t in result.lost] == [(3, reason), (5, reason)]  # type: ignore[union-attr]


def test_the_names_are_those_of_triton() -> None:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources

    assert Lost.of(OutOfResources(300_000, 232_448, "shared memory")).reason == "out of resources"  # type: ignore[union-attr]
    assert Lost.of(CompileTimeAssertionFailure(None, None, "")).reason == "compile-time assertion"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("an illegal memory access"), TuningError),
        (type("OutOfResources", (Exception,), {})("of another library"), TuningError),
        (made_by_triton("CompilationError"), TuningError),
        (WrongResult("o differs by 0.5", "do not use it"), WrongResult),
    ],
)
def test_other_failures_raise_with_the_schedule(error: Exception, kind: type[Exception]) -> None:
    def measure(schedule: Schedule) -> Outcome:
        if schedule["x0"] == 4:
            raise error
        return Measurement(1.0)

    with pytest.raises(kind, match=r"k with Schedule \{'x0': 4\}: ") as caught:
        search(free(6), measure)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_raises(ms: float) -> None:
    with pytest.raises(TuningError, match="took"):
        search(free(3), lambda _: Measurement(ms))


def test_a_reason_that_is_not_expected_is_refused() -> None:
    with pytest.raises(TuningError, match="illegal memory access"):
        Lost("illegal memory access")  # type: ignore[arg-type]


def test_a_kernel_of_which_nothing_runs_is_an_error() -> None:
    with pytest.raises(TuningError, match="none of 5 Schedules of k runs; the default is out of resources: 300 KiB"):
        search(free(5), lambda _: Lost("out of resources", "300 KiB"))


def test_where_the_default_and_the_seeds_are_lost_others_are_tried() -> None:
    space = free(9, 9, 9)

    def measure(schedule: Schedule) -> Outcome:
        return Measurement(1.0 + schedule["x2"]) if schedule["x1"] == 2 else Lost("out of resources")

    result = search(space, measure, effort=replace(QUICK, candidates=60))
    assert result.schedule["x1"] == 2
    assert result.measurement.ms == 2.0


def test_interrupting_is_not_a_failure_of_a_schedule() -> None:
    def measure(_: Schedule) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(free(5), measure)


# -- what is told, and when it ends ------------------------------------------------------------------------


def test_progress_and_what_comes_next_are_told() -> None:
    told: list[Progress] = []
    batches: list[list[int]] = []
    watch = Watch(prepare=lambda batch: batches.append([s["x0"] for s in batch]), progress=told.append)
    lost = {1: Lost("out of resources")}
    result = search(free(5), lambda s: lost.get(s["x0"]) or Measurement(6.0 - s["x0"]), watch=watch)
    assert batches == [[1, 2, 3, 4, 5]]
    assert [(p.done, p.left) for p in told] == [(1, 4), (2, 3), (3, 2), (4, 1), (5, 0)]
    assert [p.best and p.best.ms for p in told] == [None, 4.0, 3.0, 2.0, 1.0]
    assert all(p.elapsed >= 0 and p.kernel == "k" for p in told)
    assert result.default == lost[1]


def test_every_schedule_is_prepared_before_it_is_measured() -> None:
    prepared: set[tuple[tuple[str, int], ...]] = set()
    watch = Watch(prepare=lambda batch: prepared.update(tuple(s.items()) for s in batch))

    def measure(schedule: Schedule) -> Measurement:
        assert tuple(schedule.items()) in prepared
        return Measurement(1.0 + schedule["x0"])

    search(free(8, 8, 8), measure, watch=watch)


def test_after_the_deadline_only_the_default_is_measured() -> None:
    result = search(free(5), lambda s: Measurement(6.0 - s["x0"]), watch=Watch(deadline=-math.inf))
    assert [t.schedule for t in result.trials] == [{"x0": 1}]


# -- kernels that agree ------------------------------------------------------------------------------------


def test_kernels_are_searched_together() -> None:
    spec = read_spec(ROOT / "examples/specs/sse_gla.toml")
    part = pipeline.kernels(spec)
    made = spaces(spec, part, H200, "bf16")
    first, second = (c for c in part.constraints if isinstance(c, Agreement))

    def measure(kernel: str, schedule: Schedule) -> Outcome:
        if schedule["CHUNK"] == 128 and kernel.startswith("gradient"):
            return Lost("out of resources")
        return Measurement(
            {16: 4.0, 32: 3.0, 64: 1.0 if kernel.startswith("states") else 2.2, 128: 0.1}[schedule["CHUNK"]]
        )

    chosen = {k: s.default for k, s in made.items()}
    for agreement in (first, second):
        found: dict[str, Result] = search_together(made, agreement, measure)
        assert found.keys() == set(agreement.kernels)
        assert {r.schedule["CHUNK"] for r in found.values()} == {64}
        chosen |= {k: dict(r.schedule) for k, r in found.items()}
    check_constraints([first, second], chosen)
    with pytest.raises(TuningError, match="none of"):
        search_together(made, first, lambda *_: Lost("out of resources"))
