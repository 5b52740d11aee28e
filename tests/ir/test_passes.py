"""The law of every pass: the value does not change, and what the pass claims to find is found."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from splagen import library
from splagen.expression import symbol
from splagen.ir.assumptions import fold_constants
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import (
    LONG,
    LOWERING,
    Pass,
    associate,
    copy_prop,
    drop_unused,
    expose_lse,
    factor_out,
    join_sums,
    run,
    scaling,
    settle_names,
    share,
    specialise,
    split_complement,
)
from splagen.ir.products import reuse
from splagen.ir.program import Contract, Equation, Map, Program, Reduce, Softmax, TopK, Var, placeholder
from splagen.ir.reference import evaluate
from splagen.ir.remaining import remaining_states
from splagen.ir.totals import take_from_total
from splagen.spec import Residual, Select, SPLASpec, windows
from tests.ir.blocked import evaluated, random_rows
from tests.ir.strategies import LENGTH, inputs, programs, sizes, small_specs

PASSES: dict[str, Pass] = {
    "share": share,
    "drop_unused": drop_unused,
    "copy_prop": copy_prop,
    "expose_lse": expose_lse,
    "factor_out": factor_out,
    "remaining_states": remaining_states,
    "take_from_total": take_from_total,
    "split_complement": split_complement,
    "associate": associate,
    "reuse": reuse,
    "join_sums": join_sums(lambda eq: isinstance(eq.op, Contract)),
    "settle_names": settle_names,
    "fold_constants": fold_constants,
    "LOWERING": lambda p: run(p, LOWERING),
}
IDEMPOTENT = ("share", "drop_unused", "copy_prop", "reuse", "settle_names", "fold_constants")
AXES = (("i", symbol("N")), ("j", symbol("N")), ("t", symbol("M")), ("d", 4), ("e", 3))


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], limit: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        scale = max(1.0, x.abs().max().item())
        assert_close(got[name] / scale, x / scale, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def asked_values(p: Program, got: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Program was asked for, by the role that passes keep: outputs by place, gradients by input."""
    outputs = {f"output {n}": got[v.name] for n, v in enumerate(p.outputs)}
    return outputs | {f"d{x.name}": got[g.name] for x, g in p.gradients}


@pytest.mark.parametrize("name", PASSES)
@given(programs(), sizes(), st.booleans(), st.integers(0, 99))
def test_the_value_does_not_change(name: str, p: Program, extents: dict[str, int], joint: bool, seed: int) -> None:
    p = derive_gradient(p) if joint else p
    arrays = inputs(p, extents, seed)
    after = check(PASSES[name](p))
    want = evaluate(p, arrays, scalars={"L": LENGTH}, sizes=extents)
    got = evaluate(after, arrays, scalars={"L": LENGTH}, sizes=extents)
    assert_same(asked_values(after, got), asked_values(p, want))
    assert [v.name for v in after.outputs] == [v.name for v in p.outputs]


@pytest.mark.parametrize("name", IDEMPOTENT)
@given(programs(), st.booleans())
def test_idempotent(name: str, p: Program, joint: bool) -> None:
    once = PASSES[name](derive_gradient(p) if joint else p)
    assert PASSES[name](once) == once


@given(programs(), sizes(), st.sets(st.sampled_from(["N", "M"])))
def test_specialise_keeps_the_value_at_its_sizes(p: Program, extents: dict[str, int], fixed: set[str]) -> None:
    p = derive_gradient(p)
    axes = {"N": ("i", "j"), "M": ("t",)}
    told = {a: extents[a] for s in fixed for a in axes[s]}
    after = check(specialise(told)(p))
    assert all(after.extents[a] == n for a, n in told.items())
    arrays = inputs(p, extents, 0)
    want = evaluate(p, arrays, scalars={"L": LENGTH}, sizes=extents)
    assert_same(evaluate(after, arrays, scalars={"L": LENGTH}, sizes=extents), want, 1e-12)
    symbols = {s.name for eq in after.equations if isinstance(eq.op, Map) for s in eq.op.expr.free_symbols}
    assert not fixed & symbols


# -- SPLA -------------


def small_spec(**changes: object) -> SPLASpec:
    spec = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=1, sinks=1, local=0))
    return replace(spec, **changes)  # type: ignore[arg-type]


SPECS = {
    "rms": small_spec(),
    "two-sided": small_spec(causal=False, combine="add", score=library.softcap(9.0)),
    "normalised": small_spec(combine="gate", linear=Residual("elu1", temperature=True, normaliser=True)),
    "identity": small_spec(combine="rms_residual", linear=Residual("identity")),
    "sparse": small_spec(linear=None, combine="none", score=library.alibi()),
    "window": small_spec(linear=None, combine="none", score=library.sliding_window(20)),
    "dense": small_spec(linear=None, combine="none", select=None),
    "tiles": small_spec(
        select=Select(block_size=32, budget=1, local=1, granularity="tile", tile=16, statistics=windows())
    ),
}


@cache
def joint_program(spec: SPLASpec) -> Program:
    return derive_gradient(spla_program(spec))


def spla_rows(spec: SPLASpec, length: int, seed: int = 0) -> dict[str, Tensor]:
    rows = random_rows(spec, 1, length, 2, seed)
    ((_, cotangent),) = joint_program(spec).cotangents
    generator = torch.Generator().manual_seed(seed + 1)
    do = torch.randn(1, length, 2 * spec.group_size, spec.value_dim, generator=generator, dtype=torch.float64)
    return {**rows, cotangent.name: do}


@pytest.mark.parametrize("name", [*PASSES, "specialise"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_and_gradient_of_spla_do_not_change(spec: SPLASpec, name: str) -> None:
    joint, rows = joint_program(spec), spla_rows(spec, 107)
    blocks = -(-107 // (spec.select.block_size if spec.select else 64))
    fixed = specialise({"b": 1, "h": 2, "J": blocks, "Jw": blocks})
    after = check((PASSES | {"specialise": fixed})[name](joint))
    got, want = evaluated(after, spec, rows), evaluated(joint, spec, rows)
    assert_same(asked_values(after, got), asked_values(joint, want))
    if name in IDEMPOTENT:
        assert PASSES[name](after) == after


@settings(max_examples=15)
@given(small_specs(), st.integers(1, 90), st.integers(0, 9))
def test_lowering_keeps_the_value_of_any_spec(spec: SPLASpec, length: int, seed: int) -> None:
    joint, rows = joint_program(spec), spla_rows(spec, length, seed)
    after = run(joint, LOWERING)
    got, want = evaluated(after, spec, rows), evaluated(joint, spec, rows)
    assert_same(asked_values(after, got), asked_values(joint, want), 1e-8)


RESIDUAL = [name for name, spec in SPECS.items() if spec.linear]


def is_complement(eq: Equation) -> bool:
    wanted = sp.And(placeholder(0), sp.Not(placeholder(1)))
    swapped = sp.And(placeholder(1), sp.Not(placeholder(0)))
    return isinstance(eq.op, Map) and eq.op.expr in (wanted, swapped)


@pytest.mark.parametrize("name", RESIDUAL)
def test_lowering_derives_the_subtraction(name: str) -> None:
    """Nothing reads `far and not free` any more; forward, dphi_q, dphi_k, dv are differences of two sums."""
    joint = joint_program(SPECS[name])
    assert any(is_complement(eq) for eq in joint.equations)
    after = run(joint, LOWERING)
    assert not any(is_complement(eq) for eq in after.equations)
    differences = {
        re.sub(r"_\d+$", "", eq.out.name)
        for eq in after.equations
        if isinstance(eq.op, Map) and eq.op.expr == placeholder(0) - placeholder(1)
    }
    assert {"rest_kv", "n_unsel", "dphi_q", "dphi_k"} <= differences


def is_tile(v: Var) -> bool:
    """A real array over query rows and key rows."""
    return v.kind == "real" and {"T", "n"} <= set(v.axes)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_delta_needs_no_scores(spec: SPLASpec) -> None:
    """delta = sum over keys of p dp became sum over e of o_s do: no contraction multiplies two tiles."""

    def products_of_tiles(p: Program) -> list[Equation]:
        return [eq for eq in p.equations if isinstance(eq.op, Contract) and sum(map(is_tile, eq.args)) > 1]

    joint = joint_program(spec)
    after = run(joint, LOWERING)
    assert [eq.out.name for eq in products_of_tiles(joint)] == ["delta_p"]
    assert not products_of_tiles(after)
    delta = after.definitions[after.var("delta_p")]
    assert isinstance(delta.op, Contract)
    assert "o_s" in {v.name for v in delta.args}
    assert all(set(v.axes) == {"b", "h", "g", "T", "m", "e"} for v in delta.args)


def data_masks(p: Program) -> set[Var]:
    found: set[Var] = set()
    for eq in p.equations:
        if eq.out.kind == "bool" and (isinstance(eq.op, TopK) or found & set(eq.args)):
            found.add(eq.out)
    return found


@pytest.mark.parametrize("name", RESIDUAL)
def test_products_under_a_selection_stay_in_score_form(name: str) -> None:
    """At most two real factors, which meet at (query row, key row); states elsewhere are per block."""
    after = run(joint_program(SPECS[name]), LOWERING)
    chosen = data_masks(after)
    seen = 0
    for eq in after.equations:
        if isinstance(eq.op, Contract) and chosen & set(eq.args):
            reals = [v for v in eq.args if v.kind == "real"]
            assert len(reals) <= 2, eq
            weight = any(not {"d", "e"} & set(v.axes) for v in reals)  # the normaliser's cotangent, per row
            assert weight or {"T", "n"} <= {a for v in reals for a in v.axes}, eq
            seen += 1
    assert seen >= 4
    for v in (eq.out for eq in after.equations):
        if "e" in v.axes and "d" in v.axes:
            assert not {"m", "n"} & set(v.axes), f"{v} holds a state for every row"
            assert not {"T", "J"} <= set(v.axes), f"{v} holds a state for every pair of tile and block"


def multiplications(p: Program, extents: Mapping[str, int]) -> float:
    """Of all contractions, each as one loop over every axis that it touches."""
    total = 0.0
    for eq in p.equations:
        if isinstance(eq.op, Contract):
            touched = {a for v in eq.args for a in v.axes}
            total += math.prod(float(extents[a]) for a in touched) * max(1, len(eq.args) - 1)
    return total


@given(programs(), st.booleans())
def test_associate_never_costs_more_on_long_sequences(p: Program, joint: bool) -> None:
    p = derive_gradient(p) if joint else p
    extents = {a: e if isinstance(e, int) else LONG for a, e in p.axes}
    assert multiplications(associate(p), extents) <= multiplications(p, extents)


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_linear_branch_costs_no_product_of_sequence_and_state(name: str) -> None:
    """Doubling the length at most quadruples the work: nothing is cubic, and pairs cost d + e, not d * e."""
    after = run(joint_program(SPECS[name]), LOWERING)
    once, twice = (
        multiplications(after, {a: e if isinstance(e, int) else n for a, e in after.axes}) for n in (2**12, 2**13)
    )
    assert twice < 16.01 * once  # B and Hkv double as well
    features = 16 * 16
    for eq in after.equations:
        if isinstance(eq.op, Contract):
            touched = {a for v in eq.args for a in v.axes}
            if {"T", "J"} <= touched and {"m", "n"} & touched:
                assert math.prod(after.extents[a] for a in touched & {"d", "e"}) < features, eq


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_expose_lse_leaves_no_softmax_over_a_sequence(spec: SPLASpec) -> None:
    after = expose_lse(joint_program(spec))
    for eq in after.equations:
        if isinstance(eq.op, Softmax):
            assert all(isinstance(after.extents[a], int) for a in eq.op.axes)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_sum_over_tiles_reads_a_scaled_tile(spec: SPLASpec) -> None:
    after = run(joint_program(spec), LOWERING)
    sums = [eq for eq in after.equations if isinstance(eq.op, Contract)]
    summed = {v: eq for eq in sums for v in eq.args if set(v.axes) - set(eq.out.axes)}
    assert not [v for v in summed if scaling(after.definitions.get(v))]


@given(programs())
def test_share_leaves_no_equal_equations(p: Program) -> None:
    after = share(derive_gradient(p))
    asked = {*after.outputs, *(g for _, g in after.gradients)}
    plain = [(eq.op, tuple(sorted(map(str, eq.args)))) for eq in after.equations if eq.out not in asked]
    assert len(plain) == len(set(plain))


@given(programs())
def test_drop_unused_leaves_nothing_unread(p: Program) -> None:
    after = drop_unused(p)
    read = {v for eq in after.equations for v in eq.args} | set(after.outputs)
    assert all(eq.out in read for eq in after.equations)


# -- split_complement, for any masks -------------


def complement_program(over: Callable[[Builder, Var, Var, Var], Var], chosen: str) -> Program:
    b = Builder("p", AXES)
    x = b.input("x", ("i", "j", "d"))
    whole = b.input("P", ("i", "j"), "bool")
    if chosen == "free":
        free = b.topk("F", 2, "j", b.input("score", ("i", "j")), whole)
    elif chosen == "free among others":
        free = b.topk("F", 2, "j", b.input("score", ("i", "j")), b.input("Q", ("i", "j"), "bool"))
    else:
        free = b.input("F", ("t", "j") if chosen == "other axes" else ("i", "j"), "bool")
    rest = b.map("rest", lambda p, f: sp.And(p, sp.Not(f)), whole, free)
    return b.program(over(b, x, rest, whole))


SUMS: dict[str, Callable[[Builder, Var, Var, Var], Var]] = {
    "contract": lambda b, x, rest, whole: b.contract("y", ("i", "d"), x, rest),
    "square": lambda b, x, rest, whole: b.contract("y", ("d",), x, rest, x, rest),
    "beside P": lambda b, x, rest, whole: b.contract("y", ("j", "d"), whole, x, rest),
    "count": lambda b, x, rest, whole: b.reduce("y", "sum", ("j",), rest),
}


@pytest.mark.parametrize("chosen", ["any", "other axes", "free", "free among others"])
@pytest.mark.parametrize("over", SUMS)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_split_complement_is_exact_for_any_masks(over: str, chosen: str, n: int, m: int, seed: int) -> None:
    p = complement_program(SUMS[over], chosen)
    after = check(drop_unused(split_complement(p)))
    assert not any(is_complement(eq) for eq in after.equations)
    arrays = inputs(p, {"i": n, "j": n, "t": m}, seed)
    arrays["x"] = (8 * arrays["x"]).round()  # whole numbers: equal to the last bit
    got, want = evaluate(after, arrays)["y"], evaluate(p, arrays)["y"]
    assert torch.equal(got, want)


def test_a_top_k_among_p_is_subtracted_as_it_is() -> None:
    after = drop_unused(split_complement(complement_program(SUMS["contract"], "free")))
    assert {v.name for eq in after.equations if isinstance(eq.op, Contract) for v in eq.args} == {
        "x",
        "P",
        "F",
    }


def test_sums_that_are_no_sums_are_left_alone() -> None:
    """A maximum or a mean over P and not F is no difference."""
    for how in ("max", "mean"):
        b = Builder("p", AXES)
        x, whole, free = b.input("x", ("i", "j")), b.input("P", ("j",), "bool"), b.input("F", ("j",), "bool")
        rest = b.map("rest", lambda p, f: sp.And(p, sp.Not(f)), whole, free)
        p = b.program(b.reduce("y", how, ("j",), x, rest))  # type: ignore[arg-type]
        assert split_complement(p) == p


# -- associate and reuse on small cases -------------


def test_associate_finds_the_state_and_keeps_scores_under_a_selection() -> None:
    for data in (False, True):
        b = Builder("p", AXES)
        q, k, v = b.input("q", ("i", "d")), b.input("k", ("j", "d")), b.input("v", ("j", "e"))
        if data:
            mask = b.topk("mask", 1, "j", b.input("score", ("i", "j")))
            want = {("q", "k"), ("y_scores", "v", "mask")}
        else:
            mask = b.map("mask", sp.Ge(placeholder(0), 0), b.iota("at", "t"))
            want = {("k", "v"), ("q", "y_states", "mask")}
        keep = ("i", "e") if data else ("i", "t", "e")
        after = associate(b.program(b.contract("y", keep, q, k, v, mask)))
        pairs = {frozenset(a.name for a in eq.args) for eq in after.equations if isinstance(eq.op, Contract)}
        assert pairs == {frozenset(names) for names in want}


def test_reuse_turns_delta_into_a_row_sum() -> None:
    b = Builder("p", AXES)
    p, v, do = b.input("p", ("i", "j", "t")), b.input("v", ("j", "t", "e")), b.input("do", ("i", "e"))
    o = b.contract("o", ("i", "e"), p, v)
    dp = b.contract("dp", ("i", "j", "t"), do, v)
    after = reuse(b.program(o, dp, b.contract("delta", ("i",), p, dp)))
    assert {v.name for v in after.equations[-1].args} == {"do", "o"}
    arrays = inputs(after, {"i": 4, "j": 4, "t": 3}, 0)
    want = torch.einsum("ijt,ie,jte->i", arrays["p"], arrays["do"], arrays["v"])
    assert_close(evaluate(after, arrays)["delta"], want, rtol=1e-12, atol=1e-12)


def test_reuse_does_not_mix_up_an_axis_that_is_summed_twice() -> None:
    """(sum over e of do v) times (sum over e of p): p v is known, but its e is another one."""
    b = Builder("p", AXES)
    p, v, do = b.input("p", ("i", "j", "t", "e")), b.input("v", ("i", "e")), b.input("do", ("i", "e"))
    o, dp = b.contract("o", ("i", "e"), p, v), b.contract("dp", ("i",), do, v)
    whole = b.program(o, dp, b.contract("y", ("i",), p, dp))
    arrays = inputs(whole, {"i": 4, "j": 4, "t": 3}, 0)
    want = arrays["p"].sum((1, 2, 3)) * (arrays["do"] * arrays["v"]).sum(1)
    assert_close(evaluate(reuse(whole), arrays)["y"], want, rtol=1e-12, atol=1e-12)


def test_copy_prop_keeps_an_output_and_follows_chains() -> None:
    b = Builder("p", AXES)
    x = b.input("x", ("i", "d"))
    one = b.map("one", placeholder(0), x)
    two = b.contract("two", ("i", "d"), one)
    flag = b.input("flag", ("i",), "bool")
    number = b.contract("number", ("i",), flag)  # 0 or 1: not a copy
    asked = b.map("asked", placeholder(0), two)
    after = check(copy_prop(b.program(asked, b.contract("y", ("i",), two, number))))
    assert {v.name for eq in after.equations for v in eq.args} == {"x", "flag", "number"}
    assert [v.name for v in after.outputs] == ["asked", "y"]


def test_share_sees_through_order_and_repetition() -> None:
    b = Builder("p", AXES)
    x, y = b.input("x", ("i", "d")), b.input("y", ("i", "d"))
    first, second = b.contract("first", ("i",), x, y), b.contract("second", ("i",), y, x)
    third = b.map("third", placeholder(0) + 2 * placeholder(1), first, second)
    fourth = b.map("fourth", 2 * placeholder(0) + placeholder(1), second, first)
    after = check(
        share(b.program(b.reduce("sum", "sum", ("i",), b.map("both", placeholder(0) - placeholder(1), third, fourth))))
    )
    arrays = inputs(after, {"i": 3}, 0)
    assert evaluate(after, arrays)["sum"] == 0
    assert sum(isinstance(eq.op, Contract) for eq in after.equations) == 1
    assert sum(isinstance(eq.op, Reduce) for eq in after.equations) == 1


def test_run_verifies_between_passes() -> None:
    def forget(p: Program) -> Program:
        return p.with_equations(p.equations[1:])

    p = joint_program(SPECS["dense"])
    with pytest.raises(Exception, match="is read before it is defined, in `"):
        run(p, [share, forget])
