"""Tuning of decoding: spaces, a search with made-up times, what a cache takes of it, and the process that times."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splagen import pipeline, step_verification, tuning
from splagen.autotune import cache as store
from splagen.autotune import tuned, tuner
from splagen.autotune.device import DEVICES
from splagen.autotune.footprint import shared_floor
from splagen.autotune.key import Bucket, key_of
from splagen.autotune.search import Effort, Measurement, Outcome
from splagen.autotune.space import scheduled, spaces
from splagen.autotune.step_cost import step_sizes
from splagen.autotune.tuner import Target, tune
from splagen.codegen.decoding import SPLITTING, check_decode_schedule, decoding
from splagen.codegen.kernel import Kernel, Splitting
from splagen.codegen.schedule import Schedule
from splagen.errors import ScheduleError
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.paged_cache import SPLACache
from splagen.spec import Residual, Select, SPLASpec, to_toml
from tests.autotune.test_tuner import FakeBench

H200, MI300 = DEVICES["NVIDIA H200"], DEVICES["AMD Instinct MI300X"]
EFFORT = Effort("tiny", candidates=12, exhaustive=6, seeds=1, repetitions=1)
SELECT = Select(block_size=16, budget=1, sinks=0, local=0, metric=taylor(covariance="diag"))
SPEC = SPLASpec(head_dim=16, group_size=2, select=SELECT)
SPECS = {
    "small": SPEC,
    "real": SPLASpec(
        head_dim=128, group_size=16, select=Select(block_size=64, budget=61, metric=taylor(covariance="diag"))
    ),
    "wide, long lists": SPLASpec(head_dim=256, group_size=1, select=Select(block_size=128, budget=200)),
    "no selection": SPLASpec(head_dim=64, select=None, linear=None),
    "normaliser": replace(SPEC, linear=Residual(normaliser=True), combine="add"),
}
BEST = {"score": 66, "attend": 528, "chunk": 1024}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("device", "dtype"), [(H200, "bf16"), (H200, "fp32"), (MI300, "fp16")])
def test_spaces_hold_the_schedules_of_the_module_and_nothing_illegal(name: str, device: Any, dtype: str) -> None:
    part = decoding(SPECS[name])
    made = spaces(SPECS[name], part, device, dtype)
    table: dict[str, Any] = {}
    source = pipeline.decode_source(SPECS[name])
    source = source[source.index("SCHEDULES = {") :]
    exec(source[: source.index("\n}") + 2], table)
    assert {n: s.default for n, s in made.items()} == table["SCHEDULES"][device.arch][dtype]
    for kernel in part.kernels:
        points = list(made[kernel.name].all())
        assert made[kernel.name].default in points
        assert len(points) > 1
        for schedule in points:
            check_decode_schedule(kernel, part.geometry, schedule)
            assert schedule["num_warps"] < 16 or kernel.template not in ("decode_score", "decode_attend")


def test_what_would_leave_out_rows_is_refused() -> None:
    """Blocks are read in pieces of BLOCK_N, and columns of a state in pieces of BLOCK_E."""
    spec = replace(SPEC, linear=Residual(), select=Select(block_size=64, budget=40))
    part = decoding(spec)
    kernels = {k.name: k for k in part.kernels}
    good = {n: s.default for n, s in spaces(spec, part, H200, "bf16").items()}
    for name, change, message in (
        ("attend", {"BLOCK_N": 128}, "BLOCK_N=128 of attend does not divide the 64 of block"),
        ("score", {"BLOCK_E": 32}, "BLOCK_E=32 of score does not divide the 16 of columns of a state"),
        ("score", {"BLOCK_C": 8}, "not a power of two >= 16"),
    ):
        with pytest.raises(ScheduleError, match=message):
            check_decode_schedule(kernels[name], part.geometry, {**good[name], **change})


@pytest.mark.parametrize(
    ("kernel", "schedule", "shared"),
    [
        ("attend", {"BLOCK_N": 16, "num_warps": 4, "num_stages": 3}, 36_864),
        ("score", {"BLOCK_C": 64, "num_warps": 4, "num_stages": 3}, 77_824),
    ],
)
def test_the_floor_is_below_what_compiled_kernels_took(kernel: str, schedule: dict[str, int], shared: int) -> None:
    """Shared memory of kernels of a step of 16 heads of 128 compiled for sm_90, bf16, by triton 3.6."""
    found = next(k for k in decoding(SPECS["real"]).kernels if k.name == kernel)
    assert shared / 4 < shared_floor(found, schedule, "bf16") <= shared


# -- the search ----------------------------------------------------------------------------------------------------


class FakeStepBench(FakeBench):
    """Splittings are best at BEST."""

    steps: list[Mapping[str, Schedule]]

    def measure(  # type: ignore[override]
        self,
        kernel: Kernel | Splitting,
        schedule: Schedule,
        shared: Mapping[str, int],
        repetitions: int,
        schedules: Mapping[str, Schedule] | None = None,
    ) -> Outcome:
        if isinstance(kernel, Kernel):
            return super().measure(kernel, schedule, shared, repetitions)
        assert schedules is not None
        FakeStepBench.steps.append(schedules)
        return Measurement(1.0 + sum(abs(schedule[n] - BEST[n]) / BEST[n] for n in BEST))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner, "Bench", FakeStepBench)
    monkeypatch.setattr(tuner, "_verify", lambda *_: None)
    monkeypatch.setattr(tuned, "this_device", lambda: H200)
    monkeypatch.setattr(tuning, "this_device", lambda: H200)
    FakeStepBench.steps = []


@pytest.mark.usefixtures("faked")
def test_every_kernel_and_the_splitting_are_found_and_kept(tmp_path: Path) -> None:
    library = pipeline.generate_decoding(SPEC, tmp_path)
    part = decoding(SPEC)
    target = Target(SPEC, part, library.path, (3, 4, 1000), "bf16", H200)
    nothing: Any = SimpleNamespace()
    found = tune(target, nothing, effort=replace(EFFORT, candidates=200))
    assert found.entries.keys() == {x.name for x in scheduled(part)}
    assert found.schedules["splitting"] == BEST
    assert all(s["num_warps"] == 2 for n, s in found.schedules.items() if n != "splitting")
    for schedules in FakeStepBench.steps:  # the whole step is timed with what was found before
        assert schedules == {n: s for n, s in found.schedules.items() if n != "splitting"}
    assert tune(target, nothing, effort=EFFORT).schedules == found.schedules
    assert not tune(target, nothing, effort=EFFORT).results, "the cache has it"
    taken = tuned.TunedSchedules(SPEC, kernels=decoding)
    assert taken.get(("bf16", 1024, 8), {}) == found.schedules
    assert taken.get(("bf16", 1024, 4), {}) == {}, "other sequences"
    assert tuned.TunedSchedules(SPEC).get(("bf16", 1024, 8), {}) == {}, "those of the op are others"


@pytest.mark.usefixtures("faked")
def test_a_stored_splitting_beyond_the_space_is_not_taken(tmp_path: Path) -> None:
    library = pipeline.generate_decoding(SPEC, tmp_path)
    part = decoding(SPEC)
    target = Target(SPEC, part, library.path, (1, 2, 256), "bf16", H200)
    nothing: Any = SimpleNamespace()
    found = tune(target, nothing, effort=EFFORT)
    key = key_of(SPEC, part.splitting, "bf16", Bucket(256, 1), H200)
    store.put(key, replace(found.entries["splitting"], schedule={**BEST, "attend": 60_000}))
    assert tuned.TunedSchedules(SPEC, kernels=decoding).get(("bf16", 256, 1), {}) == {}


@pytest.mark.usefixtures("faked")
def test_a_cache_made_after_tuning_has_its_splits(tmp_path: Path) -> None:
    """Sizes of the cache and of the tuning meet in one bucket, whatever pages the tokens are rounded up to."""
    library = pipeline.generate_decoding(SPEC, tmp_path)
    sizes: dict[str, Any] = {"sequences": 3, "kv_heads": 2, "tokens": 5000, "dtype": torch.float16, "device": "cpu"}
    before = SPLACache(library, **sizes)
    (found,) = tuning.tune(library, shapes=[(3, 4, 5000)], dtype=torch.float16, effort="full")
    module = library.module
    q = torch.empty(3, 4, 16, dtype=torch.float16)
    assert module.TUNED.get(("fp16", *module.bucket(q, before.page_table, before.pages["k_pages"])), None) == (
        found.schedules
    )
    chosen = found.schedules["splitting"]
    assert chosen["attend"] != SPLITTING["attend"]
    made = module.scratch({"splitting": chosen}, 3, 2, 51_200, torch.float16, "cpu")
    assert made["score_max"].shape[2] == chosen["score"] // 6 + 1


def test_tokens_below_a_page_are_those_of_a_page() -> None:
    for tokens, length in ((1, 256), (256, 256), (257, 512), (1500, 2048)):
        assert tuning.capacity(SPEC, (2, 2, tokens)) == (2, 2, -(-tokens // 256) * 256)
        assert Bucket.of(SPEC, tuning.capacity(SPEC, (2, 2, tokens))).length == length


# -- the process that times ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["input", pytest.param("e4m3", marks=pytest.mark.slow)])
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from splagen.autotune.step_worker import Steps

    folder = tmp_path_factory.mktemp("steps")
    module = pipeline.generate_decoding(SPEC, folder, page_type=request.param).module
    return Steps(module, (2, 2, 96), torch.float32, "cpu")


@pytest.mark.usefixtures("fast_sort")
def test_every_launcher_and_the_whole_step_are_timed(steps: Any) -> None:
    from splagen.autotune.worker import answer

    default = steps.defaults()
    assert steps.launches({}).keys() == {k.name for k in decoding(SPEC).kernels}
    for name, change in (("score", {"BLOCK_C": 16}), ("select", {"BLOCK_S": 16}),
                         ("attend", {}), ("merge", {"BLOCK_S": 32})):  # fmt: skip
        job = {"kernel": name, "schedule": {**default[name], **change}, "shared": {}, "repetitions": 1}
        assert answer(steps, job).get("ms", 0) > 0
    before = steps.cache.scratch
    job = {"kernel": "splitting", "schedule": {"score": 4, "attend": 6, "chunk": 1}, "shared": {}, "repetitions": 1}
    assert answer(steps, {**job, "schedules": {"merge": {**default["merge"], "BLOCK_S": 32}}})["ms"] > 0
    assert steps.cache.scratch is before


@pytest.mark.usefixtures("fast_sort")
@pytest.mark.parametrize("name", ["score", "select", "attend"])
def test_a_kernel_that_writes_something_else_is_found(name: str, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pages, in the choice of blocks, and in the parts of splits."""
    from splagen.autotune.worker import answer

    right = getattr(steps.module, f"launch_{name}")
    spoilt = {"score": "v_pages", "select": "block_indices", "attend": "o_s_parts"}[name]
    names = [a.name for a in next(k for k in steps.part.kernels if k.name == name).arrays]
    steps.results({})

    def wrong(n: Any, schedule: Any, *arguments: Any) -> None:
        right(n, schedule, *arguments)
        x = arguments[names.index(spoilt)]
        if spoilt == "block_indices":
            x.copy_(torch.where(x >= 0, (x + 1) % 5, x))
        else:
            x.copy_(x.float() + 0.25)  # a factor would cancel in the norm of a branch

    monkeypatch.setattr(steps.module, f"launch_{name}", wrong)
    job = {"kernel": name, "schedule": steps.defaults()[name], "shared": {}, "repetitions": 1}
    assert answer(steps, job)["error"] > 1e-3


@pytest.mark.usefixtures("fast_sort")
@pytest.mark.parametrize("page_type", ["input", pytest.param("e4m3", marks=pytest.mark.slow)])
def test_steps_equal_the_oracle_of_the_whole_sequence(
    page_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pipeline.generate_decoding(SPEC, tmp_path, page_type=page_type)
    truth: Any = oracle(to_toml(SPEC))
    run, kept = step_verification.run, []

    def wrong(change: Any) -> list[str]:
        """The quantities that are wrong where what was stepped once is changed."""

        def once(*given: Any) -> Any:
            kept.extend([] if kept else [run(*given)])
            return change(*kept[0])

        monkeypatch.setattr(step_verification, "run", once)
        report = step_verification.verify(library.module, truth, library.part, shapes=[(1, 2, 34)])
        return [r.quantity for r in report.rows if not r.ok]

    assert wrong(lambda o, indices, counts: (o, indices, counts)) == []
    assert wrong(lambda o, indices, counts: (1.001 * o, indices, counts)) == ["o of steps"]
    other = wrong(lambda o, indices, counts: (o, torch.where(indices >= 0, 1 - indices, -1), counts))
    assert other == ["o of steps", "selection of steps"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["real", "no selection", "normaliser"])
def test_tuning_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is verified by `tune` itself; a cache that is made afterwards takes it."""
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    spec = SPECS[name]
    library = tuning.load_decoding(spec)
    heads = 2 * spec.group_size
    (found,) = tuning.tune(library, shapes=[(4, heads, 8192)], seconds=20)
    assert not found.wrong
    cache = SPLACache(library, sequences=4, kv_heads=2, tokens=8192)
    sizes = step_sizes(decoding(spec), 4, 2, 8192, found.schedules["splitting"])
    assert cache.scratch["row_max_parts"].shape[2] == sizes["ATTEND_SPLITS"]
    q = torch.empty(4, heads, spec.head_dim, dtype=torch.bfloat16, device="cuda")
    assert cache.made.schedules(library.module, q) == found.schedules
