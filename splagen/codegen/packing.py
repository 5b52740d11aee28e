"""Packed sequences: the kernels of a batch, each program with a sequence of its own length.

Rows of all sequences lie one behind the other; `bounds` [sequences + 1] says where each begins.  To a program its
sequence is a batch of one: the lines in the place of `Kernel.batch` load the length L and move every pointer to where
the sequence's part of the array begins.  What stands below them, predicates over L and addresses, stays as it is.

Arrays by tile, block, chunk or segment have as much room as the sequences before can need: s sequences with together t
tokens have at most t // unit + s tiles of `unit` tokens.  So `first_token` tells where everything of a sequence lies:
no table of offsets is made.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import dataclass, replace

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.tile_code import Walk
from splagen.codegen.unions import lists_text
from splagen.errors import PartitionError

BOUNDS = Array("bounds", "bounds", dtype="int32")  # never falling, from 0 to the tokens at the most
LENGTHS = "lengths"  # of the inverse index: tiles that a segment of each sequence has at the most
_HEADS = {"Hkv": "Hkv", "Hq": "(Hkv * GROUP)"}


@dataclass(frozen=True)
class Room:
    """How much of an array sequences have: `times` * (tokens // unit + extra * sequences) entries per KV head."""

    unit: int
    extra: int = 1
    times: int = 1

    def text(self, tokens: str, sequences: str) -> str:
        """Source of the entries that `sequences` with together `tokens` tokens have at the most."""
        whole = tokens if self.unit == 1 else f"{tokens} // {self.unit}"
        more = sequences if self.extra == 1 else f"{self.extra} * {sequences}"
        return f"({whole} + {more})" if self.times == 1 else f"({whole} + {more}) * {self.times}"

    def count(self, tokens: int, sequences: int) -> int:
        """That number."""
        return self.times * (tokens // self.unit + self.extra * sequences)

    def before(self, size: int = 0) -> str:
        """Source, in a kernel, of the entries of sequences before; of `size` elements for each KV head, if not 0."""
        found = self.text("first_token", "sequence")
        return f"{found} * Hkv * {size}" if size > 1 else f"{found} * Hkv" if size else found


@dataclass(frozen=True)
class Packing:
    """Where a sequence's part of every array begins, in kernels and where the host allocates."""

    geometry: Geometry
    budget: int

    @classmethod
    def of(cls, walk: Walk) -> Packing:
        """That of a program."""
        return cls(walk.geometry, walk.budget)

    # -- kernels ------------------------------------------------------------------------------------------

    def kernel(self, kernel: Kernel) -> Kernel:
        """The kernel for packed sequences: it takes `bounds` and the longest length in the place of L."""
        scalars = tuple("LONGEST" if s == "L" else s for s in kernel.scalars if not s.startswith("SEGMENT"))
        inputs = [replace(a, features=(LENGTHS,)) if a.layout == "work" else a for a in kernel.inputs]
        name = kernel.batch.partition(" ")[0]
        # of arrays that begin where the sequence's do, the sequence is the first
        own = "b = 0" if name == "b" else f"{name} = (tl.program_id(1) % Hkv).to(tl.int64)"
        place = self.place(f"tl.program_id(1) // {heads_of(kernel)}")
        lines = [*place, *self.leave(kernel), *self.moves(kernel), own]
        return replace(kernel, inputs=(*inputs, *self.bounds), scalars=scalars, batch="\n".join(lines))

    @property
    def bounds(self) -> tuple[Array, ...]:
        """What tells kernels where sequences lie."""
        return (BOUNDS,)

    def place(self, sequence: str, index: str = "work_") -> list[str]:
        """Lines that find the sequence, given by its number, its first token and length; those not read disappear.

        `index` begins the names of the tensors of the inverse index.
        """
        block = self.geometry.block
        return [
            f"sequence = {sequence}",
            "first_token = tl.load(bounds_ptr + sequence).to(tl.int64)",
            "L = tl.minimum(tl.load(bounds_ptr + sequence + 1) - first_token, LONGEST).to(tl.int32)",
            f"SEGMENTS = (L + {block - 1}) // {block} * 2  # at the most",
            f"SEGMENT = tl.load({index}{LENGTHS}_ptr + sequence)",
        ]

    def leave(self, kernel: Kernel) -> list[str]:
        """Lines that end programs beyond the last that the sequence has; none where all have as many."""
        programs = self.programs(kernel, "L")
        return [f"if {kernel.number} >= {programs}:", "    return"] if programs else []

    def moves(self, kernel: Kernel) -> list[str]:
        """Lines that move pointers to the sequence's part of each array."""
        lines = []
        for a in kernel.arrays:
            match a.layout:
                case "query_rows" | "query_scalars":
                    lines.append(f"{a.name}_ptr += {self.first_row()} * {a.name}_l")
                case "key_rows":
                    lines.append(f"{a.name}_ptr += first_token * {a.name}_l")
                case "cell_rows":
                    lines.append(f"{a.name}_ptr += {self.room(a).before()} * {a.name}_l")
                case "indices" | "counts" | "parts":
                    lines.append(f"{a.name}_ptr += {self.before_tiles(math.prod(self._widths(a)))}")
                case "states" | "segments":
                    lines.append(f"{a.name}_ptr += {self.room(a).before(math.prod(self._widths(a)))}")
                case "work":
                    lines += self.move_index(f"{a.name}_")
                case "partials":
                    size = f"{_HEADS[a.features[-1]]} * {a.width[0]}"
                    lines.append(f"{a.name}_ptr += ({self._programs_before(kernel)}) * {size}")
                case "unions":
                    lines += self._move_union(a, kernel)
                case "sequences":
                    lines.append(f"{a.name}_ptr += sequence * Hkv * {math.prod(a.width)}")
                case "head_rows" | "kv_head_scalars" | "pages" | "table" | "token_rows":
                    pass  # of every sequence: parameters, and what is addressed by page or token
                case _:
                    raise PartitionError(f"{a.name}: nobody packs {a.layout}")
        return lines

    def move_index(self, prefix: str) -> list[str]:
        """Lines that move the pointers to the tensors of the inverse index, which `prefix` begins."""
        return [f"{prefix}{part}_ptr += {before}" for part, before in self.before_index().items()]

    def before_index(self) -> dict[str, str]:
        """Source, by tensor of the inverse index, of the elements of sequences before."""
        rooms = {"offsets": self.ends, "blocks": self.segments, "firsts": self.ends}
        before = {part: room.before(1) for part, room in rooms.items()}
        return {"entries": self.before_entries(), **before} if self.budget else before

    def first_row(self) -> str:
        """Source of the row of position 0 among rows of queries."""
        return "first_token"

    def before_tiles(self, size: int) -> str:
        """Source of the element of an array by tile at which tile 0 of the sequence's first head lies."""
        return self.tiles.before(size)

    def before_entries(self) -> str:
        """Source of the chosen blocks of sequences before, of all heads."""
        return self.tiles.before(self.budget)

    def first_tile(self) -> str:
        """Source of the first tile that is there."""
        return "0"

    def own_tiles(self) -> str:
        """Source of the tiles of the sequence, of a head."""
        return "(L + TILE - 1) // TILE"

    def programs(self, kernel: Kernel, length: str, *, host: bool = False) -> str:
        """Source of how many programs, in the grid's first dimension, a sequence has; "" if it is not for L to say."""
        g = self.geometry
        values = {
            "GROUP": g.group, "TILE": g.tile, "BLOCK": g.block, "CHUNK": g.chunk,
            "nT": f"cdiv(L, {g.tile})", "nJ": f"cdiv(L, {g.block})", "nC": f"(cdiv(L, {g.block}) * {g.cells})",
        }  # fmt: skip
        grid = kernel.grid.replace("work.segments", "(2 * nJ)")
        for name, value in values.items():
            grid = re.sub(rf"\b{name}\b", str(value), grid)
        whole = ast.parse(grid, mode="eval").body
        assert isinstance(whole, ast.Tuple)
        first = ast.unparse(whole.elts[0])
        if not re.search(r"\bL\b", first):
            return ""
        count = ast.parse(re.sub(r"\bL\b", length, first), mode="eval").body
        return ast.unparse((_OnHost() if host else _InKernel()).visit(count))

    def _programs_before(self, kernel: Kernel, *, host: bool = False) -> str:
        """Programs that the sequences before have at the most; all of them, for the host."""
        tokens, sequences = ("n.T", "n.B") if host else ("first_token", "sequence")
        before, one = (self.programs(kernel, length, host=host) for length in (tokens, "1"))
        if not before:
            raise PartitionError(f"{kernel.name}: its programs are not counted by positions: {kernel.grid}")
        return f"{before} + {sequences}" if one == "1" else f"{before} + {sequences} * ({one})"

    def _move_union(self, a: Array, kernel: Kernel) -> list[str]:
        """Programs number their room by their place in the whole grid: that is taken back."""
        block, most = self.geometry.block, self._union()
        room = f"tl.minimum((L + {block - 1}) // {block}, {most})"
        longest = f"tl.minimum((LONGEST + {block - 1}) // {block}, {most})"
        return [
            f"{a.name}_ptr += ({self._programs_before(kernel)}) * Hkv * {longest} * 2",
            f"mine = (tl.program_id(1) % Hkv).to(tl.int64) * ({self.programs(kernel, 'L')})",
            f"{a.name}_ptr += (mine - tl.program_id(1).to(tl.int64) * tl.num_programs(0)) * {room} * 2",
        ]

    # -- room ---------------------------------------------------------------------------------------------

    @property
    def tiles(self) -> Room:
        """Of arrays by query tile."""
        return Room(self.geometry.tile)

    @property
    def blocks(self) -> Room:
        """Of arrays by key block."""
        return Room(self.geometry.block)

    @property
    def ends(self) -> Room:
        """Of arrays by key block with one more entry per sequence."""
        return Room(self.geometry.block, 2)

    @property
    def segments(self) -> Room:
        """Of segments: each block has one that is not full, and full ones are as many as blocks at the most."""
        return Room(self.geometry.block, 1, 2)

    def room(self, a: Array) -> Room:
        """Of an array by tile, block, chunk or segment."""
        match a.layout:
            case "cell_rows":
                return Room(self.geometry.block, 1, self.geometry.cells)
            case "indices" | "counts" | "parts":
                return self.tiles
            case "states":
                return Room(a.chunk, 2)
            case "segments":
                return self.segments
        raise PartitionError(f"{a.name}: nobody packs {a.layout}")

    def _widths(self, a: Array) -> list[int]:
        """Extents of an entry, per KV head."""
        g = self.geometry
        match a.layout:
            case "indices":
                return [self.budget]
            case "parts":
                return [self.budget, g.tile * g.group, *a.width]
            case "segments":
                return [g.block, *a.width]
        return list(a.width)

    def _union(self) -> str:
        return f"{lists_text(self.geometry.tile * self.geometry.group)} * {self.budget}"

    # -- the host -----------------------------------------------------------------------------------------

    def tiles_text(self) -> str:
        """Host source of the query tiles of all sequences at the most."""
        return self.tiles.text("n.T", "n.B")

    def shape(self, kernel: Kernel | None, a: Array) -> list[str]:
        """Host source of the shape of an array that a kernel fills."""
        heads = "n.Hq" if a.layout in ("query_rows", "query_scalars") else "n.Hkv"
        match a.layout:
            case "query_rows" | "query_scalars" | "key_rows":
                return ["1", "n.T", heads, *map(str, a.width)]
            case "cell_rows":
                return ["1", self.room(a).text("n.T", "n.B"), heads, *map(str, a.width)]
            case "sequences":
                return ["n.B", heads, *map(str, a.width)]
            case "partials" if kernel:
                return [self._programs_before(kernel, host=True), f"n.{a.features[-1]}", *map(str, a.width)]
            case "unions" if kernel:
                programs = f"({self._programs_before(kernel, host=True)}) * n.Hkv"
                return [programs, f"min(n.nJ, {self._union()})", *map(str, a.width)]
        return [self.room(a).text("n.T", "n.B"), heads, *map(str, self._widths(a))]


def heads_of(kernel: Kernel) -> str:
    """Source of the heads by which the second dimension of a grid counts."""
    found = re.fullmatch(r".*, B \* (Hkv|Hq)(, .*)?\)", kernel.grid)
    if not found:
        raise PartitionError(f"{kernel.name}: its programs are not counted by sequences and heads: {kernel.grid}")
    return _HEADS[found[1]]


_FOLD = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_ONE = (ast.Mult, ast.FloorDiv)  # by 1 they change nothing


class _OnHost(ast.NodeTransformer):
    """Source of a count with its constant parts worked out; they are natural numbers."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        left, right = node.left, node.right
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            return ast.Constant(_FOLD[type(node.op)](left.value, right.value))
        if isinstance(right, ast.Constant) and right.value == 1 and isinstance(node.op, _ONE):
            return left
        if isinstance(left, ast.Constant) and left.value == 1 and isinstance(node.op, ast.Mult):
            return right
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Name("cdiv"), [ast.Constant(int(over)), ast.Constant(int(under))]):
                return ast.Constant(-(-over // under))
            case ast.Call(ast.Name("cdiv"), [over, ast.Constant(1)]):
                return over
            case ast.Call(ast.Name("cdiv"), [ast.Constant(1), _]):
                return ast.Constant(1)
        return node


class _InKernel(_OnHost):
    """The same in a kernel: quotients are rounded up by floor division."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        found = super().visit_Call(node)
        if not isinstance(found, ast.Call) or not isinstance(found.func, ast.Name) or found.func.id != "cdiv":
            return found
        over, under = found.args
        less = self.visit(ast.BinOp(under, ast.Sub(), ast.Constant(1)))
        return ast.BinOp(ast.BinOp(over, ast.Add(), less), ast.FloorDiv(), under)
