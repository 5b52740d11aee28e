"""What a kernel costs as formulas in run-time sizes, and the number of programs that its launch grid says."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

import sympy as sp

from splagen.errors import ScheduleError
from splagen.ir.program import Contract, Equation, UnitInverse


@dataclass(frozen=True)
class Cost:
    """Formulas in the sizes of a launch: L, B and Hkv; of SSE T tokens, S samples and HV value heads.

    Those of a decoding step have its splits too, SCORE_SPLITS, ATTEND_SPLITS and CHUNKS; L is tokens of a sequence.

    Sizes count as whole numbers of tiles, blocks and chunks.

    Attributes:
        kernel: its name.
        bytes: that its programs read and write, a row as often as programs read it.
        flops: of its products, 2 for a multiplication and an addition.
        programs: of its launch grid.
    """

    kernel: str
    bytes: sp.Expr
    flops: sp.Expr
    programs: sp.Expr


def is_product(eq: Equation) -> bool:
    """True where two or more real arrays are multiplied and summed; a mask alone makes a sum, not a product."""
    if isinstance(eq.op, UnitInverse):
        return True
    real = sum(v.kind == "real" for v in eq.args)
    return isinstance(eq.op, Contract) and real > 1 and axes_of(eq) != set(eq.op.keep)


def axes_of(eq: Equation) -> set[str]:
    """Every axis over which the equation runs."""
    third = {eq.op.third} if isinstance(eq.op, UnitInverse) else set[str]()
    return third.union(eq.out.axes, *(v.axes for v in eq.args))


def tidy(formula: sp.Expr) -> sp.Expr:
    """The formula with what its terms have in common in front."""
    return sp.factor_terms(sp.expand(formula))


def programs(grid: str, sizes: Mapping[str, sp.Expr | int]) -> sp.Expr:
    """How many programs a launch grid has, from its source and the values of the names in it.

    Numbers are rounded up as the grid says; of a run-time size the quotient stands.

    Raises:
        ScheduleError: the grid holds something that is not known.
    """
    tree = ast.parse(grid, mode="eval").body
    parts = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    return sp.Mul(*(_value(part, sizes) for part in parts))


def _value(node: ast.expr, sizes: Mapping[str, sp.Expr | int]) -> sp.Expr:
    match node:
        case ast.Constant(int(value)):
            return sp.Integer(value)
        case ast.Name() | ast.Attribute() if (name := ast.unparse(node)) in sizes:
            return sp.sympify(sizes[name])  # a number or an expression already: nothing is parsed
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, sizes) + _value(right, sizes)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, sizes) * _value(right, sizes)
        case ast.BinOp(left, ast.FloorDiv(), right):
            return _value(left, sizes) / _value(right, sizes)  # exact where a Schedule is legal
        case ast.Call(ast.Name("cdiv"), [over, under]):
            quotient = _value(over, sizes) / _value(under, sizes)
            return sp.ceiling(quotient) if quotient.is_number else quotient
        case ast.Call(ast.Name("max" | "min" as name), arguments):
            return (sp.Max if name == "max" else sp.Min)(*(_value(a, sizes) for a in arguments))
    raise ScheduleError(f"the launch grid has an unknown part `{ast.unparse(node)}`", f"known: {', '.join(sizes)}")
