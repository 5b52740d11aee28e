"""Chosen blocks visited by key: what each gives to a row is merged to the same results and gradients."""

from pathlib import Path

import pytest
import torch

from splagen import library as lib
from splagen import pipeline
from splagen.kinds import oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Shape, compare, random_inputs
from tests.kernels.launched import record_launches
from tests.kernels.shares import allow_a_share

TOKEN = Select(block_size=16, budget=2, sinks=1, local=1, metric=lib.taylor(covariance="diag"))
CASES: dict[str, tuple[SPLASpec, Shape]] = {
    "residual, four heads": (SPLASpec(head_dim=16, group_size=4, select=TOKEN), (2, 4, 110)),
    "one head": (SPLASpec(head_dim=24, value_dim=40, group_size=1, select=TOKEN, linear=None), (1, 2, 131)),
    "temperature": (
        SPLASpec(head_dim=16, group_size=2, select=TOKEN, linear=Residual(temperature=True)),
        (1, 4, 100),
    ),
    "tiles longer than blocks": (
        SPLASpec(
            head_dim=16,
            group_size=2,
            select=Select(
                block_size=16,
                budget=1,
                sinks=0,
                local=0,
                granularity="tile",
                tile=32,
                metric=lib.taylor(covariance="diag"),
            ),
            linear=Residual(lib.elu1, normaliser=True),
            combine="gate",
        ),
        (1, 4, 120),
    ),
    "not causal": (
        SPLASpec(head_dim=16, group_size=3, causal=False, select=TOKEN, linear=Residual(lib.elu1), combine="add"),
        (1, 6, 100),
    ),
    "fewer blocks than the budget": (
        SPLASpec(
            head_dim=16,
            group_size=2,
            select=Select(block_size=16, budget=9, sinks=0, local=0, metric=lib.taylor(covariance="diag")),
        ),
        (1, 2, 60),
    ),
}


BY_KEY = {"forward_strategy": {"strategy": 1}, "backward_strategy": {"strategy": 1}}


def check(
    spec: SPLASpec,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int = 1,
) -> None:
    """By key against the oracle, in so many rounds over the KV heads each way."""
    module = pipeline.generate(spec, folder).module
    if rounds > 1:
        allow_a_share(module, rounds, monkeypatch)
    launched = record_launches(module, monkeypatch)
    truth = oracle(to_toml(spec))
    rows = compare(module, truth, random_inputs(truth, shape, dtype, device, 0), shape, schedules=BY_KEY)
    assert {"block_sparse_parts", "block_sparse_merge"} <= set(launched)
    assert launched.count("block_sparse_merge") == launched.count("block_sparse_dq_merge") == rounds
    assert "block_sparse_forward" not in launched
    assert not [f"{r.quantity}: {r.error:.1e}" for r in rows if not r.ok]


@pytest.mark.parametrize("case", CASES)
def test_parts_by_key_merge_to_the_oracle(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = CASES[case]
    check(spec, shape, torch.float32, torch.device("cpu"), tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (16, 128), (3, 80)])
def test_parts_by_key_on_the_gpu(
    group: int, head_dim: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPLASpec(
        head_dim=head_dim,
        group_size=group,
        select=Select(block_size=64, budget=5, metric=lib.taylor(covariance="diag")),
    )
    check(spec, (2, 2 * group, 1000), dtype, torch.device("cuda"), tmp_path, monkeypatch)


@pytest.mark.parametrize("case", ["temperature", "tiles longer than blocks", "not causal"])
def test_parts_that_do_not_fit_go_by_heads(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = CASES[case]
    check(spec, shape, torch.float32, torch.device("cpu"), tmp_path, monkeypatch, rounds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [2, 4])
def test_parts_that_do_not_fit_go_by_heads_on_the_gpu(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a call that is repeated gives the same bits: those of all heads at once."""
    spec, shape = SPLASpec(head_dim=128, group_size=4, select=Select(block_size=64, budget=5)), (2, 16, 1000)
    module, truth = pipeline.generate(spec, tmp_path).module, oracle(to_toml(spec))
    given = random_inputs(truth, shape, torch.bfloat16, "cuda", 0)
    rows = [given[a.name] for a in truth.partition.inputs]
    chosen = module.schedules_for(rows[0]) | BY_KEY
    launched = record_launches(module, monkeypatch)
    whole = module.forward(chosen, *rows)
    assert launched.count("block_sparse_merge") == 1
    check(spec, shape, torch.bfloat16, torch.device("cuda"), tmp_path, monkeypatch, rounds)
    launched.clear()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(module.forward(chosen, *rows), whole, strict=True))
    assert launched.count("block_sparse_merge") == 3 * rounds


def test_heads_that_a_score_numbers_are_not_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPLASpec(head_dim=16, group_size=2, select=TOKEN, linear=None, score=lib.alibi())
    module = pipeline.generate(spec, tmp_path).module
    truth = oracle(to_toml(spec))
    monkeypatch.setattr(module, "most_parts", lambda device: 1)
    launched = record_launches(module, monkeypatch)
    shape = (1, 4, 85)
    rows = compare(module, truth, random_inputs(truth, shape, torch.float32, "cpu", 0), shape, schedules=BY_KEY)
    assert not {"block_sparse_merge", "block_sparse_dq_merge"} & set(launched)
    assert not [f"{r.quantity}: {r.error:.1e}" for r in rows if not r.ok]
