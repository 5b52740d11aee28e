"""The kernels that form tile values (query row x key): block-sparse forward, dq, and dk with dv.

A tile value never leaves its kernel.  Every kernel has the same parts, found from the equations: row operands, products
of rows and keys, equations between the products, and sums of tile values times rows.  Masks over blocks split a walk
into loops: blocks that a query sees by position, and blocks that it chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from splagen.codegen.geometry import (
    Geometry,
    Rows,
    array_of,
    features_of,
    is_key_row,
    is_query_row,
    is_tile_value,
)
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.predicates import J, Predicates, T, visit
from splagen.codegen.region import Dim, Region, slice_back
from splagen.codegen.row_code import Piece, RowCode
from splagen.errors import PartitionError
from splagen.ir.program import Contract, Equation, Iota, Lse, Program, Reduce, TopK, Var
from splagen.ir.text import equation_text

INDICES = Array("block_indices", "indices", dtype="int32")
COUNTS = Array("block_counts", "counts", dtype="int32")
WORK = Array("work", "work", dtype="int32")


@dataclass(frozen=True)
class Walk:
    """The block-level structure of a program: what a query sees by position, and what it chose."""

    program: Program
    geometry: Geometry
    predicates: Predicates
    seen: Var  # the mask of the softmax
    chosen: Var | None  # the top-k over blocks
    eligible: Var | None  # the mask it chooses from

    @classmethod
    def of(cls, program: Program) -> Walk:
        """Find the softmax over keys and the top-k over blocks."""
        geometry = Geometry.of(program)
        softmax = [eq for eq in program.equations if isinstance(eq.op, Lse) and "n" in eq.op.axes]
        topk = [eq for eq in program.equations if isinstance(eq.op, TopK)]
        if len(softmax) != 1 or len(topk) > 1 or len(softmax[0].args) != 2:
            raise PartitionError("block-sparse attention has one masked softmax over keys and at most one top-k")
        chosen = topk[0].out if topk else None
        eligible = topk[0].args[1] if topk else None
        return cls(program, geometry, Predicates(program, geometry), softmax[0].args[1], chosen, eligible)

    @property
    def forced_facts(self) -> dict[Var, bool]:
        """Masks in the loop over blocks seen by position."""
        return {self.chosen: False, self.eligible: False} if self.chosen and self.eligible else {}

    @property
    def chosen_facts(self) -> dict[Var, bool]:
        """Masks in the loop over chosen blocks."""
        assert self.chosen and self.eligible
        return {self.chosen: True, self.eligible: True}

    def forced(self, variable: object, names: Mapping[str, str], extent: str, index: str) -> tuple[list[str], str, str]:
        """The loop over blocks (or tiles) seen by position: set-up, count, and source of the visited one."""
        facts = {self.chosen: False} if self.chosen else {}
        found = self.predicates.intervals(self.seen, J if variable == "J" else T, facts)
        return visit(found, "forced", names, extent, index)

    def eligible_count(self) -> list[str]:
        """Lines that count the blocks a tile may choose from, as `eligible`."""
        assert self.eligible
        found = self.predicates.intervals(self.eligible, J, {})
        lines, count, _ = visit(found, "eligible", {"T": "tile", "L": "L"}, "nJ", "i")
        return [*lines, f"eligible = {count}"]


@dataclass(frozen=True)
class Sum:
    """One sum of tile values: `out = contract(masks, tiles and row scalars, operand)`."""

    equation: Equation
    masks: tuple[Var, ...]
    factors: tuple[Var, ...]
    operand: Var | None

    @property
    def out(self) -> Var:
        """What the sum defines."""
        return self.equation.out

    @classmethod
    def of(cls, eq: Equation, to_keys: bool) -> Sum:
        """The parts of a contraction of tile values."""
        masks = tuple(v for v in eq.args if v.kind == "bool")
        reals = [v for v in eq.args if v.kind == "real"]
        other = is_query_row if to_keys else is_key_row
        operands = [v for v in reals if other(v) and features_of(v)]
        factors = tuple(v for v in reals if v not in operands)
        if len(operands) > 1 or any(features_of(v) for v in factors):
            raise PartitionError(f"`{equation_text(eq)}` is not one product of a tile and a row")
        return cls(eq, masks, factors, operands[0] if operands else None)

    def in_loop(self, facts: Mapping[Var, bool]) -> bool:
        """False where a mask of the sum never holds."""
        return all(facts.get(v, True) for v in self.masks)


def sums_of_tiles(program: Program, equations: Iterable[Equation], to_keys: bool) -> list[Sum]:
    """Contractions to rows of one side that consume a tile value or apply a mask that depends on data."""
    definitions = program.definitions
    found = []
    for eq in equations:
        if not isinstance(eq.op, Contract):
            continue
        masked = any(isinstance(d.op, TopK) for v in eq.args if (d := definitions.get(v)))
        target = is_key_row(eq.out) if to_keys else is_query_row(eq.out)
        if target and (masked or any(is_tile_value(v) and v.kind == "real" for v in eq.args)):
            found.append(Sum.of(eq, to_keys))
    return found


@dataclass(frozen=True)
class Tile:
    """The body of one loop: products, the equations between, and what stands for each variable."""

    products: tuple[Equation, ...]
    equations: tuple[Equation, ...]
    lines: tuple[str, ...]
    names: Mapping[Var, str]


class TileCode:
    """Prints the tile part of a kernel for one kind of loop."""

    def __init__(self, walk: Walk, facts: Mapping[Var, bool]) -> None:
        """`facts` fixes the block-level masks of the loop."""
        self.walk, self.program, self.facts = walk, walk.program, facts
        simplify = walk.predicates.simplifier(facts)
        dims = (Dim(frozenset("bhgTm")), Dim(frozenset("JCn")))
        self.region = Region(dims, self.program.order, self.program.extents, facts=facts, simplify=simplify)
        places = {
            ("T", "m"): "qpos[:, None]",
            ("T",): "tile",
            ("J", "C", "n"): "kpos[None, :]",
            ("J",): "j",
            ("h", "g"): "head[:, None]",
        }
        self.positions = {
            eq.out: places[eq.op.axes]
            for eq in self.program.equations
            if isinstance(eq.op, Iota) and eq.op.axes in places
        }

    def body(self, wanted: Sequence[Var]) -> Tile:
        """Products and equations that give the wanted tile values and masks; row scalars stand as name[:, None]."""
        fence = [eq.out for eq in self.program.equations if not is_tile_value(eq.out) and eq.out.kind != "bool"]
        slice_ = slice_back(self.program, wanted, [*fence, *self.program.inputs, *self.facts])
        products = tuple(eq for eq in slice_ if isinstance(eq.op, Contract))
        between = [eq for eq in slice_ if eq not in products]
        bound = {eq.out: eq.out.name for eq in products} | self.positions
        for eq in between:
            bound.update({v: f"{v.name}[:, None]" for v in eq.args if is_query_row(v) and v.kind == "real"})
        lines, names = self.region.emit(between, bound)
        used = self._read(wanted, products, between, names)
        return Tile(used, tuple(between), tuple(lines), names)

    def _read(
        self, wanted: Sequence[Var], products: Sequence[Equation], between: Sequence[Equation], names: Mapping[Var, str]
    ) -> tuple[Equation, ...]:
        read = {*wanted, *(v for eq in between for v in eq.args)}
        return tuple(eq for eq in products if eq.out in read)

    def sum_line(self, s: Sum, names: Mapping[Var, str], to_keys: bool) -> str:
        """Line that adds this loop's tile to the sum."""
        factors = [names.get(v, f"{v.name}[:, None]") for v in s.factors]
        masks = [names[v] for v in s.masks if names[v] != "True"]
        value = " * ".join(factors) or "1.0"
        for mask in masks:
            value = f"tl.where({mask}, {value}, 0.0)"
        if not masks and not any(is_tile_value(v) for v in s.factors):
            value = f"tl.broadcast_to({value}, (BLOCK_M, BLOCK_N))"
        if s.operand is None:
            return f"{s.out.name} += tl.sum({value}, axis={0 if to_keys else 1})"
        operand = s.operand.name
        tile = f"({value}).to({operand}.dtype)" if not value.isidentifier() else f"{value}.to({operand}.dtype)"
        tile = f"tl.trans({tile})" if to_keys else tile
        return f'{s.out.name} = tl.dot({tile}, {operand}, {s.out.name}, input_precision="ieee")'

    def wanted(self, sums: Iterable[Sum]) -> list[Var]:
        """Tile values and masks that the sums read in this loop."""
        needed: dict[Var, None] = {}
        for s in sums:
            needed.update(dict.fromkeys(v for v in s.factors if is_tile_value(v)))
            needed.update(dict.fromkeys(v for v in s.masks if v not in self.facts))
        return list(needed)


def product_line(eq: Equation) -> str:
    """`out = rows . keys^T` on tensor cores."""
    (row,) = [v for v in eq.args if is_query_row(v)]
    (key,) = [v for v in eq.args if is_key_row(v)]
    return f'{eq.out.name} = tl.dot({row.name}, tl.trans({key.name}), input_precision="ieee")  # [BLOCK_M, BLOCK_N]'


def operands(products: Iterable[Equation], sums: Iterable[Sum], of_queries: bool) -> list[Var]:
    """Rows of one side that enter products or sums, in order of first use."""
    side = is_query_row if of_queries else is_key_row
    used = [v for eq in products for v in eq.args] + [s.operand for s in sums if s.operand]
    return list(dict.fromkeys(v for v in used if side(v)))


def row_scalars(tiles: Iterable[Tile], sums: Iterable[Sum]) -> list[Var]:
    """Numbers per query row (lse, delta) that tiles and sums read."""
    used = [v for t in tiles for eq in t.equations for v in eq.args] + [v for s in sums for v in s.factors]
    return list(dict.fromkeys(v for v in used if is_query_row(v) and v.kind == "real"))


class QuerySide:
    """Common parts of the kernels that give each program the rows of one query tile."""

    def __init__(self, walk: Walk, available: Mapping[Var, Array]) -> None:
        """`available` maps variables in memory to their arrays."""
        self.walk, self.program, self.geometry = walk, walk.program, walk.geometry
        self.available = available
        self.rows = RowCode(self.program, self.geometry, "query", "BLOCK_M", available)
        self.arrays: dict[str, Array] = {}
        self.covers: dict[Equation, None] = {}

    def use(self, arrays: Iterable[Array]) -> None:
        """Note arrays that the kernel reads."""
        self.arrays.update({a.name: a for a in arrays})

    def loops(self) -> list[tuple[str, TileCode, dict[str, object]]]:
        """Title, tile code and holes of each loop."""
        setup, count, block = self.walk.forced("J", {"T": "tile", "L": "L"}, "nJ", "i")
        found = [("blocks seen by position", TileCode(self.walk, self.walk.forced_facts), setup, count, block)]
        if self.walk.chosen:
            self.use([INDICES, COUNTS])
            at = "((b * Hkv + h) * ((L + TILE - 1) // TILE) + tile)"
            setup = [f"at = {at}", "chosen = tl.load(block_counts_ptr + at)"]
            block = "tl.load(block_indices_ptr + at * BUDGET + i).to(tl.int64)"
            found.append(("blocks chosen", TileCode(self.walk, self.walk.chosen_facts), setup, "chosen", block))
        return [(t, code, {"title": t, "setup": "\n".join(s), "count": c, "block": k}) for t, code, s, c, k in found]

    def key_loads(self, tile_code: TileCode, keys: Sequence[Var]) -> list[str]:
        """Lines that load the key rows of a tile."""
        valid = [eq.out for eq in self.program.equations if eq.out.name == "valid"]
        known = bool(valid) and tile_code.body(valid).names[valid[0]] == "True"
        lines = [] if known else ["key_ok = kpos < L"]
        for v in keys:
            array = self.available[v]
            self.use([array])
            side = Rows(self.geometry, "key", False)
            lines.append(f"{v.name} = {side.load(array, mask=not known)}  # [BLOCK_N, {array.width[0]}]")
        return lines

    def prologue(self, operands_: Sequence[Var], scalars: Sequence[Var], keys: Sequence[Var]) -> list[str]:
        """Lines that bring the row operands and row scalars of the tiles."""
        lines: list[str] = []
        for v in keys:
            for f in (features_of(v), features_of(v)[-1:]):
                lines += self.rows.columns(f)
        piece = self.rows.compute([*operands_, *scalars], {})
        lines += piece.lines
        self.use(piece.arrays)
        self.covers.update(dict.fromkeys(piece.equations))
        for v in (*operands_, *scalars):
            if v not in self.available:
                like = self.program.inputs[0].name
                lines += self.rows.operand(v, piece.names[v], like) if features_of(v) else [f"{v.name} = {piece.names[v]}"]
        return lines

    def epilogue(self, outputs: Sequence[tuple[Var, Array]], held: Mapping[Var, str]) -> list[str]:
        """Lines that finish the rows and store the outputs."""
        piece = self.rows.compute([v for v, _ in outputs], held)
        self.use(piece.arrays)
        self.covers.update(dict.fromkeys(piece.equations))
        lines = list(piece.lines)
        for v, array in outputs:
            lines += self.rows.store(array, v, piece.names[v])
        return lines

    def shape(self, v: Var) -> str:
        """Tile shape of a sum."""
        features = features_of(v)
        return f"(BLOCK_M, {self.geometry.width(features, pad=True)})" if features else "(BLOCK_M,)"

    def kernel(self, name: str, template: str, outputs: Sequence[Array], holes: dict[str, object]) -> Kernel:
        """The finished kernel."""
        order = {eq.out: i for i, eq in enumerate(self.program.equations)}
        covers = tuple(sorted(self.covers, key=lambda eq: order[eq.out]))
        grid = "(nT * cdiv(TILE * GROUP, BLOCK_M), B * Hkv)"
        return Kernel(name, template, covers, tuple(self.arrays.values()), tuple(outputs), holes, grid)


def forward_kernel(walk: Walk, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]]) -> Kernel:
    """Block-sparse softmax with every other sum on the same tiles, and the row equations that follow."""
    program, definitions = walk.program, walk.program.definitions
    side = QuerySide(walk, available)
    (lse,) = [eq for eq in program.equations if isinstance(eq.op, Lse) and "n" in eq.op.axes]
    forward = slice_back(program, [v for v, _ in outputs], [*program.inputs, *available])
    sums = [s for s in sums_of_tiles(program, forward, to_keys=False)]
    softmax = [s for s in sums if any(lse.out in definitions[v].args for v in s.factors if v in definitions)]
    linear = [s for s in sums if s not in softmax]
    loops, tiles, keys_used = [], [], {}
    for _, code, holes in side.loops():
        active = [s for s in linear if s.in_loop(code.facts)]
        tile = code.body([*lse.args, *code.wanted(active)])
        keys = operands(tile.products, [*softmax, *active], of_queries=False)
        keys_used.update(dict.fromkeys(keys))
        score, mask = (tile.names[v] for v in lse.args)
        lines = [product_line(eq) for eq in tile.products] + list(tile.lines)
        if mask != "True":
            lines.append(f'{lse.args[0].name} = tl.where({mask}, {score}, -float("inf"))')
            score = lse.args[0].name
        loops.append(holes | {
            "loads": "\n".join(side.key_loads(code, keys)),
            "scores": "\n".join(lines),
            "score": score,
            "softmax": [{"name": s.out.name, "operand": s.operand.name} for s in softmax if s.operand],
            "linear": "\n".join(code.sum_line(s, tile.names, to_keys=False) for s in active),
        })  # fmt: skip
        tiles.append(tile)
    rows = operands([eq for t in tiles for eq in t.products], [], of_queries=True)
    prologue = side.prologue(rows, row_scalars(tiles, linear), list(keys_used))
    held = {s.out: s.out.name for s in sums} | {lse.out: lse.out.name}
    finish = [f"{s.out.name} = {s.out.name} / row_sum[:, None]" for s in softmax]
    finish.append(f"{lse.out.name} = row_max + tl.log(row_sum)")
    if walk.chosen:
        for eq in forward:
            if isinstance(eq.op, Reduce) and eq.args == (walk.eligible,):
                finish += walk.eligible_count() + [f"{eq.out.name} = (eligible + tl.zeros((BLOCK_M,), tl.int32)).to(tl.float32)"]
                held[eq.out] = eq.out.name
                side.covers[eq] = None
            if isinstance(eq.op, Reduce) and eq.args == (walk.chosen,):
                finish.append(f"{eq.out.name} = (chosen + tl.zeros((BLOCK_M,), tl.int32)).to(tl.float32)")
                held[eq.out] = eq.out.name
                side.covers[eq] = None
    epilogue = finish + side.epilogue(outputs, held)
    side.covers.update(dict.fromkeys([lse, *(s.equation for s in sums), *(eq for t in tiles for eq in (*t.products, *t.equations))]))
    side.covers.update(dict.fromkeys(definitions[v] for s in softmax for v in s.factors))
    holes = {
        "prologue": "\n".join(prologue),
        "accumulators": [{"name": s.out.name, "shape": side.shape(s.out)} for s in sums],
        "loops": loops,
        "epilogue": "\n".join(epilogue),
    }
    return side.kernel("block_sparse_forward", "block_sparse_forward", [a for _, a in outputs], holes)


def dq_kernel(walk: Walk, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]]) -> Kernel:
    """Gradients of query rows: the same walk as forward with the scores formed again."""
    program = walk.program
    side = QuerySide(walk, available)
    backward = slice_back(program, [v for v, _ in outputs], [*program.inputs, *available])
    sums = sums_of_tiles(program, backward, to_keys=False)
    loops, tiles, keys_used = [], [], {}
    for _, code, holes in side.loops():
        active = [s for s in sums if s.in_loop(code.facts)]
        tile = code.body(code.wanted(active))
        keys = operands(tile.products, active, of_queries=False)
        keys_used.update(dict.fromkeys(keys))
        loops.append(holes | {
            "loads": "\n".join(side.key_loads(code, keys)),
            "tiles": "\n".join([*(product_line(eq) for eq in tile.products), *tile.lines]),
            "sums": "\n".join(code.sum_line(s, tile.names, to_keys=False) for s in active),
        })  # fmt: skip
        tiles.append(tile)
    rows = operands([eq for t in tiles for eq in t.products], [], of_queries=True)
    prologue = side.prologue(rows, row_scalars(tiles, sums), list(keys_used))
    epilogue = side.epilogue(outputs, {s.out: s.out.name for s in sums})
    side.covers.update(dict.fromkeys([*(s.equation for s in sums), *(eq for t in tiles for eq in (*t.products, *t.equations))]))
    holes = {
        "prologue": "\n".join(prologue),
        "accumulators": [{"name": s.out.name, "shape": side.shape(s.out)} for s in sums],
        "loops": loops,
        "epilogue": "\n".join(epilogue),
    }
    return side.kernel("block_sparse_dq", "block_sparse_dq", [a for _, a in outputs], holes)


def dkv_kernel(walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var]) -> tuple[Kernel, dict[Var, Array]]:
    """Gradients of key rows from tiles, as partial sums per segment of the inverse index."""
    program, geometry = walk.program, walk.geometry
    backward = slice_back(program, wanted, [*program.inputs, *available])
    sums = sums_of_tiles(program, backward, to_keys=True)
    key_rows = RowCode(program, geometry, "key", "BLOCK_N", available)
    arrays: dict[str, Array] = {"work": WORK}
    covers: dict[Equation, None] = {}
    loops, keys_used = [], {}
    setup, count, forced_tile = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    kinds = [("queries that see the block by position", walk.forced_facts, forced_tile, "start", "tl.minimum(stop, forced)")]
    chosen = {"setup": "", "count": "0"}
    if walk.chosen:
        first = "tl.load(work_offsets_ptr + bh * (nJ + 1) + j)"
        chosen["setup"] = f"chosen_first = {first}\nchosen = tl.load(work_offsets_ptr + bh * (nJ + 1) + j + 1) - chosen_first"
        chosen["count"] = "chosen"
        load = "tl.load(work_tiles_ptr + bh * nT * BUDGET + chosen_first + i - forced, mask=row < last, other=0).to(tl.int64)"
        kinds.append(("queries that chose the block", walk.chosen_facts, load, "tl.maximum(start, forced)", "stop"))
    lines: list[str] = []
    for title, facts, tile_source, start, stop in kinds:
        code = TileCode(walk, facts)
        active = [s for s in sums if s.in_loop(facts)]
        tile = code.body(code.wanted(active))
        query_rows = RowCode(program, geometry, "query", "BLOCK_M", available)
        query_rows.defined_columns = key_rows.defined_columns
        used = operands(tile.products, active, of_queries=True)
        scalars = row_scalars([tile], active)
        keys_used.update(dict.fromkeys(operands(tile.products, [], of_queries=False)))
        for v in (*used, *keys_used):
            for f in (features_of(v), features_of(v)[-1:]):
                lines += key_rows.columns(f)
        piece = query_rows.compute([*used, *scalars], {})
        arrays.update({a.name: a for a in piece.arrays})
        prologue = list(piece.lines)
        for v in (*used, *scalars):
            if v not in available:
                like = program.inputs[0].name
                prologue += query_rows.operand(v, piece.names[v], like) if features_of(v) else [f"{v.name} = {piece.names[v]}"]
        loops.append({
            "title": title,
            "first": start,
            "last": stop,
            "tile": tile_source,
            "prologue": "\n".join(prologue),
            "tiles": "\n".join([*(product_line(eq) for eq in tile.products), *tile.lines]),
            "sums": "\n".join(code.sum_line(s, tile.names, to_keys=True) for s in active),
        })  # fmt: skip
        covers.update(dict.fromkeys([*piece.equations, *tile.products, *tile.equations, *(s.equation for s in active)]))
    key_side = Rows(geometry, "key", False)
    for v in keys_used:
        array = available[v]
        arrays[array.name] = array
        lines.append(f"{v.name} = {key_side.load(array)}  # [BLOCK_N, {array.width[0]}]")
    outputs, stores = {}, ["at = (bh * SEGMENTS + segment) * BLOCK + tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)"]
    for s in sums:
        features = features_of(s.out)
        width = geometry.width(features, pad=True) if features else 1
        outputs[s.out] = Array(f"{s.out.name}_parts", "segments", features, (width,), "float32", True)
        stores += key_rows.columns(features)
        column = "".join(features)
        stores.append(f"tl.store({s.out.name}_parts_ptr + at[:, None] * {width} + {column}[None, :], {s.out.name})")
    order = {eq.out: i for i, eq in enumerate(program.equations)}
    holes = {
        "forced": {"setup": "\n".join(setup), "count": count},
        "chosen": chosen,
        "loads": "\n".join(lines),
        "accumulators": [{"name": s.out.name, "shape": f"(BLOCK_N, {outputs[s.out].width[0]})"} for s in sums],
        "loops": loops,
        "stores": "\n".join(stores),
    }
    kernel = Kernel(
        "block_sparse_dkv",
        "block_sparse_dkv",
        tuple(sorted(covers, key=lambda eq: order[eq.out])),
        tuple(arrays.values()),
        tuple(outputs.values()),
        holes,
        "(work.segments, B * Hkv, BLOCK // BLOCK_N)",
        ("L", "Hkv", "SEGMENTS", "SEGMENT"),
    )
    return kernel, outputs


def merge_kernel(
    walk: Walk,
    available: Mapping[Var, Array],
    parts: Mapping[Var, Array],
    outputs: Sequence[tuple[Var, Array]],
) -> Kernel:
    """Sum the segments of every key block in order, then the key rows' remaining equations."""
    program, geometry = walk.program, walk.geometry
    rows = RowCode(program, geometry, "key", "BLOCK_N", available)
    columns: list[str] = []
    for array in parts.values():
        for f in (array.features, array.features[-1:]):
            columns += rows.columns(f)
    piece = rows.compute([v for v, _ in outputs], {v: v.name for v in parts})
    epilogue = list(piece.lines)
    for v, array in outputs:
        epilogue += rows.store(array, v, piece.names[v])
    accumulators = [
        {
            "name": v.name,
            "shape": f"(BLOCK_N, {a.width[0]})",
            "source": f"{a.name}_ptr + ((bh * SEGMENTS + segment) * BLOCK + key[:, None]) * {a.width[0]} + {''.join(a.features)}[None, :]",
        }
        for v, a in parts.items()
    ]
    holes = {"columns": "\n".join(columns), "accumulators": accumulators, "epilogue": "\n".join(epilogue)}
    inputs = {a.name: a for a in (WORK, *parts.values(), *piece.arrays)}
    return Kernel(
        "merge_segments",
        "merge_segments",
        piece.equations,
        tuple(inputs.values()),
        tuple(a for _, a in outputs),
        holes,
        "(nJ * (BLOCK // BLOCK_N), B * Hkv)",
        ("L", "Hkv", "SEGMENTS"),
        ("BLOCK_N",),
    )


__all__ = ["Piece", "Walk", "array_of", "dkv_kernel", "dq_kernel", "forward_kernel", "merge_kernel"]
