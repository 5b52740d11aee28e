"""The printer against the oracle's walk: two readings of the same tree that share no code."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from splagen.codegen.affine import Bound, Interval
from splagen.codegen.triton_expr import interval_text, triton_text
from splagen.errors import PartitionError
from splagen.expression import ACCEPTED, is_condition, log1p, symbol
from splagen.ir.build import Builder
from splagen.ir.reference import evaluate
from tests.test_expression import NAMES, expressions

POINTS = 7
TL = SimpleNamespace(exp=np.exp, log=np.log, sqrt=np.sqrt, where=np.where, maximum=np.maximum, minimum=np.minimum)
BUILTINS = {"tl": TL, "float": float, "tanh": np.tanh, "log1p": np.log1p}
X, Y = symbol("x"), symbol("y")


def printed(expr: sp.Basic, values: dict[str, np.ndarray]) -> np.ndarray:
    """The printed source, run with numpy in the place of Triton."""
    source = triton_text(expr, {name: name for name in values})
    with np.errstate(all="ignore"):
        found = eval(source, BUILTINS, dict(values))  # the text of our own printer
    return np.broadcast_to(np.asarray(found), (POINTS,))


def walked(expr: sp.Basic, values: dict[str, np.ndarray]) -> np.ndarray:
    """The same expression as the Map of a Program, evaluated by the oracle."""
    b = Builder("p", (("i", POINTS),))
    arguments = [b.input(name, ("i",)) for name in values]
    places = {symbol(name): symbol(f"x{i}") for i, name in enumerate(values)}
    out = b.map("out", expr.xreplace(places), *arguments)
    found = evaluate(b.program(out), {n: torch.from_numpy(x) for n, x in values.items()})
    return found[out.name].numpy()


@given(expressions(), st.integers(0, 2**32 - 1))
@example(sp.tanh(X) ** 2 / (1 + sp.exp(-X)) - log1p(X**2) / 3, 0)
@example(-(X**3) * X ** sp.Rational(-5, 2) + X ** sp.Rational(3, 2), 1)
@example(sp.Piecewise((X - 1, sp.And(X > 0, sp.Not(sp.Or(X > 1, X < -1)))), (-2 / X**2, True)), 2)
@example(1 / (X * (X + 1)) - (X - 1) / (X + 3) * (2 - X), 3)
@example(sp.log(sp.Piecewise((-3, X > -3), (-3, True), evaluate=False)), 0)
def test_printed_source_means_what_the_oracle_computes(expr: sp.Basic, seed: int) -> None:
    values = dict(zip(NAMES, np.random.default_rng(seed).normal(0, 1.5, (len(NAMES), POINTS)), strict=True))
    assume(expr.free_symbols)
    # a renamed Piecewise of equal branches is its value: then a logarithm may be seen to be none of a real number
    assume(not expr.xreplace({symbol(name): symbol(f"x{i}") for i, name in enumerate(NAMES)}).has(sp.I))
    got = printed(expr, values)
    want = walked(expr, values)
    if is_condition(expr):
        assert (got == want).all()
        return
    real = np.isfinite(got) & np.isfinite(want) & (np.abs(want) < 1e12)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("expr", "source"),
    [
        (X - Y, "x - y"),
        (-X * Y / 2, "-0.5 * x * y"),
        (X / (Y + 1), "x / (1 + y)"),
        (X**2, "x * x"),
        (sp.sqrt(X), "tl.sqrt(x)"),
        (sp.Piecewise((X, X > 0), (0, True)), "tl.where((x > 0), x, 0)"),
        (-sp.oo, '-float("inf")'),
        (sp.And(X > 0, Y <= 1), "(y <= 1) & (x > 0)"),
        (sp.Not(sp.Or(X > 0, sp.Eq(Y, 1))), None),
    ],
)
def test_source(expr: sp.Basic, source: str | None) -> None:
    text = triton_text(expr, {"x": "x", "y": "y"})
    if source is not None:
        assert text == source


@pytest.mark.parametrize(
    "expr",
    [sp.sin(X), sp.Max(X, 1), sp.Abs(X), sp.floor(X), sp.sign(X), sp.gamma(X), X ** sp.Rational(1, 3), X**Y],
)
def test_an_unknown_node_is_refused_with_its_expression(expr: sp.Basic) -> None:
    with pytest.raises(PartitionError, match="has no Triton form, in `") as caught:
        triton_text(1 + expr, {"x": "x", "y": "y"})
    assert str(expr) in str(caught.value)


def test_a_symbol_without_a_name_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"nothing stands for y .*\n.*known: \['x'\]"):
        triton_text(X + Y, {"x": "x"})


def test_a_piecewise_that_may_have_no_value_is_refused() -> None:
    with pytest.raises(PartitionError, match="needs to hold otherwise"):
        triton_text(sp.Piecewise((X, X > 0)), {"x": "x"})


def test_every_accepted_node_has_a_form() -> None:
    """A node that specs may use and the printer refuses would be an error far from its cause."""
    made = {
        sp.Add: X + Y, sp.Mul: X * Y, sp.Pow: X**-2, sp.Piecewise: sp.Piecewise((X, X > 0), (Y, True)),
        sp.And: sp.And(X > 0, Y > 0), sp.Or: sp.Or(X > 0, Y > 0), sp.Not: sp.Not(sp.Or(X > 0, sp.Eq(X, Y))),
        sp.StrictLessThan: X < Y, sp.LessThan: X <= Y, sp.StrictGreaterThan: X > Y, sp.GreaterThan: X >= Y,
        sp.Equality: sp.Eq(X, Y), sp.Unequality: sp.Ne(X, Y), sp.exp: sp.exp(X), sp.log: sp.log(X),
        log1p: log1p(X), sp.tanh: sp.tanh(X),
    }  # fmt: skip
    assert made.keys() == ACCEPTED
    for expr in made.values():
        triton_text(expr, {"x": "x", "y": "y"})


INTERVALS = st.builds(
    Interval,
    *[
        st.lists(
            st.builds(
                lambda c, a, d: Bound(a * X + c, d),
                st.integers(-9, 9), st.integers(0, 3), st.sampled_from([1, 2, 16]),
            ),
            max_size=2,
        ).map(tuple)
    ]
    * 2,
    st.lists(st.builds(lambda c: X + c, st.integers(-9, 9)), max_size=1).map(tuple),
)  # fmt: skip


@given(INTERVALS, st.integers(0, 20), st.integers(0, 12))
def test_an_interval_reads_the_same_in_a_kernel_and_on_the_host(interval: Interval, x: int, extent: int) -> None:
    """The kernel's `//` truncates towards zero; both clamp the result at 0."""

    def run(sources: tuple[str, str], divide: str) -> tuple[int, int]:
        names = {"x": x, "extent": extent, "tl": TL, "truncated": lambda a, b: int(a / b)}
        return tuple(max(0, int(eval(_divided(s, divide), dict(names)))) for s in sources)  # type: ignore[return-value]

    kernel = run(interval_text(interval, {"x": "x"}, "extent"), "truncated")
    host = run(interval_text(interval, {"x": "x"}, "extent", host=True), "//")
    places = range(extent)
    holds = [
        i
        for i in places
        if all(i >= (b.numerator.subs(X, x)) // b.divisor for b in interval.lows)
        and all(i < (b.numerator.subs(X, x)) // b.divisor for b in interval.highs)
        and all(g.subs(X, x) >= 0 for g in interval.guards)
    ]
    for low, high in (kernel, host):
        assert list(range(low, high)) == holds


def _divided(source: str, divide: str) -> str:
    """`(a) // n` by the kernel's rule: truncation."""
    return source if divide == "//" else re.sub(r"(\([^()]*\)) // (\d+)", r"truncated(\1, \2)", source)
