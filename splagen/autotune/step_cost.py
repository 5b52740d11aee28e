"""Bytes and FLOPs of the kernels of a decoding step of one token, and the least that it has to move.

A step is attention at one query, so its kernels cost what those of a sequence do at one tile, the last.  Its splits,
which its Schedules choose from the number of sequences and heads, are sizes of the formulas beside B, Hkv and L.  What
happens once per block counts for one token as one part in a block's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import sympy as sp

from splagen.autotune.attention_cost import BATCH, HEADS, Attention, last_length
from splagen.autotune.formula import Cost, programs, tidy
from splagen.codegen.affine import intervals
from splagen.codegen.decoding import LEAST_SPLIT, Decoding
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.moments import BLOCK, predicate
from splagen.codegen.predicates import LENGTH, T
from splagen.codegen.schedule import DTYPES, Schedule
from splagen.codegen.selection import CELL, PLACES, QUERY, TILE
from splagen.codegen.tile_code import Walk
from splagen.expression import symbol
from splagen.ir.decoding import FIRST
from splagen.ir.program import Equation, Map, Var

SCORE_SPLITS, ATTEND_SPLITS, CHUNKS = symbol("SCORE_SPLITS"), symbol("ATTEND_SPLITS"), symbol("CHUNKS")
_BYTES = {"float32": 4, "int32": 4, "int64": 8, "e4m3": 1}


def step_sizes(part: Decoding, sequences: int, kv_heads: int, tokens: int, splitting: Schedule) -> dict[str, int]:
    """The sizes of a step's formulas, for sequences of `tokens` tokens: splits are those that `scratch` allocates."""
    pairs, geometry = sequences * kv_heads, part.geometry
    ranges = -(-tokens // (geometry.cell * LEAST_SPLIT))
    blocks, chunk = -(-tokens // geometry.block), part.chunk(splitting["chunk"])
    pieces = part.budget + 3 if part.budget else -(-tokens // geometry.block)
    return {
        "B": sequences,
        "Hkv": kv_heads,
        "L": tokens,
        "SCORE_SPLITS": max(1, min(splitting["score"] // pairs, ranges)) if part.budget else 1,
        "ATTEND_SPLITS": max(1, min(splitting["attend"] // pairs, pieces)),
        "CHUNKS": -(-blocks // (chunk - part.reach)) if part.budget and blocks + part.reach > 2 * chunk else 1,
    }


@dataclass(frozen=True)
class Step(Attention):
    """The sizes of one spec's step, in a dtype."""

    part: Decoding

    @classmethod
    def of(cls, part: Decoding, dtype: str) -> Step:
        """Those of the kernels of a step."""
        return cls(part.program, dtype, part)

    @cached_property
    def tiles(self) -> sp.Expr:
        """One query."""
        return sp.S.One

    @cached_property
    def forced(self) -> sp.Expr:
        """Blocks that the query sees by position."""
        return last_length(Walk.of(self.program).intervals("J"), T, self.blocks)

    @cached_property
    def far(self) -> sp.Expr:
        """Blocks that it chooses from."""
        assert self._selection
        found = intervals(predicate(self.program, self._selection.far, PLACES), BLOCK, {})
        return last_length(found, TILE, self.blocks)

    @cached_property
    def usable(self) -> sp.Expr:
        """Cells over which its metric is normalised, in blocks."""
        assert self._selection
        cells = self.geometry.cells
        found = intervals(predicate(self.program, self._selection.usable, PLACES), CELL, {})
        return last_length(found, QUERY, self.blocks * cells) / cells

    def floor(self) -> sp.Expr:
        """Bytes that a step has to move: what it is given and gives, and what it reads and writes of the cache.

        What one of its kernels hands to the next is not among them, nor what a kernel reads more than once.
        """
        given = {a.name: a for a in (*self.part.tokens, self.part.output)}
        moved = [self._size(a) * math.prod(a.width) * self._given(a) for a in given.values()]
        kept = {a.name for a in (*self.part.pages, *self.part.states)}
        for kernel in self.part.kernels:
            moved += [self._moved(k, a, sp.S.One) for k, a in _arrays(kernel) if a.name in kept]
        return sp.expand(sp.Add(*moved))

    def cost(self, kernel: Kernel, schedule: Schedule) -> Cost:
        """The formulas of one kernel with a Schedule."""
        scores = kernel.template in ("decode_score", "decode_select")
        sizes: dict[str, sp.Expr | int] = {
            "TOKENS": 1,
            "B": BATCH,
            "Hkv": HEADS,
            "Hq": HEADS * self.geometry.group,
            "SPLITS": SCORE_SPLITS if scores else ATTEND_SPLITS,
            "CHUNKS": CHUNKS,
        }
        count = programs(kernel.grid, sizes | dict(schedule))
        moved = sp.Add(*(self._moved(k, a, count) for k, a in _arrays(kernel)))
        called = [eq for k in kernel.calls for eq in k.covers]
        flops = self._flops(replace(kernel, covers=tuple(eq for eq in kernel.covers if eq not in called)))
        flops = flops + sp.Add(*(self.cost(k, schedule).flops for k in kernel.calls))
        if kernel.template == "decode_append":  # of all blocks, one becomes far once per block of tokens
            flops = flops / LENGTH
        if kernel.template == "decode_select":  # it reads the scores
            flops = sp.S.Zero
        return Cost(kernel.name, tidy(moved), tidy(flops), count)

    def _visited(self, kernel: Kernel, v: Var) -> sp.Expr:
        if any(self._late(eq) for eq in kernel.covers if eq.out == v):
            return sp.S.Zero
        return self.usable if kernel.template == "decode_score" else super()._visited(kernel, v)

    def _masked(self, eq: Equation) -> bool:
        return super()._masked(eq) or self._late(eq)

    def _late(self, eq: Equation) -> bool:
        """True for a sum over blocks that became far behind the first token of a step: of one token there are none."""
        made = [self.program.definitions.get(v) for v in eq.args if v.kind == "bool"]
        return any(m is not None and isinstance(m.op, Map) and m.op.expr.has(FIRST) and "T" in m.out.axes for m in made)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _size(self, a: Array) -> int:
        return DTYPES[self.dtype] if a.dtype == "input" else _BYTES[a.dtype]

    def _moved(self, kernel: Kernel, a: Array, count: sp.Expr) -> sp.Expr:
        """Bytes of an array that all `count` programs of a kernel read and write together."""
        return self._size(a) * math.prod(a.width) * self._numbers(kernel, a, count)

    def _numbers(self, kernel: Kernel, a: Array, count: sp.Expr) -> sp.Expr:
        """Rows of an array, or numbers of one without width."""
        pairs, group, block = BATCH * HEADS, self.geometry.group, self.geometry.block
        match kernel.template, a.layout:
            case "decode_append", "pages" if a.name in self._key_pages:
                window = sp.Rational(self.part.overhang + self.geometry.cell, self.geometry.cell)
                counted = window if self.part.budget and a.name == self._key_pages[0] else 0
                return pairs * (1 + counted + bool(self.part.states))
            case "decode_append", "pages":
                return pairs / self.geometry.cell
            case "decode_score", "pages":
                return pairs * self.usable * self.geometry.cells
            case _, "pages":
                return pairs * (self.forced + self.part.budget) * block
            case "decode_append", "sequences" if a in self.part.states:
                return 2 * pairs / block
            case "decode_score" | "decode_attend", "token_rows":  # every split has all rows of its heads
                return count * group
            case "decode_select", "sequences" if a.name in ("score_max", "score_sum"):
                return CHUNKS * pairs * group * (SCORE_SPLITS + 1)
            case "decode_select", "sequences" if a.name == "scores":
                return pairs * group * self.far * self.geometry.cells
            case _, "table":
                return self._entries(kernel, a)
            case _, "sequences" | "indices" | "counts":
                return self._handed(a)
        return self._given(a)

    @cached_property
    def _key_pages(self) -> list[str]:
        """Names of the pages that have a row for each token, keys first."""
        return [a.name for a in self.part.keys]

    def _given(self, a: Array) -> sp.Expr:
        """Rows of what a caller gives or gets."""
        match a.layout:
            case "head_rows":
                return HEADS * self.geometry.group
            case "kv_head_scalars":
                return HEADS
        return BATCH * HEADS * (1 if a.name in self.part.key_rows else self.geometry.group)

    def _entries(self, kernel: Kernel, a: Array) -> sp.Expr:
        """Lengths, one for each program that asks; a page number for each block whose keys or statistics are read."""
        pairs = BATCH * HEADS
        if a.name != "page_table":
            return pairs
        match kernel.template:
            case "decode_score":
                return pairs * self.usable
            case "decode_select":
                return pairs * self.far
            case "decode_attend":
                return pairs * self.forced
        return pairs

    def _handed(self, a: Array) -> sp.Expr:
        """Rows of what one kernel hands to the next, and of states."""
        pairs, heads = BATCH * HEADS, BATCH * HEADS * self.geometry.group
        if a in self.part.states or a.layout == "counts":
            return pairs
        if a.name.endswith("_parts"):
            return heads * ATTEND_SPLITS
        match a.name:
            case "scores":
                return heads * self.usable * self.geometry.cells
            case "score_max" | "score_sum":
                return heads * (SCORE_SPLITS + 1)
            case "candidate_keys" | "candidate_blocks" | "candidate_places":
                return pairs * CHUNKS * self.part.kept
            case "block_indices" | "block_places":
                return pairs * self.part.budget
        raise AssertionError(a.name)


def _arrays(kernel: Kernel) -> list[tuple[Kernel, Array]]:
    """What a kernel moves, and what those that it calls do; pages that it reads and they write count twice."""
    own = {a.name: a for a in (*kernel.inputs, *kernel.outputs)}
    both = {a.name for a in kernel.inputs if a.layout in ("pages", "table")}
    called = [(k, a) for k in kernel.calls for a in k.arrays]
    names = {a.name for _, a in called} - both
    return [(kernel, a) for a in own.values() if a.name not in names] + called
