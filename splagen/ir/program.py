"""The Program: a straight list of equations over arrays with named axes.

    program  ::= axes inputs equations outputs
    equation ::= var[axes] = op(var, ...)
    op       ::= Iota | Map | Contract | Reduce | Softmax | Lse | TopK | CumSum | Rename | UnitInverse
               | LowRank

There are no loops, branches, tiles, permutes or float types.  Every variable carries its axes in the one order that
the program declares, so broadcasting is by name.  An axis has an extent (an integer, or a symbol known at run time),
and a sequence is stored already blocked: key position j is the mixed-radix number (J, C, n).  Scalars that are known
only at run time (the length L) are symbols that any Map may read.

Not in the language, on purpose: control flow, in-place update, data-dependent shapes, random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import sympy as sp

from splagen.errors import PartitionError, ProgramError
from splagen.expression import is_condition, symbol

Kind: TypeAlias = Literal["real", "int", "bool"]
Extent: TypeAlias = int | sp.Expr
LOW_RANK_FEATURES = 260  # the most that LowRank takes: the squares of 1 to 260 are distinct modulo 521


@dataclass(frozen=True)
class Var:
    """A named array: `axes` in the program's declared order; `kind` is real, int or bool."""

    name: str
    axes: tuple[str, ...]
    kind: Kind = "real"

    def __str__(self) -> str:
        """Name and axes, as equations print them."""
        return f"{self.name}[{' '.join(self.axes)}]"


@dataclass(frozen=True)
class Iota:
    """Position along a mixed-radix group of axes, coarse to fine: Iota((J, n)) = J * |n| + n."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Map:
    """Elementwise: `expr` in the placeholders x0, x1, ... (the arguments) and run-time scalars such as L."""

    expr: sp.Basic


@dataclass(frozen=True)
class Contract:
    """Sum of products of all arguments over the axes not in `keep`; a bool argument counts as 0 or 1."""

    keep: tuple[str, ...]


@dataclass(frozen=True)
class Reduce:
    """Sum, mean or max of x over `axes`, where the optional second argument holds (nothing held: 0)."""

    how: Literal["sum", "mean", "max"]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Softmax:
    """Softmax of x over `axes` where the optional mask holds; 0 elsewhere and in an all-masked row."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Lse:
    """Log-sum-exp of x over `axes` where the optional mask holds; -inf in an all-masked row."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class TopK:
    """True at the k largest along `axis` where the mask holds; ties go to the lowest index; no gradient."""

    k: int
    axis: str


@dataclass(frozen=True)
class CumSum:
    """Inclusive prefix sum along a mixed-radix group of axes, coarse to fine."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Rename:
    """The same array under other axis names: pairs of (old, new)."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class UnitInverse:
    """Inverse of 1 + x, x strictly lower triangular over (row, column): entries on and above the diagonal are ignored.

    `third` is an axis of the same extent that the gradient rule sums over.  A triangular solve is the product with it:
    as a product it is open to every pass that knows products.
    """

    row: str
    column: str
    third: str


@dataclass(frozen=True)
class LowRank:
    """Factors w_0, w_1, ... along the axis `rank`, sum_i w_i w_i^T ~ x^T x / n over the n rows of x where a mask holds.

    For i = 0, 1, ...: y = x v with v[d] = 2 ((i + 1) (d + 1)^2 mod 521) - 521, then `steps` times y <- x x^T (y / |y|),
    then y <- y / |y|;  w_i = x^T y / sqrt(n);  x <- x - y y^T x.  Where |y| = 0, y stays 0; no row at all gives 0.

    This is the power method on the Gram matrix of the rows, one direction at a time.  The y are orthonormal, so
    sum_i w_i w_i^T is x^T P x / n for a projector P: with more factors it grows, never exceeds x^T x / n, and equals it
    once they are as many as the rank of x.  The number of steps is part of the meaning: the factors are smooth in x
    even where eigenvalues meet and eigenvectors jump, so two evaluations agree to rounding.  No gradient.
    """

    rows: str
    features: str
    rank: str
    steps: int


Op: TypeAlias = Iota | Map | Contract | Reduce | Softmax | Lse | TopK | CumSum | Rename | UnitInverse | LowRank
OPS: tuple[type, ...] = (Iota, Map, Contract, Reduce, Softmax, Lse, TopK, CumSum, Rename, UnitInverse, LowRank)


@dataclass(frozen=True)
class Equation:
    """`out = op(args)`."""

    out: Var
    op: Op
    args: tuple[Var, ...]


@dataclass(frozen=True)
class Program:
    """Equations in order, every variable defined once and before it is read.

    `axes` declares the order and the extent of every axis.  `inputs` are given; `outputs` are asked for.
    `cotangents` pairs each differentiated output with the input that carries its cotangent, and `gradients` each input
    with the variable that holds its gradient; both are empty before derive_gradient.  `scalars` are numbers that any
    Map may read at run time: the length L, and in a decoding step where it starts.
    """

    name: str
    axes: tuple[tuple[str, Extent], ...]
    inputs: tuple[Var, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Var, ...]
    cotangents: tuple[tuple[Var, Var], ...] = ()
    gradients: tuple[tuple[Var, Var], ...] = ()
    scalars: tuple[str, ...] = ("L",)

    def __str__(self) -> str:
        """The equations, as text."""
        from splagen.ir.text import program_text

        return program_text(self)

    @property
    def order(self) -> dict[str, int]:
        """Axis name to its place in the declared order."""
        return {name: i for i, (name, _) in enumerate(self.axes)}

    @property
    def extents(self) -> dict[str, Extent]:
        """Axis name to its extent."""
        return dict(self.axes)

    @property
    def definitions(self) -> dict[Var, Equation]:
        """Variable to the equation that defines it."""
        return {eq.out: eq for eq in self.equations}

    def var(self, name: str) -> Var:
        """The variable of this name; raises ProgramError if there is none."""
        for v in (*self.inputs, *(eq.out for eq in self.equations)):
            if v.name == name:
                return v
        raise ProgramError(f"{self.name} has no variable {name}", hint=f"it has {', '.join(self.names())}")

    def names(self) -> list[str]:
        """Every variable's name, in order."""
        return [v.name for v in (*self.inputs, *(eq.out for eq in self.equations))]

    def in_order(self, equations: Iterable[Equation]) -> tuple[Equation, ...]:
        """Those of the program's equations that are among the given ones, each once."""
        wanted = set(equations)
        return tuple(eq for eq in self.equations if eq in wanted)

    def with_equations(self, equations: Iterable[Equation]) -> Program:
        """The same program with other equations."""
        return replace(self, equations=tuple(equations))


def placeholder(i: int) -> sp.Symbol:
    """The symbol that stands for argument i in a Map's expression."""
    return symbol(f"x{i}")


def ordered(axes: Iterable[str], order: Mapping[str, int]) -> tuple[str, ...]:
    """The distinct axes in declared order."""
    return tuple(sorted(set(axes), key=order.__getitem__))


def union_axes(variables: Iterable[Var], order: Mapping[str, int]) -> tuple[str, ...]:
    """Every axis that some variable carries, in declared order."""
    return ordered((a for v in variables for a in v.axes), order)


def result(op: Op, args: tuple[Var, ...], order: Mapping[str, int]) -> tuple[tuple[str, ...], Kind]:
    """Axes and kind of `op(args)`: the typing rule of every operation."""
    match op:
        case Iota(axes):
            return ordered(axes, order), "int"
        case Map(expr):
            axes = union_axes(args, order)
            if is_condition(expr) or (_is_bool_alias(expr, args)):
                return axes, "bool"
            whole = all(v.kind == "int" for v in args) and _is_whole(expr)
            return axes, "int" if whole else "real"
        case Contract(keep):
            return ordered(keep, order), "real"
        case Reduce(how, axes):
            rest = ordered(set(union_axes(args, order)) - set(axes), order)
            return rest, "int" if args[0].kind != "real" and how != "mean" else "real"
        case Softmax():
            return union_axes(args, order), "real"
        case Lse(axes):
            return ordered(set(union_axes(args, order)) - set(axes), order), "real"
        case TopK():
            return union_axes(args, order), "bool"
        case CumSum():
            return args[0].axes, args[0].kind
        case UnitInverse():
            return args[0].axes, "real"
        case LowRank(rows, _, rank):
            return ordered((set(union_axes(args, order)) - {rows}) | {rank}, order), "real"
        case Rename(pairs):
            new = dict(pairs)
            return ordered((new.get(a, a) for a in args[0].axes), order), args[0].kind


def _is_bool_alias(expr: sp.Basic, args: tuple[Var, ...]) -> bool:
    return any(expr == placeholder(i) and v.kind == "bool" for i, v in enumerate(args))


def _is_whole(expr: sp.Basic) -> bool:
    return all(
        isinstance(e, (sp.Integer, sp.Symbol, sp.Add, sp.Mul, sp.Piecewise))
        or is_condition(e)
        or isinstance(e, sp.functions.elementary.piecewise.ExprCondPair)
        for e in sp.preorder_traversal(expr)
    )


def rename_arguments(expr: sp.Basic, old: tuple[Var, ...], new: tuple[Var, ...]) -> sp.Basic:
    """`expr` over the arguments `old`, rewritten over the arguments `new` (every old one is in new)."""
    where = {v: i for i, v in enumerate(new)}
    return expr.xreplace({placeholder(i): placeholder(where[v]) for i, v in enumerate(old)})


def ancestors(program: Program, wanted: Iterable[Var]) -> set[Var]:
    """The variables that the wanted ones depend on, and they themselves."""
    found = set(wanted)
    for eq in reversed(program.equations):
        if eq.out in found:
            found.update(eq.args)
    return found


def descendants(program: Program, sources: Iterable[Var]) -> set[Var]:
    """The variables that depend on one of the sources, and they themselves."""
    found = set(sources)
    for eq in program.equations:
        if found & set(eq.args):
            found.add(eq.out)
    return found


def slice_back(program: Program, wanted: Iterable[Var], stop: Iterable[Var]) -> list[Equation]:
    """The equations that compute the wanted variables from those in `stop`, in program order.

    Raises PartitionError for an input of the program that is needed and not in `stop`.
    """
    fence, definitions = set(stop), program.definitions
    seen: set[Var] = set()
    todo = [v for v in wanted if v not in fence]
    while todo:
        v = todo.pop()
        if v in seen or v in fence:
            continue
        if v not in definitions:
            raise PartitionError(f"{v} is an input that the kernel does not load")
        seen.add(v)
        todo.extend(definitions[v].args)
    return [eq for eq in program.equations if eq.out in seen]
