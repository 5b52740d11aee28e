"""The derived gradient: reverse-mode differentiation of a Program, one rule per operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy as sp

from splagen.errors import ProgramError
from splagen.ir.build import Builder
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
    ordered,
    placeholder,
)

Rule: TypeAlias = Callable[[Builder, Equation, Var, "set[Var]"], Iterator[tuple[Var, Var]]]


def derive_gradient(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The program followed by the equations of its gradient.

    For every output y a new input dy holds its cotangent; for every real input x in `wrt` (None: those that an output
    depends on through differentiable operations) `gradients` names the variable that holds dx.  Rewrite, for y = f(x):
    dx += (df/dx)^T dy.  Law: equals torch autograd of the oracle.  Raises ProgramError if an output does not depend on
    an input asked for.
    """
    inputs = [v for v in program.inputs if v.kind == "real" and (wrt is None or v.name in wrt)]
    active = _active(program, inputs)
    b = Builder.resume(program)
    pending: dict[Var, list[Var]] = {}
    cotangents = []
    for y in program.outputs:
        dy = b.input(f"d{y.name}", y.axes)
        cotangents.append((y, dy))
        pending.setdefault(y, []).append(dy)
    for eq in reversed(program.equations):
        if eq.out in active and eq.out in pending:
            dy = _total(b, eq.out, pending[eq.out])
            for x, dx in GRADIENT[type(eq.op)](b, eq, dy, active):
                pending.setdefault(x, []).append(_sum_to(b, x, dx))
    gradients = []
    for x in inputs:
        if x not in pending and wrt is None:
            continue
        if x not in pending:
            raise ProgramError(f"no output of {program.name} depends on {x}", hint="leave it out of wrt")
        gradients.append((x, _total(b, x, pending[x])))
    done = b.program(*program.outputs)
    return replace(done, cotangents=tuple(cotangents), gradients=tuple(gradients))


def _active(program: Program, inputs: Sequence[Var]) -> set[Var]:
    """Real variables that depend on an input asked for through differentiable operations."""
    active = set(inputs)
    for eq in program.equations:
        if eq.out.kind == "real" and GRADIENT[type(eq.op)] is not _none and active & set(eq.args):
            active.add(eq.out)
    return active


def _total(b: Builder, x: Var, parts: list[Var]) -> Var:
    if len(parts) == 1:
        return parts[0]
    return b.map(f"d{x.name}", sp.Add(*(placeholder(i) for i in range(len(parts)))), *parts)


def _sum_to(b: Builder, x: Var, dx: Var) -> Var:
    """Sum a contribution over the axes along which x was broadcast."""
    extra = set(dx.axes) - set(x.axes)
    return b.reduce(f"d{x.name}", "sum", extra, dx) if extra else dx


def _broadcast(b: Builder, name: str, x: Var, axes: Sequence[str]) -> Var:
    """x, constant along the axes that it lacks."""
    missing = [a for a in axes if a not in x.axes]
    return b.map(name, placeholder(0), x, *(b.iota(f"along_{a}", a) for a in missing)) if missing else x


def _map(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    assert isinstance(eq.op, Map)
    cotangent = placeholder(len(eq.args))
    for x in dict.fromkeys(a for a in eq.args if a in active):
        slope = sp.Add(*(eq.op.expr.diff(placeholder(i)) for i, a in enumerate(eq.args) if a == x))
        if slope == 0:
            continue
        expr = cotangent * slope
        used = [i for i in range(len(eq.args) + 1) if placeholder(i) in expr.free_symbols]
        args = [(*eq.args, dy)[i] for i in used]
        expr = expr.xreplace({placeholder(i): placeholder(n) for n, i in enumerate(used)})
        dx = b.map(f"d{x.name}", expr, *args)
        yield x, _broadcast(b, f"d{x.name}", dx, [a for a in eq.out.axes if a in x.axes])


def _contract(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    for i, x in enumerate(eq.args):
        if x in active:
            others = (*eq.args[:i], *eq.args[i + 1 :])
            reach = {a for v in (dy, *others) for a in v.axes}
            dx = b.contract(f"d{x.name}", set(x.axes) & reach, *others, dy)
            yield x, _broadcast(b, f"d{x.name}", dx, x.axes)


def _softmax(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    """dx = p (dp - delta), delta = sum p dp."""
    assert isinstance(eq.op, Softmax)
    x, p = eq.args[0], eq.out
    delta = b.contract(f"delta_{p.name}", set(p.axes) - set(eq.op.axes), p, dy)
    yield x, b.map(f"d{x.name}", lambda w, g, mean: w * (g - mean), p, dy, delta)


def _lse(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    """dx = softmax(x) dl."""
    assert isinstance(eq.op, Lse)
    p = b.add(f"softmax_{eq.args[0].name}", Softmax(eq.op.axes), *eq.args)
    yield eq.args[0], b.map(f"d{eq.args[0].name}", lambda w, g: w * g, p, dy)


def _reduce(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    assert isinstance(eq.op, Reduce)
    x, where = eq.args[0], eq.args[1:]
    spread = ordered({a for v in eq.args for a in v.axes}, b.order)
    extents = dict(b.axes)
    if eq.op.how == "max":
        hit = b.map(f"is_max_{x.name}", lambda v, top: sp.Eq(v, top), x, eq.out)
        if where:
            hit = b.map(f"is_max_{x.name}", lambda h, held: sp.And(h, held), hit, *where)
        where = (hit,)
    if eq.op.how == "sum":
        share = dy
    elif where:
        ones = b.map(f"held_{x.name}", lambda held: sp.Piecewise((1, held), (0, True)), *where)
        ones = _broadcast(b, f"held_{x.name}", ones, spread)
        count = b.reduce(f"count_{x.name}", "sum", eq.op.axes, ones)
        share = b.map(f"share_{x.name}", lambda g, c: sp.Piecewise((g / c, c > 0), (0, True)), dy, count)
    else:
        count_expr = sp.Mul(*(extents[a] for a in eq.op.axes))
        share = b.map(f"share_{x.name}", lambda g: g / count_expr, dy)
    if where:
        share = b.map(f"d{x.name}", lambda g, held: sp.Piecewise((g, held), (0, True)), share, *where)
    yield x, _broadcast(b, f"d{x.name}", share, spread)


def _cumsum(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    """The transpose of a prefix sum is a suffix sum: total - prefix + own."""
    assert isinstance(eq.op, CumSum)
    x = eq.args[0]
    total = b.reduce(f"total_{x.name}", "sum", eq.op.axes, dy)
    prefix = b.cumsum(f"prefix_{x.name}", eq.op.axes, dy)
    yield x, b.map(f"d{x.name}", lambda t, c, g: t - c + g, total, prefix, dy)


def _rename(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    assert isinstance(eq.op, Rename)
    yield eq.args[0], b.rename(f"d{eq.args[0].name}", dy, **{new: old for old, new in eq.op.pairs})


def _unit_inverse(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    """dx = -(y^T dy y^T) below the diagonal, from d(1 + x)^-1 = -y dx y."""
    assert isinstance(eq.op, UnitInverse)
    row, column, third = eq.op.row, eq.op.column, eq.op.third
    x, y = eq.args[0], eq.out
    rest = [a for a in y.axes if a not in (row, column)]
    left = b.contract(f"d{x.name}_left", (*rest, column, third), y, b.rename(f"d{y.name}_third", dy, **{column: third}))
    whole = b.contract(f"d{x.name}_flip", (*rest, row, column), left, b.rename(f"{y.name}_third", y, **{column: third}))
    turned = b.rename(f"d{x.name}_whole", whole, **{row: column, column: row})
    i, j = b.iota(f"row_{x.name}", row), b.iota(f"column_{x.name}", column)
    yield x, b.map(f"d{x.name}", lambda g, r, c: sp.Piecewise((-g, c < r), (0, True)), turned, i, j)


def _none(b: Builder, eq: Equation, dy: Var, active: set[Var]) -> Iterator[tuple[Var, Var]]:
    return iter(())


GRADIENT: dict[type[Op], Rule] = {
    Iota: _none,
    Map: _map,
    Contract: _contract,
    Reduce: _reduce,
    Softmax: _softmax,
    Lse: _lse,
    TopK: _none,
    CumSum: _cumsum,
    Rename: _rename,
    UnitInverse: _unit_inverse,
    LowRank: _none,
}
