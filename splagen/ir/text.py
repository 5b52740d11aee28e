"""Printing a Program as text that people read and errors quote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy as sp

from splagen.expression import symbol
from splagen.expression_text import text
from splagen.ir.program import (
    Contract,
    CumSum,
    Equation,
    Iota,
    LowRank,
    Lse,
    Map,
    Op,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    UnitInverse,
    Var,
    placeholder,
)


def _over(word: str, axes: Sequence[str], args: Sequence[Var]) -> str:
    where = f", where={args[1].name}" if len(args) > 1 else ""
    return f"{word}({args[0].name}, over={' '.join(axes)}{where})"


def _map(op: Op, args: tuple[Var, ...]) -> str:
    assert isinstance(op, Map)
    return text(named(op.expr, args))


def named(expr: sp.Basic, args: Sequence[Var]) -> sp.Basic:
    """The expression with its arguments' names in place of x0, x1, ..."""
    return expr.xreplace({placeholder(i): symbol(v.name) for i, v in enumerate(args)})


PRINT: dict[type[Op], Callable[..., str]] = {
    Iota: lambda op, args: f"iota({' '.join(op.axes)})",
    Map: _map,
    Contract: lambda op, args: f"contract({', '.join(v.name for v in args)})",
    Reduce: lambda op, args: _over(op.how, op.axes, args),
    Softmax: lambda op, args: _over("softmax", op.axes, args),
    Lse: lambda op, args: _over("lse", op.axes, args),
    TopK: lambda op, args: _over("topk", (op.axis,), args)[:-1] + f", k={op.k})",
    CumSum: lambda op, args: _over("cumsum", op.axes, args),
    Rename: lambda op, args: f"rename({args[0].name}, {', '.join(f'{a}={b}' for a, b in op.pairs)})",
    UnitInverse: lambda op, args: f"unit_inverse({args[0].name}, {op.row} {op.column})",
    LowRank: lambda op, args: _over("low_rank", (op.rows,), args)[:-1] + f", steps={op.steps})",
}


def equation_text(eq: Equation) -> str:
    """One equation on one line."""
    return f"{eq.out} = {PRINT[type(eq.op)](eq.op, eq.args)}"


def program_text(program: Program) -> str:
    """The whole program: axes, inputs, equations, outputs, gradients."""
    lines = [f"program {program.name}"]
    lines += ["axes    " + ", ".join(f"{a}={e}" for a, e in program.axes)]
    lines += ["inputs  " + ", ".join(map(str, program.inputs))]
    lines += [f"  {equation_text(eq)}" for eq in program.equations]
    lines += ["outputs " + ", ".join(v.name for v in program.outputs)]
    if program.gradients:
        lines += ["gradients " + ", ".join(f"d{x.name}={g.name}" for x, g in program.gradients)]
    return "\n".join(lines) + "\n"
