"""Exponents in base 2: the same values, and constant factors in one place."""

from __future__ import annotations

import math

import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from splagen.codegen.base_two import exponent, to_base2
from splagen.ir.build import Builder
from splagen.ir.program import Equation, Map, Program, Var, placeholder

NUMBERS = st.floats(-20, 20, allow_nan=False)
FACTORS = st.sampled_from([sp.sqrt(2) / 16, sp.Rational(1, 8), sp.Integer(3), sp.Rational(-3, 7)])


def program(*factors: sp.Expr) -> tuple[Program, Equation]:
    """p = exp(s - y) where y < 15, else 0; s is x times the factors, one equation for each."""
    b = Builder("exponentials", (("m", 4), ("n", 4)))
    s, y = b.input("x", ("m", "n")), b.input("y", ("m",))
    for i, c in enumerate(factors):
        s = b.map(f"s{i}", c * placeholder(0), s)
    u, v = placeholder(0), placeholder(1)
    p = b.map("p", sp.Piecewise((sp.exp(u - v), v < 15), (0, True)), s, y)
    found = b.program(p)
    return found, found.definitions[p]


def value(equations: dict[Var, Equation], v: Var, inputs: dict[str, float]) -> float:
    if v not in equations:
        return inputs[v.name]
    op, args = equations[v].op, equations[v].args
    assert isinstance(op, Map)
    return float(op.expr.subs({placeholder(i): value(equations, a, inputs) for i, a in enumerate(args)}))


@given(st.lists(FACTORS, max_size=3), NUMBERS, NUMBERS)
def test_the_value_does_not_change(factors: list[sp.Expr], x: float, y: float) -> None:
    before, p = program(*factors)
    after = {eq.out: eq for eq in to_base2(before.equations)}
    inputs = {"x": x, "y": y}
    assert value(after, p.out, inputs) == pytest.approx(value(before.definitions, p.out, inputs), rel=1e-9)
    assert not any(isinstance(eq.op, Map) and eq.op.expr.has(sp.exp) for eq in after.values())
    assert after[p.out].args == before.inputs  # no scaled value is read any more


@given(st.lists(FACTORS, max_size=3), NUMBERS)
def test_an_exponent_is_its_value_times_its_scale(factors: list[sp.Expr], x: float) -> None:
    before, p = program(*factors)
    found = exponent(before, p.args[0])
    inputs = {"x": x, "y": 0.0}
    score = value(before.definitions, p.args[0], inputs)
    assert found.scale * value(before.definitions, found.value, inputs) == pytest.approx(score / math.log(2), rel=1e-9)
    assert found.scale > 0
    negative = [c for c in factors if c < 0]
    assert len(found.equations) == (len(factors) if not negative else factors[::-1].index(negative[-1]))
