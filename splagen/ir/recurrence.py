"""Passes for recurrences: routing a partition's rows, one token, and exponentials of decays.

A recurrence is a Program from rows and the state before to rows and the state after that equals itself under
composition (frontend_sse.py).  What these passes give is equal to it in the sense that each states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy as sp

from splagen.errors import ProgramError
from splagen.expression import is_condition
from splagen.ir.passes import drop_unused
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
    result,
)

_NO_RECURRENCE = "take the part of the program that is a recurrence"


def restrict(program: Program, axis: str, masks: Sequence[str]) -> Program:
    """The rows of one partition: `axis` disappears and the bool inputs `masks` hold.

    Law: where a row with a false mask changes no state and contributes nothing to an output, the program over all rows
    is, for each value of `axis`, the restricted program over the rows whose mask holds, in order; outputs that were
    summed over the axis are sums over the rows of a position.
    """
    held = {v for v in program.inputs if v.name in masks}
    if len(held) != len(masks) or any(v.kind != "bool" for v in held):
        raise ProgramError(f"{program.name} has no bool inputs {', '.join(masks)}")

    order = {a: n for n, (a, _) in enumerate(x for x in program.axes if x[0] != axis)}
    new = {v: replace(v, axes=tuple(a for a in v.axes if a != axis)) for v in program.inputs}
    true = set(held)
    equations = []
    for eq in program.equations:
        kept = tuple(v for v in eq.args if v not in true)
        args = tuple(new[v] for v in kept)
        op: Op = eq.op
        match op:
            case Rename() if not kept:
                true.add(eq.out)
                continue
            case Map(expr):
                known = {placeholder(i): sp.true for i, v in enumerate(eq.args) if v in true}
                moved = {placeholder(i): placeholder(kept.index(v)) for i, v in enumerate(eq.args) if v not in true}
                expr = expr.xreplace(known).xreplace(moved)
                if expr == sp.true:
                    true.add(eq.out)
                    continue
                op = Map(expr)
            case Contract(keep):
                op = Contract(tuple(a for a in keep if any(a in v.axes for v in args)))
            case Reduce(how, axes) if axis in axes:
                rest = tuple(a for a in axes if a != axis)
                op = Reduce(how, rest) if rest else Map(placeholder(0))
            case Softmax() | TopK() if axis in (op.axes if isinstance(op, Softmax) else (op.axis,)):
                raise ProgramError(f"{eq.out} chooses along {axis}", hint="restrict the part behind the router")
            case LowRank(rows, features, rank) if axis in (rows, features, rank):
                raise ProgramError(f"{eq.out} goes along {axis}", hint="restrict what is behind it")
        new[eq.out] = Var(eq.out.name, *result(op, args, order))
        equations.append(Equation(new[eq.out], op, args))
    return replace(
        program,
        axes=tuple((a, e) for a, e in program.axes if a != axis),
        inputs=tuple(new[v] for v in program.inputs if v not in held),
        equations=tuple(equations),
        outputs=tuple(new[v] for v in program.outputs),
    )


def single(program: Program, axes: Sequence[str]) -> Program:
    """The program at extent 1 of `axes`, without them: a recurrence's step for one token.  Law: the value there.

    Raises ProgramError for a softmax, log-sum-exp or choice along one of the axes: a recurrence has none.
    """
    gone = set(axes)
    left = {s for a, e in program.axes if a not in gone and not isinstance(e, int) for s in e.free_symbols}
    ones = {e: sp.S.One for a, e in program.axes if a in gone and isinstance(e, sp.Symbol) and e not in left}

    def without(v: Var) -> Var:
        return replace(v, axes=tuple(a for a in v.axes if a not in gone))

    equations: list[Equation] = []
    zero: set[Var] = set()
    for eq in program.equations:
        op, args = _single(eq, gone, zero)
        if isinstance(op, Iota) and not op.axes:
            zero.add(eq.out)
            continue
        if isinstance(op, Map):
            op = Map(op.expr.xreplace(ones))
        equations.append(Equation(without(eq.out), op, tuple(without(v) for v in args)))
    return drop_unused(
        replace(
            program,
            axes=tuple((a, e) for a, e in program.axes if a not in gone),
            inputs=tuple(without(v) for v in program.inputs),
            equations=tuple(equations),
            outputs=tuple(without(v) for v in program.outputs),
            cotangents=tuple((without(y), without(dy)) for y, dy in program.cotangents),
            gradients=tuple((without(x), without(g)) for x, g in program.gradients),
        )
    )


def _single(eq: Equation, gone: set[str], zero: set[Var]) -> tuple[Op, tuple[Var, ...]]:
    """An equation's operation and arguments without the axes; `zero` are positions that are 0."""
    same = Map(placeholder(0))
    match eq.op:
        case Iota(group):
            return Iota(tuple(a for a in group if a not in gone)), ()
        case Map(expr):
            args = tuple(v for v in eq.args if v not in zero)
            known = {placeholder(i): sp.S.Zero for i, v in enumerate(eq.args) if v in zero}
            moved = {placeholder(i): placeholder(args.index(v)) for i, v in enumerate(eq.args) if v not in zero}
            return Map(expr.xreplace(known).xreplace(moved)), args
        case Contract(keep):
            return Contract(tuple(a for a in keep if a not in gone)), eq.args
        case Reduce(how, over):
            rest = tuple(a for a in over if a not in gone)
            if rest:
                return Reduce(how, rest), eq.args
            if eq.args[0].kind == "bool":
                raise ProgramError(f"{eq.out} counts along {' '.join(over)}, of which one is left", hint=_NO_RECURRENCE)
            held = len(eq.args) > 1
            return Map(sp.Piecewise((placeholder(0), placeholder(1)), (0, True))) if held else same, eq.args
        case Softmax() | Lse() | TopK() | LowRank():
            match eq.op:
                case TopK(_, axis):
                    along = {axis}
                case LowRank(rows, features, rank):
                    along = {rows, features, rank}
                case Softmax(axes) | Lse(axes):
                    along = set(axes)
            if along & gone:
                what = f"{eq.out} goes along {' '.join(sorted(along & gone))}, of which one is left"
                raise ProgramError(what, hint=_NO_RECURRENCE)
            return eq.op, eq.args
        case CumSum(over):
            rest = tuple(a for a in over if a not in gone)
            return (CumSum(rest) if rest else same), eq.args
        case Rename(pairs):
            kept = tuple(p for p in pairs if not gone & set(p))
            return (Rename(kept) if kept else same), eq.args
        case UnitInverse():
            return (Map(sp.S.One) if {eq.op.row, eq.op.column} <= gone else eq.op), eq.args


def share_exponentials(program: Program) -> Program:
    """An expression that holds another equation's exponential reads its value instead.  Law: value unchanged.

    The derivative of y = exp(u) is y itself; with it a decay between pairs of positions is formed once.
    """
    known: list[Equation] = []
    equations = []
    for eq in program.equations:
        if isinstance(eq.op, Map) and not is_condition(eq.op.expr):
            for old in known:
                assert isinstance(old.op, Map)
                if not set(old.args) <= set(eq.args):
                    continue
                where = {placeholder(i): placeholder(eq.args.index(v)) for i, v in enumerate(old.args)}
                value = old.op.expr.xreplace(where)
                fresh = placeholder(len(eq.args))
                expr = eq.op.expr.xreplace({value: fresh, _negated(value): -fresh})
                if fresh in expr.free_symbols:
                    eq = _pruned(Equation(eq.out, Map(expr), (*eq.args, old.out)))
            assert isinstance(eq.op, Map)
            if isinstance(_first_value(eq.op.expr), sp.exp):
                known.append(eq)
        equations.append(eq)
    return program.with_equations(equations)


def _first_value(expr: sp.Basic) -> sp.Basic:
    return expr.args[0][0] if isinstance(expr, sp.Piecewise) else expr


def _negated(expr: sp.Basic) -> sp.Basic:
    if isinstance(expr, sp.Piecewise):
        return sp.Piecewise(*((-v, c) for v, c in expr.args))
    return -expr


def _pruned(eq: Equation) -> Equation:
    """The equation without arguments that its expression does not read, unless they give it an axis."""
    assert isinstance(eq.op, Map)
    read = [v for i, v in enumerate(eq.args) if placeholder(i) in eq.op.expr.free_symbols]
    for v in eq.args:
        if v not in read and set(v.axes) - {a for x in read for a in x.axes}:
            read.append(v)
    where = {placeholder(eq.args.index(v)): placeholder(n) for n, v in enumerate(read)}
    return Equation(eq.out, Map(eq.op.expr.xreplace(where)), tuple(read))


def carried(program: Program, after: Var, before: Var) -> tuple[sp.Expr, tuple[Var, ...]] | None:
    """The factor by which `before` enters `after`, where it enters through sums and elementwise factors alone.

    Returns the expression and its arguments (over rows' features, never `before`); None where a state enters through a
    contraction: then the step from state to state is a matrix.
    """
    definitions = program.definitions
    seen: dict[Var, bool] = {}

    def reaches(v: Var) -> bool:
        if v == before:
            return True
        if v not in seen:
            seen[v] = v in definitions and any(reaches(x) for x in definitions[v].args)
        return seen[v]

    def factor(v: Var) -> Mapping[Var, sp.Expr] | sp.Expr | None:
        if v == before:
            return sp.S.One
        eq = definitions[v]
        if not isinstance(eq.op, Map):
            return None
        total: sp.Expr = sp.S.Zero
        for i, x in enumerate(eq.args):
            if not reaches(x):
                continue
            inner = factor(x)
            slope = eq.op.expr.diff(placeholder(i))
            linear = all(placeholder(n) not in slope.free_symbols for n, y in enumerate(eq.args) if reaches(y))
            if not isinstance(inner, sp.Expr) or not linear:
                return None
            names = {placeholder(n): sp.Symbol(f"@{y.name}") for n, y in enumerate(eq.args)}
            total += inner * slope.xreplace(names)
        return total

    found = factor(after)
    if not isinstance(found, sp.Expr):
        return None
    names = sorted(s.name[1:] for s in found.free_symbols)
    args = tuple(program.var(n) for n in names)
    return found.xreplace({sp.Symbol(f"@{n}"): placeholder(i) for i, n in enumerate(names)}), args
