"""Laws of the passes that put partitions side by side, and the equations of the routed form that they give."""

from collections.abc import Mapping
from functools import partial

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splagen.codegen.sequence_partition import FACTORING, SEQUENCE_LOWERING
from splagen.errors import ProgramError
from splagen.expression import symbol
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.frontend_sse import recurrence_program, router_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.partitions import copied, copy_name, masks_as_factors, unroll
from splagen.ir.passes import run
from splagen.ir.program import (
    Contract,
    CumSum,
    Iota,
    LowRank,
    Lse,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    UnitInverse,
    Var,
)
from splagen.ir.reference import evaluate
from splagen.sse_spec import Router, SSESpec
from tests.ir.strategies import CASES, LENGTH, inputs, programs, sizes
from tests.ir.test_passes import assert_same
from tests.ir.test_sse import random_inputs

ROUTED = {n: s for n, s in CASES.items() if s.router and s.backbone in ("none", "constant", "scalar")}
ROWS = ("i", "j", "l")


def asked(p: Program) -> list[Var]:
    return list(dict.fromkeys([*p.outputs, *(g for _, g in p.gradients)]))


def check_unrolled(p: Program, axis: str, x: Mapping[str, Tensor], extents: dict[str, int], length: int) -> Program:
    """Each input cut along the axis gives each output cut along it, gradients too."""

    def cut(arrays: Mapping[str, Tensor], every: list[Var], copies: list[Var]) -> dict[str, Tensor]:
        parts = [
            y
            for v in every
            for y in (arrays[v.name].unbind(v.axes.index(axis)) if axis in v.axes else [arrays[v.name]])
        ]
        return {v.name: y for v, y in zip(copies, parts, strict=True)}

    one = check(unroll(p, axis))
    assert axis not in one.order
    assert [v for v, _ in one.gradients] == [v for v in one.inputs if v in dict(one.gradients)]
    want = evaluate(p, x, scalars={"L": length}, sizes=extents)
    left = {a: n for a, n in extents.items() if a != axis}
    got = evaluate(one, cut(x, list(p.inputs), list(one.inputs)), scalars={"L": length}, sizes=left)
    for before, after in ((p.outputs, one.outputs), ([g for _, g in p.gradients], [g for _, g in one.gradients])):
        copies = list(after)
        assert_same({v.name: got[v.name] for v in copies}, cut(want, list(before), copies), 1e-12)
    return one


def goes_along(p: Program, axis: str) -> bool:
    """True where an operation does more with the axis than keep it or sum over it."""
    for eq in p.equations:
        match eq.op:
            case Softmax(over) | Lse(over) | CumSum(over) if axis in over:
                return True
            case Iota(group) if axis in group and len(group) > 1:
                return True
            case TopK(_, along) if axis == along:
                return True
            case Rename(pairs) if any(axis in pair for pair in pairs):
                return True
            case UnitInverse() if axis in (eq.op.row, eq.op.column, eq.op.third):
                return True
            case LowRank(rows, features, rank) if axis in (rows, features, rank):
                return True
            case Reduce(how, over) if axis in over and (how == "max" or eq.args[0].kind != "real"):
                return True
            case Reduce("mean", over) if axis in over and len(eq.args) > 1:
                return True
    return False


@given(programs(), sizes(), st.booleans(), st.integers(0, 99))
def test_unrolling_changes_no_value(p: Program, extents: dict[str, int], joint: bool, seed: int) -> None:
    p = derive_gradient(p) if joint else p
    for axis in [a for a, e in p.axes if isinstance(e, int)]:
        x = inputs(p, extents, seed)
        if goes_along(p, axis):
            try:
                unroll(p, axis)
            except ProgramError as error:
                assert error.hint  # noqa: PT017
                continue
        check_unrolled(p, axis, x, extents, LENGTH)


@pytest.mark.parametrize("name", ROUTED)
def test_all_partitions_side_by_side_are_the_recurrence(name: str) -> None:
    """Of any spec without a decay inside products, and its gradient."""
    p = check(recurrence_program(ROUTED[name], "sparse"))
    for q in (p, check(masks_as_factors(p)), derive_gradient(p)):
        check_unrolled(q, "p", random_inputs(q, 5, seed=3), dict.fromkeys(ROWS, 5), 5)


@pytest.mark.parametrize("name", ROUTED)
def test_a_mask_as_a_factor_changes_no_value(name: str) -> None:
    p = recurrence_program(ROUTED[name], "sparse")
    x = random_inputs(p, 5, seed=4)
    found = [evaluate(q, x, scalars={"L": 5}, sizes=dict.fromkeys(ROWS, 5)) for q in (p, check(masks_as_factors(p)))]
    names = [v.name for v in p.outputs]
    assert_same({n: found[1][n] for n in names}, {n: found[0][n] for n in names}, 1e-12)


@given(programs(), sizes(), st.integers(0, 99))
def test_masks_as_factors_change_no_value(p: Program, extents: dict[str, int], seed: int) -> None:
    x = inputs(p, extents, seed)
    want, got = (evaluate(q, x, scalars={"L": LENGTH}, sizes=extents) for q in (p, check(masks_as_factors(p))))
    assert_same({v.name: got[v.name] for v in asked(p)}, {v.name: want[v.name] for v in asked(p)})


def test_masks_that_are_no_factor_stay() -> None:
    """Only in a product that sums over an axis which the mask lacks; a decay that may be -oo is none."""
    b = Builder("p", (("i", symbol("N")), ("d", 3)))
    x, y, m = b.input("x", ("i", "d")), b.input("y", ("d",)), b.input("m", ("i",), "bool")
    x0, x1, x2 = (symbol(f"x{n}") for n in range(3))
    rule = sp.Piecewise((2 * x0 * x1, x2), (0, True))
    read = b.map("read", rule, x, b.reduce("size", "sum", ("d",), x), m)
    kept = b.map("kept", sp.Piecewise((x0, x1), (0, True)), x, m)
    other = b.map("other", sp.Piecewise((x0, x1), (1, True)), x, m)
    p = b.program(
        b.contract("a", ("i",), read, y), b.reduce("b", "sum", ("d",), kept), b.contract("c", ("i",), other, y)
    )
    after = {eq.out.name: eq for eq in check(masks_as_factors(p)).equations}
    assert after["read"].op.expr == x0 * x1
    assert [v.name for v in after["read"].args] == ["x", "read_gate"]
    assert after["kept"] in p.equations
    assert after["other"] in p.equations


@pytest.mark.parametrize("partitions", [1, 2, 4])
@pytest.mark.parametrize("name", ["none", "constant", "scalar"])
def test_one_product_of_queries_and_keys_serves_all_partitions(name: str, partitions: int) -> None:
    """One q k^T and one a v; a product with each state; an update of each; in the gradient dP k and dP^T q once too."""
    spec = SSESpec(head_dim=16, backbone=name, router=Router(partitions), form="routed")  # type: ignore[arg-type]
    sides = (masks_as_factors, partial(unroll, axis="p"), *FACTORING)
    p = run(recurrence_program(spec, "sparse"), sides)

    def products(q: Program, kept: set[str], summed: set[str]) -> int:
        every = [eq for eq in q.equations if isinstance(eq.op, Contract)]
        axes = [(set(eq.op.keep), {a for v in eq.args for a in v.axes} - set(eq.op.keep)) for eq in every]
        return sum((k & {"i", "j", "d", "e"}, s & {"i", "j", "d", "e"}) == (kept, summed) for k, s in axes)

    assert products(p, {"i", "j"}, {"d"}) == 1
    assert products(p, {"i", "e"}, {"j"}) == 1
    assert products(p, {"i", "e"}, {"d"}) == partitions
    assert products(p, {"d", "e"}, {"j"}) == partitions
    joint = run(p, (derive_gradient, *SEQUENCE_LOWERING))
    assert products(joint, {"i", "j"}, {"d"}) == products(joint, {"i", "j"}, {"e"}) == 1
    assert products(joint, {"i", "d"}, {"j"}) == products(joint, {"j", "d"}, {"i"}) == 1
    assert products(joint, {"i", "d"}, {"e"}) == products(joint, {"j", "d"}, {"e"}) == partitions


def small_programs() -> dict[str, Program]:
    """Programs of one rule each, over i (run-time extent N) and p."""
    found = {}
    for name in ("counted", "largest", "summed", "masked sum", "masked mean", "mean", "mean of both", "position"):
        b = Builder("p", (("i", symbol("N")), ("p", 3)))
        x = b.input("x", ("i", "p"))
        mask = b.map("mask", symbol("x0") > 0, x)
        made = {
            "counted": lambda b=b, m=mask: b.map("out", lambda n: n / 2, b.reduce("n", "sum", ("p",), m)),
            "largest": lambda b=b, x=x: b.reduce("out", "max", ("p",), x),
            "summed": lambda b=b, x=x: b.reduce("out", "sum", ("i", "p"), x),
            "masked sum": lambda b=b, x=x, m=mask: b.reduce("out", "sum", ("p",), x, m),
            "masked mean": lambda b=b, x=x, m=mask: b.reduce("out", "mean", ("p",), x, m),
            "mean": lambda b=b, x=x: b.reduce("out", "mean", ("p",), x),
            "mean of both": lambda b=b, x=x: b.reduce("out", "mean", ("i", "p"), x),
            "position": lambda b=b, x=x: b.map("out", lambda a, n: a * n, x, b.iota("n", "p")),
        }[name]()
        found[name] = check(b.program(made))
    return found


@pytest.mark.parametrize("name", small_programs())
def test_unrolling_any_operation_is_right_or_refused(name: str) -> None:
    p = small_programs()[name]
    x = {"x": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    if name in ("counted", "largest", "masked mean"):
        with pytest.raises(ProgramError, match="goes along p") as caught:
            unroll(p, "p")
        assert caught.value.hint
        return
    check_unrolled(p, "p", x, {"i": 4}, 4)


def test_unroll_refuses_what_it_cannot_state() -> None:
    spec = CASES["scalar sorted"]
    with pytest.raises(ProgramError, match=r"write\[b i p\] goes along p\nhint: unroll an axis that is only kept"):
        unroll(router_program(spec), "p")
    with pytest.raises(ProgramError, match="i has extent L\nhint: unroll an axis of known extent"):
        unroll(recurrence_program(spec, "sparse"), "i")


def test_a_copys_name_says_of_what_it_is_one() -> None:
    assert copied(copy_name("eta", "p", 13), "p") == ("eta", 13)
    assert copied("deta_k2", "p") == ("deta_k2", 0)
    p = unroll(recurrence_program(CASES["none sorted"], "sparse"), "p")
    assert [copied(v.name, "p") for v in p.inputs if v.name.startswith("state")] == [("state2", n) for n in range(4)]
