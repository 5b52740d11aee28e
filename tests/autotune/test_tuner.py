"""The tuner with a bench that makes times up: what is searched, what is stored, and what a module takes afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splagen import pipeline
from splagen.autotune import cache, tuned, tuner
from splagen.autotune.device import DEVICES
from splagen.autotune.key import Bucket, key_of
from splagen.autotune.search import Effort, Lost, Measurement, Outcome
from splagen.autotune.space import spaces
from splagen.autotune.tuner import Target, tune
from splagen.codegen.kernel import Kernel
from splagen.codegen.schedule import Agreement, Divides, Schedule, check_constraints
from splagen.errors import TuningError, WrongResult
from splagen.library import taylor
from splagen.spec import Select, Spec, SPLASpec
from splagen.sse_spec import Router, SSESpec

H200 = DEVICES["NVIDIA H200"]
EFFORT = Effort("tiny", candidates=6, exhaustive=6, seeds=1, repetitions=1)
SPECS: dict[str, Spec] = {
    "sse": SSESpec(head_dim=16, backbone="vector", router=Router(2)),
    "spla": SPLASpec(
        head_dim=16, group_size=2, select=Select(block_size=16, budget=2, metric=taylor(covariance="diag"))
    ),
}
SHAPE = (1, 2, 100)


def milliseconds(kernel: str, schedule: Schedule) -> float:
    """A made-up time: best at two warps."""
    return 1.0 + abs(schedule["num_warps"] - 2) + 0.01 * len(kernel)


class FakeBench:
    """Stands for `Bench`; counts what is asked of it."""

    measured: list[tuple[str, Schedule, Mapping[str, int]]]

    def __init__(self, *_: object) -> None:
        self.wrong: list[tuple[str, Schedule, str]] = []
        FakeBench.measured = []

    def __enter__(self) -> "FakeBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def prepare(self, wanted: Sequence[tuple[Kernel, Schedule]]) -> None:
        pass

    def measure(self, kernel: Kernel, schedule: Schedule, shared: Mapping[str, int], repetitions: int) -> Outcome:
        FakeBench.measured.append((kernel.name, schedule, shared))
        if schedule["num_warps"] == 8 and schedule["num_stages"] == 2:
            return Lost("out of resources")
        return Measurement(milliseconds(kernel.name, schedule))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "Bench", FakeBench)
    monkeypatch.setattr(tuner, "_verify", lambda *_: None)
    monkeypatch.setattr(tuned, "this_device", lambda: H200)


def target(name: str, folder: Path) -> Target:
    spec = SPECS[name]
    library = pipeline.generate(spec, folder)
    return Target(spec, pipeline.kernels(spec), library.path, SHAPE, "bf16", H200)


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("name", SPECS)
def test_every_kernel_has_a_schedule_that_goes_with_the_others_and_is_kept(name: str, tmp_path: Path) -> None:
    wanted = target(name, tmp_path)
    found = tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert found.entries.keys() == {k.name for k in (*wanted.part.kernels, *wanted.part.strategies)}
    check_constraints(wanted.part.constraints, found.schedules)
    for kernel, result in found.results.items():
        assert result.measurement.ms <= milliseconds(kernel, result.trials[0].schedule)
        assert result.measurement.ms == milliseconds(kernel, found.schedules[kernel])
    again = tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert again.schedules == found.schedules
    assert not again.results, "the second time nothing is measured"
    sizes = Bucket.of(wanted.spec, SHAPE)
    taken = tuned.TunedSchedules(wanted.spec)
    assert taken.get(("bf16", sizes.length, sizes.batch), {}) == found.schedules
    assert taken.get(("bf16", 2 * sizes.length, sizes.batch), {"x": {}}) == {"x": {}}
    assert taken.get(("fp16", sizes.length, sizes.batch), {}) == {}


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize(
    ("slow", "strategy", "ms"),
    [
        (("block_sparse_parts", "block_sparse_union"), 0, 8),
        (("block_sparse_forward", "block_sparse_union"), 1, 24),
        (("block_sparse_forward", "block_sparse_parts"), 2, 8),
    ],
)
def test_the_strategy_whose_kernels_take_least_together_is_chosen(
    slow: Sequence[str], strategy: int, ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: FakeBench, kernel: Kernel, schedule: Schedule, *_: object, **__: object) -> Outcome:
        return Measurement(40.0 if kernel.name in slow else 8.0)

    monkeypatch.setattr(FakeBench, "measure", measure)
    found = tune(target("spla", tmp_path), SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert found.schedules["forward_strategy"] == {"strategy": strategy}
    assert found.entries["forward_strategy"].ms == ms
    assert found.schedules["backward_strategy"] == {"strategy": 1}, "the default: 24 against 24"


@pytest.mark.usefixtures("faked")
def test_a_search_for_queries_that_are_alike_is_always_a_new_one(tmp_path: Path) -> None:
    """No key in the cache says how alike they are."""
    wanted = target("spla", tmp_path)
    tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert tune(replace(wanted, alike=0.9), SimpleNamespace(), effort=EFFORT).results  # type: ignore[arg-type]
    assert not tune(wanted, SimpleNamespace(), effort=EFFORT).results, "others take it"  # type: ignore[arg-type]


@pytest.mark.usefixtures("faked")
def test_a_stored_schedule_that_its_kernel_does_not_take_is_not_taken(tmp_path: Path) -> None:
    """A file in the cache may hold numbers in range that would read beyond the columns."""
    wanted = target("sse", tmp_path)
    found = tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    sizes = Bucket.of(wanted.spec, SHAPE)
    kernel = next(k for k in wanted.part.kernels if k.name == "output1")
    entry = found.entries["output1"]
    wide = replace(entry, schedule={**entry.schedule, "BLOCK_E": 128})
    cache.put(key_of(wanted.spec, kernel, "bf16", sizes, H200), wide)
    assert tuned.TunedSchedules(wanted.spec).get(("bf16", sizes.length, sizes.batch), {}) == {}
    assert tune(wanted, SimpleNamespace(), effort=EFFORT).results, "it is searched again"  # type: ignore[arg-type]


@pytest.mark.usefixtures("faked")
def test_kernels_that_agree_are_measured_in_runs_that_agree(tmp_path: Path) -> None:
    wanted = target("sse", tmp_path)
    tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    groups = [c for c in wanted.part.constraints if isinstance(c, Agreement)]
    assert groups
    defaults = {n: s.default for n, s in spaces(wanted.spec, wanted.part, H200, "bf16").items()}
    chunks = {n: s["CHUNK"] for n, s in defaults.items() if "CHUNK" in s}
    for name, schedule, changed in FakeBench.measured:
        shared = {**chunks, **changed}
        group = next((c for c in groups if name in c.kernels), None)
        if group:
            assert {shared[k] for k in group.kernels} == {schedule[group.name]}
            measured = {c.measured for c in wanted.part.constraints if isinstance(c, Divides) and name in c.kernels}
            assert all(shared[m] % schedule[group.name] == 0 for m in measured)


@pytest.mark.usefixtures("faked")
def test_an_unexpected_failure_names_kernel_and_schedule_and_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FakeBench, kernel: Kernel, schedule: Schedule, *_: object, **__: object) -> Outcome:
        if kernel.name == "output2" and schedule["num_warps"] == 2:
            raise RuntimeError("an illegal memory access")
        return Measurement(milliseconds(kernel.name, schedule))

    monkeypatch.setattr(FakeBench, "measure", fails)
    wanted = target("sse", tmp_path)
    with pytest.raises(TuningError, match=r"output2 with .*num_warps.* 2.*an illegal memory access"):
        tune(wanted, SimpleNamespace(), effort=replace(EFFORT, candidates=60))  # type: ignore[arg-type]
    assert not cache.entries()


@pytest.mark.usefixtures("faked")
def test_schedules_that_the_oracle_refuses_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise WrongResult("dq is wrong")

    monkeypatch.setattr(tuner, "_verify", refuse)
    with pytest.raises(WrongResult, match="dq is wrong"):
        tune(target("spla", tmp_path), SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert not cache.entries()


@pytest.mark.usefixtures("faked")
def test_force_searches_again(tmp_path: Path) -> None:
    wanted = target("spla", tmp_path)
    tune(wanted, SimpleNamespace(), effort=EFFORT)  # type: ignore[arg-type]
    assert tune(wanted, SimpleNamespace(), effort=EFFORT, force=True).results  # type: ignore[arg-type]


def test_the_worker_times_every_launcher_and_finds_a_wrong_result(tmp_path: Path) -> None:
    from splagen.autotune.worker import Kernels, answer

    spec = SSESpec(head_dim=16, backbone="scalar", router=Router(2))
    module = pipeline.generate(spec, tmp_path).module
    kernels = Kernels(module, (1, 1, 20), torch.float32, "cpu")
    names = {k.name for k in pipeline.kernels(spec).kernels}
    assert kernels.launches({}).keys() == names
    default = module.schedules_for(kernels.first)
    chunked = {"states2": 32, "dstates2": 32, "dvalues2": 32, "gradient2": 32}
    job = {"kernel": "gradient2", "schedule": {**default["gradient2"], "CHUNK": 32}, "shared": chunked}
    assert answer(kernels, {**job, "repetitions": 2})["ms"] > 0
    for name in ("scan1", "step"):  # these write into what they are given: other kernels are timed on it
        arrays = [x for x in kernels.launches({})[name][1] if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in arrays]
        found = answer(kernels, {"kernel": name, "schedule": default[name], "shared": {}, "repetitions": 3})
        assert found["ms"] > 0, found
        assert all(torch.equal(x, y) for x, y in zip(arrays, before, strict=True)), name
    kept = kernels.launch("output1", {})
    with pytest.MonkeyPatch.context() as patch:  # as if the arguments were too large to be kept
        patch.setattr("splagen.autotune.worker.KEPT_BYTES", 0)
        patch.setattr("splagen.autotune.worker.COPIED_BYTES", 0)
        alone = Kernels(module, (1, 1, 20), torch.float32, "cpu")
        assert not alone.launches({})
        again = alone.launch("output1", {})
        pairs = [(x, y) for x, y in zip(kept[1], again[1], strict=True) if isinstance(x, torch.Tensor)]
        assert pairs
        assert all(torch.equal(x, y) for x, y in pairs)
        job = {"kernel": "output1", "schedule": default["output1"], "shared": {}, "repetitions": 1}
        assert answer(alone, job)["ms"] > 0
    right = module.launch_output1
    try:
        calls: list[int] = []

        def wrong(n: Any, schedule: Any, *arguments: Any) -> Any:
            calls.append(1)
            o = right(n, schedule, *arguments)
            return o * 1.01 if len(calls) == 2 else o

        module.launch_output1 = wrong
        found = answer(kernels, {"kernel": "output1", "schedule": default["output1"], "shared": {}, "repetitions": 1})
    finally:
        module.launch_output1 = right
    assert found == {"error": pytest.approx(0.01, rel=1e-3)}
    broken = {k: v for k, v in default["output1"].items() if k != "BLOCK_E"}
    failed = answer(kernels, {"kernel": "output1", "schedule": broken, "shared": {}, "repetitions": 1})
    assert "BLOCK_E" in failed["failed"]


def test_results_differ_where_one_is_finite_and_the_other_is_not() -> None:
    from splagen.autotune.worker import difference

    inf, nan = float("inf"), float("nan")
    want = torch.tensor([3.0, -inf, 4.0, nan])
    assert difference(want.clone(), want) == 0.0
    assert difference(torch.tensor([3.0, -inf, 4.5, nan]), want) == pytest.approx(0.1)
    for other in (
        torch.tensor([3.0, 1.0, 4.0, nan]),
        torch.tensor([3.0, -inf, inf, nan]),
        torch.tensor([nan, -inf, 4.0, nan]),
    ):
        assert difference(other, want) == inf
    assert difference(None, want) == inf
    assert difference(torch.zeros(2), torch.zeros(3)) == 0.0, "its shape depends on the Schedule"
    assert difference(torch.ones(3), torch.zeros(3)) > 1
