"""Laws of what is known of run-time sizes: the value does not change where the fact holds, and constants disappear."""

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
from splagen.expression import symbol
from splagen.ir.assumptions import assume, below, fold_constants
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.frontend_spla import LENGTH, spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import CumSum, Map, Program, Softmax, TopK
from splagen.ir.reference import evaluate
from splagen.ir.text import equation_text
from splagen.spec import Residual, Select, SPLASpec, windows
from tests.ir.blocked import evaluated, random_rows
from tests.ir.strategies import small_specs

LIMIT = 91
SELECT = Select(block_size=16, budget=1, sinks=1, local=0)


def spec_of(**changes: object) -> SPLASpec:
    spec = SPLASpec(head_dim=16, group_size=2, select=SELECT, dense_below=LIMIT)
    return replace(spec, **changes)  # type: ignore[arg-type]


SPECS = {
    "rms": spec_of(),
    "rms_residual": spec_of(combine="rms_residual", linear=Residual("identity")),
    "add, not causal": spec_of(combine="add", causal=False),
    "gate, normalised": spec_of(combine="gate", linear=Residual("elu1", temperature=True, normaliser=True)),
    "softcap": spec_of(score=library.softcap(9.0)),
    "no residual": spec_of(linear=None, combine="none", score=library.alibi()),
    "tiles": spec_of(
        select=Select(block_size=32, budget=1, local=1, granularity="tile", tile=16, statistics=windows())
    ),
}


def arrays(program: Program, spec: SPLASpec, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in plain layout, cotangents among them."""
    rows = random_rows(spec, 1, length, 2, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    do = torch.randn(1, length, 2 * spec.group_size, spec.value_dim, generator=generator, dtype=torch.float64)
    return rows | {d.name: do for _, d in program.cotangents}


def assert_same_value(after: Program, before: Program, spec: SPLASpec, rows: Mapping[str, Tensor]) -> None:
    got, want = evaluated(check(after), spec, rows), evaluated(before, spec, rows)
    pairs = [*zip(after.outputs, before.outputs, strict=True)]
    pairs += [(g, w) for (_, g), (_, w) in zip(after.gradients, before.gradients, strict=True)]
    for g, w in pairs:
        assert_close(got[g.name].expand_as(want[w.name]), want[w.name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 16, 77, LIMIT - 1])
@pytest.mark.parametrize("name", SPECS)
def test_the_value_and_the_gradient_do_not_change_below_the_limit(name: str, length: int) -> None:
    """Folded before the gradient is derived, and after."""
    spec = SPECS[name]
    definition = spla_program(spec)
    short = run(definition, below(LENGTH, LIMIT))
    assert_same_value(short, definition, spec, arrays(definition, spec, length))
    joint = derive_gradient(definition)
    assert_same_value(run(joint, below(LENGTH, LIMIT)), joint, spec, arrays(joint, spec, length))


@settings(max_examples=15)
@given(small_specs(), st.integers(1, 60), st.integers(0, 9))
def test_of_any_spec_too(spec: SPLASpec, length: int, seed: int) -> None:
    spec = replace(spec, dense_below=61 if spec.select else 0)
    joint = derive_gradient(spla_program(spec))
    rows = arrays(joint, spec, length, seed)
    assert_same_value(run(joint, below(LENGTH, 61)), joint, spec, rows)
    assert_same_value(run(joint, [*below(LENGTH, 61), *LOWERING]), joint, spec, rows)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_selected_and_nothing_is_left_below_the_limit(name: str) -> None:
    """What stands there is dense attention and the combination: no scores of blocks, no second branch."""
    short = run(spla_program(SPECS[name]), below(LENGTH, LIMIT))
    assert not any(isinstance(eq.op, TopK) for eq in short.equations)
    assert sum(isinstance(eq.op, Softmax) for eq in short.equations) == 1
    found = {eq.out.name for eq in short.equations}
    assert not found & {"far", "free", "rest", "o_r", "rms_r", "phi_q", "mean", "share"}


def test_at_the_limit_it_is_another_program() -> None:
    spec = SPECS["rms"]
    definition = spla_program(spec)
    rows = arrays(definition, spec, LIMIT)
    got, want = (evaluated(p, spec, rows)["o"] for p in (run(definition, below(LENGTH, LIMIT)), definition))
    assert not torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("joint", [False, True])
def test_folding_is_idempotent(name: str, joint: bool) -> None:
    program = spla_program(SPECS[name])
    program = assume(sp.Lt(LENGTH, LIMIT))(derive_gradient(program) if joint else program)
    once = fold_constants(program)
    assert fold_constants(once) == once


L = symbol("L")


@pytest.mark.parametrize(
    "asked", [sp.Lt(L, 9), sp.Gt(9, L, evaluate=False), sp.Not(sp.Ge(L, 9)), sp.Not(sp.Le(9, L, evaluate=False))]
)
def test_a_fact_is_seen_from_either_side(asked: sp.Basic) -> None:
    b = Builder("p", (("i", 3),))
    x = b.input("x", ("i",))
    program = b.program(b.map("y", sp.Piecewise((symbol("x0"), asked), (2 * symbol("x0"), True)), x))
    for fact, factor in ((sp.Lt(L, 9), 1), (sp.Ge(L, 9), 2)):
        (eq,) = assume(fact)(program).equations
        assert isinstance(eq.op, Map)
        assert eq.op.expr == factor * symbol("x0")


def folded() -> Builder:
    """A builder over axes i (3), j (4) and k (4)."""
    return Builder("p", (("i", 3), ("j", 4), ("k", 4)))


def check_fold(b: Builder, *outputs: object, lines: list[str]) -> None:
    """Folding keeps the value and leaves these equations."""
    program = b.program(*outputs)  # type: ignore[arg-type]
    after = check(fold_constants(program))
    assert [equation_text(eq) for eq in after.equations] == lines
    generator = torch.Generator().manual_seed(0)
    known = dict(program.axes)
    given = {v.name: torch.randn([known[a] for a in v.axes], generator=generator).double() for v in program.inputs}
    want, got = (evaluate(p, given, scalars={"L": 5}) for p in (program, after))
    for old, new in zip(program.outputs, after.outputs, strict=True):
        assert_close(got[new.name], want[old.name])


def test_a_sum_counts_along_an_axis_that_only_a_constant_carried() -> None:
    """where(never[j], 1, x[i]) lies along i alone; its sum over j is still four times as much."""
    b = folded()
    x, never = b.input("x", ("i",)), b.map("never", sp.false, b.iota("place", "j"))
    y = b.map("y", lambda v, m: sp.Piecewise((1, m), (v, True)), x, never)
    lines = ["y_2[i] = x", "along_j[j] = iota(j)", "y_2_along[i j] = y_2", "z[i] = sum(y_2_along, over=j)"]
    check_fold(b, b.reduce("z", "sum", ("j",), y), lines=lines)


def test_an_output_keeps_its_axes() -> None:
    b = folded()
    x, zero = b.input("x", ("i",)), b.map("zero", sp.false, b.iota("place", "j"))
    y = b.map("y", lambda v, m: sp.Piecewise((1, m), (v, True)), x, zero)
    check_fold(b, y, lines=["along_j[j] = iota(j)", "y[i j] = x"])


def test_what_is_zero_leaves_no_equation() -> None:
    b = folded()
    x, y = b.input("x", ("i", "j")), b.input("y", ("i",))
    never = b.map("never", sp.false, b.iota("place", "j"))
    sums = b.add("sums", CumSum(("j",)), b.softmax("r", ("j",), x, never))
    gone = [
        b.contract("product", ("i",), x, never),
        b.reduce("total", "max", ("j",), x, never),
        b.reduce("count", "mean", ("j",), b.softmax("p", ("j",), x, never)),
        b.reduce("prefix", "sum", ("k",), b.rename("turned", sums, j="k")),
        b.contract("few", ("i",), x, b.topk("top", 2, "j", x, never)),
    ]
    args = [symbol(f"x{i}") for i in range(len(gone))]
    check_fold(b, b.map("z", symbol("x5") + sp.Add(*args), *gone, y), lines=["z[i] = y"])


def test_a_mask_that_always_holds_disappears() -> None:
    b = folded()
    x, y = b.input("x", ("i", "j")), b.input("y", ("i",))
    always = b.map("always", sp.true, b.iota("place", "i", "j"))
    p = b.softmax("p", ("j",), x, always)
    z = b.contract("z", ("i",), p, y, always)
    check_fold(b, z, lines=["p[i j] = softmax(x, over=j)", "z[i] = contract(p, y)"])


def test_a_constant_that_an_operation_needs_stays() -> None:
    b = folded()
    x, one = b.input("x", ("i",)), b.map("one", sp.Integer(1), b.iota("place", "i", "j"))
    before = b.program(b.reduce("z", "sum", ("j",), b.map("w", symbol("x0") * 1, one)), x)
    assert "sum(" in str(check(fold_constants(before)))
