"""Exponentials of a tile in base 2, the one that a GPU has: constant factors of the exponent become one factor.

exp(c x - y) is 2**(c log2(e) x - log2(e) y).  A multiplication and a subtraction per entry of a tile are then one
fused operation, and what depends on the row alone is multiplied once per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy as sp

from splagen.ir.passes import scaling
from splagen.ir.program import Equation, Map, Program, Var, placeholder

LOG2_E = sp.Float(1.4426950408889634)  # a float: sympy turns 2**(x / log(2)) back into exp(x)
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class Exponent:
    """A score as a value of the tile: exp(score) = 2**(scale * value), scale > 0."""

    value: Var
    scale: float
    equations: tuple[Equation, ...]  # those between the value and the score


def exponent(program: Program, score: Var) -> Exponent:
    """The exponent of a score: positive constant factors become its scale."""
    definitions, scale, between = program.definitions, LOG2_E, []
    while (found := scaling(definitions.get(score))) and found[0].is_positive:
        between.append(definitions[score])
        scale, score = scale * found[0], found[1]
    return Exponent(score, float(scale), tuple(between))


def to_base2(equations: Sequence[Equation]) -> list[Equation]:
    """exp(x - y), x = c z  ->  2**(log2(e) c z - log2(e) y), in every Map.

    Law: the values are unchanged, to rounding.
    """
    definitions = {eq.out: eq for eq in equations}
    return [_to_base2(eq, definitions) for eq in equations]


def _to_base2(eq: Equation, definitions: Mapping[Var, Equation]) -> Equation:
    if not isinstance(eq.op, Map) or not eq.op.expr.has(sp.exp):
        return eq
    expr, args = eq.op.expr, list(eq.args)
    for i in range(len(args)):
        while found := scaling(definitions.get(args[i])):
            expr = expr.xreplace({placeholder(i): found[0] * placeholder(i)})
            args[i] = found[1]
    powers = {}
    for e in expr.atoms(sp.exp):
        terms = sp.Add.make_args(sp.expand_mul(e.args[0]))
        powers[e] = sp.Pow(2, sp.Add(*(sp.N(t * LOG2_E) for t in terms)))
    return Equation(eq.out, Map(expr.xreplace(powers)), tuple(args))
