"""Regions: equations that are elementwise or reduce inside a tile, printed as Triton lines.

A region works on tiles of one rank.  Each dimension of the tile stands for a group of axes (rows, sign, feature, keys),
and a variable that lacks a group has size 1 there, so that Triton's broadcasting is the Program's broadcasting by name.
All arithmetic is float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy as sp

from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.program import Contract, Equation, Iota, Lse, Map, Reduce, Softmax, Var, placeholder
from splagen.ir.text import equation_text


@dataclass(frozen=True)
class Dim:
    """One tile dimension: the axes it flattens, and for each axis that is padded the source of its in-bounds mask."""

    axes: frozenset[str]
    padding: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """How to print equations: tile dimensions, facts about masks, and what is known to hold.

    `facts` fixes bool variables (the block-level part of a mask) and `simplify` may replace comparisons that always
    hold; a mask that becomes true is not printed.  `scalars` names run-time scalars such as L.
    """

    dims: tuple[Dim, ...]
    order: Mapping[str, int]
    extents: Mapping[str, int | sp.Expr]
    scalars: Mapping[str, str] = field(default_factory=lambda: {"L": "L", "Hkv": "Hkv"})
    facts: Mapping[Var, bool] = field(default_factory=dict)
    simplify: Callable[[sp.Basic, tuple[Var, ...]], sp.Basic] = lambda expr, args: expr

    def emit(self, equations: Iterable[Equation], bound: Mapping[Var, str]) -> tuple[list[str], dict[Var, str]]:
        """Lines that compute the equations, and the source that stands for every variable afterwards.

        `bound` gives the source of the variables that the kernel already holds.  A bool that is known to be true or
        false maps to "True" or "False".
        """
        names = dict(bound)
        names.update({v: str(value) for v, value in self.facts.items()})
        lines: list[str] = []
        for eq in equations:
            if eq.out not in names:
                names[eq.out] = self._equation(eq, names, lines)
        return lines, names

    def _equation(self, eq: Equation, names: dict[Var, str], lines: list[str]) -> str:
        match eq.op:
            case Map():
                return self._map(eq, names, lines)
            case Reduce(how, axes):
                x, where = self._masked(eq, names)
                source = self._reduce(eq, how, x, where, axes)
            case Contract(keep):
                product = " * ".join(names[v] for v in eq.args if v.kind == "real")
                for v in eq.args:
                    if v.kind == "bool" and names[v] != "True":
                        product = f"tl.where({names[v]}, {product}, 0.0)"
                summed = [a for v in eq.args for a in v.axes if a not in keep]
                source = self._reduce(eq, "sum", product, None, summed)
            case Softmax(axes):
                return self._softmax(eq, axes, names, lines)
            case Lse(axes):
                return self._lse(eq, axes, names, lines)
            case Iota((axis,)) if isinstance(self.extents[axis], int):
                return self._index(eq, axis)
            case _:
                raise PartitionError(f"no region computes `{equation_text(eq)}`")
        lines.append(f"{eq.out.name} = {source}")
        return eq.out.name

    def _map(self, eq: Equation, names: dict[Var, str], lines: list[str]) -> str:
        assert isinstance(eq.op, Map)
        known = {
            placeholder(i): sp.true if names[v] == "True" else sp.false
            for i, v in enumerate(eq.args)
            if names[v] in ("True", "False")
        }
        expr = self.simplify(eq.op.expr.xreplace(known), eq.args)
        for i, v in enumerate(eq.args):
            if expr == placeholder(i):
                return names[v]
        if expr in (sp.true, sp.false):
            return str(bool(expr))
        symbols = {placeholder(i).name: names[v] for i, v in enumerate(eq.args)} | dict(self.scalars)
        if eq.out.kind == "real":
            expr = self._as_floats(expr, eq.args, symbols)
        lines.append(f"{eq.out.name} = {triton_text(expr, symbols)}")
        return eq.out.name

    def _as_floats(self, expr: sp.Basic, args: tuple[Var, ...], symbols: dict[str, str]) -> sp.Basic:
        """Integers become float32 in arithmetic and stay exact in comparisons of integers."""
        whole = {placeholder(i): v for i, v in enumerate(args) if v.kind == "int"}
        exact = whole.keys() | {symbol(s) for s in self.scalars}
        kept = {r: sp.Dummy() for r in expr.atoms(sp.core.relational.Relational) if r.free_symbols <= exact}
        floats = {x: symbol(f"{x.name}_float") for x in whole}
        symbols.update({f.name: f"{_atom(symbols[x.name])}.to(tl.float32)" for x, f in floats.items()})
        return expr.xreplace(kept).xreplace(floats).xreplace({d: r for r, d in kept.items()})

    def _masked(self, eq: Equation, names: Mapping[Var, str]) -> tuple[str, str | None]:
        where = names[eq.args[1]] if len(eq.args) > 1 else "True"
        return names[eq.args[0]], None if where == "True" else where

    def _dims_of(self, eq: Equation, axes: Iterable[str]) -> list[int]:
        todo = set(axes)
        dims = [i for i, d in enumerate(self.dims) if d.axes & todo]
        missing = todo - frozenset().union(*(d.axes for d in self.dims))
        if missing:
            raise PartitionError(f"the tile has no axis {' '.join(sorted(missing))} of `{equation_text(eq)}`")
        return dims

    def padding(self, axes: Iterable[str]) -> str | None:
        """Source of the mask of real (not padded) entries along the axes, or None where nothing is padded."""
        masks = [d.padding[a] for a in axes for d in self.dims if a in d.padding]
        return " & ".join(dict.fromkeys(masks)) or None

    def _reduce(self, eq: Equation, how: str, x: str, where: str | None, axes: Sequence[str]) -> str:
        dims = self._dims_of(eq, axes)
        neutral = '-float("inf")' if how == "max" else "0.0"
        for mask in (where, self.padding(axes)):
            x = f"tl.where({mask}, {x}, {neutral})" if mask else x
        fn = "tl.max" if how == "max" else "tl.sum"
        for d in dims:
            x = f"{fn}({x}, axis={d}, keep_dims=True)"
        if how == "mean":
            if where:
                raise PartitionError(f"a masked mean has no region form: `{equation_text(eq)}`")
            size = sp.Mul(*(self.extents[a] for a in axes))
            x = f"{x} / {triton_text(sp.sympify(size), self.scalars)}"
        return x

    def _softmax(self, eq: Equation, axes: Sequence[str], names: Mapping[Var, str], lines: list[str]) -> str:
        x, where = self._masked(eq, names)
        out, dims = eq.out.name, self._dims_of(eq, axes)
        for mask in (where, self.padding(axes)):
            x = f'tl.where({mask}, {x}, -float("inf"))' if mask else x
        top = x
        for d in dims:
            top = f"tl.max({top}, axis={d}, keep_dims=True)"
        lines.append(f"{out} = tl.exp({x} - {top})")
        total = out
        for d in dims:
            total = f"tl.sum({total}, axis={d}, keep_dims=True)"
        lines.append(f"{out} = {out} / {total}")
        return out

    def _lse(self, eq: Equation, axes: Sequence[str], names: Mapping[Var, str], lines: list[str]) -> str:
        x, where = self._masked(eq, names)
        if where:
            raise PartitionError(f"a masked log-sum-exp has no region form: `{equation_text(eq)}`")
        out = eq.out.name
        lines.append(f"{out}_top = {self._reduce(eq, 'max', x, None, axes)}")
        power = f"tl.exp({x} - {out}_top)"
        total = self._reduce(eq, "sum", power, None, axes)
        lines.append(f"{out} = {out}_top + tl.log({total})")
        return out

    def _index(self, eq: Equation, axis: str) -> str:
        (d,) = self._dims_of(eq, [axis])
        view = ", ".join(":" if i == d else "None" for i in range(len(self.dims)))
        size = self.extents[axis] if axis == "s" else padded_extent(int(str(self.extents[axis])))
        return f"tl.arange(0, {size})[{view}]"


def padded_extent(size: int) -> int:
    """The tile extent that holds a feature axis: a power of two, at least 16 (tl.dot sums over no fewer)."""
    return max(16, 1 << (size - 1).bit_length())


def _atom(source: str) -> str:
    return source if re.fullmatch(r"[\w.]+(\[[^\]]*\]|\(.*\)(\[[^\]]*\])?)?", source) else f"({source})"
