"""Row code: loading rows, the equations on them, and storing rows, as prologue, epilogue or body of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splagen.codegen.base_two import to_base2
from splagen.codegen.geometry import Geometry, Rows, column_name, features_of, is_parameter
from splagen.codegen.kernel import Array
from splagen.codegen.region import Region
from splagen.codegen.row_sums import factor_sums
from splagen.ir.passes import followed
from splagen.ir.program import Equation, Program, Var, slice_back


@dataclass(frozen=True)
class Piece:
    """Source lines, the arrays that they load, the equations that they compute, and what stands for each variable."""

    lines: tuple[str, ...]
    arrays: tuple[Array, ...]
    equations: tuple[Equation, ...]
    names: Mapping[Var, str]


@dataclass
class RowCode:
    """Prints row code of one side; remembers which columns and rows the kernel has already defined.

    `available` maps each variable that lies in memory to its array; `tile_rows` is the constexpr that counts rows;
    `row_type` says how arrays are addressed; `in_loop` that every turn of a loop loads other rows.
    """

    program: Program
    geometry: Geometry
    side: str
    tile_rows: str
    available: Mapping[Var, Array]
    defined_columns: set[str] = field(default_factory=set)
    loaded: set[Var] = field(default_factory=set)
    row_type: type[Rows] = Rows
    in_loop: bool = False

    def rows(self, equations: Iterable[Equation]) -> Rows:
        """The rank that these equations need: 3 where the feature map has two signs."""
        signed = any("s" in v.axes for eq in equations for v in (eq.out, *eq.args))
        return self.row_type(self.geometry, self.side, signed)

    def columns(self, features: tuple[str, ...]) -> list[str]:
        """Lines that define the columns of these features, once per kernel."""
        name = column_name(features)
        if not {"d", "e"} & set(features) or name in self.defined_columns:
            return []
        self.defined_columns.add(name)
        return self.geometry.columns(features)

    def compute(self, wanted: Sequence[Var], bound: Mapping[Var, str]) -> Piece:
        """Load what is needed and compute the wanted row variables.

        `bound` gives flat source ([rows, columns] or [rows]) of variables that the kernel holds already.
        """
        stop = [*self.available, *bound]
        equations = slice_back(self.program, wanted, stop)
        rows = self.rows(equations)
        read = dict.fromkeys(v for eq in equations for v in eq.args)
        read.update(dict.fromkeys(wanted))
        lines: list[str] = []
        arrays: list[Array] = []
        names: dict[Var, str] = {}
        needed = [v for v in read if v in self.available or v in bound]
        features = {features_of(v) for v in needed} | {features_of(eq.out) for eq in equations}
        features |= {f[-1:] for f in features if f}  # padding masks are per feature axis
        for f in sorted(features):
            lines += self.columns(f)
        read_here = [v for v in needed if v not in bound]
        arrays += [self.available[v] for v in read_here]
        lines += self._loads([v for v in read_here if v not in self.loaded])
        names.update({v: self._lifted(bound.get(v, v.name), v, rows, exact=v in bound) for v in needed})
        region = Region(rows.dims, self.program.order, self.program.extents)
        body, after = region.emit(followed(wanted, factor_sums(to_base2(equations))), names)
        lines += body
        flat = {v: bound.get(v, v.name) for v in needed}
        for v in wanted:
            if v not in flat:
                flat[v] = after[v] if is_parameter(v) else rows.flat(after[v], v, self.tile_rows)
        return Piece(tuple(lines), tuple(arrays), tuple(equations), flat)

    def of_head(self, wanted: Sequence[Var]) -> list[str]:
        """Lines that load what computing the wanted variables reads and every row of a head has alike."""
        equations = slice_back(self.program, wanted, self.available)
        read = dict.fromkeys(v for eq in equations for v in eq.args if v in self.available)
        alike = [v for v in read if self.available[v].layout in ("head_rows", "kv_head_scalars")]
        return [*self.columns_of(alike), *self._loads([v for v in alike if v not in self.loaded])]

    def tile_shape(self, v: Var) -> str:
        """Shape of a tile of rows of a variable."""
        features = features_of(v)
        return f"({self.tile_rows}, {self.geometry.width(features, pad=True)})" if features else f"({self.tile_rows},)"

    def _loads(self, wanted: Sequence[Var]) -> list[str]:
        """Lines that load variables by name."""
        self.loaded.update(wanted)
        rows = self.row_type(self.geometry, self.side)
        by_row = [v for v in wanted if self.available[v].layout in ("query_scalars", "pages") and not features_of(v)]
        numbers = by_row if self.in_loop else []
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
        apart = [v for v in wanted if not any(v in pair for pair in pairs)]
        lines = [f"{v.name} = {rows.load(self.available[v])}" for v in apart]
        for one, other in pairs:
            both = rows.load_both(self.available[one], self.available[other], self.tile_rows)
            lines.append(f"{one.name}, {other.name} = {both}")
            missing = [(v.name, self.available[v].missing) for v in (one, other)]
            lines += [f"{name} = tl.where({rows.mask}, {name}, {x})" for name, x in missing if x != "0.0"]
        return lines

    def _lifted(self, source: str, v: Var, rows: Rows, *, exact: bool) -> str:
        array = self.available.get(v)
        if array is not None and array.layout == "kv_head_scalars":
            return source
        wide = source if exact or (array and array.dtype == "float32") else f"{source}.to(tl.float32)"
        features = features_of(v)
        if not features:
            return rows.vector(wide)
        if array is not None and array.layout == "head_rows" and self.side == "key":
            return wide
        if not rows.signed:
            return wide
        if "s" in features:
            width = self.geometry.width(features[1:], pad=True)
            return f"tl.reshape({wide}, ({self.tile_rows}, {self.geometry.signs}, {width}))"
        return f"{wide}[:, None, :]"

    def operands(self, wanted: Sequence[Var], scales: Mapping[Var, str] | None = None) -> Piece:
        """Bring rows as a tile's products take them: matrices in the input type, numbers per row as vectors.

        What lies in memory is loaded; the rest is computed, multiplied by its scale if it has one (before it is
        rounded to the input type), and its padded columns are made 0.
        """
        piece = self.compute(wanted, {})
        lines = list(piece.lines)
        like = self._like(piece)
        for v in wanted:
            if v in self.available:
                continue
            source, features = piece.names[v], features_of(v)
            source = f"({scales[v]} * {source})" if scales and v in scales else source
            if not features:
                lines.append(f"{v.name} = {source}")
            elif self.geometry.is_padded(features):
                lines.append(f"{v.name} = tl.where({self.padding(features)}, {source}, 0.0).to({like}.dtype)")
            else:
                lines.append(f"{v.name} = {source}.to({like}.dtype)")
        return Piece(tuple(lines), piece.arrays, piece.equations, {v: v.name for v in wanted})

    def _like(self, piece: Piece) -> str:
        """A row in the input type that the kernel holds: q, or where it is not read another that is."""
        q = self.program.inputs[0]
        arrays = [(v.name, self.available[v]) for v in piece.names if v in self.available]
        held = [n for n, a in arrays if a.dtype == "input" and a.features and a.layout != "head_rows"]
        return q.name if q in self.loaded or not held else held[0]

    def columns_of(self, variables: Iterable[Var]) -> list[str]:
        """Lines that define the columns of these rows, and of their padding, once per kernel."""
        return [line for v in variables for f in (features_of(v), features_of(v)[-1:]) for line in self.columns(f)]

    def padding(self, features: tuple[str, ...]) -> str:
        """Source of the mask [1, columns] of the columns that are data."""
        if len(features) == 1:
            return f"{features[0]}_ok[None, :]"
        axis = features[-1]
        width = self.geometry.width((axis,), pad=True)
        return f"({column_name(features)} % {width} < {self.geometry.size(axis)})[None, :]"

    def store(self, array: Array, source: str) -> list[str]:
        """Lines that store a row variable, or this program's part of a sum over rows."""
        if array.layout == "partials":
            return self._store_partial(array, source)
        lines = self.columns(array.features)
        value = source
        if array.padded and self.geometry.is_padded(array.features):
            value = f"tl.where({self.padding(array.features)}, {source}, 0.0)"
        return [*lines, self.row_type(self.geometry, self.side).store(array, value)]

    def _store_partial(self, array: Array, source: str) -> list[str]:
        features, width = array.features[:-1], array.width[0]
        column = column_name(features) or "tl.arange(0, 1)"
        heads, head = ("Hkv * GROUP", "query_head") if array.features[-1] == "Hq" else ("Hkv", "h")
        row = f"(b * tl.num_programs(0) + tl.program_id(0)) * ({heads}) + {head}"
        return [
            *self.columns(features),
            f"tl.store({array.name}_ptr + ({row}) * {width} + {column}, tl.reshape({source}, ({width},)))",
        ]
