"""Factors of a row leave its sums: the same values, and no term that holds what the row has once."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from splagen.codegen.geometry import features_of
from splagen.codegen.row_sums import factor_sums
from splagen.ir.build import Builder
from splagen.ir.program import Map, Program, Reduce, Var, placeholder
from splagen.ir.reference import evaluate

SIZES = {"T": 3, "e": 5}
POWERS = st.sampled_from([sp.Integer(0), sp.Integer(1), sp.Rational(1, 2), sp.Rational(-3, 2)])


def program(narrow: sp.Expr, wide: sp.Expr, axes: tuple[str, ...] = ("e",)) -> tuple[Program, Var]:
    """y = sum(narrow * wide), of numbers m and n of a row and of its columns x and y."""
    b = Builder("sums", tuple(SIZES.items()))
    args = [b.input(name, ("T", "e")) for name in "xy"] + [b.input(name, ("T",)) for name in "mn"]
    terms = b.map("terms", narrow * wide, *args)
    total = b.reduce("total", "sum", axes, terms)
    return b.program(total), total


@given(POWERS, POWERS, st.sampled_from([sp.Rational(-1, 2), sp.Integer(1)]))
def test_the_value_does_not_change(one: sp.Expr, other: sp.Expr, number: sp.Expr) -> None:
    x, y, m, n = (placeholder(i) for i in range(4))
    before, total = program(number * (m + 1) ** one * (n + 2) ** other, x * y)
    after = before.with_equations(factor_sums(before.equations))
    rows = torch.Generator().manual_seed(0)
    inputs = {
        v.name: torch.rand([SIZES[a] for a in v.axes], generator=rows, dtype=torch.float64) for v in before.inputs
    }
    made = [evaluate(p, inputs)[total.name] for p in (before, after)]
    torch.testing.assert_close(made[1], made[0], rtol=1e-12, atol=0)
    for eq in after.equations:
        if isinstance(eq.op, Map) and features_of(eq.out) and eq.out.name != "terms":
            assert all(features_of(v) for v in eq.args)


@pytest.mark.parametrize("axes", [("e",), ("T",)])
def test_other_sums_stay_as_they_are(axes: tuple[str, ...]) -> None:
    """A factor without a row leaves no sum, and a sum over rows keeps what is a row's."""
    x, y, m = (placeholder(i) for i in range(3))
    before, _ = program(sp.Integer(1) if axes == ("e",) else m, x * y, axes)
    assert factor_sums(before.equations) == list(before.equations)
    assert any(isinstance(eq.op, Reduce) for eq in before.equations)
