"""The tile kernels that give each program the keys of one block: dk with dv, and the merge of their partial sums.

They can also give what each chosen block adds to the gradients of query rows: the scores are formed once for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import sympy as sp

from splagen.codegen.geometry import Rows, array_of, column_name, features_of, is_query_row, is_tile_value
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.render import render
from splagen.codegen.row_code import RowCode
from splagen.codegen.tile_code import (
    CHOICES,
    CHOSEN_HERE,
    WORK,
    Group,
    Sum,
    TileCode,
    Walk,
    accumulators,
    apart,
    entries,
    entries_ahead,
    follows_softmax,
    operands,
    part_array,
    row_scalars,
    store_part,
    sums_of_tiles,
)
from splagen.ir.program import Equation, Map, Var, placeholder, slice_back

Outputs: TypeAlias = Sequence[tuple[Var, Array]]
PART = "part = (bh * nT * BUDGET + entry) * ROWS + row"  # the i-th chosen block of a query row


@dataclass(frozen=True)
class KeyGradients:
    """Kernels with the partial sums of key rows that they store, and the parts of query rows where they give them."""

    kernels: list[Kernel]
    sums: dict[Var, Array]
    parts: dict[Var, Array]


def key_groups(
    walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var], rows: Sequence[Var] = (), *, direct: bool = False
) -> list[Group]:
    """Sums of key rows, a kernel for each group; with what each chosen block adds to those that `rows` take.

    Sums that read no query row in common are apart: the accumulators of all do not fit registers.  `rows` are
    gradients of query rows.
    """
    to_keys, to_rows = (
        sums_of_tiles(walk.program, slice_back(walk.program, asked, [*walk.program.inputs, *available]), to_keys=side)
        for asked, side in ((wanted, True), (rows, False))
    )
    facts = walk.chosen_facts if walk.chosen else walk.forced_facts
    code = TileCode.direct(walk, to_keys=True) if direct else TileCode(walk, facts, to_keys=True)
    return sorted(apart(code, to_keys, to_rows), key=lambda g: not _softmax(walk, g))


def key_kernels(
    walk: Walk,
    available: Mapping[Var, Array],
    groups: Sequence[Group],
    wanted: Sequence[Var],
    finished: Outputs = (),
    *,
    direct: bool = False,
) -> KeyGradients:
    """Gradients of key rows from tiles, as partial sums per segment of the inverse index; parts of rows with them.

    `finished` are stored by the kernel itself where a block has one segment: a single one has to form all sums.
    `direct`: what is left over is summed too, and each block is one segment, met by all rows that see it.
    """
    suffix = "dqkv" if any(g.to_rows for g in groups) else "dkv_direct" if direct else "dkv"
    found = KeyGradients([], {}, {})
    for group in groups:
        name = ("block_sparse_" if _softmax(walk, group) else "linear_") + suffix
        name += f"_{len(found.kernels)}" if any(k.name == name for k in found.kernels) else ""
        made = (_DirectKeyKernel if direct else _KeyKernel)(walk, available, group)
        found.kernels.append(made.kernel(name, wanted, finished))
        found.sums.update(made.sums)
        found.parts.update(made.parts)
    return found


def _softmax(walk: Walk, group: Group) -> bool:
    return any(follows_softmax(walk.program, s) for s in group.to_keys)


def _is_finite_at_zero(equations: Iterable[Equation]) -> bool:
    """Whether tile values stay finite where products and numbers of a row are 0, whatever is masked there."""
    found: dict[Var, set[sp.Basic]] = {}
    for eq in equations:
        if eq.out.kind != "real":
            continue
        known = [v.kind == "bool" or v in found or is_query_row(v) or is_tile_value(v) for v in eq.args]
        if not isinstance(eq.op, Map) or not all(known) or any(v.kind == "int" for v in eq.args):
            return False
        values = [{sp.true, sp.false} if v.kind == "bool" else found.get(v, {sp.S.Zero}) for v in eq.args]
        places = [placeholder(i) for i in range(len(eq.args))]
        found[eq.out] = {eq.op.expr.xreplace(dict(zip(places, given, strict=True))) for given in product(*values)}
        if not all(x.is_number and x.is_finite for x in found[eq.out]):
            return False
    return True


class _KeyKernel:
    """Puts one of these kernels together."""

    def __init__(self, walk: Walk, available: Mapping[Var, Array], group: Group) -> None:
        self.walk, self.available, self.group = walk, available, group
        self.program, self.geometry = walk.program, walk.geometry
        # what a key beyond the sequence gets is its own, and may be made 0 behind the loop
        self.masked_behind = not group.to_rows
        self.key_rows = RowCode(self.program, self.geometry, "key", "BLOCK_N", available)
        self.read: dict[Var, str] = {}  # masks that differ by row, and the lines that tell them
        self.masks: list[str] = []
        self.arrays: dict[str, Array] = {"work": WORK}
        self.covers: dict[Equation, None] = {}
        self.sums: dict[Var, Array] = {}
        self.parts: dict[Var, Array] = {}
        self.loads: list[str] = []
        self.keys_used: dict[Var, None] = {}

    def kernel(self, name: str, wanted: Sequence[Var], finished: Outputs) -> Kernel:
        """The finished kernel."""
        walk, geometry = self.walk, self.geometry
        setup, count, forced_tile = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
        by_position = "queries that see the block by position"
        loops = self._loop(
            by_position,
            walk.forced_facts,
            "",
            f"i = at // ROWS\ntile = {forced_tile}",
            "start",
            "tl.minimum(stop, forced)",
            [],
        )
        chosen = {"setup": "", "count": "0"}
        if walk.chosen:
            first = "tl.load(work_offsets_ptr + bh * (nJ + 1) + j)"
            found = f"chosen_first = {first}\nchosen = tl.load(work_offsets_ptr + bh * (nJ + 1) + j + 1) - chosen_first"
            chosen = {"setup": found, "count": "chosen"}
            title, first = "queries that chose the block", "tl.maximum(start, forced)"
            shift = " - forced"
            # kernels that also hand on what the rows get have no registers left for entries read ahead
            lines = entries(shift) if self.group.to_rows else entries_ahead(first, shift)
            loops += self._loop(title, walk.chosen_facts, *lines, first, "stop", self.group.to_rows)
        stores = ["sums = (bh * SEGMENTS + segment) * BLOCK + tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)"]
        totals = self._totals(wanted)
        for v in totals:
            features = features_of(v)
            width = geometry.width(features, pad=True)
            self.sums[v] = Array(f"{v.name}_parts", "segments", features, (width,), "float32", True)
            column = column_name(features)
            total = f"tl.where(key_ok[:, None], {v.name}, 0.0)" if self.masked_behind else v.name
            stores.append(f"tl.store({v.name}_parts_ptr + sums[:, None] * {width} + {column}[None, :], {total})")
        columns = [line for v in totals for line in self.key_rows.columns(features_of(v))]
        holes = {
            "place": render("key_segment", {"forced": {"setup": "\n".join(setup), "count": count}, "chosen": chosen}),
            "columns": "\n".join(columns),
            "anew": _softmax(walk, self.group),
            "whole": "\n".join(self._whole(finished, totals)),
            "stores": "\n".join(stores),
        }
        made = (*self.sums.values(), *self.parts.values(), *(a for _, a in finished))
        scalars = ("L", "Hkv", "SEGMENTS", "SEGMENT")
        return self._kernel(name, made, holes, loops, "(work.segments, B * Hkv, BLOCK // BLOCK_N)", scalars)

    def _totals(self, wanted: Sequence[Var]) -> list[Var]:
        """What the sums add up to; the equations that add up sums are covered with them."""
        totals = accumulators(self.group.to_keys)
        backward = slice_back(self.program, wanted, [*self.program.inputs, *self.available])
        self.covers.update(dict.fromkeys(eq for eq in backward if eq.out in totals))
        return totals

    def _kernel(
        self,
        name: str,
        made: tuple[Array, ...],
        holes: Mapping[str, object],
        loops: Sequence[Mapping[str, str]],
        grid: str,
        scalars: tuple[str, ...],
    ) -> Kernel:
        key_side = Rows(self.geometry, "key")
        for v in self.keys_used:
            array = self.available[v]
            self.arrays[array.name] = array
            self.loads.append(f"{v.name} = {key_side.load(array)}  # [BLOCK_N, {array.width[0]}]")
        own = {
            "loads": "\n".join(self.loads),
            "accumulators": [{"name": v.name, "shape": f"(BLOCK_N, {a.width[0]})"} for v, a in self.sums.items()],
            "loops": loops,
        }
        covers = self.program.in_order(self.covers)
        inputs = tuple(self.arrays.values())
        return Kernel(name, "block_sparse_dkv", covers, inputs, made, {**holes, **own}, grid, scalars)

    def _whole(self, finished: Outputs, totals: Iterable[Var]) -> list[str]:
        """Lines for a segment that has all of its block: the key rows' remaining equations, as in the merge."""
        if not finished:
            return []
        piece = self.key_rows.compute([v for v, _ in finished], {v: v.name for v in totals})
        self.arrays.update({a.name: a for a in piece.arrays})
        self.covers.update(dict.fromkeys(piece.equations))
        return [*piece.lines, *(line for v, a in finished for line in self.key_rows.store(a, piece.names[v]))]

    def _loop(
        self,
        title: str,
        facts: Mapping[Var, bool],
        ahead: str,
        tile_source: str,
        first: str,
        last: str,
        to_rows: Sequence[Sum],
    ) -> list[dict[str, str]]:
        """The loop over the queries for which `facts` hold; none where no sum takes them.

        `ahead` are lines before it: they begin what `tile_source` has one visit before it is needed.
        """
        active = [s for s in self.group.to_keys if s.in_loop(facts)]
        if not active and not to_rows:
            return []
        if self.masked_behind:
            facts = {**facts, **self.walk.whole_facts}
        code = TileCode(self.walk, facts, to_keys=True, read=self.read)
        tile = code.body(code.wanted([*active, *to_rows]))
        used = operands(tile.products, active, of_queries=True)
        available, numbers = dict(self.available), row_scalars([tile], active)
        loaded = {*used, *numbers} <= available.keys() and all(s.operand for s in active)
        if loaded and _is_finite_at_zero(tile.equations):
            # rows beyond the sequence are rows of 0: they add nothing, and no number of theirs has to see to it
            available |= {v: replace(available[v], missing="0.0") for v in numbers}
        rows = RowCode(self.program, self.geometry, "query", "BLOCK_M", available, in_loop=True)
        rows.defined_columns = self.key_rows.defined_columns
        self.keys_used.update(dict.fromkeys(operands(tile.products, to_rows, of_queries=False)))
        self.loads += self.key_rows.columns_of([*used, *self.keys_used, *(s.into for s in to_rows)])
        piece = rows.operands([*used, *row_scalars([tile], [*active, *to_rows])])
        share = self._share(code, tile.names, to_rows) if to_rows else []
        self.arrays.update({a.name: a for v, a in self.available.items() if available[v] in piece.arrays})
        formed = (*piece.equations, *tile.products, *tile.equations, *(s.equation for s in (*active, *to_rows)))
        self.covers.update(dict.fromkeys(formed))
        products = [code.product_line(eq) for eq in tile.products]
        return [{
            "title": title,
            "first": first,
            "last": last,
            "ahead": ahead,
            "tile": tile_source,
            "prologue": "\n".join([*self.masks, *piece.lines]),
            "tiles": "\n".join([*products, *tile.lines]),
            "sums": "\n".join([*(code.sum_line(s, tile.names) for s in active), *share]),
        }]  # fmt: skip

    def _share(self, code: TileCode, names: Mapping[Var, str], to_rows: Sequence[Sum]) -> list[str]:
        """Lines that store what the block adds to the sums of query rows."""
        totals = accumulators(to_rows)
        self.parts.update({v: part_array(v, self.geometry) for v in totals})
        lines = []
        for v in totals:
            shape = f"(BLOCK_M, {self.parts[v].width[0]})" if features_of(v) else "(BLOCK_M,)"
            lines.append(f"{v.name} = tl.zeros({shape}, tl.float32)")
        lines += [code.sum_line(s, names, across=True) for s in to_rows]
        return [*lines, PART, *(store_part(self.parts[v], v.name) for v in totals)]


class _DirectKeyKernel(_KeyKernel):
    """One over all rows that see a block by position or may choose it; sums of its keys are stored as rows."""

    def __init__(self, walk: Walk, available: Mapping[Var, Array], group: Group) -> None:
        super().__init__(walk, available, group)
        assert walk.chosen
        self.read = TileCode.direct(walk, to_keys=True).read
        self.masks = ["choices = tl.load(choices_ptr + bh * nT + qpos // TILE, mask=row_ok, other=0)", CHOSEN_HERE]
        self.arrays = {CHOICES.name: CHOICES}

    def kernel(self, name: str, wanted: Sequence[Var], finished: Outputs = ()) -> Kernel:
        setup, count, seen_tile = self.walk.every("T", {"J": "j", "L": "L"}, "nT", "i")
        tile = f"i = at // ROWS\ntile = {seen_tile}"
        loops = self._loop("queries that see the block or have left it over", {}, "", tile, "0", "visited", [])
        stores = []
        for v in self._totals(wanted):
            array = array_of(v, self.geometry, internal=True, dtype="float32")
            self.sums[v] = replace(array, name=f"{v.name}_sum")
            stores += self.key_rows.store(self.sums[v], v.name)
        holes = {
            "place": "\n".join(["j = tl.program_id(0).to(tl.int64)", *setup, f"visited = tl.cast({count}, tl.int32)"]),
            "columns": "",
            "anew": False,
            "whole": "",
            "stores": "\n".join(stores),
        }
        made, grid = tuple(self.sums.values()), "(nJ, B * Hkv, BLOCK // BLOCK_N)"
        return self._kernel(name, made, holes, loops, grid, ("L", "Hkv"))


def merge_kernel(
    walk: Walk,
    available: Mapping[Var, Array],
    parts: Mapping[Var, Array],
    outputs: Outputs,
    *,
    finished: bool = False,
) -> Kernel:
    """Sum the segments of every key block in order, then the key rows' remaining equations.

    `finished`: in place, but for blocks of one segment, which the kernels before have stored.
    """
    program, geometry = walk.program, walk.geometry
    rows = RowCode(program, geometry, "key", "BLOCK_N", available)
    columns: list[str] = []
    for array in parts.values():
        for f in (array.features, array.features[-1:]):
            columns += rows.columns(f)
    piece = rows.compute([v for v, _ in outputs], {v: v.name for v in parts})
    epilogue = list(piece.lines)
    for v, array in outputs:
        epilogue += rows.store(array, piece.names[v])
    accumulators = [
        {
            "name": v.name,
            "shape": f"(BLOCK_N, {a.width[0]})",
            "source": f"{a.name}_ptr + (at + key[:, None]) * {a.width[0]} + {''.join(a.features)}[None, :]",
        }
        for v, a in parts.items()
    ]
    holes = {
        "columns": "\n".join(columns),
        "finished": finished,
        "accumulators": accumulators,
        "epilogue": "\n".join(epilogue),
    }
    results = tuple(a for _, a in outputs)
    inputs = {a.name: a for a in (WORK, *parts.values(), *piece.arrays, *(results if finished else ()))}
    return Kernel(
        "merge_segments",
        "merge_segments",
        (*(program.definitions[v] for v in parts), *piece.equations),
        tuple(inputs.values()),
        () if finished else results,
        holes,
        "(nJ * (BLOCK // BLOCK_N), B * Hkv)",
        ("L", "Hkv", "SEGMENTS"),
        ("BLOCK_N",),
    )
