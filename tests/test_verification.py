"""verify finds what is wrong: outputs, gradients, selections that are not a best choice."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splagen import pipeline
from splagen.errors import InputError, WrongResult
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.pipeline import generate, generate_decoding, generate_packed, generate_prefill
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.tuning import tune
from splagen.verification import loss_scale, random_inputs, relative_error, selection_error, verify

SPEC = SPLASpec(
    head_dim=16,
    group_size=2,
    select=Select(block_size=16, budget=2, metric=taylor(covariance="diag")),
    linear=Residual(),
)
SHAPE = (1, 2, 100)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return generate(SPEC, tmp_path_factory.mktemp("kernels")).module


def changed(module: Any, **functions: Any) -> Any:
    """The module with some of its functions replaced."""
    return SimpleNamespace(**{**vars(module), **functions})


def test_a_right_module_passes(module: Any) -> None:
    verify(module, oracle(to_toml(SPEC)), shapes=[SHAPE]).raise_if_wrong()


def test_steps_are_verified_as_an_op_is(tmp_path: Path) -> None:
    library = generate_decoding(SPEC, tmp_path)
    report = pipeline.verify(library, shapes=[(1, 2, 3)])
    assert report.ok
    assert {r.quantity for r in report.rows} == {"o of steps", "selection of steps"}


def test_modules_of_packed_rows_have_a_verification_of_their_own(tmp_path: Path) -> None:
    for library in (generate_packed(SPEC, tmp_path), generate_prefill(SPEC, tmp_path)):
        with pytest.raises(InputError, match=f"{library.op_name} is neither"):
            pipeline.verify(library, shapes=[SHAPE])
        with pytest.raises(InputError, match=f"{library.op_name} is neither"):
            tune(library, shapes=[SHAPE])


@pytest.mark.parametrize(("name", "schedules"), [("forward", {}), ("direct_forward", None)])
def test_a_wrong_output_is_found(name: str, schedules: dict[str, dict[str, int]] | None, module: Any) -> None:
    def forward(*args: Any) -> Any:
        o, *saved = getattr(module, name)(*args)
        return 1.0001 * o, *saved

    report = verify(changed(module, **{name: forward}), oracle(to_toml(SPEC)), shapes=[SHAPE], schedules=schedules)
    assert [r.quantity for r in report.rows if not r.ok] == ["o"]
    with pytest.raises(WrongResult, match=r"o at \(B, H, L\) = \(1, 2, 100\), float32: error 1\.00e-04 > 1e-05"):
        report.raise_if_wrong()


@pytest.mark.parametrize(("name", "schedules"), [("backward", {}), ("direct_backward", None)])
def test_a_wrong_gradient_is_found(name: str, schedules: dict[str, dict[str, int]] | None, module: Any) -> None:
    def backward(*args: Any) -> Any:
        dq, dk, *rest = getattr(module, name)(*args)
        dk[:, 7] = 0
        return dq, dk, *rest

    report = verify(changed(module, **{name: backward}), oracle(to_toml(SPEC)), shapes=[SHAPE], schedules=schedules)
    assert [r.quantity for r in report.rows if not r.ok] == ["dk"]


def test_a_selection_that_is_no_best_choice_is_found() -> None:
    truth = oracle(to_toml(SPEC))
    inputs = random_inputs(truth, SHAPE, torch.float32, "cpu", 0)
    indices, counts = truth.values(inputs, ["block_indices", "block_counts"])
    assert selection_error(truth, inputs, indices, counts) == 0.0
    worse = indices.clone()
    row = worse[0, 0, 99]  # blocks 1 to 4 may be chosen
    row[:] = torch.tensor(sorted({1, 2, 3, 4} - set(row.tolist())))
    assert 0.0 < selection_error(truth, inputs, worse, counts) < math.inf
    twice = indices.clone()
    twice[0, 0, 99] = twice[0, 0, 99, 0]
    assert selection_error(truth, inputs, twice, counts) == math.inf
    near = indices.clone()
    near[0, 0, 99, 1] = 6  # its own block
    assert selection_error(truth, inputs, near, counts) == math.inf


def test_relative_error_is_infinite_for_nan_and_takes_a_scale() -> None:
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want + torch.tensor([0.3, 0.4]), want) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan]), want) == math.inf
    assert relative_error(torch.tensor([1e-9]), torch.tensor([0.0]), scale=2.0) == pytest.approx(5e-10)


@pytest.mark.parametrize(("top", "factor"), [(1.0, 2.0**10), (3.0e3, 4.0), (1.0e5, 2.0**-3)])
def test_loss_scale_keeps_float16_gradients_in_range(top: float, factor: float) -> None:
    truth = {"q": torch.tensor([top]), "k": torch.tensor([top / 7])}
    assert loss_scale(truth, torch.float16) == factor
    assert top * factor <= 2.0**14
    assert loss_scale(truth, torch.bfloat16) == 1.0
