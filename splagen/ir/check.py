"""The verifier: every rule that a Program must obey; it runs between passes, and its errors quote the equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from splagen.errors import ProgramError
from splagen.expression import ExpressionError, check_expression
from splagen.ir.program import (
    LOW_RANK_FEATURES,
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
    result,
    union_axes,
)
from splagen.ir.text import equation_text

Rule: TypeAlias = Callable[[Program, Equation], "str | None"]


def _iota(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, Iota)
    if eq.args or not eq.op.axes:
        return "iota takes at least one axis and no argument"
    unknown = set(eq.op.axes) - set(program.order)
    return f"axis {' '.join(sorted(unknown))} is not declared" if unknown else None


def _map(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, Map)
    names = {placeholder(i).name for i in range(len(eq.args))} | scalars(program)
    try:
        check_expression(eq.op.expr, names)
    except ExpressionError as e:
        return str(e)
    return None


def _contract(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, Contract)
    missing = set(eq.op.keep) - set(union_axes(eq.args, program.order))
    if missing:
        return f"keeps {' '.join(sorted(missing))}, which no argument carries"
    return None if eq.args else "contract takes at least one argument"


def _over_axes(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, (Reduce, Softmax, Lse))
    if not 1 <= len(eq.args) <= 2:
        return f"takes an array and at most one mask, not {len(eq.args)} arguments"
    if len(eq.args) == 2 and eq.args[1].kind != "bool":
        return f"the mask {eq.args[1].name} is {eq.args[1].kind}, not bool"
    missing = set(eq.op.axes) - set(union_axes(eq.args, program.order))
    return f"no argument carries {' '.join(sorted(missing))}" if missing else None


def _topk(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, TopK)
    if eq.op.k < 1:
        return f"k is {eq.op.k}; at least 1 is chosen"
    if not 1 <= len(eq.args) <= 2:
        return f"takes an array and at most one mask, not {len(eq.args)} arguments"
    if eq.op.axis not in union_axes(eq.args, program.order):
        return f"no argument carries {eq.op.axis}"
    if len(eq.args) == 2 and eq.args[1].kind != "bool":
        return f"the mask {eq.args[1].name} is {eq.args[1].kind}, not bool"
    return None


def _cumsum(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, CumSum)
    if len(eq.args) != 1:
        return f"takes one array, not {len(eq.args)} arguments"
    missing = set(eq.op.axes) - set(eq.args[0].axes)
    return f"{eq.args[0]} has no axis {' '.join(sorted(missing))}" if missing else None


def _unit_inverse(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, UnitInverse)
    if len(eq.args) != 1:
        return f"takes one array, not {len(eq.args)} arguments"
    pair = (eq.op.row, eq.op.column)
    missing = [a for a in pair if a not in eq.args[0].axes]
    if missing:
        return f"{eq.args[0]} has no axis {' '.join(missing)}"
    three = {*pair, eq.op.third}
    if eq.op.third in eq.args[0].axes or len(three) != 3 or len({program.extents.get(a) for a in three}) != 1:
        return f"{' '.join(pair)} and {eq.op.third} must be three axes of one extent"
    return None


def _low_rank(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, LowRank)
    if not 1 <= len(eq.args) <= 2:
        return f"takes an array and at most one mask, not {len(eq.args)} arguments"
    if len(eq.args) == 2 and eq.args[1].kind != "bool":
        return f"the mask {eq.args[1].name} is {eq.args[1].kind}, not bool"
    x, rank = eq.args[0], program.extents.get(eq.op.rank)
    missing = [a for a in (eq.op.rows, eq.op.features) if a not in x.axes]
    if missing or eq.op.rows == eq.op.features:
        return f"{x} has no axis {missing[0]}" if missing else f"{eq.op.rows} is both rows and features"
    if len(eq.args) == 2 and eq.op.features in eq.args[1].axes:
        return f"the mask {eq.args[1].name} differs between features"
    if not isinstance(rank, int) or eq.op.rank in union_axes(eq.args, program.order):
        return f"{eq.op.rank} must be an axis of a known extent that no argument carries"
    width = program.extents[eq.op.features]
    if not isinstance(width, int) or width > LOW_RANK_FEATURES:
        return f"{eq.op.features} must have a known extent of at most {LOW_RANK_FEATURES}"
    return f"steps is {eq.op.steps}; at least 1 is taken" if eq.op.steps < 1 else None


def _rename(program: Program, eq: Equation) -> str | None:
    assert isinstance(eq.op, Rename)
    if len(eq.args) != 1:
        return f"takes one array, not {len(eq.args)} arguments"
    old, new = {a for a, _ in eq.op.pairs}, {b for _, b in eq.op.pairs}
    axes = set(eq.args[0].axes)
    if old - axes:
        return f"{eq.args[0]} has no axis {' '.join(sorted(old - axes))}"
    if len(new) < len(old) or new & (axes - old):
        return f"two axes would be called {' '.join(sorted(new & (axes - old))) or 'the same'}"
    if new - set(program.order):
        return f"axis {' '.join(sorted(new - set(program.order)))} is not declared"
    if any(program.extents[a] != program.extents[b] for a, b in eq.op.pairs):
        return "an axis may only be renamed to one of the same extent"
    return None


CHECK: dict[type[Op], Rule] = {
    Iota: _iota,
    Map: _map,
    Contract: _contract,
    Reduce: _over_axes,
    Softmax: _over_axes,
    Lse: _over_axes,
    TopK: _topk,
    CumSum: _cumsum,
    Rename: _rename,
    UnitInverse: _unit_inverse,
    LowRank: _low_rank,
}


def scalars(program: Program) -> set[str]:
    """Names that any Map may read beside its arguments: the program's scalars and the symbolic extents."""
    symbols = {s.name for _, e in program.axes if not isinstance(e, int) for s in e.free_symbols}
    return {*program.scalars} | symbols


def check(program: Program) -> Program:
    """Return the program if it is valid; raise ProgramError that quotes the first equation that is not.

    Rules: names are distinct; every argument is defined before; axes are declared and in order; each operation's own
    rule; the recorded axes and kind equal those that the operation gives; outputs and gradients are defined.
    """
    order = program.order
    defined = set(program.inputs)
    names = {v.name for v in program.inputs}
    if len(names) != len(program.inputs):
        raise ProgramError(f"{program.name}: two inputs share a name")
    for eq in program.equations:
        _check_equation(program, eq, defined, names, order)
        defined.add(eq.out)
        names.add(eq.out.name)
    gradients = [g for _, g in program.gradients]
    for v in (*program.outputs, *gradients):
        if v not in defined:
            raise ProgramError(f"{program.name}: output {v} is never defined")
    for x, g in program.gradients:
        if x.axes != g.axes:
            raise ProgramError(f"{program.name}: the gradient {g} does not have the axes of {x}")
    return program


def _check_equation(program: Program, eq: Equation, defined: set[Var], names: set[str], order: dict[str, int]) -> None:
    def fail(what: str) -> ProgramError:
        return ProgramError(f"{program.name}: {what}, in `{_quote(eq)}`")

    if eq.out.name in names:
        raise fail(f"{eq.out.name} is defined twice")
    for v in eq.args:
        if v not in defined:
            raise fail(f"{v} is read before it is defined")
    unknown = {a for v in (eq.out, *eq.args) for a in v.axes} - set(order)
    if unknown:
        raise fail(f"axis {' '.join(sorted(unknown))} is not declared")
    complaint = CHECK[type(eq.op)](program, eq)
    if complaint:
        raise fail(complaint)
    axes, kind = result(eq.op, eq.args, order)
    if (axes, kind) != (eq.out.axes, eq.out.kind):
        raise fail(f"the result is {kind} over [{' '.join(axes)}], declared {eq.out.kind} {eq.out}")


def _quote(eq: Equation) -> str:
    try:
        return equation_text(eq)
    except Exception:  # an invalid equation may not even print
        return f"{eq.out} = {eq.op} {[str(a) for a in eq.args]}"
