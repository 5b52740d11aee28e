"""Passes that put the partitions of a recurrence side by side, so that equations without a partition are shared.

The routed form of SSE: rows stay in time order, all states are carried together, and one product q k^T serves them all
with the gram of gates sum_n r_in w_jn exp(G^n_i - G^n_j) (frontend_sse.py has the recurrence).
"""

from __future__ import annotations

import re
from dataclasses import replace

import sympy as sp

from splagen.errors import ProgramError
from splagen.ir.build import Builder
from splagen.ir.program import Contract, Equation, Iota, Map, Op, Program, Reduce, Var, placeholder


def copy_name(name: str, axis: str, index: int) -> str:
    """The name of a variable's copy at one index of an unrolled axis: eta at p = 3 is eta_p3."""
    return f"{name}_{axis}{index}"


def copied(name: str, axis: str) -> tuple[str, int]:
    """The inverse of `copy_name`; a variable that is no copy has index 0."""
    found = re.fullmatch(rf"(.+)_{axis}(\d+)", name)
    return (found[1], int(found[2])) if found else (name, 0)


def unroll(program: Program, axis: str) -> Program:
    """Every variable over `axis` becomes one per index of it, inputs and outputs too; a sum over it a sum of those.

        y[i] = sum_n,j a[i j n] v[j]   ->   y = contract(a_0 + a_1 + ..., v)
        y[i] = sum_n c[i n] x[i n]     ->   y = c_0 x_0 + c_1 x_1 + ...

    Law: value unchanged; x_n is x at index n.  Raises ProgramError for an operation that goes along the axis otherwise.
    """
    extent = program.extents.get(axis)
    if not isinstance(extent, int):
        raise ProgramError(f"{program.name}: {axis} has extent {extent}", hint="unroll an axis of known extent")
    return _Unroll(program, axis, extent).program()


class _Unroll:
    def __init__(self, program: Program, axis: str, extent: int) -> None:
        self.old, self.axis, self.extent = program, axis, extent
        self.b = Builder(program.name, [(a, e) for a, e in program.axes if a != axis])
        every = (*program.inputs, *(eq.out for eq in program.equations))
        self.b._taken = {v.name for v in every if axis not in v.axes}
        self.copies: dict[Var, tuple[Var, ...]] = {}

    def program(self) -> Program:
        old = self.old
        inputs = tuple(x for v in old.inputs for x in self.spread(v))
        for eq in old.equations:
            if self.axis in eq.out.axes:
                self.copy(eq)
            elif not any(self.axis in v.axes for v in eq.args):
                self.b.equations.append(eq)
            else:
                self.total(eq)
        return replace(
            old,
            axes=self.b.axes,
            inputs=inputs,
            equations=tuple(self.b.equations),
            outputs=tuple(x for v in old.outputs for x in self.of(v)),
            cotangents=tuple(p for y, dy in old.cotangents for p in zip(self.of(y), self.of(dy), strict=True)),
            gradients=tuple(p for x, g in old.gradients for p in zip(self.of(x), self.of(g), strict=True)),
        )

    def spread(self, v: Var) -> tuple[Var, ...]:
        """Declare the copies of a variable."""
        if self.axis not in v.axes:
            return (v,)
        axes = tuple(a for a in v.axes if a != self.axis)
        names = [self.b.fresh(copy_name(v.name, self.axis, n)) for n in range(self.extent)]
        self.copies[v] = tuple(replace(v, name=name, axes=axes) for name in names)
        return self.copies[v]

    def of(self, v: Var) -> tuple[Var, ...]:
        return self.copies.get(v, (v,))

    def at(self, args: tuple[Var, ...], n: int) -> tuple[Var, ...]:
        return tuple(self.copies[v][n] if v in self.copies else v for v in args)

    def copy(self, eq: Equation) -> None:
        """An equation for each index."""
        for n, out in enumerate(self.spread(eq.out)):
            op: Op = eq.op
            match op:
                case Iota((axis,)) if axis == self.axis:
                    op = Map(sp.Integer(n))
                case Contract(keep):
                    op = Contract(tuple(a for a in keep if a != self.axis))
                case Map() | Reduce():
                    pass
                case _ if self.axis in _along(op):
                    raise self.refusal(eq)
            self.b.equations.append(Equation(out, op, self.at(eq.args, n)))

    def total(self, eq: Equation) -> None:
        """An equation that sums over the axis."""
        carrying = [v for v in eq.args if v in self.copies]
        match eq.op:
            case Contract(keep) if len(carrying) == 1 and carrying[0].kind == "real":
                (x,) = carrying
                whole = self.b.map(x.name, self.sum, *self.copies[x])
                self.b.equations.append(Equation(eq.out, eq.op, tuple(whole if v == x else v for v in eq.args)))
                return
            case Contract(keep):
                terms = [self.b.contract(self.term(eq, n), keep, *self.at(eq.args, n)) for n in range(self.extent)]
            case Reduce("sum", axes) | Reduce("mean", axes) if eq.op.how == "sum" or len(eq.args) == 1:
                rest = tuple(a for a in axes if a != self.axis)
                terms = [self.reduced(eq, rest, n) for n in range(self.extent)]
            case _:
                raise self.refusal(eq)
        mean = isinstance(eq.op, Reduce) and eq.op.how == "mean"
        self.b.equations.append(Equation(eq.out, Map(self.sum / self.extent if mean else self.sum), tuple(terms)))

    def reduced(self, eq: Equation, rest: tuple[str, ...], n: int) -> Var:
        """The term of one index, reduced over the other axes."""
        assert isinstance(eq.op, Reduce)
        args = self.at(eq.args, n)
        if rest:
            return self.b.add(self.term(eq, n), Reduce(eq.op.how, rest), *args)
        if len(args) == 1 and args[0].kind == "real":
            return args[0]
        if eq.args[0].kind != "real":
            raise self.refusal(eq)
        return self.b.map(self.term(eq, n), sp.Piecewise((placeholder(0), placeholder(1)), (0, True)), *args)

    def term(self, eq: Equation, n: int) -> str:
        return copy_name(eq.out.name, self.axis, n)

    @property
    def sum(self) -> sp.Expr:
        return sp.Add(*(placeholder(n) for n in range(self.extent)))

    def refusal(self, eq: Equation) -> ProgramError:
        return ProgramError(f"{eq.out} goes along {self.axis}", hint="unroll an axis that is only kept or summed over")


def _along(op: Op) -> set[str]:
    """The axes that an operation names, beside those that it keeps."""
    match op:
        case Map() | Contract():
            return set()
    found: set[str] = set()
    for value in vars(op).values():
        entries = value if isinstance(value, tuple) else (value,)
        found |= {a for x in entries for a in (x if isinstance(x, tuple) else (x,)) if isinstance(a, str)}
    return found


def masks_as_factors(program: Program) -> Program:
    """contract(where(m, c f x, 0), y)  ->  contract(x where(m, c f, 0), y)  for x with a summed axis that m lacks.

    What is left of a masked row is then a gate of the row, which a product of rows can do without (pull_factors).
    Law: value unchanged where x is finite.
    """
    summed: dict[Var, set[str]] = {}
    for eq in program.equations:
        if isinstance(eq.op, Contract):
            for v in eq.args:
                summed.setdefault(v, set()).update({a for x in eq.args for a in x.axes} - set(eq.op.keep))
    b = Builder.beside(program)
    for eq in program.equations:
        parts = _masked_product(eq)
        if parts:
            number, factors, mask = parts
            inside = [v for v in factors if (set(v.axes) - set(mask.axes)) & summed.get(eq.out, set())]
            if inside:
                rest = [v for v in factors if v not in inside]
                kept = (number * sp.Mul(*(placeholder(n) for n in range(len(rest)))), placeholder(len(rest)))
                gate = b.map(f"{eq.out.name}_gate", sp.Piecewise(kept, (0, True)), *rest, mask)
                args = (*inside, gate)
                eq = Equation(eq.out, Map(sp.Mul(*(placeholder(n) for n in range(len(args))))), args)
        b.equations.append(eq)
    return program.with_equations(b.equations)


def _masked_product(eq: Equation) -> tuple[sp.Expr, list[Var], Var] | None:
    """A number, factors and a mask where the equation is their product where the mask holds, else 0."""
    if not isinstance(eq.op, Map) or not isinstance(eq.op.expr, sp.Piecewise) or len(eq.op.expr.args) != 2:
        return None
    (value, held), (other, _) = eq.op.expr.args
    where = {placeholder(i): v for i, v in enumerate(eq.args)}
    if other != 0 or held not in where:
        return None
    every = sp.Mul.make_args(value)
    number = sp.Mul(*(f for f in every if f.is_number))
    symbols = [f for f in every if not f.is_number]
    if any(f not in where or f == held for f in symbols) or len(symbols) + 1 != len(eq.args):
        return None
    return number, [where[f] for f in symbols], where[held]
