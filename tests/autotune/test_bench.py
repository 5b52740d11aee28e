"""The process that times kernels: what it answers, and that it ends when it must."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splagen import pipeline
from splagen.autotune import bench
from splagen.autotune.bench import Bench
from splagen.autotune.search import Lost, Measurement
from splagen.autotune.worker import NEIGHBOURS, related
from splagen.codegen.kernel import Kernel
from splagen.errors import TuningError
from splagen.spec import SPLASpec

SPEC = SPLASpec(head_dim=16, select=None, linear=None)
SHAPE = (1, 1, 40)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Bench]:
    library = pipeline.generate(SPEC, tmp_path)
    with Bench(library.path, None, "fp32", "sm_90", SHAPE, alike=0.9) as made:
        yield made


def forward() -> tuple[Kernel, dict[str, int]]:
    kernel = pipeline.kernels(SPEC).kernels[0]
    return kernel, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def test_a_measurement_is_a_time_and_a_failure_is_an_error(running: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, schedule = forward()
    found = running.measure(kernel, schedule, {}, 2)
    assert isinstance(found, Measurement)
    assert found.ms > 0
    with pytest.raises(TuningError, match="BLOCK_N"):
        running.measure(kernel, {k: v for k, v in schedule.items() if k != "BLOCK_N"}, {}, 1)
    assert isinstance(running.measure(kernel, schedule, {}, 1), Measurement), "the process goes on"
    assert not running.wrong
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    lost = running.measure(kernel, schedule, {}, 1000)
    assert isinstance(lost, Lost)
    assert lost.reason == "crash"
    assert [(name, s) for name, s, seen in running.wrong if "status -9" in seen] == [(kernel.name, schedule)]
    monkeypatch.undo()
    assert isinstance(running.measure(kernel, schedule, {}, 1), Measurement), "another process takes over"


def test_an_op_that_does_not_run_is_no_fault_of_a_candidate(tmp_path: Path) -> None:
    kernel, schedule = forward()
    library = pipeline.generate(SPEC, tmp_path)
    library.path.write_text(library.path.read_text() + '\nraise RuntimeError("no such driver")\n')
    with (
        Bench(library.path, None, "fp32", "sm_90", SHAPE) as made,
        pytest.raises(TuningError, match=r"does not run with default Schedules.*no such driver"),
    ):
        made.measure(kernel, schedule, {}, 1)


def test_after_a_stop_every_measurement_fails(running: Bench) -> None:
    kernel, schedule = forward()
    running.measure(kernel, schedule, {}, 1)
    process = running._worker.process
    assert process is not None
    running.stop()
    assert process.poll() is not None
    with pytest.raises(TuningError, match="stopped"):
        running.measure(kernel, schedule, {}, 1)


def test_what_did_not_compile_is_lost_without_being_timed(running: Bench) -> None:
    kernel, schedule = forward()
    running.built[kernel.name, frozenset(schedule.items())] = Lost("out of resources", "too much shared memory")
    assert running.measure(kernel, schedule, {}, 1) == Lost("out of resources", "too much shared memory")
    assert running._worker.process is None


def test_neighbouring_queries_have_as_much_in_common_as_is_asked_for() -> None:
    q = torch.randn(1, 1001, 2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alike in (0.0, 0.6, 0.9, 1.0):
        found = related(q, alike)
        assert found.shape == q.shape
        assert torch.equal(found[:, ::NEIGHBOURS], q[:, ::NEIGHBOURS])
        assert found.square().mean().item() == pytest.approx(1, abs=0.05)
        rows = found[:, : 1001 // NEIGHBOURS * NEIGHBOURS].unflatten(1, (-1, NEIGHBOURS))
        assert (rows[:, :, 1] * rows[:, :, 2]).mean().item() == pytest.approx(alike**2, abs=0.05)
        assert (rows[:, 1:, 1] * rows[:, :-1, 1]).mean().item() == pytest.approx(0, abs=0.05)
