"""The tile kernels that give each program the rows of one query tile: block-sparse forward, and dq."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from splagen.codegen.base_two import LN_2, LOG2_E
from splagen.codegen.geometry import BlockRows, Rows, array_of, features_of
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.row_code import RowCode
from splagen.codegen.tile_code import (
    CHOICES,
    CHOSEN_HERE,
    COUNTS,
    INDICES,
    Sum,
    Tile,
    TileCode,
    Walk,
    accumulators,
    follows_softmax,
    operands,
    part_address,
    row_scalars,
    sums_of_tiles,
)
from splagen.codegen.unions import SPAN, UNION, union_walk
from splagen.ir.program import Equation, Reduce, Var, descendants, slice_back

FULL = 32  # query rows that share a list of blocks: a tile of so many fills its registers
WHOLE = 64  # query rows of a product of four warps: their registers hold the keys' offsets too
HELD = 384  # columns of sums and operands of a row that a full tile can hold
Chosen: TypeAlias = Literal["list", "union", "parts", "direct"]  # how a program meets the blocks that its rows chose


class QuerySide:
    """Common parts of the kernels that give each program the rows of one query tile."""

    def __init__(self, walk: Walk, available: Mapping[Var, Array]) -> None:
        """`available` maps variables in memory to their arrays."""
        self.walk, self.program, self.geometry = walk, walk.program, walk.geometry
        self.available = available
        self.rows = RowCode(self.program, self.geometry, "query", "BLOCK_M", available)
        self.arrays: dict[str, Array] = {}
        self.key_rows: type[Rows] = Rows
        self.scratch: tuple[Array, ...] = ()
        self.covers: dict[Equation, None] = {}

    def use(self, arrays: Iterable[Array]) -> None:
        """Note arrays that the kernel reads."""
        self.arrays.update({a.name: a for a in arrays})

    def loops(self, chosen: Chosen) -> list[tuple[TileCode, dict[str, object]]]:
        """Tile code and holes of each loop; what is merged from parts has none."""
        geometry = self.geometry
        if (geometry.chunk if chosen in ("parts", "direct") else geometry.tile) * geometry.group >= WHOLE:
            self.key_rows = BlockRows
        if chosen == "direct":
            return [self._every()]
        setup, count, block = self.walk.forced("J", {"T": "tile", "L": "L"}, "nJ", "i")
        code = TileCode(self.walk, self.walk.forced_facts, to_keys=False)
        found = [(code, self._walk("blocks seen by position", setup, count, block))]
        if not self.walk.chosen or chosen == "parts":
            return found
        self.use([INDICES, COUNTS])
        if chosen == "union":
            self.scratch = (UNION,)
            code = TileCode.picking(self.walk, self.walk.eligible_facts, to_keys=False)
            union = union_walk(geometry, self.walk.budget)
            return [*found, (code, self._walk("blocks that any of the rows chose", *union))]
        return [*found, *self._listed()]

    def _every(self) -> tuple[TileCode, dict[str, object]]:
        """The loop over all blocks, where what is left over is summed as what is seen."""
        self.use([CHOICES, COUNTS])
        setup, count, block = self.walk.every("J", {"T": "tile", "L": "L"}, "nJ", "i")
        setup += [
            "own = (b * Hkv + h) * ((L + TILE - 1) // TILE) + qpos // TILE  # [BLOCK_M]: the list of each row",
            "choices = tl.load(choices_ptr + own, mask=row_ok, other=0)",
            "chosen = tl.load(block_counts_ptr + own, mask=row_ok, other=0)",
        ]
        title = "blocks seen by position, chosen and left over"
        return TileCode.direct(self.walk, to_keys=False), self._walk(title, setup, count, block, [CHOSEN_HERE])

    def _listed(self) -> list[tuple[TileCode, dict[str, object]]]:
        """The loop over one list of chosen blocks.

        Where programs are few, as their tiles are large, one waits for what it reads: the list is read a visit ahead,
        and a block that may reach beyond the sequence has a loop of its own, with masks.  Lists ascend: it is the last.
        """
        facts, entry = self.walk.chosen_facts, "tl.load(block_indices_ptr + at * BUDGET + {0})"
        code = TileCode(self.walk, facts, to_keys=False)
        setup = [
            "at = ((b * Hkv + h) * ((L + TILE - 1) // TILE) + tile)",
            "chosen = tl.load(block_counts_ptr + at)",
        ]
        if self.key_rows is not BlockRows:
            block = entry.format("i") + ".to(tl.int64)"
            return [(code, self._walk("blocks chosen", setup, "chosen", block))]
        first, block = f"ahead = {entry.format('0')}", "ahead.to(tl.int64)"
        visit = [
            "following = tl.minimum((step + 1) // PARTS, BUDGET - 1)",
            f"ahead = {entry.format('following')}",
        ]
        if code.whole:
            return [(code, self._walk("blocks chosen", [*setup, first], "chosen", block, visit))]
        setup += [
            f"final = {entry.format('tl.maximum(chosen - 1, 0)')}",
            "whole = chosen - ((chosen > 0) & ((final + 1) * BLOCK > L)).to(tl.int32)",
        ]
        whole = self._walk("blocks chosen that are whole", [*setup, first], "whole", block, visit)
        title = "the chosen block that the sequence ends in"
        cut = self._walk(title, ["cut = chosen - whole"], "cut", "final.to(tl.int64)")
        return [(TileCode(self.walk, facts | self.walk.whole_facts, to_keys=False), whole), (code, cut)]

    def _walk(
        self, title: str, setup: Sequence[str], count: str, block: str, visit: Sequence[str] = ()
    ) -> dict[str, object]:
        first = "j * BLOCK + (step - i * PARTS) * BLOCK_N"
        lines = [f"kpos = {first} + tl.arange(0, BLOCK_N)  # [BLOCK_N]"]
        if self.key_rows is BlockRows:
            lines = [
                f"first_key, key = tl.cast({first}, tl.int64), tl.arange(0, BLOCK_N)",
                "kpos = first_key.to(tl.int32) + key  # [BLOCK_N]",
            ]
        lines = [*visit, *lines]
        return {
            "title": title, "setup": "\n".join(setup), "count": count, "block": block, "visit": "\n".join(lines)
        }  # fmt: skip

    def key_loads(self, tile_code: TileCode, keys: Sequence[Var]) -> list[str]:
        """Lines that load the key rows of a tile."""
        known = tile_code.whole
        lines = [] if known else ["key_ok = kpos < L"]
        for v in keys:
            array = self.available[v]
            self.use([array])
            side = self.key_rows(self.geometry, "key")
            lines.append(f"{v.name} = {side.load(array, mask=not known)}  # [BLOCK_N, {array.width[0]}]")
        return lines

    def prologue(self, wanted: Sequence[Var], keys: Sequence[Var]) -> list[str]:
        """Lines that bring the rows and the numbers per row that the tiles read."""
        columns = self.rows.columns_of(keys)
        piece = self.rows.operands(wanted)
        self.use(piece.arrays)
        self.covers.update(dict.fromkeys(piece.equations))
        return [*columns, *piece.lines]

    def epilogue(self, outputs: Sequence[tuple[Var, Array]], held: Mapping[Var, str]) -> list[str]:
        """Lines that finish the rows and store the outputs."""
        piece = self.rows.compute([v for v, _ in outputs], held)
        self.use(piece.arrays)
        self.covers.update(dict.fromkeys(piece.equations))
        lines = list(piece.lines)
        for v, array in outputs:
            lines += self.rows.store(array, piece.names[v])
        return lines

    def counts(self, equations: Sequence[Equation]) -> tuple[list[str], dict[Var, str]]:
        """Lines that count the blocks that a tile may choose and those that it chose; what stands for the counts."""
        lines: list[str] = []
        held: dict[Var, str] = {}
        for eq in equations if self.walk.chosen else ():
            if not isinstance(eq.op, Reduce) or eq.args not in ((self.walk.eligible,), (self.walk.chosen,)):
                continue
            name = "chosen"
            if eq.args == (self.walk.eligible,):
                lines += self.walk.eligible_count()
                name = "eligible"
            lines.append(f"{eq.out.name} = ({name} + tl.zeros((BLOCK_M,), tl.int32)).to(tl.float32)")
            held[eq.out] = eq.out.name
            self.covers[eq] = None
        return lines, held

    def kernel(
        self,
        name: str,
        template: str,
        outputs: Sequence[tuple[Var, Array]],
        sums: Sequence[Sum],
        tiles: Sequence[Tile],
        loops: Sequence[dict[str, object]],
        prologue: Sequence[str],
        epilogue: Sequence[str],
        more: Mapping[str, object] | None = None,
        span: str = "TILE",
    ) -> Kernel:
        """The finished kernel: it also covers the sums and what the tiles form."""
        totals = [self.program.definitions[v] for v in accumulators(sums)]
        self.covers.update(dict.fromkeys([*(s.equation for s in sums), *totals]))
        self.covers.update(dict.fromkeys(eq for t in tiles for eq in (*t.products, *t.equations)))
        holes = {
            "prologue": "\n".join(prologue),
            "accumulators": [{"name": v.name, "shape": self.rows.tile_shape(v)} for v in accumulators(sums)],
            "loops": loops,
            "epilogue": "\n".join(epilogue),
            **(more or {}),
        }
        tiles_of_span = "nT" if span == "TILE" else f"cdiv(L, {span})"
        grid = f"({tiles_of_span} * cdiv({span} * GROUP, BLOCK_M), B * Hkv)"
        made = tuple(a for _, a in outputs)
        inputs = tuple(self.arrays.values())
        return Kernel(
            name, template, self.program.in_order(self.covers), inputs, made, holes, grid, scratch=self.scratch
        )


def forward_kernels(
    walk: Walk, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]], chosen: Chosen = "list"
) -> tuple[Kernel, ...]:
    """Block-sparse attention by row: one kernel, or one for the sums beside the softmax and one for the rest."""
    return _by_row(forward_kernel, "linear_forward", walk, available, outputs, chosen)


def dq_kernels(
    walk: Walk, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]], chosen: Chosen = "list"
) -> tuple[Kernel, ...]:
    """Gradients of query rows by row, as `forward_kernels`."""
    return _by_row(dq_kernel, "linear_dq", walk, available, outputs, chosen)


def _by_row(
    kernel: Callable[..., Kernel],
    linear: str,
    walk: Walk,
    available: Mapping[Var, Array],
    outputs: Sequence[tuple[Var, Array]],
    chosen: Chosen,
) -> tuple[Kernel, ...]:
    """The one `kernel`, or behind that of the sums beside the softmax, which is named `linear`."""
    first = _apart(walk, available, outputs, chosen)
    if not first:
        return (kernel(walk, available, outputs, chosen=chosen),)
    beside = dq_kernel(walk, available, list(first.items()), chosen=chosen, name=linear)
    rest = [(v, a) for v, a in outputs if v not in first]
    return beside, kernel(walk, {**available, **first}, rest, chosen=chosen)


def _apart(
    walk: Walk, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]], chosen: Chosen
) -> dict[Var, Array]:
    """Rows that follow from the sums beside the softmax alone and leave their kernel, if they are to have their own.

    They are where a full tile of rows and the sums of both kinds do not fit registers.
    """
    program, geometry = walk.program, walk.geometry
    asked = [v for v, _ in outputs]
    equations = slice_back(program, asked, [*program.inputs, *available])
    sums = sums_of_tiles(program, equations, to_keys=False)
    linear = [s for s in sums if not follows_softmax(program, s)]
    direct = chosen == "direct"
    rows = (geometry.chunk if direct else geometry.tile) * geometry.group
    if not walk.chosen or rows < FULL or not 0 < len(linear) < len(sums):
        return {}
    code = TileCode.direct(walk, to_keys=False) if direct else TileCode(walk, walk.chosen_facts, to_keys=False)
    held = [s.into for s in sums] + operands(code.body(code.wanted(sums)).products, [], of_queries=True)
    if sum(geometry.width(f, pad=True) for v in dict.fromkeys(held) if (f := features_of(v))) <= HELD:
        return {}
    behind = program.with_equations(equations)
    both = linear, [s for s in sums if s not in linear]
    here, there = (descendants(behind, [s.equation.out for s in some]) for some in both)
    crossing = {v for eq in equations if eq.out in there for v in eq.args}
    given = dict(outputs)
    alone = [v for v in dict.fromkeys([*asked, *(eq.out for eq in equations)]) if v in here and v not in there]
    return {
        v: given.get(v) or array_of(v, geometry, internal=True, dtype="float32")
        for v in alone
        if v in given or v in crossing
    }


def forward_kernel(
    walk: Walk,
    available: Mapping[Var, Array],
    outputs: Sequence[tuple[Var, Array]],
    parts: Mapping[Var, Array] | None = None,
    *,
    chosen: Chosen = "list",
) -> Kernel:
    """Block-sparse softmax with every other sum on the same tiles, and the row equations that follow.

    `parts` holds what the chosen blocks give to each row where these are "parts" (part_kernels.py).  Else they are
    visited here: those of one list, of the "union" of all lists that a program's rows have, or, as the "direct" sum
    over what is left over wants it, all blocks.
    """
    program, definitions, lse = walk.program, walk.program.definitions, walk.lse
    side = QuerySide(walk, available)
    forward = slice_back(program, [v for v, _ in outputs], [*program.inputs, *available])
    sums = [s for s in sums_of_tiles(program, forward, to_keys=False)]
    softmax = [s for s in sums if follows_softmax(program, s)]
    linear = [s for s in sums if s not in softmax]
    loops, tiles, keys_used = [], [], {}
    for code, holes in side.loops(chosen):
        active = [s for s in linear if s.in_loop(code.facts)]
        tile, scores = code.scores(lse, code.wanted(active))
        keys = operands(tile.products, [*softmax, *active], of_queries=False)
        keys_used.update(dict.fromkeys(keys))
        loops.append(holes | {
            "loads": "\n".join(side.key_loads(code, keys)),
            "scores": "\n".join(scores.lines),
            "score": scores.source,
            "scale": scores.scale,
            "softmax": [{"name": s.into.name, "operand": s.operand.name} for s in softmax if s.operand],
            "linear": "\n".join(code.sum_line(s, tile.names) for s in active),
        })  # fmt: skip
        tiles.append(tile)
    rows = operands([eq for t in tiles for eq in t.products], [], of_queries=True)
    prologue = side.prologue([*rows, *row_scalars(tiles, linear)], [*keys_used, *(parts or ())])
    held = {s.into: s.into.name for s in sums} | {lse.out: lse.out.name}
    finish = [f"{s.into.name} = {s.into.name} / row_sum[:, None]" for s in softmax]
    finish.append(f"{lse.out.name} = (row_max + tl.log2(row_sum)) * {LN_2}")
    counts, counted = side.counts(forward)
    epilogue = finish + counts + side.epilogue(outputs, held | counted)
    side.covers.update(dict.fromkeys([lse, *(definitions[v] for s in softmax for v in s.factors)]))
    merged, span = None, "TILE" if chosen == "list" else SPAN
    if parts:
        side.use([COUNTS, *parts.values()])
        merged = {
            "lse": parts[lse.out].name,
            "scale": repr(float(LOG2_E)),
            "softmax": [_merged_part(s.into, parts[s.into]) for s in softmax],
            "linear": [_merged_part(s.into, parts[s.into]) for s in linear if s.into in parts],
        }
    more = {"merged": merged, "span": span}
    name = "block_sparse_" + {"list": "forward", "union": "union", "parts": "merge", "direct": "direct"}[chosen]
    return side.kernel(name, "block_sparse_forward", outputs, sums, tiles, loops, prologue, epilogue, more, span)


def _merged_part(v: Var, array: Array) -> dict[str, str]:
    mask = "part_ok[:, None]" if array.features else "part_ok"
    return {"name": v.name, "load": f"tl.load({part_address(array)}, mask={mask}, other=0.0)"}


def dq_kernel(
    walk: Walk,
    available: Mapping[Var, Array],
    outputs: Sequence[tuple[Var, Array]],
    parts: Mapping[Var, Array] | None = None,
    *,
    chosen: Chosen = "list",
    name: str = "block_sparse_dq",
) -> Kernel:
    """Gradients of query rows, or other rows behind sums of tiles: the same walk as forward, the scores formed again.

    `parts` holds what the chosen blocks give to each row (key_kernels.py), `chosen` is that of `forward_kernel`.
    """
    program = walk.program
    side = QuerySide(walk, available)
    backward = slice_back(program, [v for v, _ in outputs], [*program.inputs, *available])
    sums = sums_of_tiles(program, backward, to_keys=False)
    loops, tiles, keys_used = [], [], {}
    for code, holes in side.loops(chosen):
        active = [s for s in sums if s.in_loop(code.facts)]
        if not active:
            continue
        tile = code.body(code.wanted(active))
        keys = operands(tile.products, active, of_queries=False)
        keys_used.update(dict.fromkeys(keys))
        loops.append(holes | {
            "loads": "\n".join(side.key_loads(code, keys)),
            "tiles": "\n".join([*(code.product_line(eq) for eq in tile.products), *tile.lines]),
            "sums": "\n".join(code.sum_line(s, tile.names) for s in active),
        })  # fmt: skip
        tiles.append(tile)
    rows = operands([eq for t in tiles for eq in t.products], [], of_queries=True)
    prologue = side.prologue([*rows, *row_scalars(tiles, sums)], [*keys_used, *(parts or ())])
    merged, span = [], "TILE" if chosen == "list" else SPAN
    if parts:
        side.use([COUNTS, *parts.values()])
        merged = [_merged_part(v, array) for v, array in parts.items()]
    counts, counted = side.counts(backward)
    epilogue = counts + side.epilogue(outputs, {s.into: s.into.name for s in sums} | counted)
    more = {"merged": merged, "span": span}
    name += "" if chosen == "list" else "_merge" if chosen == "parts" else f"_{chosen}"
    return side.kernel(name, "block_sparse_dq", outputs, sums, tiles, loops, prologue, epilogue, more, span)
