"""verify of SSE specs: what it compares, that it finds what is wrong, and that every stage of the pipeline is there."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splagen import pipeline, tuning
from splagen.errors import InputError, WrongResult
from splagen.kinds import oracle
from splagen.sequence import SSEOracle
from splagen.sequence_verification import TOLERANCE, cases, gradient_scales, gradients_of_tokens, random_inputs, verify
from splagen.spec import SPLASpec, to_toml
from splagen.sse_spec import Router, SSESpec

SPEC = SSESpec(head_dim=16, value_dim=20, backbone="scalar", router=Router(partitions=3, writers=1))
SHAPE = (1, 1, 20)
SPECS = {
    "scalar": SPEC,
    "masked": SSESpec(head_dim=16, backbone="none", router=Router(partitions=2, writers=1, readers=2), form="masked"),
    "shared only": SSESpec(head_dim=16, backbone="vector", router=None),
    "by head": SSESpec(head_dim=16, backbone="delta", group_size=2, shared=False, router=Router(scope="head")),
    "constant": SSESpec(head_dim=16, backbone="constant", group_size=2, router=None),
}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline.generate(SPEC, tmp_path_factory.mktemp("kernels")).module


def changed(module: Any, **functions: Any) -> Any:
    """The module with some of its functions replaced."""
    return SimpleNamespace(**{**vars(module), **functions})


def wrong(module: Any) -> set[str]:
    """The quantities beyond their limits."""
    return {r.quantity for r in verify(module, SSEOracle(SPEC), shapes=[SHAPE]).rows if not r.ok}


# -- what is found -----------------------------------------------------------------------------------------


def test_a_right_module_passes_and_everything_is_compared(module: Any) -> None:
    report = verify(module, SSEOracle(SPEC), shapes=[SHAPE, (2, 1, 1)])
    report.raise_if_wrong()
    inputs = ["q1", "k1", "g1", "q2", "k2", "g2", "logits", "v", "state"]
    wanted = ["o", "final", "balance", *(f"d{n}" for n in inputs)]
    found = [r.quantity for r in report.rows if r.shape == SHAPE]
    assert found == [n + case for case in ("", ", packed", ", strong decay") for n in wanted]


def test_wrong_outputs_are_found(module: Any) -> None:
    def forward(*args: Any) -> Any:
        o, final, balance = module.forward(*args)
        samples = args[-1].shape[0] - 1
        final[samples - 1, 1] *= 1.001
        return o, final, balance * (1 if samples == 1 else 1.0001)

    found = wrong(changed(module, forward=forward))
    assert found == {"final", "final, packed", "final, strong decay", "balance, packed", "balance, strong decay"}


def test_wrong_gradients_are_found(module: Any) -> None:
    def backward(schedules: Any, *args: Any) -> Any:
        found = list(module.backward(schedules, *args[:-1], 0.999 * args[-1]))  # of the balance loss
        found[5] = found[5] * 1.0001  # dg2
        return found

    found = wrong(changed(module, backward=backward))
    assert {n.split(",")[0] for n in found} == {"dg2", "dlogits"}
    assert {"dlogits", "dlogits, packed", "dlogits, strong decay", "dg2", "dg2, packed"} <= found


def test_what_is_not_finite_is_found_and_named(module: Any) -> None:
    def backward(*args: Any) -> Any:
        found = module.backward(*args)
        found[0][3] = math.nan
        return found

    report = verify(changed(module, backward=backward), SSEOracle(SPEC), shapes=[SHAPE])
    with pytest.raises(WrongResult, match=r"dq1 at \(B, H, L\) = \(1, 1, 20\), float32: error inf > 1e-05"):
        report.raise_if_wrong()


# -- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 1, 2), (3, 2, 50)])
def test_packed_cases_have_as_many_tokens_an_empty_sequence_and_a_single_token(shape: tuple[int, int, int]) -> None:
    (_, plain, none), (_, packed, random), (_, again, strong) = cases(SPEC, shape)
    assert plain == shape[0] * [shape[2]]
    assert sum(packed) == shape[0] * shape[2]
    assert packed == again
    assert {0, 1} <= set(packed)
    assert (none, random, strong) == (None, None, -5.0)


def test_without_decay_there_is_no_strong_one() -> None:
    assert len(cases(SPECS["masked"], SHAPE)) == 2


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_inputs_are_those_of_the_op(spec: SSESpec) -> None:
    truth = SSEOracle(spec)
    heads = 2 * spec.group_size
    inputs = random_inputs(truth, [7, 0, 1], heads, torch.bfloat16, "cpu", 0)
    op = tuning.load(spec)
    rows = [inputs[n] if inputs[n].ndim == 1 else inputs[n][None] for n in truth.names]
    o, final, *_ = op(*rows, initial_state=inputs["state"], cu_seqlens=inputs["cu_seqlens"])
    assert o[0].shape == inputs["do"].shape
    assert final.shape == inputs["dfinal"].shape
    narrow = {n for n, x in inputs.items() if x.dtype == torch.bfloat16}
    assert narrow == {"do", *(n for n in truth.names if n[0] in "qkv")}
    assert all(bool((x <= 0).all()) for n, x in inputs.items() if n.startswith("g"))


def test_heads_are_a_multiple_of_the_group() -> None:
    with pytest.raises(InputError, match="H = 3 is not a multiple of group_size 2"):
        random_inputs(SSEOracle(SPECS["constant"]), [5], 3, torch.float32, "cpu", 0)


def test_a_gradient_that_cancels_is_measured_by_what_cancels() -> None:
    one = torch.ones(4)
    truth = {"q1": 2 * one, "g1": 1e-6 * one, "k1": 0 * one}
    truth_of = SSEOracle(SPEC)
    scales = gradient_scales(truth_of, {"q1": 3 * one}, truth, TOLERANCE[torch.float32][1])
    assert scales == {"q1": pytest.approx(4.0), "g1": pytest.approx(12.0), "k1": pytest.approx(4.0)}
    narrow = gradient_scales(truth_of, {"q1": 3 * one}, truth, TOLERANCE[torch.bfloat16][1])
    assert narrow["g1"] == pytest.approx(12.0 * 1e-5 / 5e-3)


def test_what_tokens_give_to_a_decay_that_they_share_adds_up_to_its_gradient() -> None:
    truth_of = SSEOracle(SPECS["constant"])
    inputs = random_inputs(truth_of, [9, 0, 4], 2, torch.float32, "cpu", 0)
    whole = truth_of.gradients(inputs)
    of_tokens = gradients_of_tokens(truth_of, inputs)
    assert of_tokens.keys() == {"g1"}
    torch.testing.assert_close(of_tokens["g1"].sum(0), whole["g1"], rtol=1e-12, atol=0)
    scale = gradient_scales(truth_of, inputs, whole, TOLERANCE[torch.bfloat16][1])["g1"]
    assert scale == pytest.approx(max(float(of_tokens["g1"].norm()), float(whole["g1"].norm())))


# -- the pipeline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_stages_end_with_the_programs_of_the_kernels(spec: SSESpec) -> None:
    stages, part = pipeline.stages(spec), pipeline.kernels(spec)
    last = {name.split(".")[0]: program for name, program in stages.items()}
    assert next(iter(stages)) == "definition"
    assert last.pop("definition") == pipeline.program(spec)
    assert last == pipeline.lowered(spec)
    assert last == part.programs
    assert "p" in stages["definition"].order
    assert all(".derive_gradient" in " ".join(n for n in stages if n.startswith(part)) for part in last)


def test_the_oracle_of_a_text_is_that_of_its_kind() -> None:
    assert isinstance(oracle(to_toml(SPEC)), SSEOracle)
    assert oracle(to_toml(SPEC)) is oracle(to_toml(SPEC))
    assert not isinstance(oracle(to_toml(SPLASpec(head_dim=16))), SSEOracle)


def test_verify_takes_a_spec_and_default_shapes() -> None:
    assert pipeline.verify(SPECS["shared only"], shapes=[(1, 1, 3)]).ok
    assert pipeline.default_shapes(SPECS["constant"], "cpu") == [(1, 2, 67)]
    assert all(length > 900 for _, _, length in pipeline.default_shapes(SPEC, "cuda"))
