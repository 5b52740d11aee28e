"""Where rows lie: the sizes of a program's axes, and the source that loads and stores rows of arrays.

In a kernel's source, b is the batch, h the KV head, head [rows] the query heads, qpos and kpos the positions of query
and key rows, row_ok and key_ok what is inside the sequence; d, e and sd are the columns of a feature tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import sympy as sp

from splagen.codegen.kernel import Array
from splagen.codegen.region import Dim
from splagen.codegen.region import padded_extent as padded
from splagen.expression import symbol
from splagen.ir.program import Contract, Equation, Iota, Program, TopK, Var

QUERY_AXES = frozenset({"T", "m"})
KEY_AXES = frozenset({"J", "C", "n"})
FEATURE_AXES = ("s", "r", "d", "e")


@dataclass(frozen=True)
class Geometry:
    """The integer extents of a program's axes by role."""

    group: int
    tile: int
    cells: int
    cell: int
    signs: int
    head_dim: int
    value_dim: int
    rank: int = 0  # factors of a covariance

    @classmethod
    def of(cls, program: Program) -> Geometry:
        """Read the extents from the program."""
        names = ("g", "m", "C", "n", "s", "d", "e", "r")  # a step has its signs written out
        sizes = {"s": 1, "r": 0} | {a: e for a, e in program.axes if isinstance(e, int)}
        return cls(*(sizes[a] for a in names))

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.cells * self.cell

    @property
    def chunk(self) -> int:
        """Queries that share the ends of every interval of far blocks: state sums are taken per chunk."""
        return max(self.tile, self.block)

    def size(self, axis: str) -> int:
        """Extent of a feature axis."""
        return {"s": self.signs, "r": self.rank, "d": self.head_dim, "e": self.value_dim}[axis]

    def width(self, features: Iterable[str], *, pad: bool) -> int:
        """Columns of a tile over these feature axes."""
        sizes = [self.size(a) if a in "sr" or not pad else padded(self.size(a)) for a in features]
        return math.prod(sizes)

    def columns(self, features: Iterable[str]) -> list[str]:
        """Lines that define the columns of a tile over these features, and their mask where they are padded."""
        name = column_name(features)
        lines = [f"{name} = tl.arange(0, {self.width(features, pad=True)})"]
        (axis,) = [a for a in features if a != "s"]
        if padded(self.size(axis)) != self.size(axis) and name == axis:
            lines.append(f"{axis}_ok = {axis} < {self.size(axis)}")
        return lines

    def factor_columns(self, factor: int) -> str:
        """Source of the columns of one factor of a covariance among those of all, as internal arrays hold them."""
        before = factor * self.width(("d",), pad=True)
        return f"({before} + d)" if before else "d"

    def is_padded(self, features: Iterable[str]) -> bool:
        """True where the tile has more columns than the data."""
        return self.width(features, pad=True) != self.width(features, pad=False)

    def position(self, op: Iota) -> sp.Expr | None:
        """The value of an Iota over sequence axes, in the symbols T, m, J, n; None for other axes."""
        T, m, J, n = (symbol(x) for x in "TmJn")
        match op.axes:
            case ("T", "m"):
                return self.tile * T + m
            case ("T",):
                return T
            case ("J", "C", "n"):
                return self.block * J + n
            case ("J",):
                return J
        return None


def column_name(features: Iterable[str]) -> str:
    """d, e or sd."""
    return "".join(features)


def features_of(v: Var) -> tuple[str, ...]:
    """The feature axes that a variable carries."""
    return tuple(a for a in v.axes if a in FEATURE_AXES)


def is_query_row(v: Var) -> bool:
    """Carries a query position and no key position."""
    return bool(QUERY_AXES & set(v.axes)) and not KEY_AXES & set(v.axes)


def is_key_row(v: Var) -> bool:
    """Carries a key position down to the single key, and no query position."""
    return "n" in v.axes and not QUERY_AXES & set(v.axes)


def is_tile_value(v: Var) -> bool:
    """Carries a query position and a single key position."""
    return "n" in v.axes and bool(QUERY_AXES & set(v.axes))


def is_parameter(v: Var) -> bool:
    """Carries no position."""
    return not (QUERY_AXES | KEY_AXES | {"b"}) & set(v.axes)


def is_state(v: Var) -> bool:
    """A sum over the rows of a block, a tile or a sequence: features, and no single position."""
    place = [a for a in v.axes if a in QUERY_AXES | KEY_AXES]
    return place in (["J"], ["T"], []) and "b" in v.axes and bool(features_of(v)) and "g" not in v.axes


def is_total(v: Var) -> bool:
    """A state of the whole sequence."""
    return is_state(v) and not (QUERY_AXES | KEY_AXES) & set(v.axes)


def side(v: Var) -> str:
    """Which rows a variable belongs to: "tile", "query", "key" or "block"."""
    if is_tile_value(v):
        return "tile"
    if is_query_row(v):
        return "query"
    if is_key_row(v):
        return "key"
    return "block"


def is_row_local(eq: Equation) -> bool:
    """Computable from values of the same row: no sum over, and no meeting of, positions of another side."""
    if isinstance(eq.op, (Iota, TopK)):
        return isinstance(eq.op, Iota)
    sides = {side(v) for v in (eq.out, *eq.args) if not is_parameter(v)}
    if len(sides) > 1 or any(is_state(v) for v in (eq.out, *eq.args)):
        return False
    if isinstance(eq.op, Contract):
        positions = QUERY_AXES | KEY_AXES
        return {a for v in eq.args for a in v.axes} & positions == set(eq.out.axes) & positions
    return True


@dataclass(frozen=True)
class Rows:
    """Rows of one side of the attention, in tiles of rank 2 (rows, features) or 3 (rows, s, features)."""

    geometry: Geometry
    side: str  # "query" or "key"
    signed: bool = False

    @property
    def mask(self) -> str:
        """The vector that says which rows exist."""
        return "row_ok" if self.side == "query" else "key_ok"

    @property
    def position(self) -> str:
        """The vector of positions."""
        return "qpos" if self.side == "query" else "kpos"

    @property
    def head(self) -> str:
        """Source of the rows' head in the array's own numbering."""
        return "head" if self.side == "query" else "h"

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Tile dimensions for regions over these rows."""
        g = self.geometry
        rows = frozenset({"b", "h", "g", *(QUERY_AXES if self.side == "query" else KEY_AXES)})
        view = "[None, None, :]" if self.signed else "[None, :]"
        padding = {a: f"{a}_ok{view}" for a in ("d", "e") if g.is_padded((a,))}
        features = Dim(frozenset({"d", "e"}), padding)
        return (Dim(rows), Dim(frozenset({"s"})), features) if self.signed else (Dim(rows), features)

    def vector(self, source: str) -> str:
        """One number per row, as a tile."""
        return f"{source}[:, None, None]" if self.signed else f"{source}[:, None]"

    def flat(self, source: str, v: Var, rows: str) -> str:
        """A tile of the region's rank as a matrix [rows, columns], or as a vector [rows]."""
        features = features_of(v)
        if not features:
            return f"tl.reshape({source}, ({rows},))"
        if not self.signed:
            return source
        return f"tl.reshape({source}, ({rows}, {self.geometry.width(features, pad=True)}))"

    def load(self, array: Array, *, mask: bool = True, column: str | None = None) -> str:
        """Source that loads these rows of an array: a matrix, a vector, or one scalar per KV head.

        `column` names other columns than all of them (a slice).
        """
        if array.layout == "kv_head_scalars":
            return f"tl.load({array.name}_ptr + h)"
        address, conditions = self._address(array, column)
        if mask and array.layout != "head_rows":
            conditions.insert(0, f"{self.mask}[:, None]" if array.features else self.mask)
        options = f", mask={' & '.join(conditions)}, other={array.missing}" if conditions else ""
        return f"tl.load({address}{options})"

    def load_both(self, first: Array, second: Array, count: str) -> str:
        """Source that loads a number per row of each of two arrays: vectors of `count` rows, 0 where there is none."""
        addresses = ", ".join(f"{a.name}_ptr + {self._place(a)}" for a in (first, second))
        return f"load_both({addresses}, {self.mask}, {count})"

    def store(self, array: Array, value: str, column: str | None = None) -> str:
        """Line that stores a matrix or vector to these rows."""
        address, conditions = self._address(array, column)
        conditions.insert(0, f"{self.mask}[:, None]" if array.features else self.mask)
        return f"tl.store({address}, {value}, mask={' & '.join(conditions)})"

    def _place(self, array: Array) -> str:
        """Source of where the rows begin, as a column where they have features."""
        name = array.name
        if array.layout == "head_rows":
            return f"({self.head} * {name}_h)[:, None]" if self.side == "query" else f"{self.head} * {name}_h"
        place = f"{self.position} * {name}_l + {self.head} * {name}_h"
        return f"b * {name}_b + " + (f"({place})[:, None]" if array.features else place)

    def _address(self, array: Array, column: str | None) -> tuple[str, list[str]]:
        name, g, place = array.name, self.geometry, self._place(array)
        if not array.features:
            return f"{name}_ptr + {place}", []
        conditions = []
        if not array.padded and g.is_padded(array.features):
            real = f"({column} < {array.width[0]})" if column else f"{column_name(array.features)}_ok"
            conditions.append(f"{real}[None, :]")
        return f"{name}_ptr + {place} + {column or column_name(array.features)}[None, :]", conditions


class BlockRows(Rows):
    """Key rows of a visit of a loop over blocks: `key` of them from `first_key` on.

    The first one's address is a scalar, and the offsets of the others are those of every visit: an address takes one
    addition, where a product of 64 bits with a stride would take several instructions.  Offsets have 32 bits: keys are
    less than 2^24 elements apart.
    """

    def _address(self, array: Array, column: str | None) -> tuple[str, list[str]]:
        _, conditions = super()._address(array, column)
        name = array.name
        first = f"{name}_ptr + (b * {name}_b + first_key * {name}_l + h * {name}_h)"
        if not array.features:
            return f"{first} + key * {name}_l", conditions
        return f"{first} + ((key * {name}_l)[:, None] + {column or column_name(array.features)}[None, :])", conditions


class ChunkRows(Rows):
    """Rows of a chunk of positions: `place` [rows] is where in it they lie, `member` whose head of the group they are.

    The address of the chunk's first row is a scalar, and the offsets of the rows are products of numbers of 32 bits,
    one instruction each: a product of a position of 64 bits with a stride takes several, in every turn of a loop.
    """

    def _place(self, array: Array) -> str:
        if array.layout == "head_rows":
            return super()._place(array)
        name = array.name
        first, offset = f"b * {name}_b + chunk * CHUNK * {name}_l", f"place.to(tl.int64) * {name}_l"
        if self.side == "query":
            first, offset = f"{first} + h * GROUP * {name}_h", f"{offset} + member.to(tl.int64) * {name}_h"
        else:
            first = f"{first} + h * {name}_h"
        return f"({first}) + ({offset})" + ("[:, None]" if array.features else "")


def array_of(v: Var, geometry: Geometry, *, internal: bool, dtype: str | None = None) -> Array:
    """The array that holds a row variable or a parameter.

    Internal arrays are padded; rows with features take the input type unless told, scalars per row are float32.
    """
    features = features_of(v)
    width = (geometry.width(features, pad=internal),) if features else ()
    kind = dtype or ("input" if features else "float32")
    if is_parameter(v):
        layout = "head_rows" if features else "kv_head_scalars"
    elif is_query_row(v):
        layout = "query_rows" if features else "query_scalars"
    else:
        layout = "key_rows"
    return Array(v.name, layout, features, width, kind, internal)  # type: ignore[arg-type]
