"""Which equations are linear in some of their variables: what is linear may be applied to the terms of a sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy as sp

from splagen.ir.program import Contract, CumSum, Equation, Map, Reduce, Rename, Var, placeholder


def linear_with(equations: Sequence[Equation], sums: Iterable[Var]) -> frozenset[Var] | None:
    """The variables that enter beside `sums` as terms, so that the results are linear in all of them together.

    f(x + y, z) = f(x, z) + f(y, 0) for sums x, y and such variables z.  None where the equations are not linear in the
    sums: where two of them are multiplied, or a function is taken of one.
    """
    linear, terms = set(sums), set[Var]()
    while True:
        reached = linear | terms
        for eq in equations:
            found = _terms(eq, reached)
            if found is None:
                return None
            if found - reached:
                terms |= found
                break
            if reached & set(eq.args):
                reached.add(eq.out)
        else:
            return frozenset(terms)


def _terms(eq: Equation, linear: set[Var]) -> set[Var] | None:
    """The arguments that must be 0, beside the linear ones, for the result to be 0; None where it is not linear."""
    mine = [v for v in eq.args if v in linear]
    if not mine:
        return set()
    match eq.op:
        case Map(expr=expr):
            names = {placeholder(i): v for i, v in enumerate(eq.args)}
            own = [x for x, v in names.items() if v in linear]
            rest = sp.simplify(expr.xreplace({x: sp.Integer(0) for x in own}))
            more = {v for x, v in names.items() if x in rest.free_symbols and v.kind == "real"}
            if rest != 0 and not more:
                return None
            every = [*own, *(x for x, v in names.items() if v in more)]
            slopes = [sp.diff(expr, x) for x in every]
            if any(set(every) & s.free_symbols for s in slopes):
                return None
            constant = sp.simplify(expr.xreplace({x: sp.Integer(0) for x in every}))
            return more if constant == 0 else None
        case Contract():
            return set() if len(mine) == 1 else None
        case Reduce(how="sum" | "mean"):
            return set() if mine == [eq.args[0]] else None
        case Rename() | CumSum():
            return set()
    return None
