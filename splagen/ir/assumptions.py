"""What a Program becomes where something is known of its run-time sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy as sp
from sympy.core.relational import Relational

from splagen.ir.build import Builder
from splagen.ir.passes import Pass, copy_prop, drop_unused, share
from splagen.ir.program import (
    Contract,
    CumSum,
    Equation,
    LowRank,
    Map,
    Op,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    Var,
    placeholder,
    result,
    union_axes,
)


def assume(fact: sp.Basic) -> Pass:
    """A comparison of run-time scalars holds: L < 100  ->  true, L >= 100  ->  false, wherever an expression asks.

    Law: the value does not change at sizes for which the fact holds.
    """
    assert isinstance(fact, Relational)
    false = fact.negated
    known = {fact: sp.true, fact.reversed: sp.true, false: sp.false, false.reversed: sp.false}

    def assuming(program: Program) -> Program:
        return program.with_equations(
            Equation(eq.out, Map(eq.op.expr.xreplace(known)), eq.args) if isinstance(eq.op, Map) else eq
            for eq in program.equations
        )

    return assuming


def fold_constants(program: Program) -> Program:
    """Equations of one constant are written where they are read: sum over nothing of X  ->  0,  f(x, 0)  ->  g(x).

    What a folded equation no longer reads may have been all that carried an axis: its value then lies along fewer axes
    and is spread again where it is summed.  Law: value unchanged, idempotent.
    """
    return drop_unused(_Folding(program).run())


class _Folding:
    """`known` has the constants, `new` the variables that lie along fewer axes than before.

    The equation of a constant stays where an operation takes no constants; it disappears if nothing reads it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.b = Builder.beside(program)
        self.asked = {*program.outputs, *(g for _, g in program.gradients)}
        self.known: dict[Var, sp.Basic] = {}
        self.new: dict[Var, Var] = {}

    def run(self) -> Program:
        for eq in self.program.equations:
            args = tuple(self.new.get(v, v) for v in eq.args)
            value = _constant(eq.op, args, self.known)
            if value is not None:
                self.known[eq.out] = value
                self.b.equations.append(eq)
                continue
            op, kept = _without_constants(eq.op, args, self.known)
            if (op, kept) == (eq.op, eq.args):
                self.b.equations.append(eq)
            else:
                self._add(eq, op, kept)
        return replace(self.program, equations=tuple(self.b.equations))

    def _add(self, eq: Equation, op: Op, args: tuple[Var, ...]) -> None:
        order = self.b.order
        lost = [a for a in union_axes(eq.args, order) if a not in union_axes(args, order)]
        if lost and isinstance(op, Map) and eq.out in self.asked:
            args = (*args, *(self.b.iota(f"along_{a}", a) for a in lost))
        elif lost and not isinstance(op, Map):
            along = [self.b.iota(f"along_{a}", a) for a in lost]
            args = (self.b.map(f"{args[0].name}_along", placeholder(0), args[0], *along), *args[1:])
        axes, kind = result(op, args, order)
        if kind != eq.out.kind:  # a real number that is now always whole
            self.b.equations.append(eq)
        elif axes == eq.out.axes:
            self.b.equations.append(Equation(eq.out, op, args))
        else:
            self.b.equations.append(eq)
            self.new[eq.out] = self.b.add(eq.out.name, op, *args)


def _constant(op: Op, args: tuple[Var, ...], known: Mapping[Var, sp.Basic]) -> sp.Basic | None:
    """The constant that an equation is, if it is one."""
    nowhere = len(args) > 1 and known.get(args[1]) == sp.false
    match op:
        case Map(expr):
            value = expr.xreplace({placeholder(i): known[v] for i, v in enumerate(args) if v in known})
            return value if not value.free_symbols else None
        case Contract():
            return sp.Integer(0) if any(_is_zero(known.get(v)) for v in args) else None
        case Reduce() | LowRank():
            return sp.Integer(0) if nowhere or _is_zero(known.get(args[0])) else None
        case Softmax():
            return sp.Integer(0) if nowhere else None
        case TopK():
            return sp.false if nowhere else None
        case CumSum():
            return sp.Integer(0) if _is_zero(known.get(args[0])) else None
        case Rename():
            return known.get(args[0])
    return None


def _is_zero(value: sp.Basic | None) -> bool:
    return value == 0 or value == sp.false


def _without_constants(op: Op, args: tuple[Var, ...], known: Mapping[Var, sp.Basic]) -> tuple[Op, tuple[Var, ...]]:
    """The same operation without the arguments that a constant stands for."""
    if isinstance(op, Map):
        if not known.keys() & set(args):
            return op, args
        expr = op.expr.xreplace({placeholder(i): known[v] for i, v in enumerate(args) if v in known})
        left = [
            i
            for i, v in enumerate(args)
            if v not in known and (placeholder(i) in expr.free_symbols or placeholder(i) not in op.expr.free_symbols)
        ]
        swap = {placeholder(i): placeholder(n) for n, i in enumerate(left)}
        return Map(expr.xreplace(swap)), tuple(args[i] for i in left)
    if isinstance(op, Contract):
        factors = tuple(v for v in args if known.get(v) not in (sp.true, sp.Integer(1)))
        return op, factors or args
    if len(args) > 1 and known.get(args[1]) == sp.true:  # a mask that holds everywhere
        return op, args[:1]
    return op, args


def below(length: sp.Symbol, limit: int) -> tuple[Pass, ...]:
    """The passes that a Program takes where a sequence is shorter than `limit`."""
    return assume(sp.Lt(length, limit)), fold_constants, copy_prop, share, drop_unused
