"""The derived gradient against torch autograd of the oracle, against differences, and its exact zeros."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from splagen import library
from splagen.errors import ProgramError
from splagen.expression import symbol
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Program
from splagen.ir.reference import evaluate
from splagen.spec import Residual, Select, SPLASpec, windows
from tests.ir.blocked import blocked, evaluated, plain_keys, plain_rows, random_rows
from tests.ir.strategies import LENGTH, inputs, programs, sizes, small_specs

AXES = (("i", symbol("N")), ("j", symbol("N")), ("n", 3), ("d", 2))
X, Y = symbol("x0"), symbol("x1")


def by_autograd(
    p: Program, arrays: Mapping[str, Tensor], scalars: Mapping[str, float], extents: Mapping[str, int] = {}
) -> dict[str, Tensor]:
    """Gradients of the oracle by torch, for a gradient Program: by the name of its gradient variables."""
    leaves = {x.name: arrays[x.name].clone().requires_grad_() for x, _ in p.gradients}
    outputs = [y for y, _ in p.cotangents]
    got = evaluate(p, {**arrays, **leaves}, scalars=scalars, sizes=extents, wanted=outputs)
    total = sum((got[y.name] * arrays[dy.name]).sum() for y, dy in p.cotangents)
    found = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]
    return {g.name: dx for (_, g), dx in zip(p.gradients, found, strict=True)}


def check_against_autograd(
    p: Program, arrays: Mapping[str, Tensor], scalars: Mapping[str, float], extents: Mapping[str, int] = {}
) -> None:
    got = evaluate(p, arrays, scalars=scalars, sizes=extents)
    for name, want in by_autograd(p, arrays, scalars, extents).items():
        scale = max(1.0, want.abs().max().item())
        assert_close(got[name] / scale, want / scale, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@given(programs(), sizes(), st.integers(0, 99))
def test_derived_gradient_is_autograd_of_the_oracle(p: Program, extents: dict[str, int], seed: int) -> None:
    joint = check(derive_gradient(p))
    check_against_autograd(joint, inputs(joint, extents, seed), {"L": LENGTH}, extents)


@settings(max_examples=25)
@given(small_specs(), st.integers(1, 90), st.integers(1, 2), st.integers(0, 99))
def test_derived_gradient_of_a_spec_is_autograd(spec: SPLASpec, length: int, kv_heads: int, seed: int) -> None:
    joint = check(derive_gradient(spla_program(spec)))
    rows = random_rows(spec, 1, length, kv_heads, seed)
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * spec.group_size
    do = torch.randn(1, length, heads, spec.value_dim, generator=generator, dtype=torch.float64)
    ((_, cotangent),) = joint.cotangents
    check_against_autograd(joint, blocked(spec, {**rows, cotangent.name: do}), {"L": length})


def small_spec(**changes: object) -> SPLASpec:
    spec = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=1, sinks=1, local=0), combine="add")
    return replace(spec, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(),
        small_spec(causal=False, combine="rms", score=library.softcap(5.0)),
        small_spec(combine="gate", linear=Residual("elu1", temperature=True, normaliser=True)),
        small_spec(linear=None, combine="none", score=library.alibi()),
        small_spec(
            combine="rms_residual",
            select=Select(block_size=32, budget=1, local=0, granularity="tile", tile=16, statistics=windows()),
        ),
    ],
    ids=["causal", "two-sided", "normalised", "alibi", "tiles"],
)
@pytest.mark.parametrize("lowered", [False, True])
def test_gradcheck(spec: SPLASpec, lowered: bool) -> None:
    """The derived backward, as an autograd function, against finite differences of the oracle's forward."""
    joint = derive_gradient(spla_program(spec))
    if lowered:
        joint = run(joint, LOWERING)
    length = 75
    rows = blocked(spec, random_rows(spec, 1, length, 1))
    names = [x.name for x, _ in joint.gradients]
    ((out, cotangent),) = joint.cotangents
    forward = spla_program(spec)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *arrays: Tensor) -> Tensor:
            ctx.save_for_backward(*arrays)  # type: ignore[attr-defined]
            given_rows = {**rows, **dict(zip(names, arrays, strict=True))}
            return evaluate(forward, given_rows, scalars={"L": length})[out.name]

        @staticmethod
        def backward(ctx: object, do: Tensor) -> tuple[Tensor, ...]:
            saved = dict(zip(names, ctx.saved_tensors, strict=True))  # type: ignore[attr-defined]
            arrays = {**rows, **saved, cotangent.name: do}
            grads = [g for _, g in joint.gradients]
            values = evaluate(joint, arrays, scalars={"L": length}, wanted=grads)
            return tuple(values[g.name] for g in grads)

    leaves = [rows[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(Attention.apply, leaves, fast_mode=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(("row", "column"), [("i", "j"), ("j", "i")])
def test_gradcheck_of_unit_inverse(row: str, column: str, size: int) -> None:
    """-(y^T dy y^T) below the diagonal and exactly 0 elsewhere, against finite differences."""
    b = Builder("p", (("n", 2), *((a, symbol("N")) for a in "ijl")))
    p = b.program(b.unit_inverse("y", b.input("x", ("n", "i", "j")), row, column))
    joint = check(derive_gradient(p))
    ((_, dx),) = joint.gradients

    class Inverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return evaluate(p, {"x": x})["y"]

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return evaluate(joint, {"x": x, "dy": dy}, wanted=[dx])[dx.name]

    x = torch.randn(2, size, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Inverse.apply, x)
    (got,) = torch.autograd.grad(Inverse.apply(x).square().sum(), x)
    square = got if row == "i" else got.mT
    assert not square.triu().any()


# -- exact zeros -------------


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("selecting", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_an_all_masked_row_is_exactly_zero(causal: bool, selecting: bool, lowered: bool) -> None:
    """A score function may mask every key of a row: then o and every gradient from that row are 0."""
    rule = library.score_function(lambda s, m, n: library.where(n >= m + 3, s, -sp.oo))
    if causal:
        rule = library.score_function(lambda s, m, n: library.where(n < m - 40, s, -sp.oo))
    select = Select(block_size=16, budget=1, local=0) if selecting else None
    spec = small_spec(linear=None, combine="none", score=rule, causal=causal, select=select)
    length, empty = 50, slice(0, 41) if causal else slice(47, 50)
    joint = derive_gradient(spla_program(spec))
    if lowered:
        joint = run(joint, LOWERING)
    rows = random_rows(spec, 1, length, 1)
    do = torch.zeros(1, length, 2, 16, dtype=torch.float64)
    do[:, empty] = 1
    ((out, cotangent),) = joint.cotangents
    got = evaluated(joint, spec, {**rows, cotangent.name: do})
    o = plain_rows(got[out.name], length)
    assert not o[:, empty].any()
    assert o.isfinite().all()
    for x, g in joint.gradients:
        assert not got[g.name].any(), f"d{x.name}"


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("combine", ["add", "rms"])
@pytest.mark.parametrize("normaliser", [False, True])
def test_rows_with_nothing_unselected_are_exactly_zero(combine: str, normaliser: bool, lowered: bool) -> None:
    """o_r is 0 where n_unsel = 0, and a cotangent there gives the residual no gradient (spla.md 9.1)."""
    linear = Residual("hedgehog", normaliser=normaliser)
    spec = small_spec(combine=combine, linear=linear)
    joint = derive_gradient(spla_program(spec))
    if lowered:
        joint = run(joint, LOWERING)
    length = 100
    rows = random_rows(spec, 1, length, 2)
    program = spla_program(spec)
    arrays = blocked(spec, rows)
    n_unsel = evaluate(program, arrays, scalars={"L": length}, wanted=[program.var("n_unsel")])["n_unsel"]
    gated = n_unsel[0, :, :, None] == 0  # [h T m]
    assert gated.any()
    assert not gated.all()
    do = torch.ones(1, 2, 2, length, 1, 16, dtype=torch.float64) * gated[None, :, None, :, :, None]
    branch = [joint.var(n) for n in ("o_r", "dphi_q", "dphi_k")]
    got = evaluate(joint, {**arrays, "do": do}, scalars={"L": length}, wanted=branch)
    open_rows = ~gated[None, :, None].expand(1, 2, 2, length, 1)
    assert not got["o_r"][~open_rows].any()
    assert got["o_r"][open_rows].all()
    assert not got["dphi_q"].any()
    assert not got["dphi_k"].any()


def test_padded_rows_have_no_gradient() -> None:
    spec = small_spec(select=Select(block_size=32, budget=1, local=0, granularity="tile", tile=16))
    length = 70
    joint = derive_gradient(spla_program(spec))
    rows = random_rows(spec, 1, length, 1)
    arrays = blocked(spec, {**rows, "do": torch.ones(1, length, 2, 16, dtype=torch.float64)})
    got = evaluate(joint, arrays, scalars={"L": length})
    grads = {x.name: got[g.name] for x, g in joint.gradients}
    assert not plain_rows(grads["q"], 80)[:, length:].any()
    for name in "kv":
        assert not plain_keys(grads[name], 96)[:, length:].any()


# -- rules that random Programs reach rarely -------------


def test_ties_share_the_gradient_of_a_maximum() -> None:
    b = Builder("p", AXES)
    x, mask = b.input("x", ("n",)), b.input("mask", ("n",), "bool")
    joint = derive_gradient(b.program(b.reduce("y", "max", ("n",), x, mask)))
    ((_, dx),) = joint.gradients
    arrays = {"x": torch.tensor([2.0, 2.0, 2.0]), "dy": torch.tensor(6.0)}
    for held, want in (([1, 0, 1], [3, 0, 3]), ([1, 1, 1], [2, 2, 2]), ([0, 0, 0], [0, 0, 0])):
        assert evaluate(joint, {**arrays, "mask": torch.tensor(held) > 0})[dx.name].tolist() == want


def test_a_factor_that_appears_twice() -> None:
    b = Builder("p", AXES)
    x = b.input("x", ("i", "n"))
    y = b.contract("y", ("i",), x, x, x)
    joint = check(derive_gradient(b.program(b.map("z", X * Y + X, y, y))))
    check_against_autograd(joint, inputs(joint, {"i": 4}, 0), {})


@pytest.mark.parametrize("axes", [("i",), ("i", "n"), ("n", "d")])
def test_the_mean_over_a_run_time_axis_and_scalars_in_a_slope(axes: tuple[str, ...]) -> None:
    b = Builder("p", AXES, scalars=("L", "N"))
    x = b.input("x", ("i", "n", "d"))
    warm = b.map("warm", lambda v: sp.tanh(v * symbol("N") / symbol("L")), x)
    joint = check(derive_gradient(b.program(b.reduce("y", "mean", axes, warm))))
    check_against_autograd(joint, inputs(joint, {"i": 4}, 0), {"L": 5.0})


def test_wrt_selects_and_a_selection_has_no_gradient() -> None:
    b = Builder("p", AXES)
    x, z = b.input("x", ("i", "n")), b.input("z", ("i", "n"))
    chosen = b.topk("chosen", 1, "n", z)
    p = b.program(b.contract("y", ("i",), x, chosen))
    with pytest.raises(ProgramError, match=r"no output of p depends on z\[i n\]"):
        derive_gradient(p, wrt=["x", "z"])
    joint = derive_gradient(p)
    assert joint.gradients == derive_gradient(p, wrt=["x"]).gradients
    arrays = inputs(joint, {"i": 4}, 0)
    got = evaluate(joint, arrays)[joint.gradients[0][1].name]
    best = torch.nn.functional.one_hot(arrays["z"].argmax(-1), 3)
    assert_close(got, arrays["dy"][:, None] * best, rtol=0, atol=0)
