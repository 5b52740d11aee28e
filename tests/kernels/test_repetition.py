"""A call like an earlier one repeats what that one did, on its own tensors: numbers of every strategy."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from splagen import library as lib
from splagen import pipeline, sequence_verification
from splagen.kinds import oracle
from splagen.ops import Oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.sse_spec import Router, SSESpec
from splagen.verification import random_inputs
from tests.kernels.repeatable import repeatable

SPECS = {
    "residual": SPLASpec(
        head_dim=16, group_size=2, select=Select(block_size=16, budget=2, metric=lib.taylor(covariance="diag"))
    ),
    "gate and temperature": SPLASpec(
        head_dim=24,
        group_size=1,
        select=Select(
            block_size=16, budget=2, sinks=0, local=0, granularity="tile", tile=32, metric=lib.taylor(covariance="diag")
        ),
        linear=Residual(lib.elu1, normaliser=True, temperature=True),
        combine="gate",
    ),
    "no selection": SPLASpec(head_dim=16, group_size=2, select=None, linear=None),
}
STRATEGIES = [(name, i) for name, spec in SPECS.items() for i in (range(2) if spec.select else range(1))]


class Op:
    """Forward and backward of a module on inputs by name; what they return, in order."""

    def __init__(self, module: ModuleType, truth: Oracle, strategy: int) -> None:
        self.module, self.part = module, truth.partition
        self.strategies = {c.name: {"strategy": strategy} for c in self.part.strategies}

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = [given[a.name] for a in self.part.inputs]
        found = self.module.forward(self.module.schedules_for(inputs[0]) | self.strategies, *inputs)
        return dict(zip([a.name for a in (*self.part.outputs, *self.part.saved)], found, strict=True))

    def backward(self, given: dict[str, Tensor], results: dict[str, Tensor]) -> Sequence[Tensor]:
        arguments = [given[a.name] for a in self.part.inputs]
        arguments += [results[a.name] for a in self.part.residuals] + [given[a.name] for a in self.part.cotangents]
        chosen = self.module.schedules_for(arguments[0]) | self.strategies
        found: Sequence[Tensor] = self.module.backward(chosen, *arguments)
        return found

    def both(self, given: dict[str, Tensor]) -> list[Tensor]:
        results = self.forward(given)
        return [*results.values(), *self.backward(given, results)]


@pytest.fixture(params=STRATEGIES, ids=lambda p: f"{p[0]}, strategy {p[1]}")
def op(request: pytest.FixtureRequest, tmp_path: Path) -> Op:
    name, strategy = request.param
    return Op(pipeline.generate(SPECS[name], tmp_path).module, oracle(to_toml(SPECS[name])), strategy)


def given(op: Op, seed: int, length: int = 40) -> dict[str, Tensor]:
    truth = oracle(op.module.SPEC)
    return random_inputs(truth, (1, truth.partition.group_size, length), torch.float32, "cpu", seed)


def equal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(xs, ys, strict=True))


def test_a_repeated_call_gives_what_a_first_one_gives(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = given(op, 0), given(op, 1)
    want = [op.both(x) for x in (first, other)]
    if op.strategies.get("forward_strategy") == {"strategy": 1}:
        monkeypatch.setattr(op.module, "MOST_SHARED", 0)
        monkeypatch.setattr(op.module, "LITTLE", 0)  # each array by itself
    asked, ran = repeatable(op.module, monkeypatch)
    assert equal(op.both(first), want[0])
    assert asked
    assert not ran
    launched = list(asked)
    asked.clear()
    assert equal(op.both(other), want[1]), "other values"
    assert ran == launched
    assert not asked
    results = op.forward(first), op.forward(other)
    assert equal(op.backward(first, results[0]), want[0][-len(op.part.gradients) :]), "forwards in between"
    assert equal(list(results[1].values()), want[1][: len(results[1])]), "results are their own"
    assert not asked


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return pipeline.generate(SPECS["no selection"], tmp_path_factory.mktemp("repetition")).module


@hypothesis.given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(1, 9)), max_size=12))
def test_arrays_that_one_step_needs_lie_apart(module: ModuleType, arrays: list[tuple[int, int, int]]) -> None:
    """Bytes, first step and number of steps of each; together they take no less than a step needs."""
    wanted = [(i, size, first, first + steps) for i, (size, first, steps) in enumerate(arrays)]
    begins, room = module.room_for(wanted)
    assert all(begin % 512 == 0 and begin + wanted[i][1] <= room for i, begin in begins.items())
    for (i, x, first, end), (j, y, f, e) in itertools.combinations(wanted, 2):
        if f < end and first < e:
            assert begins[i] + x <= begins[j] or begins[j] + y <= begins[i] or not x * y
    most = max((sum(-(-x // 512) * 512 for _, x, f, e in wanted if f <= step < e) for step in range(19)), default=0)
    assert most <= room <= sum(-(-x // 512) * 512 for _, x, *_ in wanted)


def test_what_a_call_reads_decides_whether_it_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["no selection"]
    op = Op(pipeline.generate(spec, tmp_path).module, oracle(to_toml(spec)), 0)
    module, first = op.module, given(op, 0, 20)
    want = op.forward(first)
    asked, ran = repeatable(module, monkeypatch)

    def asks(**changed: Tensor) -> bool:
        asked.clear(), ran.clear()
        found = op.forward(first | changed)
        assert all(torch.equal(found[name], x) for name, x in want.items())
        assert bool(asked) != bool(ran)
        return bool(asked)

    assert asks()
    assert not asks()
    wide = torch.zeros(1, 20, 1, 20)
    assert asks(k=wide[..., :16].copy_(first["k"])), "strides"
    assert not asks(k=wide[..., :16])
    assert asks(k=wide.view(-1)[1:].as_strided(first["k"].shape, first["k"].stride()).copy_(first["k"])), "alignment"
    assert not asks()
    schedule = module.SCHEDULES["sm_90"]["fp32"]["block_sparse_forward"]
    monkeypatch.setitem(schedule, "num_warps", 1)
    assert asks(), "a Schedule, changed in place"
    assert not asks()
    launch = module.launch_block_sparse_forward
    with monkeypatch.context() as replaced:
        replaced.setattr(module, "launch_block_sparse_forward", lambda *a: (asked.clear(), launch(*a))[1])
        op.forward(first)
        assert ran, "launched again by the launcher, with what the JIT chose"
    assert not asks()
    assert len(module.KEPT) == 3
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    longer = given(op, 0, 24)
    op.forward(longer)
    assert len(module.KEPT) == 1


RECURRENCES = {
    "none, no router": SSESpec(head_dim=16, group_size=2, backbone="none", router=None),
    "scalar": SSESpec(head_dim=16, group_size=2, backbone="scalar", router=Router(partitions=2)),
    "vector": SSESpec(head_dim=16, backbone="vector", router=Router(partitions=2, writers=2)),
    "delta": SSESpec(head_dim=16, backbone="delta", router=Router(partitions=2)),
    "masked": SSESpec(head_dim=16, backbone="scalar", router=Router(partitions=2), form="masked"),
}


@pytest.mark.usefixtures("fast_sort")
@pytest.mark.parametrize("name", RECURRENCES)
def test_calls_of_a_recurrence_are_repeated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RECURRENCES[name]
    module, truth = pipeline.generate(spec, tmp_path).module, oracle(to_toml(spec))
    heads = spec.group_size
    tokens = [sequence_verification.random_inputs(truth, [1, 1], heads, torch.float32, "cpu", seed) for seed in (0, 1)]
    long = [sequence_verification.random_inputs(truth, [20, 9], heads, torch.float32, "cpu", seed) for seed in (0, 1)]
    schedules = module.schedules_for(long[0]["v"])

    def calls() -> list[Tensor]:
        table, slots = tokens[0]["state"].clone(), torch.tensor([1, 0], dtype=torch.int32)
        found = [module.step(schedules, *(x[n] for n in truth.names), table, slots) for x in tokens]
        found.append(table)
        for x in long:
            rows = [x[n] for n in (*truth.names, "state", "cu_seqlens")]
            cotangents = [x[n] for n in ("do", "dfinal", "dbalance") if n in x]
            found += [*module.forward(schedules, *rows), *module.backward(schedules, *rows, *cotangents)]
        return found

    want = calls()
    asked, ran = repeatable(module, monkeypatch)
    assert equal(calls(), want)
    assert asked, "the first calls ask"
    asked.clear(), ran.clear()
    assert equal(calls(), want)
    assert ran
    assert not asked
    assert all(x.again is not None for x in module.KEPT.values())
