"""Tile values (query row x key): what every kernel that forms them has in common.

A tile value never leaves its kernel.  Every such kernel has the same parts, found from the equations: row operands,
products of rows and keys, equations between the products, and sums of tile values times rows.  Masks over blocks split
a walk into loops: blocks that a query sees by position, and blocks that it chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy as sp

from splagen.codegen.affine import Interval
from splagen.codegen.base_two import exponent, to_base2
from splagen.codegen.geometry import (
    Geometry,
    column_name,
    features_of,
    is_key_row,
    is_query_row,
    is_tile_value,
)
from splagen.codegen.kernel import Array
from splagen.codegen.predicates import LENGTH, J, Predicates, T, visit
from splagen.codegen.region import Dim, Region
from splagen.errors import PartitionError
from splagen.ir.passes import followed, signed_terms
from splagen.ir.program import Contract, Equation, Iota, Lse, Map, Program, TopK, Var, placeholder, slice_back
from splagen.ir.text import equation_text

INDICES = Array("block_indices", "indices", dtype="int32")
COUNTS = Array("block_counts", "counts", dtype="int32")
WORK = Array("work", "work", dtype="int32")
CHOICES = Array("choices", "counts", dtype="int64")  # bit j: block j is chosen; where blocks are few
BITS_OF_A_MASK = 64
CHOSEN_HERE = "picked = ((choices >> j) & 1) != 0  # [BLOCK_M]"


@dataclass(frozen=True)
class Walk:
    """The block-level structure of a program: what a query sees by position, and what it chose."""

    program: Program
    geometry: Geometry
    predicates: Predicates
    lse: Equation  # the log-sum-exp of the softmax over keys
    chosen: Var | None  # the top-k over blocks
    eligible: Var | None  # the mask it chooses from

    @classmethod
    def of(cls, program: Program) -> Walk:
        """Find the softmax over keys and the top-k over blocks."""
        geometry = Geometry.of(program)
        softmax = [eq for eq in program.equations if isinstance(eq.op, Lse) and "n" in eq.op.axes]
        topk = [eq for eq in program.equations if isinstance(eq.op, TopK)]
        if len(softmax) != 1 or len(topk) > 1 or len(softmax[0].args) != 2:
            found = "\n  ".join(equation_text(eq) for eq in (*softmax, *topk)) or "none of either"
            what = "block-sparse attention has one masked softmax over keys and at most one top-k, not\n"
            raise PartitionError(f"{what}  {found}")
        chosen, eligible = (topk[0].out, topk[0].args[1]) if topk else (None, None)
        return cls(program, geometry, Predicates(program, geometry), softmax[0], chosen, eligible)

    @property
    def whole_facts(self) -> dict[Var, bool]:
        """Masks where no key of a block lies beyond the sequence."""
        program, inside = self.program, Map(sp.Lt(placeholder(0), LENGTH))
        keys = [eq.out for eq in program.equations if eq.op == Iota(("J", "C", "n"))]
        return {eq.out: True for eq in program.equations if eq.op == inside and eq.args[0] in keys}

    @property
    def budget(self) -> int:
        """Blocks that a tile chooses at the most."""
        op = self.program.definitions[self.chosen].op if self.chosen else None
        return op.k if isinstance(op, TopK) else 0

    @property
    def forced_facts(self) -> dict[Var, bool]:
        """Masks in the loop over blocks seen by position."""
        return {self.chosen: False, self.eligible: False} if self.chosen and self.eligible else {}

    @property
    def eligible_facts(self) -> dict[Var, bool]:
        """Masks in a loop over blocks that some of the rows chose."""
        assert self.eligible
        return {self.eligible: True}

    @property
    def chosen_facts(self) -> dict[Var, bool]:
        """Masks in the loop over chosen blocks."""
        assert self.chosen
        assert self.eligible
        return {self.chosen: True, self.eligible: True}

    @property
    def few_blocks(self) -> int:
        """Blocks of a sequence up to which those left over are few, or no more than the chosen: their sum is direct."""
        tile = sp.Integer(2**16)  # it sees as many by position as any
        length = 2 * tile * self.geometry.tile
        at, extent = {T: tile, LENGTH: length}, int(length) // self.geometry.block
        forced = sum(i.count(at, extent) for i in self.intervals("J"))
        return min(BITS_OF_A_MASK, max(8, forced + 2 * self.budget))

    def intervals(self, variable: Literal["T", "J"], *, chosen: bool = False) -> list[Interval]:
        """The blocks J, or tiles T, that are seen by position, or with those that may be chosen."""
        facts = {self.chosen: chosen} if self.chosen else {}
        return self.predicates.intervals(self.lse.args[1], J if variable == "J" else T, facts)

    def every(
        self, variable: Literal["T", "J"], names: Mapping[str, str], extent: str, index: str
    ) -> tuple[list[str], str, str]:
        """The loop over blocks (or tiles) that are seen by position or may be chosen."""
        return visit(self.intervals(variable, chosen=True), "seen", names, extent, index)

    def forced(
        self, variable: Literal["T", "J"], names: Mapping[str, str], extent: str, index: str
    ) -> tuple[list[str], str, str]:
        """The loop over blocks (or tiles) seen by position: set-up, count, and source of the visited one."""
        return visit(self.intervals(variable), "forced", names, extent, index)

    def eligible_count(self) -> list[str]:
        """Lines that count the blocks a tile may choose from, as `eligible`."""
        assert self.eligible
        found = self.predicates.intervals(self.eligible, J, {})
        lines, count, _ = visit(found, "eligible", {"T": "tile", "L": "L"}, "nJ", "i")
        return [*lines, f"eligible = {count}"]


@dataclass(frozen=True)
class Sum:
    """One sum of tile values, `contract(masks, tiles and row scalars, operand)`, added to or taken from `into`."""

    equation: Equation
    masks: tuple[Var, ...]
    factors: tuple[Var, ...]
    operand: Var | None
    into: Var
    sign: int = 1

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
        return cls(eq, masks, factors, operands[0] if operands else None, eq.out)

    def joined(self, goes: Mapping[Var, tuple[Var, int]]) -> Sum:
        """The same sum, added to or taken from what `joined_sums` says."""
        into, sign = goes[self.into]
        return replace(self, into=into, sign=self.sign * sign)

    def in_loop(self, facts: Mapping[Var, bool]) -> bool:
        """False where a mask of the sum never holds."""
        return all(facts.get(v, True) for v in self.masks)


def sums_of_tiles(program: Program, equations: Sequence[Equation], to_keys: bool) -> list[Sum]:
    """Contractions to rows of one side that consume a tile value or apply a mask that depends on data."""
    found = []
    for eq in equations:
        if not isinstance(eq.op, Contract):
            continue
        masked = any(_of_data(program, v) for v in eq.args)
        target = is_key_row(eq.out) if to_keys else is_query_row(eq.out)
        if target and (masked or any(is_tile_value(v) and v.kind == "real" for v in eq.args)):
            found.append(Sum.of(eq, to_keys))
    return _joined(found, equations)


def _of_data(program: Program, v: Var) -> bool:
    """True for a top-k, and for a mask that follows from one."""
    eq = program.definitions.get(v)
    if eq is None or v.kind != "bool":
        return False
    return isinstance(eq.op, TopK) or any(_of_data(program, x) for x in eq.args)


def _joined(sums: list[Sum], equations: Sequence[Equation]) -> list[Sum]:
    """Sums whose results are only added up share the accumulator of the total (see passes.join_sums)."""
    goes, _ = joined_sums(equations, [s.into for s in sums])
    return [s.joined(goes) for s in sums]


def joined_sums(
    equations: Sequence[Equation], sums: Iterable[Var], added: Sequence[Var] = ()
) -> tuple[dict[Var, tuple[Var, int]], list[Equation]]:
    """Where each sum goes and with which sign, and by which equations: what is only added and subtracted is one sum.

    Those of `added` have no sign: where one would be subtracted, sums stay apart.
    """
    uses = Counter(v for eq in equations for v in eq.args)
    goes = {v: (v, 1) for v in (*sums, *added)}
    joined = []
    for eq in equations:
        terms = signed_terms(eq)
        if not terms or any(uses[v] > 1 for v in terms) or not terms.keys() <= {into for into, _ in goes.values()}:
            continue
        moved = {v: (eq.out, sign * terms[into]) for v, (into, sign) in goes.items() if into in terms}
        if all(moved[v][1] > 0 for v in added if v in moved):
            goes |= moved
            joined.append(eq)
    return goes, joined


def is_sum_of_tiles(eq: Equation) -> bool:
    """A contraction of a tile value to key rows: join_sums lets these share an accumulator."""
    return isinstance(eq.op, Contract) and is_key_row(eq.out) and any(is_tile_value(v) for v in eq.args)


def follows_softmax(program: Program, s: Sum) -> bool:
    """True for a sum of tiles that the softmax weights, forward or backward."""
    tiles = [v for v in s.factors if is_tile_value(v)]
    while tiles:
        eq = program.definitions[tiles.pop()]
        if any(isinstance(d.op, Lse) and "n" in d.op.axes for v in eq.args if (d := program.definitions.get(v))):
            return True
        tiles += [v for v in eq.args if is_tile_value(v) and v in program.definitions]
    return False


def accumulators(sums: Iterable[Sum]) -> list[Var]:
    """What the sums add up to, each once."""
    return list(dict.fromkeys(s.into for s in sums))


@dataclass(frozen=True)
class Tile:
    """The body of one loop: products, the equations between, and what stands for each variable."""

    products: tuple[Equation, ...]
    equations: tuple[Equation, ...]
    lines: tuple[str, ...]
    names: Mapping[Var, str]


@dataclass(frozen=True)
class Scores:
    """The scores of a softmax: lines that form the tile, its source, and what makes it exponents of 2."""

    lines: tuple[str, ...]
    source: str
    scale: str


class TileCode:
    """Prints the tile part of a kernel for one kind of loop.

    A tile is [BLOCK_M, BLOCK_N] (rows, keys) where sums go to rows, and [BLOCK_N, BLOCK_M] where they go to keys, so
    that the sum's product always takes the tile as it lies.
    """

    def __init__(
        self, walk: Walk, facts: Mapping[Var, bool], *, to_keys: bool, read: Mapping[Var, str] | None = None
    ) -> None:
        """`facts` fixes block-level masks in the loop; those of `read` differ by row, and it loads them as sources."""
        self.walk, self.program, self.facts, self.to_keys = walk, walk.program, facts, to_keys
        self.read = dict(read or {})
        self.row_view, self.key_view = ("[None, :]", "[:, None]") if to_keys else ("[:, None]", "[None, :]")
        simplify = walk.predicates.simplifier(facts)
        dims = (Dim(frozenset("bhgTm")), Dim(frozenset("JCn")))
        self.region = Region(dims, self.program.order, self.program.extents, facts=facts, simplify=simplify)
        places = {
            ("T", "m"): f"qpos{self.row_view}",
            ("T",): f"(qpos // TILE){self.row_view}" if to_keys else "tile",
            ("J", "C", "n"): f"kpos{self.key_view}",
            ("J",): "j",
            ("h", "g"): f"head{self.row_view}",
        }
        self.positions = {
            eq.out: places[eq.op.axes]
            for eq in self.program.equations
            if isinstance(eq.op, Iota) and eq.op.axes in places
        }

    @property
    def whole(self) -> bool:
        """True if the loop's facts say that no key of a block lies beyond the sequence."""
        inside = list(self.walk.whole_facts)
        return bool(inside) and all(self.body(inside).names[v] == "True" for v in inside)

    @classmethod
    def picking(cls, walk: Walk, facts: Mapping[Var, bool], *, to_keys: bool) -> TileCode:
        """That of a loop over blocks of which each row chose some: `picked` [BLOCK_M] tells which rows chose one."""
        assert walk.chosen
        view = "[None, :]" if to_keys else "[:, None]"
        return cls(walk, facts, to_keys=to_keys, read={walk.chosen: f"picked{view}"})

    @classmethod
    def direct(cls, walk: Walk, *, to_keys: bool) -> TileCode:
        """That of a loop over blocks that rows see by position, chose or left over: CHOSEN_HERE tells which."""
        return cls.picking(walk, {}, to_keys=to_keys)

    def body(self, wanted: Sequence[Var]) -> Tile:
        """Products and equations that give the wanted tile values and masks; row scalars stand as vectors by name."""
        fence = [eq.out for eq in self.program.equations if not is_tile_value(eq.out) and eq.out.kind != "bool"]
        slice_ = slice_back(self.program, wanted, [*fence, *self.program.inputs, *self.facts, *self.read])
        products = tuple(eq for eq in slice_ if isinstance(eq.op, Contract))
        between = [eq for eq in slice_ if eq not in products]
        bound = {eq.out: eq.out.name for eq in products} | self.positions | self.read
        for eq in between:
            bound.update({v: f"{v.name}{self.row_view}" for v in eq.args if is_query_row(v) and v.kind == "real"})
        printed = followed(wanted, to_base2(between))
        lines, names = self.region.emit(printed, bound)
        read = {*wanted, *(v for eq in printed for v in eq.args)}
        formed = tuple(eq for eq in products if eq.out in read)
        return Tile(formed, tuple(between), tuple(lines), names)

    def scores(self, lse: Equation, others: Sequence[Var]) -> tuple[Tile, Scores]:
        """The tile of a softmax's scores beside other wanted values."""
        score, mask = lse.args
        power = exponent(self.program, score)
        tile = self.body([power.value, mask, *others])
        lines = [*(self.product_line(eq) for eq in tile.products), *tile.lines]
        source, holds = tile.names[power.value], tile.names[mask]
        if holds != "True":
            lines.append(f'{score.name} = tl.where({holds}, {source}, -float("inf"))')
            source = score.name
        tile = replace(tile, equations=(*tile.equations, *power.equations))
        return tile, Scores(tuple(lines), source, repr(power.scale))

    def product_line(self, eq: Equation) -> str:
        """The tile of products of rows and keys, on tensor cores."""
        (row,) = [v for v in eq.args if is_query_row(v)]
        (key,) = [v for v in eq.args if is_key_row(v)]
        left, right = (key, row) if self.to_keys else (row, key)
        shape = "[BLOCK_N, BLOCK_M]" if self.to_keys else "[BLOCK_M, BLOCK_N]"
        return f'{eq.out.name} = tl.dot({left.name}, tl.trans({right.name}), input_precision="ieee")  # {shape}'

    def sum_line(self, s: Sum, names: Mapping[Var, str], *, across: bool = False, turned: bool = False) -> str:
        """Line that adds this loop's tile to the sum; `across` where the sum goes to the tile's second side.

        A `turned` sum goes there too and lies as the tile does: [features, second side].
        """
        factors = [names.get(v, f"{v.name}{self.row_view}") for v in s.factors]
        masks = [names[v] for v in s.masks if names[v] != "True"]
        value = " * ".join(factors) or "1.0"
        value = f"-{value}" if s.sign < 0 else value
        for mask in masks:
            value = f"tl.where({mask}, {value}, 0.0)"
        # without a mask of keys, numbers per row are still what they are
        if (self.read or not masks) and not any(is_tile_value(v) for v in s.factors):
            value = f"tl.broadcast_to({value}, {'(BLOCK_N, BLOCK_M)' if self.to_keys else '(BLOCK_M, BLOCK_N)'})"
        if s.operand is None:
            return f"{s.into.name} += tl.sum({value}, axis={0 if across or turned else 1})"
        operand = s.operand.name
        tile = f"({value}).to({operand}.dtype)" if not value.isidentifier() else f"{value}.to({operand}.dtype)"
        if turned:
            return f'{s.into.name} = tl.dot(tl.trans({operand}), {tile}, {s.into.name}, input_precision="ieee")'
        tile = f"tl.trans({tile})" if across else tile
        return f'{s.into.name} = tl.dot({tile}, {operand}, {s.into.name}, input_precision="ieee")'

    def wanted(self, sums: Iterable[Sum]) -> list[Var]:
        """Tile values and masks that the sums read in this loop."""
        needed: dict[Var, None] = {}
        for s in sums:
            needed.update(dict.fromkeys(v for v in s.factors if is_tile_value(v)))
            needed.update(dict.fromkeys(v for v in s.masks if v not in self.facts))
        return list(needed)


def operands(products: Iterable[Equation], sums: Iterable[Sum], of_queries: bool) -> list[Var]:
    """Rows of one side that enter products or sums, in order of first use."""
    side = is_query_row if of_queries else is_key_row
    used = [v for eq in products for v in eq.args] + [s.operand for s in sums if s.operand]
    return list(dict.fromkeys(v for v in used if side(v)))


@dataclass(frozen=True)
class Group:
    """Sums that read query rows in common, by the side they go to."""

    to_keys: list[Sum]
    to_rows: list[Sum]


def apart(code: TileCode, to_keys: Sequence[Sum], to_rows: Sequence[Sum]) -> list[Group]:
    """The sums in groups that read no query row in common; where totals would be of several groups, their terms."""
    every = (*to_keys, *to_rows)
    met: list[tuple[set[Var], list[Equation]]] = []
    for s in every:
        products = code.body(code.wanted([s])).products
        read = set(operands(products, [s] if s in to_keys else [], of_queries=True))
        members = [s.equation]
        for other in [m for m in met if m[0] & read]:
            met.remove(other)
            read, members = read | other[0], [*members, *other[1]]
        met.append((read, members))
    spread = [{s.into for s in every if s.equation in members} for _, members in met]
    shared = {v for i, here in enumerate(spread) for there in spread[:i] for v in here & there}
    alone = [
        [replace(s, into=s.equation.out, sign=1) if s.into in shared else s for s in sums]
        for sums in (to_keys, to_rows)
    ]
    return [Group(*([s for s in sums if s.equation in members] for sums in alone)) for _, members in met]


def row_scalars(tiles: Iterable[Tile], sums: Iterable[Sum]) -> list[Var]:
    """Numbers per query row (lse, delta) that tiles and sums read."""
    used = [v for t in tiles for eq in t.equations for v in eq.args] + [v for s in sums for v in s.factors]
    return list(dict.fromkeys(v for v in used if is_query_row(v) and v.kind == "real"))


def entries(shift: str = "") -> tuple[str, str]:
    """Lines before a loop over the rows that chose a key block, and in it: a row's entry and its tile.

    `shift` goes from numbers of rows' tiles to places in the block's list.
    """
    return f"listed = {_LISTED}{shift}", "\n".join([f"entry = {_entry('at')}", _TILE_OF_ENTRY])


def entries_ahead(first: str, shift: str = "") -> tuple[str, str]:
    """The same from row tile `first` on, each entry read one visit ahead: loads of a row wait for it."""
    before = [f"listed = {_LISTED}{shift}", f"at = {first} * ROWS + visit", f"ahead = {_entry('at')}"]
    inside = ["entry = ahead", "following = at + BLOCK_M", f"ahead = {_entry('following')}", _TILE_OF_ENTRY]
    return "\n".join(before), "\n".join(inside)


_LISTED = "work_entries_ptr + bh * nT * BUDGET + chosen_first"
_TILE_OF_ENTRY = "tile = (entry // BUDGET).to(tl.int64)"


def _entry(row: str) -> str:
    return f"tl.load(listed + {row} // ROWS, mask={row} < last, other=0)"


def part_array(v: Var, geometry: Geometry) -> Array:
    """What chosen blocks give to a row variable, block by block: matrices in the input type, numbers in float32."""
    features = features_of(v)
    width = (geometry.width(features, pad=True),) if features else ()
    return Array(f"{v.name}_parts", "parts", features, width, "input" if features else "float32", bool(features))


def store_part(array: Array, source: str) -> str:
    """Line that stores a part of rows."""
    return f"tl.store({part_address(array)}, {source}, mask={'row_ok[:, None]' if array.features else 'row_ok'})"


def part_address(array: Array) -> str:
    """Source of where the parts of rows lie: `part` numbers them."""
    if not array.features:
        return f"{array.name}_ptr + part"
    return f"{array.name}_ptr + part[:, None] * {array.width[0]} + {column_name(array.features)}[None, :]"
