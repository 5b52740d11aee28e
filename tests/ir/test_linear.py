"""Linearity of equations in sums, by which they may be applied to each term."""

from splagen.ir.frontend_spla import spla_program
from splagen.ir.linear import linear_with
from splagen.ir.program import Contract, Equation, Map, Program, Reduce, Var, placeholder
from splagen.spec import SPLASpec

X0, X1 = placeholder(0), placeholder(1)


def var(name: str, *axes: str) -> Var:
    return Var(name, axes)


def names(found: frozenset[Var] | None) -> set[str] | None:
    return None if found is None else {v.name for v in found}


A, B, C = (var(n, "T", "d") for n in "abc")
Y, Z = var("y", "T", "d"), var("z", "T")


def test_terms_that_are_added_must_be_left_out() -> None:
    assert names(linear_with([Equation(Y, Map(X0 - X1), (A, B))], [B])) == {"a"}
    assert names(linear_with([Equation(Y, Map(3 * X0), (B,))], [B])) == set()


def test_factors_stay() -> None:
    equations = [Equation(Y, Map(X0 * X1), (A, B)), Equation(Z, Reduce("sum", ("d",)), (Y,))]
    assert names(linear_with(equations, [B])) == set()
    assert names(linear_with([Equation(Z, Contract(("T",)), (A, B))], [B])) == set()


def test_a_term_found_late_counts_from_the_start() -> None:
    """a is a factor of b in one equation and a term beside it in the next: no choice of zeros makes that linear."""
    first, second = Equation(C, Map(X0 * X1), (A, B)), Equation(Y, Map(X0 + X1), (A, C))
    assert linear_with([first, second], [B]) is None


def test_what_is_not_linear() -> None:
    for expr in (X0**2, 1 / X0, X0 + 1):
        assert linear_with([Equation(Y, Map(expr), (B,))], [B]) is None
    assert linear_with([Equation(Z, Contract(("T",)), (B, B))], [B]) is None
    assert linear_with([Equation(Z, Reduce("max", ("d",)), (B,))], [B]) is None


def test_the_output_of_attention_is_not_linear_in_its_sums_and_unrelated_equations_do_not_matter() -> None:
    program: Program = spla_program(SPLASpec(head_dim=16))
    assert linear_with(program.equations, [B]) == frozenset()
