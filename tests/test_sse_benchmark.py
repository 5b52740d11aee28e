"""The benchmark of SSE where no GPU is needed: its floors, its inputs, and what it refuses to time."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import sse
from splagen.sequence import SSEOracle, input_names
from splagen.sse_spec import Router, SSESpec


def test_floors_are_those_of_the_specification() -> None:
    assert sse.floor_ms("scalar", 1, 8192)["forward"] == pytest.approx(0.094, abs=5e-4)
    assert sse.floor_ms("scalar", 1, 131072)["forward"] == pytest.approx(1.51, abs=5e-3)
    assert sse.floor_ms("vector", 1, 131072)["forward"] == pytest.approx(2.5, abs=5e-2)
    slots = 131072 * 32 * 3
    assert sse.floor_ms("scalar", 2, 131072)["backward"] == pytest.approx(1e3 * slots * 245760 / 790e12)


@pytest.mark.parametrize("backbone", ["scalar", "vector", "delta"])
def test_inputs_fit_the_oracle_and_errors_are_seen(backbone: str) -> None:
    spec = SSESpec(head_dim=16, backbone=backbone, router=Router(partitions=3, writers=2))  # type: ignore[arg-type]
    x = sse.random_inputs(spec, (37, 0, 5), 2, torch.float32, "cpu")
    assert all(x[n].max() <= 0 for n in input_names(spec) if n[0] == "g")
    truth, oracle = sse.truth_of(spec, x), SSEOracle(spec)
    right = SimpleNamespace(
        schedules_for=lambda q: {},
        forward=lambda schedules, *tensors: oracle.forward(*tensors),
        backward=lambda schedules, *tensors: oracle.backward(*tensors),
    )
    found = sse.check(spec, right, x, truth, {})  # type: ignore[arg-type]
    assert found["forward"]["ok"]
    assert found["backward"]["ok"]
    assert set(found["backward"]["errors"]) == {f"d{n}" for n in (*input_names(spec), "state")}
    wrong = SimpleNamespace(
        schedules_for=right.schedules_for,
        forward=lambda schedules, *tensors: (math.nan * tensors[-1], *oracle.forward(*tensors)[1:]),
        backward=lambda schedules, *tensors: tuple(1.01 * g for g in oracle.backward(*tensors)),
    )
    found = sse.check(spec, wrong, x, truth, {})  # type: ignore[arg-type]
    assert not found["forward"]["ok"]
    assert not found["backward"]["ok"]
    assert not sse.check(spec, right, x, truth, {"forward": "the GPU is lost"})["forward"]["ok"]  # type: ignore[arg-type]


def test_independence_compares_equal_choices() -> None:
    rows = [
        {"backbone": "scalar", "N": n, "k": k, "length": 64, "forward": {"device_ms": ms}}
        for n, k, ms in ((4, 1, 1.0), (4, 2, 9.0), (16, 1, 1.05))
    ]
    (found,) = sse.independence(rows)
    assert found["within_10_percent"]
    assert found["ratio"] == pytest.approx(1.05)
