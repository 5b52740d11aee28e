"""Building a Program equation by equation, as a front end or a pass writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import sympy as sp

from splagen.errors import ProgramError
from splagen.expression import check_expression
from splagen.ir.program import (
    Contract,
    CumSum,
    Equation,
    Extent,
    Iota,
    Kind,
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
    result,
)


class Builder:
    """Collects equations; every method adds one and returns its variable.

    A name that is taken gets a number appended.  Methods raise ProgramError where the operation does not type.
    """

    def __init__(self, name: str, axes: Sequence[tuple[str, Extent]], scalars: Sequence[str] = ("L",)) -> None:
        """Start an empty program over the declared axes and the run-time scalars."""
        self.name = name
        self.axes = tuple(axes)
        self.order = {a: i for i, (a, _) in enumerate(self.axes)}
        self.scalars = tuple(scalars)
        self.inputs: list[Var] = []
        self.equations: list[Equation] = []
        self._taken: set[str] = set()

    @classmethod
    def beside(cls, program: Program) -> Builder:
        """A builder of equations over the axes of `program`, whose names are taken and whose scalars are known."""
        extents = {s.name for _, e in program.axes if not isinstance(e, int) for s in e.free_symbols}
        b = cls(program.name, program.axes, scalars=(*program.scalars, *sorted(extents)))
        b._taken = set(program.names())
        return b

    @classmethod
    def resume(cls, program: Program) -> Builder:
        """A builder that continues `program`."""
        b = cls.beside(program)
        b.inputs = list(program.inputs)
        b.equations = list(program.equations)
        return b

    def fresh(self, name: str) -> str:
        """`name`, or `name` with the first free number; the name is then taken."""
        stem = re.sub(r"_\d+$", "", name)
        i, candidate = 2, name
        while candidate in self._taken:
            candidate, i = f"{stem}_{i}", i + 1
        self._taken.add(candidate)
        return candidate

    def input(self, name: str, axes: Iterable[str], kind: Kind = "real") -> Var:
        """Declare an input."""
        v = Var(self.fresh(name), ordered(axes, self.order), kind)
        self.inputs.append(v)
        return v

    def add(self, name: str, op: Op, *args: Var) -> Var:
        """Append `name = op(args)`."""
        axes, kind = result(op, args, self.order)
        out = Var(self.fresh(name), axes, kind)
        self.equations.append(Equation(out, op, args))
        return out

    def iota(self, name: str, *axes: str) -> Var:
        """Position along the group of axes, coarse to fine."""
        return self.add(name, Iota(axes))

    def map(self, name: str, fn: Callable[..., sp.Basic | float | bool] | sp.Basic, *args: Var) -> Var:
        """Elementwise `fn` of the arguments: a callable of sympy symbols, or an expression in x0, x1, ..."""
        expr = fn if isinstance(fn, sp.Basic) else sp.sympify(fn(*(placeholder(i) for i in range(len(args)))))
        names = {placeholder(i).name for i in range(len(args))} | set(self.scalars)
        return self.add(name, Map(check_expression(expr, names)), *args)

    def contract(self, name: str, keep: Iterable[str], *args: Var) -> Var:
        """Sum of products over every axis not kept."""
        return self.add(name, Contract(ordered(keep, self.order)), *args)

    def reduce(
        self, name: str, how: Literal["sum", "mean", "max"], axes: Iterable[str], x: Var, where: Var | None = None
    ) -> Var:
        """Sum, mean or max over `axes` where the mask holds."""
        return self.add(name, Reduce(how, ordered(axes, self.order)), *_masked(x, where))

    def softmax(self, name: str, axes: Iterable[str], x: Var, where: Var | None = None) -> Var:
        """Softmax over `axes` where the mask holds."""
        return self.add(name, Softmax(ordered(axes, self.order)), *_masked(x, where))

    def lse(self, name: str, axes: Iterable[str], x: Var, where: Var | None = None) -> Var:
        """Log-sum-exp over `axes` where the mask holds."""
        return self.add(name, Lse(ordered(axes, self.order)), *_masked(x, where))

    def topk(self, name: str, k: int, axis: str, x: Var, where: Var | None = None) -> Var:
        """Mask of the k largest along `axis` where the mask holds."""
        return self.add(name, TopK(k, axis), *_masked(x, where))

    def cumsum(self, name: str, axes: Iterable[str], x: Var) -> Var:
        """Inclusive prefix sum along the group of axes."""
        return self.add(name, CumSum(ordered(axes, self.order)), x)

    def unit_inverse(self, name: str, x: Var, row: str = "i", column: str = "j", third: str = "l") -> Var:
        """Inverse of 1 + x, x strictly lower triangular over (row, column)."""
        return self.add(name, UnitInverse(row, column, third), x)

    def low_rank(
        self, name: str, x: Var, where: Var | None = None, *, rows: str, features: str, rank: str, steps: int
    ) -> Var:
        """Factors along `rank` of the second moment of the rows where the mask holds."""
        return self.add(name, LowRank(rows, features, rank, steps), *_masked(x, where))

    def rename(self, name: str, x: Var, **pairs: str) -> Var:
        """The same array with axes renamed (old=new)."""
        return self.add(name, Rename(tuple(sorted(pairs.items()))), x)

    def program(self, *outputs: Var) -> Program:
        """The finished program."""
        known = {*self.inputs, *(eq.out for eq in self.equations)}
        for v in outputs:
            if v not in known:
                raise ProgramError(f"output {v} of {self.name} is not defined", hint="add its equation first")
        return Program(self.name, self.axes, tuple(self.inputs), tuple(self.equations), tuple(outputs))


def _masked(x: Var, where: Var | None) -> tuple[Var, ...]:
    return (x,) if where is None else (x, where)
