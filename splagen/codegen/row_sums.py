"""Sums along the columns of rows: what a row has once is a factor of the sum, not of its terms.

A derivative of a norm sums products with a power of the norm.  As a factor of the sum it costs one multiplication per
row, and no register for each column.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp

from splagen.codegen.geometry import FEATURE_AXES, features_of
from splagen.ir.program import Equation, Map, Reduce, Var, placeholder


def factor_sums(equations: Sequence[Equation]) -> list[Equation]:
    """y = sum(f z, over=e)  ->  y = f sum(z, over=e)  for factors f of a row: numbers and variables without columns.

    Law: the values are unchanged, to rounding.
    """
    definitions = {eq.out: eq for eq in equations}
    taken = {v.name for eq in equations for v in (eq.out, *eq.args)}
    found: list[Equation] = []
    for eq in equations:
        found += _factored(eq, definitions, taken) or [eq]
    return found


def _factored(eq: Equation, definitions: dict[Var, Equation], taken: set[str]) -> list[Equation]:
    """The equations that take the place of a sum of products; none if nothing leaves it."""
    if not isinstance(eq.op, Reduce) or eq.op.how != "sum" or len(eq.args) > 1 or not {*eq.op.axes} <= {*FEATURE_AXES}:
        return []
    terms = definitions.get(eq.args[0])
    if terms is None or not isinstance(terms.op, Map):
        return []
    wide = {placeholder(i) for i, v in enumerate(terms.args) if features_of(v)}
    factors = sp.Mul.make_args(terms.op.expr)
    inside = [f for f in factors if f.free_symbols & wide]
    outside = sp.Mul(*(f for f in factors if f not in inside))
    if not inside or not outside.free_symbols:
        return []
    names = (f"{terms.out.name}_wide", f"{eq.out.name}_wide")
    if taken & {*names}:
        return []
    taken.update(names)
    part, total = Var(names[0], terms.out.axes, terms.out.kind), Var(names[1], eq.out.axes, eq.out.kind)
    last = placeholder(len(terms.args))
    return [
        _map(part, sp.Mul(*inside), terms.args),
        Equation(total, Reduce("sum", eq.op.axes), (part,)),
        _map(eq.out, outside * last, (*terms.args, total)),
    ]


def _map(out: Var, expr: sp.Expr, args: Sequence[Var]) -> Equation:
    """A Map of those arguments that the expression reads."""
    read = [i for i in range(len(args)) if placeholder(i) in expr.free_symbols]
    renamed = {placeholder(i): placeholder(n) for n, i in enumerate(read)}
    return Equation(out, Map(expr.xreplace(renamed)), tuple(args[i] for i in read))
