"""Printing a chunk of a recurrence: every equation over rows and features as one line on tiles of rank 0 to 2.

A program takes one value head and walks over chunks of CHUNK rows; axes i, j and l are rows of the chunk, d and e
features, p partitions.  A tile has a dimension for each of these axes that its variable carries, in declared order.

Tiles are padded: rows beyond the segment, features beyond the data.  An input reads 0 there.  `clean` tracks along
which axes a variable is 0 in the padding; a sum along an axis takes at least one factor that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy as sp

from splagen.codegen.region import padded_extent
from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.program import (
    Contract,
    CumSum,
    Equation,
    Iota,
    Map,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    UnitInverse,
    Var,
    placeholder,
)
from splagen.ir.text import equation_text

ROWS = ("i", "j", "l")
TILE = (*ROWS, "p", "d", "e")


def tile_axes(v: Var) -> tuple[str, ...]:
    """The axes that are dimensions of the variable's tile."""
    return tuple(a for a in v.axes if a in TILE)


def too_large(v: Var) -> bool:
    """Pairs of positions and a feature: no tile holds it."""
    return len(tile_axes(v)) > 2


def decay_of(program: Program, v: Var) -> Var:
    """The cumulative decay whose differences a large array is the exponential of."""
    eq = program.definitions[v]
    x0, x1, x2, x3 = (symbol(f"x{n}") for n in range(4))
    form = sp.Piecewise((sp.exp(x0 - x1), sp.Le(x3, x2)), (0, True))
    if isinstance(eq.op, Map) and len(eq.args) == 4 and eq.op.expr == form:
        late = program.definitions.get(eq.args[1])
        if late is not None and isinstance(late.op, Rename) and late.args == (eq.args[0],):
            return eq.args[0]
    raise PartitionError(f"no tile holds `{equation_text(eq)}`")


@dataclass
class ChunkCode:
    """Prints equations of a program as lines; `names` maps variables to float32 (or bool) source.

    `raw` maps loaded variables to source in the dtype of memory, for products.
    """

    program: Program
    names: dict[Var, str] = field(default_factory=dict)
    raw: dict[Var, str] = field(default_factory=dict)
    clean: dict[Var, frozenset[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    row_mask: str = "row_ok"
    mild: bool = True  # decays over pairs of rows and features span little
    sums: frozenset[Var] = frozenset()  # what a loop over columns adds to
    scalars: Mapping[str, str] = field(default_factory=dict)

    def bind(self, v: Var, source: str, raw: str | None = None) -> None:
        """A loaded or carried variable: 0 in the padding."""
        self.names[v] = source
        self.clean[v] = frozenset(tile_axes(v))
        if raw is not None:
            self.raw[v] = raw

    def emit(self, equations: Iterable[Equation]) -> None:
        """Append lines for the equations, in order."""
        for eq in equations:
            if eq.out in self.names or too_large(eq.out):
                continue  # a large array is a factor of contractions that know its form
            source, clean = self._equation(eq)
            if eq.out in self.sums:
                self.lines.append(f"{eq.out.name} += {source}")
                self.names[eq.out] = eq.out.name
            elif source.isidentifier():
                self.names[eq.out] = source
            else:
                self.lines.append(f"{eq.out.name} = {source}")
                self.names[eq.out] = eq.out.name
            self.clean[eq.out] = clean

    # -- one rule per operation --------------------------------------------------------------------------------------

    def _equation(self, eq: Equation) -> tuple[str, frozenset[str]]:
        match eq.op:
            case Iota((axis,)) if axis in ROWS:
                return "row", frozenset()
            case Iota((axis,)) if axis in TILE:
                return f"tl.arange(0, {self.extent(axis)})", frozenset()
            case Iota((_,)):
                return "0", frozenset()  # an axis of programs: the variable only spreads another along it
            case Map(expr):
                return self._map(eq, expr)
            case Contract(keep):
                return self._contract(eq, keep)
            case Reduce(how, axes):
                return self._reduce(eq, how, axes)
            case Softmax(axes):
                return self._softmax(eq, axes)
            case TopK(k, axis):
                return self._topk(eq, k, axis)
            case CumSum((axis,)):
                x = eq.args[0]
                place = tile_axes(x).index(axis)
                return f"tl.cumsum({self._zeroed(x, (axis,))}, axis={place})", self.clean[x] - {axis}
            case Rename(pairs):
                return self._rename(eq, dict(pairs))
            case UnitInverse(row, column, _) if tile_axes(eq.out) == (row, column):
                return f"unit_inverse({self.names[eq.args[0]]})", frozenset()
        raise PartitionError(f"no chunk computes `{equation_text(eq)}`")

    def _map(self, eq: Equation, expr: sp.Basic) -> tuple[str, frozenset[str]]:
        out = tile_axes(eq.out)
        symbols = {placeholder(i).name: self.view(self.names[v], tile_axes(v), out) for i, v in enumerate(eq.args)}
        source = triton_text(expr, symbols | dict(self.scalars))
        for v in eq.args:
            if expr == placeholder(eq.args.index(v)) and tile_axes(v) == out:
                return self.names[v], self.clean[v]
        missing = [
            a for a in out if not any(a in v.axes for i, v in enumerate(eq.args) if placeholder(i) in expr.free_symbols)
        ]
        if missing:
            shape = ", ".join(self.extent(a) for a in out)
            source = f"tl.zeros(({shape},), tl.float32) + {source}"
        return source, frozenset(a for a in out if self._vanishes(eq, expr, a))

    def _vanishes(self, eq: Equation, expr: sp.Basic, axis: str) -> bool:
        """True where the expression is 0 wherever its arguments that are clean along the axis are."""
        if eq.out.kind == "bool":
            return False
        zero = {placeholder(i): sp.S.Zero for i, v in enumerate(eq.args) if axis in v.axes and axis in self.clean[v]}
        return bool(zero) and expr.xreplace(zero) == 0

    def _contract(self, eq: Equation, keep: Sequence[str]) -> tuple[str, frozenset[str]]:
        large = [v for v in eq.args if too_large(v)]
        clean = frozenset(a for a in tile_axes(eq.out) if any(a in self.clean.get(v, ()) for v in eq.args))
        if large:
            return self._decayed(eq, large), clean
        summed = [a for a in TILE if a not in keep and any(a in v.axes for v in eq.args)]
        inside = [v for v in eq.args if set(tile_axes(v)) & set(summed)]
        outside = [v for v in eq.args if v not in inside]
        source, axes = self._sum_of_products(eq, inside, summed) if inside else ("1.0", ())
        out = tile_axes(eq.out)
        terms = [self.view(source, axes, out)] if inside else []
        terms += [self.view(self.names[v], tile_axes(v), out) for v in outside]
        return " * ".join(terms), clean

    def _sum_of_products(self, eq: Equation, args: list[Var], summed: list[str]) -> tuple[str, tuple[str, ...]]:
        every = tuple(a for a in TILE if any(a in v.axes for v in args))
        kept = tuple(a for a in every if a not in summed)
        if len(every) <= 2:
            factors = [self.view(self.names[v], tile_axes(v), every) for v in args]
            for a in summed:
                if not any(a in self.clean[v] for v in args) and self.padding(a):
                    factors[0] = f"tl.where({self.view(self._mask(a), (a,), every)}, {factors[0]}, 0.0)"
            return self._summed(" * ".join(factors), every, summed), kept
        if len(args) != 2 or len(summed) != 1 or len(kept) != 2:
            raise PartitionError(f"no product of tiles computes `{equation_text(eq)}`")
        (axis,) = summed
        left = next(v for v in args if kept[0] in v.axes)
        right = next(v for v in args if v is not left or args.count(v) == 2)
        if set(tile_axes(left)) != {kept[0], axis} or set(tile_axes(right)) != {axis, kept[1]}:
            raise PartitionError(f"no product of tiles computes `{equation_text(eq)}`")
        mask = (axis,) if not any(axis in self.clean[v] for v in args) else ()
        fine = any(self._solved(v) for v in args)
        a = self._operand(left, mask, fine=fine)
        b = self._operand(right, (), fine=fine)
        a = a if tile_axes(left) == (kept[0], axis) else f"tl.trans({a})"
        b = b if tile_axes(right) == (axis, kept[1]) else f"tl.trans({b})"
        return f"dot_fine({a}, {b}, DTYPE)" if fine else f'tl.dot({a}, {b}, input_precision="ieee")', kept

    def _solved(self, v: Var) -> bool:
        """True for the inverse of a triangular solve, and for what was solved with it."""
        eq = self.program.definitions.get(v)
        if eq is None:
            return False
        if isinstance(eq.op, Rename):
            return self._solved(eq.args[0])
        inverses = (self.program.definitions.get(x) for x in (v, *(eq.args if isinstance(eq.op, Contract) else ())))
        return any(e is not None and isinstance(e.op, UnitInverse) for e in inverses)

    def _operand(self, v: Var, mask: Sequence[str], *, fine: bool) -> str:
        """A tile in the type that products take; a triangular solve multiplies in float32, or its rounding adds up."""
        if fine:
            return self._zeroed(v, mask)
        if v in self.raw and not mask:
            return self.raw[v]
        return f"({self._zeroed(v, mask)}).to(DTYPE)" if mask else f"{self.names[v]}.to(DTYPE)"

    def _decayed(self, eq: Equation, large: list[Var]) -> str:
        """A contraction with exp(decay[i d] - decay[j d]) on pairs j <= i."""
        if len(large) != 1:
            raise PartitionError(f"two arrays over pairs and features in `{equation_text(eq)}`")
        decay = decay_of(self.program, large[0])
        rest = {tile_axes(v): v for v in eq.args if v is not large[0]}
        forms: dict[tuple[str, ...], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
            ("i", "j"): ("decayed_scores", ("i", "d"), ("j", "d")),
            ("i", "d"): ("decayed_rows", ("i", "j"), ("j", "d")),
            ("j", "d"): ("decayed_columns", ("i", "j"), ("i", "d")),
        }
        name, first, second = forms.get(tile_axes(eq.out), ("", (), ()))
        if not name or rest.keys() != {first, second}:
            raise PartitionError(f"no product with a decay computes `{equation_text(eq)}`")
        x, y = self.names[rest[first]], self.names[rest[second]]
        return f"{name}({x}, {y}, {self.names[decay]}, DTYPE, {self.mild})"

    def _reduce(self, eq: Equation, how: str, axes: Sequence[str]) -> tuple[str, frozenset[str]]:
        x = eq.args[0]
        if how != "sum" or len(eq.args) > 1:
            raise PartitionError(f"no chunk computes `{equation_text(eq)}`")
        over = [a for a in axes if a in TILE]
        every = tile_axes(x)
        if not over:
            return self.names[x], self.clean[x]
        return self._summed(self._zeroed(x, over), every, over), self.clean[x] - set(over)

    def _softmax(self, eq: Equation, axes: Sequence[str]) -> tuple[str, frozenset[str]]:
        x, (axis,) = eq.args[0], tuple(axes)
        every = tile_axes(eq.out)
        masks = [self.view(self.names[v], tile_axes(v), every) for v in eq.args[1:]]
        if self.padding(axis):
            masks.append(self.view(self._mask(axis), (axis,), every))
        place, name = every.index(axis), eq.out.name
        held = f'tl.where({" & ".join(masks)}, {self.names[x]}, -float("inf"))' if masks else self.names[x]
        self.lines.append(f"{name} = {held}")
        self.lines.append(f"{name} = tl.exp({name} - tl.max({name}, axis={place}, keep_dims=True))")
        return f"{name} / tl.sum({name}, axis={place}, keep_dims=True)", frozenset({axis})

    def _topk(self, eq: Equation, k: int, axis: str) -> tuple[str, frozenset[str]]:
        if tile_axes(eq.out).index(axis) != len(tile_axes(eq.out)) - 1 or len(eq.args) > 1:
            raise PartitionError(f"no chunk computes `{equation_text(eq)}`")
        size = self.program.extents[axis]
        return f"largest({self.names[eq.args[0]]}, {size}, {min(k, int(str(size)))})", frozenset()

    def _rename(self, eq: Equation, pairs: Mapping[str, str]) -> tuple[str, frozenset[str]]:
        x = eq.args[0]
        moved = tuple(pairs.get(a, a) for a in tile_axes(x))
        clean = frozenset(pairs.get(a, a) for a in self.clean[x])
        if moved == tile_axes(eq.out):
            if x in self.raw:
                self.raw[eq.out] = self.raw[x]
            return self.names[x], clean
        return f"tl.trans({self.names[x]})", clean

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def extent(self, axis: str) -> str:
        """Source of a tile's extent along an axis."""
        if axis in ROWS:
            return "CHUNK"
        return "BLOCK_E" if axis == "e" else str(padded_extent(self.size(axis)))

    def size(self, axis: str) -> int:
        """Extent of the data along a feature axis."""
        return int(str(self.program.extents[axis]))

    def padding(self, axis: str) -> bool:
        """True where a tile may reach beyond the data."""
        return axis in ROWS or padded_extent(self.size(axis)) != self.size(axis)

    def _mask(self, axis: str) -> str:
        return self.row_mask if axis in ROWS else f"{axis}_ok"

    def view(self, source: str, axes: tuple[str, ...], target: tuple[str, ...]) -> str:
        """A tile over `axes` broadcast to the dimensions of `target`."""
        if len(axes) == len(target) or not axes:
            return source
        index = ", ".join(":" if a in axes else "None" for a in target)
        return f"{_atom(source)}[{index}]"

    def _zeroed(self, x: Var, axes: Iterable[str]) -> str:
        """The variable with 0 in its padding along the axes."""
        every = tile_axes(x)
        masks = [self.view(self._mask(a), (a,), every) for a in axes if a not in self.clean[x] and self.padding(a)]
        return f"tl.where({' & '.join(masks)}, {self.names[x]}, 0.0)" if masks else self.names[x]

    def _summed(self, source: str, axes: tuple[str, ...], over: Iterable[str]) -> str:
        left = list(axes)
        for a in over:
            source = f"tl.sum({source}, axis={left.index(a)})"
            left.remove(a)
        return source


def _atom(source: str) -> str:
    return source if source.isidentifier() else f"({source})"
