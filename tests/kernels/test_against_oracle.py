"""Every kernel of a spec together, forward and backward, against the oracle."""

from pathlib import Path

import pytest
import torch

from splagen import library as lib
from splagen.kinds import oracle
from splagen.pipeline import generate
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Report, compare, random_inputs
from tests.kernels.cases import DIAGONAL, GPU, SMALL, USER, Case, Shape
from tests.kernels.embedding import embedded, fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")


def verify(
    spec: SPLASpec,
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Report:
    """verification.verify with NaN around every input and in every array that a kernel is to fill."""
    module = generate(spec, folder).module
    fill_empty_with_nan(module, monkeypatch)
    truth = oracle(to_toml(spec))
    rows = []
    for seed, shape in enumerate(shapes):
        inputs = embedded(random_inputs(truth, shape, dtype, device, seed))
        rows += compare(module, truth, inputs, shape, schedules={})  # test_direct.py has the kernels for few blocks
    return Report(spec.name, tuple(rows))


def pairs(cases: tuple[Case, ...]) -> list[object]:
    """(case, dtype), named after both; slow where other cases are run instead."""
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if case.instead else [],
        )
        for case in cases
        for dtype in case.dtypes
    ]


@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL))
def test_the_interpreter_agrees_with_the_oracle(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(case.spec, case.shapes, dtype, device, tmp_path, monkeypatch).raise_if_wrong()


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), pairs(GPU))
def test_the_gpu_agrees_with_the_oracle(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(case.spec, case.shapes, dtype, device, tmp_path, monkeypatch).raise_if_wrong()


def test_scores_that_grow_beyond_the_sequence(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 0 behind the last query add nothing to dk and dv only if their p is a number."""
    growing = lib.score_function(lambda s, m, n: s + 2 * (m - n))  # of query 63, key 0: e**126
    spec = SPLASpec(head_dim=16, group_size=2, causal=False, score=growing, select=None, linear=None)
    verify(spec, ((1, 2, 50),), torch.float32, device, tmp_path, monkeypatch).raise_if_wrong()


def test_every_axis_has_a_case() -> None:
    """What is not slow has each value of the axes of a spec, and what is named instead of a slow case."""
    quick = tuple(c for c in SMALL if not c.instead)
    assert {name for c in SMALL for name in c.instead} <= {c.name for c in quick}
    for cases in (quick, GPU):
        specs = [c.spec for c in cases]
        selects = [s.select for s in specs if s.select]
        linears = [s.linear for s in specs if s.linear]
        assert {s.causal for s in specs} == {True, False}
        assert {s.combine for s in specs} == {"none", "add", "rms", "rms_residual", "gate"}
        assert {m.feature_map.name for m in linears} >= {
            "identity", "relu", "relu2", "elu1", "exp", "softmax", "hedgehog"
        }  # fmt: skip
        assert {m.feature_map for m in linears} & {USER}
        assert any(m.temperature for m in linears)
        assert any(m.normaliser for m in linears)
        assert {s.block_size for s in selects} == {16, 32, 64, 128}
        assert {s.tile for s in selects} >= {1, 16, 32, 64, 128}
        assert {(s.metric.order, s.metric.form) for s in selects} == {
            (1, "taylor"), (2, "taylor"), (2, "cumulant")
        }  # fmt: skip
        assert {s.metric.rank for s in selects} == {0, 2, 4, 8}
        assert {(s.statistics.cell, s.statistics.pool) for s in selects} == {
            (None, "logsum"), (16, "logsum"), (16, "max")
        }  # fmt: skip
        assert {s.score.name for s in specs if s.score} >= {"softcap", "alibi", "sliding_window"}
        assert any(s.dense_below for s in specs)
        assert any(s.select is None for s in specs)
        assert any(s.select and not s.linear for s in specs)
        assert any(b > 1 for c in cases if c.spec.linear for b, _, _ in c.shapes)
        assert len({t for c in cases for t in c.dtypes}) > 1
    groups = {c.spec.group_size for c in (*quick, *GPU)}
    assert groups >= {1, 3, 4, 5, 6, 7, 8, 16, 64}
    assert {c.spec.head_dim for c in GPU} >= {64, 80, 96, 128, 192, 256}
    assert {n for c in GPU for _, _, n in c.shapes} >= {1, 15, 63, 64, 65, 1000, 4095}


@pytest.mark.parametrize("causal", [True, False])
def test_the_residual_is_exactly_0_where_nothing_is_left(causal: bool, device: torch.device, tmp_path: Path) -> None:
    """Sums cancel to something near 0 there; the gate makes it 0, and the gradient of its rows too."""
    select = Select(block_size=16, budget=2, sinks=1, local=1, metric=DIAGONAL)
    spec = SPLASpec(
        head_dim=16, group_size=1, causal=causal, select=select, linear=Residual(own_rows=True), combine="add"
    )
    library = generate(spec, tmp_path)
    truth = oracle(to_toml(spec))
    for length, empty in ((60, True), (100, False)):
        inputs = random_inputs(truth, (1, 1, length), torch.float32, device, 0)
        arguments = [inputs[a.name] for a in truth.partition.inputs]
        names = [a.name for a in (*truth.partition.outputs, *truth.partition.saved)]
        schedules = library.module.schedules_for(arguments[0])
        results = dict(zip(names, library.module.forward(schedules, *arguments), strict=True))
        assert bool((results["n_unsel"] == 0).all()) == empty
        if empty:
            assert torch.equal(results["o"], results["o_s"])
            behind = [results[a.name] for a in truth.partition.residuals]
            behind += [inputs[a.name] for a in truth.partition.cotangents]
            found = library.module.backward(schedules, *arguments, *behind)
            gradients = {name: x for (name, _), x in zip(truth.partition.gradients, found, strict=True)}
            assert not gradients["q_r"].any()
            assert not gradients["k_r"].any()
            assert gradients["q"].any()
