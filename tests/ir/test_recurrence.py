"""Laws of the passes of recurrences: one partition's rows, one token, folded products, the factor of a state."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splagen.errors import ProgramError
from splagen.expression import symbol
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.frontend_sse import recurrence_program, router_program, states
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import Pass, copy_prop, drop_unused, run, settle_names, share
from splagen.ir.products import fold_products, largest_rank, pull_factors
from splagen.ir.program import LowRank, Lse, Map, Program, Reduce, Softmax, TopK, Var
from splagen.ir.recurrence import (
    carried,
    restrict,
    share_exponentials,
    single,
)
from splagen.ir.reference import evaluate
from splagen.sse_spec import SSESpec
from tests.ir.strategies import BACKBONES, CASES, LENGTH, ROUTES, inputs, programs, sizes, small_sse_specs
from tests.ir.test_passes import asked_values, assert_same
from tests.ir.test_sse import random_inputs

ROWS = ("i", "j", "l")
LARGE = largest_rank(2, (*ROWS, "d", "e"))
FOLDED = (share, share_exponentials, fold_products(LARGE), copy_prop, share, drop_unused, settle_names)


def values(p: Program, arrays: Mapping[str, Tensor], length: int, *more: Var) -> dict[str, Tensor]:
    wanted = [*p.outputs, *(g for _, g in p.gradients), *more]
    sizes_ = dict.fromkeys(ROWS, length)
    return evaluate(p, arrays, scalars={"L": length}, sizes=sizes_, wanted=list(dict.fromkeys(wanted)))


# -- restrict ----------------------------------------------------------------------------------------------------------


def check_restricted(spec: SSESpec, length: int, seed: int, masks: list[str]) -> None:
    """For every head and partition: the restricted program over the rows that are written, or over all of them."""
    p = check(recurrence_program(spec, "sparse"))
    one = check(restrict(p, "p", masks))
    assert "p" not in one.order
    assert {v.name for v in p.inputs} - {v.name for v in one.inputs} == set(masks)
    x = random_inputs(p, length, seed=seed)
    known = {v.name: v for v in p.inputs}
    whole = values(p, x, length)
    o, final = (whole[v.name] for v in p.outputs)
    total, assert_final = torch.zeros_like(o), []
    heads, partitions = o.shape[1], final.shape[3]

    def at(name: str, axes: dict[str, int | Tensor]) -> Tensor:
        v, found = known[name], x[name]
        for axis, where in axes.items():
            for here in {"i": ("i", "j")}.get(axis, (axis,)):
                if here in v.axes:
                    rows = torch.tensor([where]) if isinstance(where, int) else where
                    found = found.index_select(v.axes.index(here), rows)
        return found

    for b in range(o.shape[0]):
        for h in range(heads):
            for n in range(partitions):
                written = at("write", {"b": b, "h": h, "p": n}).flatten()
                rows = written.nonzero().flatten() if masks else torch.arange(length)
                place: dict[str, int | Tensor] = {"b": b, "h": h, "i": rows, "p": n}
                given_rows = {v.name: at(v.name, place) for v in p.inputs}
                for v in p.inputs:
                    if "p" in v.axes:
                        given_rows[v.name] = given_rows[v.name].squeeze(v.axes.index("p"))
                got = values(one, {v.name: given_rows[v.name] for v in one.inputs}, len(rows))
                part, end = (got[v.name] for v in one.outputs)
                total[b, h].index_add_(1, rows, part[0, 0])
                assert_final.append((end[0, 0], final[b, h, :, n]))
    assert_same({"o": total}, {"o": o}, 1e-12)
    for end, want in assert_final:
        assert_same({"final": end}, {"final": want}, 1e-12)


@settings(max_examples=15)
@given(small_sse_specs().filter(lambda s: s.router), st.integers(1, 9), st.integers(0, 99))
def test_a_partition_is_the_recurrence_over_the_rows_that_it_is_given(spec: SSESpec, length: int, seed: int) -> None:
    """Any masks will do; with as many readers as writers they hold and disappear."""
    check_restricted(spec, length, seed, [])
    if spec.router and spec.router.readers == spec.router.writers:
        check_restricted(spec, length, seed, ["write"])


def test_restrict_refuses_what_it_cannot_state() -> None:
    spec = CASES["scalar sorted"]
    p = recurrence_program(spec, "sparse")
    with pytest.raises(ProgramError, match="sse has no bool inputs read"):
        restrict(p, "p", ["read"])
    with pytest.raises(ProgramError, match="sse has no bool inputs eta"):
        restrict(p, "p", ["eta"])
    with pytest.raises(
        ProgramError, match=r"write\[b i p\] chooses along p\nhint: restrict the part behind the router"
    ):
        restrict(router_program(spec), "p", [])


# -- single ------------------------------------------------------------------------------------------------------------


def at_one(x: Tensor, v: Var, axes: tuple[str, ...]) -> Tensor:
    """The only entry along the axes."""
    return x[tuple(0 if a in axes else slice(None) for a in v.axes)]


def check_single(p: Program, axes: tuple[str, ...], x: Mapping[str, Tensor], left: dict[str, int]) -> None:
    """The value at extent 1 of `axes`; `left` are the extents of the others."""
    whole = {**left, **dict.fromkeys(axes, 1)}
    scalars = {"L": LENGTH, "N": 1, "M": 1}
    want = evaluate(p, x, scalars=scalars, sizes=whole)
    step = check(single(p, axes))
    assert not set(step.order) & set(axes)
    arrays = {v.name: at_one(x[v.name], v, axes) for v in p.inputs}
    got = evaluate(step, arrays, scalars=scalars, sizes=left)
    truth = {f"output {n}": at_one(want[v.name], v, axes) for n, v in enumerate(p.outputs)}
    truth |= {f"d{v.name}": at_one(want[g.name], g, axes) for v, g in p.gradients}
    assert_same(asked_values(step, got), truth)


@settings(max_examples=20)
@given(small_sse_specs(), st.booleans(), st.integers(0, 99))
def test_one_token_is_the_recurrence_of_length_one(spec: SSESpec, joint: bool, seed: int) -> None:
    for kind in states(spec):
        p = recurrence_program(spec, kind)
        p = derive_gradient(p) if joint else p
        check_single(p, ROWS, random_inputs(p, 1, seed=seed), {})


def small_programs() -> dict[str, Program]:
    """Programs of one rule each, over i (run-time extent N) and d."""
    found = {}
    for name in ("masked sum", "masked max", "count", "softmax", "lse", "topk", "gradient of a mean", "unit inverse"):
        b = Builder("p", (*((a, symbol("N")) for a in "ijl"), ("d", 3)))
        x, y = b.input("x", ("i", "d")), b.input("y", ("i", "j", "d"))
        mask = b.map("mask", symbol("x0") > 0, x)
        made = {
            "masked sum": lambda b=b, x=x, m=mask: b.reduce("out", "sum", ("i",), x, m),
            "masked max": lambda b=b, x=x, m=mask: b.reduce("out", "max", ("i",), x, m),
            "count": lambda b=b, m=mask: b.map("out", lambda n: n / 2, b.reduce("n", "sum", ("i",), m)),
            "softmax": lambda b=b, x=x, m=mask: b.softmax("out", ("i",), x, m),
            "lse": lambda b=b, x=x: b.lse("out", ("i",), x),
            "topk": lambda b=b, x=x: b.contract("out", ("d",), x, b.topk("one", 1, "i", x)),
            "gradient of a mean": lambda b=b, x=x: b.reduce("out", "mean", ("i",), x),
            "unit inverse": lambda b=b, y=y: b.unit_inverse("out", y),
        }[name]()
        p = check(b.program(made))
        p = replace(p, inputs=tuple(v for v in p.inputs if any(v in eq.args for eq in p.equations)))
        found[name] = derive_gradient(p) if "gradient" in name else p
    return found


@pytest.mark.parametrize("name", [n for n in small_programs() if n != "unit inverse"])
def test_single_of_any_operation_is_right_or_refused(name: str) -> None:
    p = small_programs()[name]
    try:
        check_single(p, ("i", "j", "l"), inputs(p, {"i": 1, "j": 1, "l": 1}, seed=0), {})
    except ProgramError as error:
        assert error.hint, "a refusal of the pass itself, not of the verifier behind it"  # noqa: PT017


def test_single_of_a_unit_inverse() -> None:
    """It is 1, for every index of the other axes."""
    p = small_programs()["unit inverse"]
    check_single(p, ("i", "j", "l"), inputs(p, {"i": 1, "j": 1, "l": 1}, seed=0), {})


def refused_by_single(p: Program, axes: set[str]) -> bool:
    """True where something goes along the axes that no recurrence has."""
    for eq in p.equations:
        match eq.op:
            case Softmax(over) | Lse(over) if axes & set(over):
                return True
            case Reduce(_, over) if set(over) <= axes and eq.args[0].kind == "bool":
                return True
            case TopK(_, axis) if axis in axes:
                return True
            case LowRank(rows, features, rank) if {rows, features, rank} & axes:
                return True
    return False


@given(programs(), st.sampled_from([("i", "j", "l"), ("t",), ("i", "j", "l", "t")]), st.booleans(), st.integers(0, 99))
def test_single_is_the_value_at_extent_one(p: Program, axes: tuple[str, ...], joint: bool, seed: int) -> None:
    p = derive_gradient(p) if joint else p
    if not refused_by_single(p, set(axes)):
        extents = {"i": 1, "j": 1, "l": 1, "t": 1}
        check_single(p, axes, inputs(p, extents, seed), {a: n for a, n in extents.items() if a not in axes})


# -- share_exponentials and fold_products ------------------------------------------------------------------------------


@given(programs(), sizes(), st.booleans(), st.integers(0, 99))
def test_a_shared_exponential_changes_no_value(p: Program, extents: dict[str, int], joint: bool, seed: int) -> None:
    p = share(derive_gradient(p) if joint else p)
    check_same(p, check(share_exponentials(p)), extents, seed)


@given(programs(), sizes(), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_folded_products_change_no_value(
    p: Program, extents: dict[str, int], rank: int, joint: bool, seed: int
) -> None:
    p = derive_gradient(p) if joint else p
    large = largest_rank(rank, [a for a, _ in p.axes])
    check_same(p, check(fold_products(lambda v: v.kind == "real" and large(v))(p)), extents, seed)


@given(programs(), sizes(), st.booleans(), st.integers(0, 99))
def test_pulled_factors_change_no_value(p: Program, extents: dict[str, int], joint: bool, seed: int) -> None:
    p = derive_gradient(p) if joint else p
    check_same(p, check(pull_factors(p)), extents, seed)


def masked_programs() -> dict[str, tuple[Pass, Program]]:
    b = Builder("p", (("i", symbol("N")), ("j", symbol("N")), ("d", 3)))
    x = b.input("x", ("i", "j", "d"))
    mask = b.map("mask", symbol("x0") > 0, x)
    count = b.reduce("count", "sum", ("j", "d"), mask)
    half = b.program(b.map("half", lambda n: n / 2, count))
    product = b.program(b.contract("out", ("i",), x, mask))
    fold = fold_products(largest_rank(2, ("i", "j", "d")))
    return {"folded": (fold, product), "pulled": (pull_factors, product), "count": (fold, half)}


@pytest.mark.parametrize("name", ["folded", "pulled", "count"])
def test_products_with_a_comparison(name: str) -> None:
    apply, p = masked_programs()[name]
    check_same(p, check(apply(p)), {"i": 4, "j": 4}, 0)


def check_same(before: Program, after: Program, extents: dict[str, int], seed: int) -> None:
    x = inputs(before, extents, seed)
    want = evaluate(before, x, scalars={"L": LENGTH}, sizes=extents)
    got = evaluate(after, x, scalars={"L": LENGTH}, sizes=extents)
    assert_same(asked_values(after, got), asked_values(before, want))


@pytest.mark.parametrize("guarded", [False, True])
def test_a_derivative_reads_the_exponential_that_is_there(guarded: bool) -> None:
    """y = exp(u - w), behind a condition or not: dy/du is y and dy/dw is -y, and no second exp is left."""
    b = Builder("p", (("i", symbol("N")), ("j", symbol("N"))))
    u, w = b.input("u", ("i",)), b.input("w", ("j",))
    at = b.iota("at", "i"), b.iota("from", "j")
    x = [symbol(f"x{n}") for n in range(4)]
    rule = sp.exp(x[0] - x[1])
    rule = sp.Piecewise((rule, sp.Le(x[3], x[2])), (0, True)) if guarded else rule
    y = b.map("y", rule, u, w, *at) if guarded else b.map("y", rule, u, w)
    p = run(derive_gradient(b.program(y)), (share, share_exponentials, share))
    exponentials = [eq.out.name for eq in p.equations if isinstance(eq.op, Map) and eq.op.expr.has(sp.exp)]
    assert exponentials == ["y"]


@pytest.mark.parametrize("name", CASES)
def test_only_the_decay_itself_is_over_pairs_and_features(name: str) -> None:
    """After folding, forward and backward; without it the gradient alone has several such arrays."""
    spec = CASES[name]
    for kind in states(spec):
        p = recurrence_program(spec, kind)
        masks = ["write"] if kind == "sparse" and spec.form == "sorted" else []
        joint = derive_gradient(restrict(p, "p", masks) if kind == "sparse" else p)
        folded = check(run(joint, FOLDED))
        large = [eq for eq in folded.equations if LARGE(eq.out)]
        x = random_inputs(joint, 5)
        assert_same(asked_values(folded, values(folded, x, 5)), asked_values(joint, values(joint, x, 5)), 1e-12)
        if spec.backbone != "vector":
            assert not large
            continue
        (between,) = large
        assert between.out.name.startswith("between")
        assert isinstance(between.op, Map)
        assert between.op.expr.has(sp.exp)
        assert len([eq for eq in run(joint, (share, copy_prop)).equations if LARGE(eq.out)]) > 2


# -- carried -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{b} {r}" for b, site in BACKBONES if not site for r in list(ROUTES)[:4]])
def test_an_additive_state_is_carried_by_a_factor(name: str) -> None:
    """after(state) - after(0) = factor * state, and likewise the cotangent backwards."""
    spec, length = CASES[name], 6
    for kind in states(spec):
        p = recurrence_program(spec, kind)
        p = restrict(p, "p", ["write"] if spec.form == "sorted" else []) if kind == "sparse" else p
        joint = derive_gradient(p)
        state = next(v for v in joint.inputs if v.name.startswith("state"))
        final, dfinal = joint.cotangents[1]
        x = random_inputs(joint, length)
        for after, before in ((final, state), (dict(joint.gradients)[state], dfinal)):
            found = carried(joint, after, before)
            assert found is not None
            expr, args = found
            assert before not in args
            b = Builder.resume(joint)
            factor = b.map("the_factor", expr, *args) if args else None
            p = joint.with_equations(b.equations)
            empty = {**x, before.name: torch.zeros_like(x[before.name])}
            full = values(p, x, length, after, *([factor] if factor else []))
            added = values(p, empty, length, after)[after.name]
            scale = full[factor.name] if factor else torch.tensor(float(expr), dtype=torch.float64)
            if factor:
                shape = [scale.shape[factor.axes.index(a)] if a in factor.axes else 1 for a in before.axes]
                scale = scale.reshape(shape)
            assert_same({"carried": scale * x[before.name]}, {"carried": full[after.name] - added}, 1e-12)


@pytest.mark.parametrize(("backbone", "site"), BACKBONES)
@pytest.mark.parametrize("route", ["no router", "sorted"])
def test_the_step_of_the_delta_rule_is_a_matrix(backbone: str, site: str | None, route: str) -> None:
    spec = CASES[" ".join(filter(None, (backbone, site, route)))]
    for kind in states(spec):
        joint = derive_gradient(recurrence_program(spec, kind))
        state = next(v for v in joint.inputs if v.name.startswith("state"))
        final, dfinal = joint.cotangents[1]
        found = carried(joint, final, state), carried(joint, dict(joint.gradients)[state], dfinal)
        assert [f is None for f in found] == [backbone == "delta"] * 2


def test_a_state_that_enters_otherwise_has_no_factor() -> None:
    b = Builder("p", (("i", symbol("N")), ("d", 3)))
    state, x = b.input("state", ("d",)), b.input("x", ("i",))
    x0, x1 = symbol("x0"), symbol("x1")
    total = b.reduce("total", "sum", ("i",), x)
    half = b.map("half", lambda h: h / 2, state)
    afters = {
        "twice": (b.map("twice", x0 * x1 + x0, half, total), (symbol("x0") + 1) / 2),
        "sum": (b.map("sum", x0 - x1, half, state), sp.Rational(-1, 2)),
        "square": (b.map("square", x0 * x1, half, state), None),
        "bent": (b.map("bent", sp.tanh(x0), state), None),
        "mixed": (b.contract("mixed", ("d",), state, b.contract("norm", (), state, state)), None),
        "apart": (b.map("apart", lambda t: 2 * t, total), sp.S.Zero),
    }
    p = b.program(*(v for v, _ in afters.values()))
    for name, (v, want) in afters.items():
        found = carried(p, v, state)
        if want is None:
            assert found is None, name
        else:
            assert found is not None, name
            assert sp.simplify(found[0] - want) == 0, name
            assert found[1] == ((total,) if want.free_symbols else ()), name
