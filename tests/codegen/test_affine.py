"""Predicates over positions against enumeration of every position."""

from collections.abc import Sequence

import numpy as np
import pytest
import sympy as sp
from hypothesis import assume, example, given
from hypothesis import strategies as st

from splagen.codegen.affine import Interval, atom, disjoint, feasible, implied, intervals, negation, terms
from splagen.errors import PartitionError
from splagen.expression import symbol

J, T, n, m = (symbol(x) for x in ("J", "T", "n", "m"))
INNER = {n: 3, m: 2}
GRID = np.meshgrid(np.arange(-1, 7), np.arange(-1, 7), np.arange(3), np.arange(2), indexing="ij")


def holds(predicate: sp.Basic) -> np.ndarray:
    """The predicate at every J, T, n, m of the grid."""
    found = sp.lambdify((J, T, n, m), predicate, "numpy")(*GRID)
    return np.broadcast_to(np.asarray(found, dtype=bool), GRID[0].shape)


def all_hold(term: Sequence[sp.Expr]) -> np.ndarray:
    """Where every atom of a term is >= 0."""
    found = [np.broadcast_to(sp.lambdify((J, T, n, m), a, "numpy")(*GRID) >= 0, GRID[0].shape) for a in term]
    return np.logical_and.reduce(found) if found else np.ones(GRID[0].shape, dtype=bool)


def how_many_hold(terms_: Sequence[Sequence[sp.Expr]]) -> np.ndarray:
    return sum((all_hold(t).astype(int) for t in terms_), np.zeros(GRID[0].shape, dtype=int))


def somewhere(found: np.ndarray) -> np.ndarray:
    """Over the inner positions: does it hold for one of them?"""
    return found.any((2, 3), keepdims=True)


@st.composite
def comparisons(draw: st.DrawFn) -> sp.Basic:
    names = {J: draw(st.integers(-4, 4)), T: draw(st.integers(-3, 3))}
    inner = {n: draw(st.integers(-1, 1)), m: draw(st.integers(-1, 1))}
    left = sum((c * x for x, c in (names | inner).items()), sp.Integer(draw(st.integers(-12, 12))))
    relation = draw(st.sampled_from([sp.Lt, sp.Le, sp.Gt, sp.Ge, sp.Eq]))
    made = relation(left, 0)
    assume(made not in (sp.true, sp.false))
    return made


def predicates() -> st.SearchStrategy[sp.Basic]:
    """Small formulas; equalities stay outside of not, whose negation is not one conjunction."""
    less = comparisons().filter(lambda p: not isinstance(p, sp.Equality))
    pair = st.sampled_from([sp.And, sp.Or])
    return st.recursive(
        comparisons() | st.builds(lambda f, a, b: sp.Not(f(a, b)), pair, less, less),
        lambda inner: st.builds(lambda f, a, b: f(a, b), pair, inner, inner),
        max_leaves=3,
    )


@given(predicates())
def test_terms_hold_where_the_predicate_does(predicate: sp.Basic) -> None:
    assert ((how_many_hold(terms(predicate)) > 0) == holds(predicate)).all()


@given(predicates())
def test_negation_is_the_complement(predicate: sp.Basic) -> None:
    assert (holds(negation(predicate)) != holds(predicate)).all()


@given(st.lists(predicates(), min_size=1, max_size=2))
def test_disjoint_is_the_same_union_and_nowhere_twice(some: list[sp.Basic]) -> None:
    all_terms = [t for p in some for t in terms(p)]
    assert (how_many_hold(disjoint(all_terms)) == (how_many_hold(all_terms) > 0)).all()


@given(predicates())
def test_feasible_holds_where_each_atom_may_hold(predicate: sp.Basic) -> None:
    """For one atom exactly; of several each may hold at another inner position."""
    for term in terms(predicate):
        each = [somewhere(all_hold((a,))) for a in term]
        assert (all_hold(feasible(term, INNER)) == np.logical_and.reduce(each)).all()


def visited(found: Sequence[Interval], variable: sp.Symbol, value: int, extent: int) -> list[int]:
    """The loop that a kernel makes of intervals, the other variable being `value`."""
    at = {T if variable == J else J: value}
    visits: list[int] = []
    for interval in found:
        low = max([0, *(int(b.numerator.subs(at) // b.divisor) for b in interval.lows)])
        high = min([extent, *(int(b.numerator.subs(at) // b.divisor) for b in interval.highs)])
        if all(g.subs(at) >= 0 for g in interval.guards):
            visits += range(low, high)
    return visits


@given(predicates(), st.sampled_from([J, T]))
def test_intervals_visit_each_block_once_and_miss_none(predicate: sp.Basic, variable: sp.Symbol) -> None:
    """Every block in which the predicate holds somewhere is visited exactly once; others may be visited."""
    found = intervals(predicate, variable, INNER)
    wanted = somewhere(holds(predicate))[:, :, 0, 0]  # J, T from -1
    for value in range(-1, 7):
        visits = visited(found, variable, value, 6)
        assert len(visits) == len(set(visits))
        line = wanted[:, value + 1] if variable == J else wanted[value + 1]
        assert {x for x in range(6) if line[x + 1]} <= set(visits)


@given(comparisons(), st.lists(comparisons(), max_size=3))
@example(J - 2 * T + n >= 0, [J - T >= 0, -T >= 0])
@example(2 * J - m >= 0, [J - 1 >= 0])
def test_implied_is_sound(target: sp.Basic, known: list[sp.Basic]) -> None:
    facts = [a for k in known for a in atom(k)]
    everywhere = all_hold(facts).all((2, 3), keepdims=True)
    for wanted in atom(target):
        if implied(wanted, facts, INNER):
            assert (all_hold((wanted,)) | ~everywhere).all(), (wanted, facts)


def test_implied_finds_what_the_kernels_need() -> None:
    """A far block of 16 ends before the query's tile of 32 starts: no causal mask inside."""
    far = (32 * T - 16 * J - 32,)
    assert implied(32 * T + m - (16 * J + n), far, {m: 32, n: 16})
    assert not implied(32 * T + m - (16 * J + n) - 64, far, {m: 32, n: 16})


def test_sinks_and_local_blocks_overlap_in_the_first_rows_and_are_visited_once() -> None:
    forced = sp.Or(J < 2, sp.And(J >= T - 1, J <= T))
    found = intervals(forced, J, {})
    for t in range(8):
        assert sorted(visited(found, J, t, 9)) == sorted({0, 1, *(x for x in (t - 1, t) if x >= 0)})


@pytest.mark.parametrize("wrong", [sp.Ne(J, 1), J])
def test_what_is_not_a_comparison_of_positions_is_refused(wrong: sp.Basic) -> None:
    with pytest.raises(PartitionError, match="is not a comparison of positions"):
        atom(wrong)


@pytest.mark.parametrize("wrong", [J**2 > 3, J / 2 > 1, J * T > 1])
def test_what_is_not_affine_is_refused(wrong: sp.Basic) -> None:
    with pytest.raises(PartitionError, match="is not affine in J"):
        intervals(wrong, J, {})
