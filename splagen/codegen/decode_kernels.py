"""The kernels of a decoding step around the selection: append, attend over blocks in splits, merge the splits.

The tokens of a step are an axis of every grid: each is at the end of a sequence of its own length, in the same pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from splagen.codegen.base_two import LN_2
from splagen.codegen.decode_selection import BLOCK_PLACES, Statistics
from splagen.codegen.decode_states import State, fold_code, read_code
from splagen.codegen.decode_walks import WAIT, chosen_count, walks
from splagen.codegen.geometry import Rows, features_of
from splagen.codegen.kernel import Array, Kernel, Narrow
from splagen.codegen.predicates import J, visit
from splagen.codegen.row_code import RowCode
from splagen.codegen.step_rows import (
    LENGTHS,
    PAGES,
    SEQLENS,
    SETTLED,
    CompleteRows,
    NewRow,
    PagedRows,
    StepRows,
    as_kept,
    query_heads,
)
from splagen.codegen.tile_code import (
    INDICES,
    Tile,
    TileCode,
    Walk,
    follows_softmax,
    joined_sums,
    operands,
    row_scalars,
    sums_of_tiles,
)
from splagen.errors import PartitionError
from splagen.ir.program import Equation, Iota, Reduce, Var, slice_back

ROW_MAX = Array("row_max_parts", "sequences", dtype="float32")  # [B * tokens, Hkv, splits, GROUP]
ROW_SUM = Array("row_sum_parts", "sequences", dtype="float32")
MULTIPROCESSORS = 132  # of an H200
LEAST_ROWS = 16  # of a state that a program reads at a time
_COLUMNS = (("d",), ("e",))


@dataclass(frozen=True)
class _Late:
    """The loop over blocks that no state has yet: its tile, what it reads and computes, and its lines."""

    tile: Tile
    arrays: tuple[Array, ...]
    covers: tuple[Equation, ...]
    holes: Mapping[str, str]


@dataclass
class DecodeCode:
    """What the three kernels have in common; `available` has tokens, pages and features of queries."""

    walk: Walk
    available: Mapping[Var, Array]
    states: Sequence[State]

    def __post_init__(self) -> None:
        self.program, self.geometry = self.walk.program, self.walk.geometry
        self.heads = query_heads(self.geometry, 16)
        self.columns = "\n".join(line for f in _COLUMNS for line in self.geometry.columns(f))
        self.lse = self.walk.lse
        self.output = self.program.outputs[0]
        stop = [*self.program.inputs, *(s.after for s in self.states)]
        self.forward = slice_back(self.program, [self.output], stop)
        sums = sums_of_tiles(self.program, self.forward, to_keys=False)
        self.softmax = [s for s in sums if follows_softmax(self.program, s)]
        totals = {s.late: s.total.out for s in self.states}  # shared with what is read of the state
        linear = [replace(s, into=totals.get(s.equation, s.into)) for s in sums if s not in self.softmax]
        goes, self.joined = joined_sums(self.forward, [s.into for s in linear], [s.total.out for s in self.states])
        linear = [s.joined(goes) for s in linear]
        self.read = {s: goes[s.total.out][0] for s in self.states}  # the sum to which each state's reading is added
        self.late = [s for s in linear if s.equation in totals]
        self.linear = [s for s in linear if s.equation not in totals]
        self.sums = [*self.softmax, *linear]

    def row_code(
        self,
        side: str,
        tile_rows: str,
        row_type: type[Rows],
        available: Mapping[Var, Array],
        *,
        in_loop: bool = False,
    ) -> RowCode:
        """Prints rows; all columns are defined at the top of each kernel."""
        names = {"".join(f) for f in _COLUMNS}
        return RowCode(self.program, self.geometry, side, tile_rows, available, names, set(), row_type, in_loop)

    def ordered(self, equations: Sequence[Equation]) -> tuple[Equation, ...]:
        """Each equation once, in the program's order, without positions."""
        return self.program.in_order(eq for eq in equations if not isinstance(eq.op, Iota))

    # -- append -------------------------------------------------------------------------------------------

    def append(
        self,
        tokens: Mapping[Var, Array],
        pages: Mapping[Var, Array],
        numbers: Mapping[Var, Array],
        features: Mapping[Var, Array],
        statistics: Statistics | None,
    ) -> Kernel:
        """Writes tokens, features of their queries, statistics of cells that they complete, and what became far.

        `pages` are what the tokens bring, `numbers` what is kept of each of their keys beside them.  With statistics it
        is a part of `score`, whose other programs are splits of the cells that were complete before.
        """
        geometry = self.geometry
        new = NewRow(geometry, "key")
        lines = []
        for v in pages:
            row = as_kept(pages[v], new.load(tokens[v]))
            lines.append(f"{v.name} = {row}  # [1, {tokens[v].width[0]}]")
            lines.append(new.store(pages[v], v.name))
        keys = self.row_code("key", "1", NewRow, tokens)
        keys.loaded.update(pages)
        kept = keys.compute(list(numbers), {})
        lines += [*kept.lines, *(new.store(a, kept.names[v]) for v, a in numbers.items())]
        queries = self.row_code("query", "BLOCK_M", StepRows, tokens)
        queries.loaded.add(self.program.inputs[0])
        piece = queries.compute(list(features), {})
        stores = [line for v, a in features.items() for line in queries.store(a, piece.names[v])]
        q = self.program.inputs[0]
        holes: dict[str, object] = {
            "heads": self.heads,
            "cells": geometry.cells,
            "folds": f"tl.num_programs(2) - 1{' - SPLITS' if statistics else ''}",
            "columns": self.columns,
            "q_load": StepRows(geometry, "query").load(tokens[q]),
            "rows": "\n".join(lines),
            "features": "\n".join([*piece.lines, *stores]),
            "statistics": statistics.holes if statistics else None,
            "fresh": None,
            "states": [],
            "state_rows": "",
            "left_size": 0,
            "right_size": 0,
        }
        arrays = [s.array(geometry) for s in self.states]
        columns = max((a.width[1] for a in arrays if len(a.width) > 1), default=1)
        # with few sequences and heads, slices of columns have programs of their own
        folds = f" + max(1, min({columns} // BLOCK_E, {MULTIPROCESSORS} // (B * Hkv)))" if arrays else ""
        covers = [*kept.equations, *piece.equations, *(statistics.equations if statistics else ())]
        read = [*kept.arrays, *piece.arrays]
        if self.states:
            setup, count, block = visit(
                self.walk.predicates.intervals(self._common([s.fresh for s in self.states]), J, {}),
                "fresh", {"first": "held", "settled": "settled"}, "nJ", "i",
            )  # fmt: skip
            holes["fresh"] = {"setup": "\n".join(setup), "count": count, "block": block}
            more, equations, parameters = self._state_rows({**tokens, **pages, **numbers})
            holes["state_rows"] = "\n".join(more)
            holes["left_size"] = arrays[0].width[0]
            holes["right_size"] = columns
            holes["states"] = [fold_code(s, a) for s, a in zip(self.states, arrays, strict=True)]
            covers += [*equations, *(eq for s in self.states for eq in (s.blocks, s.new))]
            covers += [self.program.definitions[s.after] for s in self.states]
            read += parameters
        inputs = [
            SEQLENS,
            *([SETTLED] if arrays else []),
            PAGES,
            *(tokens[v] for v in (q, *pages)),
            *(a for a in read if a.layout != "pages"),
        ]
        paged = [*pages.values(), *numbers.values(), *(statistics.arrays.values() if statistics else ())]
        made = [LENGTHS, *paged, *features.values()]
        return Kernel(
            "append",
            "decode_append",
            self.ordered(covers),
            tuple({a.name: a for a in inputs}.values()),
            (*made, *arrays),
            holes,
            f"(TOKENS, B * Hkv, 1{folds})",
            scalars=("Hkv", "PAGE", "PAGES", "MAX_PAGES", *(("SPLITS",) if statistics else ())),
            tunable=("BLOCK_N", "BLOCK_E") if arrays else (),
            fixed=("PAGE",),
        )

    def _state_rows(self, available: Mapping[Var, Array]) -> tuple[list[str], list[Equation], list[Array]]:
        """Lines that bring the rows of a part of a block to its states."""
        code = self.row_code("key", "BLOCK_N", PagedRows, available)
        wanted = list(dict.fromkeys(s.left for s in self.states))
        piece = code.operands(wanted)
        lines = list(piece.lines)
        for v in dict.fromkeys(s.right for s in self.states if s.right):
            assert v is not None
            load = PagedRows(self.geometry, "key").load(available[v], column="right")
            lines.append(f"{v.name} = {load}  # [BLOCK_N, BLOCK_E]")
        return lines, list(piece.equations), [a for a in piece.arrays if a.layout != "token_rows"]

    # -- attend -------------------------------------------------------------------------------------------

    @property
    def accumulated(self) -> list[Var]:
        """What each split adds up: sums of tiles, and what the queries read of the states."""
        return list(dict.fromkeys([*(s.into for s in self.sums), *self.read.values()]))

    def part(self, v: Var) -> Array:
        """[B * tokens, Hkv, splits, GROUP(, width)] float32: a sum of each split."""
        features = features_of(v)
        width = (self.geometry.width(features, pad=True),) if features else ()
        return Array(f"{v.name}_parts", "sequences", features, width, "float32", True)

    def attend(self) -> Kernel:
        """Softmax over blocks with every other sum on the same tiles, in splits."""
        loops, used = [], []
        tiles, arrays = [], [LENGTHS, PAGES]
        covers: list[Equation] = []
        for title, facts, walk in walks(self.walk, self.late_masks):
            code = TileCode(self.walk, facts, to_keys=True)
            active = [s for s in self.linear if s.in_loop(code.facts)]
            tile, scores = code.scores(self.lse, code.wanted(active))
            keys = operands(tile.products, [*self.softmax, *active], of_queries=False)
            complete = self.walk.chosen is not None and facts.get(self.walk.chosen, False)
            kind = CompleteRows if complete else PagedRows
            rows = self.row_code("key", "BLOCK_N", kind, self.available, in_loop=True)
            piece = rows.operands(keys)
            covers += [*piece.equations, *tile.products, *tile.equations]
            used += list(piece.arrays)
            loops.append(walk | {
                "title": title,
                "loads": "\n".join(["key_ok = kpos < L", *piece.lines]),
                "scores": "\n".join(scores.lines),
                "score": scores.source,
                "scale": scores.scale,
                "softmax": [{"name": s.into.name, "operand": s.operand.name} for s in self.softmax if s.operand],
                "linear": "\n".join(code.sum_line(s, tile.names, turned=True) for s in active),
            })  # fmt: skip
            tiles.append(tile)
        late = self._late()
        if late:
            tiles.append(late.tile)
            used += late.arrays
            covers += late.covers
        queries = self.row_code("query", "BLOCK_M", StepRows, self.available)
        wanted = operands([eq for t in tiles for eq in t.products], [], of_queries=True)
        piece = queries.operands([*wanted, *row_scalars(tiles, [*self.linear, *self.late])])
        states = [read_code(s, s.array(self.geometry), self.available[s.row], self.read[s]) for s in self.states]
        made = {v: self.part(v) for v in self.accumulated}
        read = {*self.read.values()}
        left_size = self.states[0].array(self.geometry).width[0] if states else 0
        holes = {
            "heads": self.heads,
            "few_heads": query_heads(self.geometry, 8),
            "columns": self.columns,
            "lengths": "\n".join([*([] if self.walk.chosen else [WAIT]), "L = tl.load(lengths_ptr + r)"]),
            "prologue": "\n".join(piece.lines),
            "loops": loops,
            "accumulators": [self._sum(v, a) for v, a in made.items() if v not in read],
            "sums_read": [self._sum(v, a) for v, a in made.items() if v in read],
            "states": states,
            "late": late.holes if late else None,
            "left_size": left_size,
            "least_rows": LEAST_ROWS,
        }
        arrays += [*piece.arrays, *used, *(s.array(self.geometry) for s in self.states)]
        arrays += [self.available[s.row] for s in self.states]
        arrays += [INDICES, BLOCK_PLACES] if self.walk.chosen else []
        covers += [*piece.equations, *(s.equation for s in self.sums)]
        covers += [*self.joined, *(eq for s in self.states for eq in (s.read, s.total))]
        return Kernel(
            "attend",
            "decode_attend",
            self.ordered(covers),
            tuple({a.name: a for a in arrays}.values()),
            (ROW_MAX, ROW_SUM, *made.values()),
            holes,
            "(TOKENS, B * Hkv, SPLITS)",
            scalars=("Hkv", "PAGE", "PAGES", "MAX_PAGES", "SPLITS"),
            tunable=("BLOCK_N", *(("BLOCK_D",) if states else ()), "launch_pdl"),
            fixed=("PAGE",),
            narrow=(Narrow("BLOCK_D", f"cdiv({left_size}, SPLITS)", ({"BLOCK_D": LEAST_ROWS, "num_stages": 2},)),)
            if states
            else (),
        )

    @property
    def late_masks(self) -> list[Var]:
        """Masks of blocks that became far since the first token of a step."""
        return [v for s in self.states for v in s.late.args if v.kind == "bool" and {"T", "J"} == {*v.axes}]

    def _late(self) -> _Late | None:
        """The loop over blocks that became far since the first token: their linear sums alone."""
        if not self.states:
            return None
        mask = self._common(self.late_masks)
        code = TileCode(self.walk, {mask: True}, to_keys=True)
        tile = code.body(code.wanted(self.late))
        keys = operands(tile.products, self.late, of_queries=False)
        piece = self.row_code("key", "BLOCK_N", PagedRows, self.available).operands(keys)
        names = {"T": "tile", "L": "L", "first": "first_token"}
        setup, count, block = visit(self.walk.predicates.intervals(mask, J, {}), "late", names, "nJ", "i")
        holes = {
            "setup": "\n".join(setup),
            "count": count,
            "block": block,
            "loads": "\n".join(["key_ok = kpos < L", *piece.lines]),
            "scores": "\n".join([*(code.product_line(eq) for eq in tile.products), *tile.lines]),
            "sums": "\n".join(code.sum_line(s, tile.names, turned=True) for s in self.late),
        }
        return _Late(tile, piece.arrays, (*piece.equations, *tile.products, *tile.equations), holes)

    def _common(self, masks: Sequence[Var]) -> Var:
        """The mask that all states share: one loop serves them."""
        if len({*masks}) != 1:
            raise PartitionError(f"states take in different blocks: {', '.join(map(str, masks))}")
        return masks[0]

    def _sum(self, v: Var, a: Array) -> dict[str, str]:
        features = features_of(v)
        shape = f"({self.geometry.width(features, pad=True)}, BLOCK_M)" if features else "(BLOCK_M,)"
        return {"name": v.name, "shape": shape, "store": self._store(v, a)}

    def _store(self, v: Var, a: Array) -> str:
        if not a.width:
            return f"tl.store({a.name}_ptr + at, {v.name}, mask=row_ok)"
        column = "".join(a.features)
        place = f"{a.name}_ptr + at[None, :] * {a.width[0]} + {column}[:, None]"
        return f"tl.store({place}, {v.name}, mask=row_ok[None, :])"

    # -- merge --------------------------------------------------------------------------------------------

    def merge(self, tokens: Mapping[Var, Array], output: Array) -> Kernel:
        """Adds up the splits and finishes the rows."""
        held = {v: v.name for v in self.accumulated} | {self.lse.out: self.lse.out.name}
        finish = [f"{s.into.name} = {s.into.name} / row_sum[:, None]" for s in self.softmax]
        finish.append(f"{self.lse.out.name} = (row_max + tl.log2(row_sum)) * {LN_2}")
        counts, counted, covers = self._counts()
        rows = self.row_code("query", "1", StepRows, tokens)
        piece = rows.compute([self.output], held | counted)
        outs = [{"name": piece.names[self.output], "store": "\n".join(rows.store(output, piece.names[self.output]))}]
        parts = {v: self.part(v) for v in self.accumulated}
        holes = {
            "columns": self.columns,
            "accumulators": [
                {"name": v.name, "shape": rows.tile_shape(v), "load": _part(v, a), "merge": self._merge(v, a)}
                for v, a in parts.items()
            ],
            "epilogue": "\n".join([*finish, *counts, *piece.lines]),
            "outputs": outs,
        }
        arrays = [LENGTHS, ROW_MAX, ROW_SUM, *parts.values(), *piece.arrays]
        definitions = self.program.definitions
        weights = [definitions[v] for s in self.softmax for v in s.factors]
        return Kernel(
            "merge",
            "decode_merge",
            self.ordered([*piece.equations, *covers, self.lse, *weights]),
            tuple({a.name: a for a in arrays}.values()),
            (SEQLENS, SETTLED, output),
            holes,
            "(TOKENS, B * Hq)",
            scalars=("Hkv", "SPLITS"),
            tunable=("BLOCK_S", "launch_pdl"),
            narrow=(Narrow("BLOCK_S", "SPLITS", tuple({"BLOCK_S": x, "num_warps": 1} for x in (2, 8))),),
        )

    def _merge(self, v: Var, a: Array) -> str:
        softmax = any(s.into == v for s in self.softmax)
        weight, scale = (
            ("weight", f"{v.name} * rescale" + ("[:, None]" if a.width else "")) if softmax else ("", v.name)
        )
        part = f"{v.name}_part"
        if not a.width:
            return f"{v.name} = {scale} + tl.sum({part}{' * ' + weight if weight else ''}, axis=0)"
        part = f"{part} * weight[:, None]" if weight else part
        return f"{v.name} = {scale} + tl.sum({part}, axis=0, keep_dims=True)"

    def _counts(self) -> tuple[list[str], dict[Var, str], list[Equation]]:
        lines: list[str] = []
        held: dict[Var, str] = {}
        covers: list[Equation] = []
        for eq in self.forward if self.walk.chosen else ():
            if not isinstance(eq.op, Reduce) or eq.args not in ((self.walk.eligible,), (self.walk.chosen,)):
                continue
            lines += chosen_count(self.walk)
            name = "eligible" if eq.args == (self.walk.eligible,) else "chosen"
            lines.append(f"{eq.out.name} = ({name} + tl.zeros((1,), tl.int32)).to(tl.float32)")
            held[eq.out] = eq.out.name
            covers.append(eq)
        return list(dict.fromkeys(lines)), held, covers


def _part(v: Var, a: Array) -> str:
    """Line that loads what some splits have of a sum."""
    wide = "[:, None]" if a.width else ""
    columns = f" * {a.width[0]} + {''.join(a.features)}[None, :]" if a.width else ""
    return f"{v.name}_part = tl.load({a.name}_ptr + part{wide}{columns}, mask=split_ok{wide}, other=0.0)"
