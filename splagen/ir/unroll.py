"""A short axis written out: an array along it becomes one array for each of its indices."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from splagen.errors import ProgramError
from splagen.ir.build import Builder
from splagen.ir.passes import Pass
from splagen.ir.program import Contract, Equation, Iota, Map, Op, Program, Reduce, Softmax, Var, placeholder
from splagen.ir.text import equation_text


def unroll(axis: str) -> Pass:
    """x[s d]  ->  x_0[d], x_1[d];  contract(x, y) over s and d  ->  contract(x_0, y_0) + contract(x_1, y_1).

    Law: value unchanged.  What a program is given and what it is asked for does not lie along the axis, and no softmax
    sums over it; ProgramError quotes what does.
    """

    def unrolled(program: Program) -> Program:
        asked = (*program.inputs, *program.outputs, *(g for _, g in program.gradients))
        if carried := [v for v in asked if axis in v.axes]:
            raise ProgramError(f"{carried[0]} lies along {axis}", hint="only what is computed on the way is unrolled")
        return _Unrolling(program, axis).run()

    return unrolled


class _Unrolling:
    """`slices` has the arrays that stand for one along the axis."""

    def __init__(self, program: Program, axis: str) -> None:
        self.program, self.axis = program, axis
        self.size = int(program.extents.get(axis, 0))
        self.b = Builder(program.name, program.axes)
        self.b._taken = set(program.names())
        self.slices: dict[Var, tuple[Var, ...]] = {}

    def run(self) -> Program:
        for eq in self.program.equations:
            if self.axis in eq.out.axes:
                self.slices[eq.out] = tuple(self._slice(eq, i) for i in range(self.size))
            elif any(v in self.slices for v in eq.args):
                self._total(eq)
            else:
                self.b.equations.append(eq)
        return replace(self.program, equations=tuple(self.b.equations))

    def _slice(self, eq: Equation, i: int) -> Var:
        """One of the arrays that stand for an equation's result."""
        name, op = f"{eq.out.name}_{i}", eq.op
        args = self._args(eq, i)
        match op:
            case Iota((only,)) if only == self.axis:
                return self.b.add(name, Map(sp.Integer(i)))
            case Contract(keep):
                return self.b.add(name, Contract(tuple(a for a in keep if a != self.axis)), *args)
            case Iota() | Softmax() if self.axis in op.axes:
                raise ProgramError(f"`{equation_text(eq)}` goes along {self.axis}", hint="it cannot be unrolled")
        return self.b.add(name, op, *args)

    def _total(self, eq: Equation) -> None:
        """An equation that sums over the axis."""
        match eq.op:
            case Contract():
                op: Op = eq.op
            case Reduce("sum", axes) if axes == (self.axis,):
                op = Map(placeholder(0))
            case Reduce("sum", axes):
                op = Reduce("sum", tuple(a for a in axes if a != self.axis))
            case _:
                raise ProgramError(f"`{equation_text(eq)}` goes along {self.axis}", hint="only sums are unrolled")
        parts = tuple(self.b.add(f"{eq.out.name}_{i}", op, *self._args(eq, i)) for i in range(self.size))
        total = sp.Add(*(placeholder(i) for i in range(self.size)))
        self.b.equations.append(Equation(eq.out, Map(total), parts))

    def _args(self, eq: Equation, i: int) -> tuple[Var, ...]:
        return tuple(self.slices[v][i] if v in self.slices else v for v in eq.args)
