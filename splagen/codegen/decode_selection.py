"""Block selection in a decoding step: scores of cells in splits, then the best blocks of chunks and the best of those.

A step has few queries per sequence: their scores are few enough to be stored, and the masses of a chunk of blocks to be
held by one program.  Nothing is sorted: a choice is a cut through the masses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import sympy as sp

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.moments import BLOCK, MEAN, VARIANCE, CellStatistics, Moments
from splagen.codegen.selection import CELL, QUERY, TILE, Selection
from splagen.codegen.selection_kernels import SelectionCode, kept
from splagen.codegen.step_rows import (
    PAGES,
    SEQLENS,
    NewKeys,
    PagedCells,
    PagedRows,
    PageType,
    StepRows,
    as_kept,
    paged_array,
    query_heads,
)
from splagen.codegen.tile_code import INDICES
from splagen.codegen.triton_expr import triton_text
from splagen.ir.program import Equation, LowRank, Program, Var

SCORES = Array("scores", "sequences", dtype="float32")  # [B * tokens, Hq, cells of a full table], base 2
SCORE_MAX = Array("score_max", "sequences", dtype="float32")  # [B * tokens, Hq, splits]
SCORE_SUM = Array("score_sum", "sequences", dtype="float32")
CANDIDATES = tuple(  # [B * tokens, Hkv, chunks, kept]: the best of each chunk in order, by key, block and place
    Array(f"candidate_{of}", "sequences", dtype="int32") for of in ("keys", "blocks", "places")
)
ARRIVED = Array("arrived", "counts", dtype="int32")  # [B * tokens, Hkv]: chunks that have chosen, 0 between steps
BLOCK_PLACES = Array("block_places", "sequences", dtype="int32")  # [B * tokens, Hkv, budget]: where keys of blocks lie


@dataclass(frozen=True)
class Statistics:
    """How the append kernel makes the statistics of a cell: holes of its template, arrays and equations."""

    holes: dict[str, object]
    arrays: dict[Var, Array]
    equations: tuple[Equation, ...]
    degrees: dict[str, int]


def statistics_code(selection: Selection, tokens: Mapping[Var, Array], pages: Mapping[Var, Array]) -> Statistics:
    """Every statistic of a cell whose window of keys is complete; `pages` are of keys, `tokens` the step's own."""
    geometry = selection.geometry
    moments = Moments(selection.program, geometry)
    statistics = CellStatistics.of(moments, selection.statistics)
    width = selection.window(moments) * geometry.cell
    (source,) = moments.keys
    kind: PageType = "e4m3" if pages[source].dtype == "e4m3" else "input"
    arrays = {v: paged_array(v, geometry, padded=True, dtype=kind) for v in selection.statistics}
    cells = PagedCells(geometry, "key")
    lines = [cells.store(arrays[v], value, columns) for v, value, columns in statistics.values]
    usable = selection.bounds(selection.usable, CELL, QUERY, ("first_query", "last_query"), "nC")
    holes: dict[str, object] = {
        "cell": geometry.cell,
        "width": width,
        "moments": "\n".join(_moments(statistics, width)),
        "load": PagedRows(geometry, "key").load(pages[source]),
        "new": as_kept(pages[source], NewKeys(geometry, "key").load(tokens[source])),
        "store": "\n".join(lines),
        "bounds": "\n".join(_completed(usable)),
    }
    degrees = {a.name: _degree(selection.program, v, moments.statistic(v)[0]) for v, a in arrays.items()}
    return Statistics(holes, arrays, tuple(moments.equations), degrees)


def _moments(statistics: CellStatistics, width: int) -> list[str]:
    """Lines that form what the statistics read beside the mean mu of the one cell x [WIDTH, columns]."""
    lines = ["centred = x - mu"] if statistics.second or statistics.factors else []
    if statistics.second:
        lines.append(f"var = tl.sum(centred * centred, axis=0, keep_dims=True) / {width}")
    if statistics.factors:
        lines += ["left = centred[None, :, :]", f"count = tl.full((1, 1), {width}, tl.float32)"]
    for f in statistics.factors:
        lines.append(f"{f['name']}, left = leading_factor(left, d, count, {f['number']}, {f['steps']})")
    return lines


def _degree(program: Program, v: Var, expr: sp.Expr) -> int:
    """By which power of a factor of all keys a statistic grows: 1 for a mean, 2 for a variance, 0 for neither's kin."""
    if isinstance(program.definitions[v].op, LowRank):  # a covariance is the sum of their squares
        return 1
    factor = sp.Symbol("factor", positive=True)
    grown = expr.subs({MEAN: factor * MEAN, VARIANCE: factor**2 * VARIANCE}, simultaneous=True)
    base, power = sp.simplify(grown / expr).as_base_exp()
    return int(power) if base == factor and power.is_Integer else 0


def _completed(usable: list[str]) -> list[str]:
    """From the cells that a query may use to those that none before the step might: where the bounds ended for it."""
    return [
        "first_query = held - 1",
        "last_query = held - 1",
        *usable,
        "low = tl.maximum(high, 0)",
        "first_query = before",
        "last_query = before",
        *(line for line in usable if line.startswith("high")),
    ]


def selection_kernels(
    selection: Selection, available: Mapping[Var, Array], append: Kernel, columns: str
) -> list[Kernel]:
    """`score`, some of whose programs are those of `append`, and `select`.

    `available` has the rows of the token and the pages of statistics, `columns` the lines that define those of rows.
    """
    code = SelectionCode(selection, dict(available), StepRows, PagedCells)
    return [_score(code, append, columns), _select(code)]


def _score(code: SelectionCode, append: Kernel, columns: str) -> Kernel:
    selection, geometry = code.selection, code.geometry
    exponent, weight = selection.mass()
    lines, names = code.scores()
    usable = names.pop(selection.usable.name)
    score = triton_text(exponent, names)
    if weight != 1:
        score = f"{score} + tl.log2({triton_text(weight, names)})"
    holes = {
        "heads": query_heads(geometry, 16),
        "cells": geometry.cells,
        "cell_size": geometry.cell,
        "columns": columns,
        "append": append.call,
        "folds": append.holes["folds"],
        "states": bool(append.holes["states"]),
        "rows": "\n".join(code.rows()),
        "bounds": "\n".join(selection.bounds(selection.usable, CELL, QUERY, ("first_query", "last_query"), "nC")),
        "loads": "\n".join(code.loads()),
        "scores": "\n".join(lines),
        "usable": "cell_ok[None, :]" if usable == "True" else f"{usable} & cell_ok[None, :]",
        "score": score,
    }
    covers = code.covers([selection.lse.out], [*code.program.inputs, *selection.statistics])
    inputs = {a.name: a for a in (*append.inputs, *code.inputs())}
    return Kernel(
        "score",
        "decode_score",
        (*append.covers, *covers),
        tuple(inputs.values()),
        (*append.outputs, SCORES, SCORE_MAX, SCORE_SUM),
        holes,
        re.sub(r"\)$", " + SPLITS)", append.grid),
        scalars=("Hkv", "PAGE", "PAGES", "MAX_PAGES", "SPLITS"),
        tunable=("BLOCK_C", *append.tunable, "next_pdl"),
        fixed=("PAGE",),
        calls=(append,),
    )


def _select(code: SelectionCode) -> Kernel:
    selection, geometry = code.selection, code.geometry
    carried, pool = code.pool()
    holes = {
        "heads": query_heads(geometry),
        "kept": kept(selection),
        "reach": reach(selection),
        "cells": geometry.cells,
        "cell_size": geometry.cell,
        "usable": "\n".join(selection.bounds(selection.usable, CELL, QUERY, ("first_query", "last_query"), "nC")),
        "bounds": "\n".join(selection.bounds(selection.far, BLOCK, TILE, ("first_tile", "last_tile"), "nJ")),
        "carried": "\n".join(carried),
        "pool": "\n".join(pool),
        "far": "\n".join(code.far()),
    }
    lse = selection.lse.out
    covers = code.covers([selection.topk.out], [*code.program.inputs, *selection.statistics, lse])
    return Kernel(
        "select",
        "decode_select",
        covers,
        (SEQLENS, PAGES, SCORES, SCORE_MAX, SCORE_SUM),
        (*CANDIDATES, ARRIVED, INDICES, BLOCK_PLACES),
        holes,
        "(TOKENS, B * Hkv, CHUNKS)",
        scalars=("Hkv", "PAGE", "PAGES", "MAX_PAGES", "SPLITS", "CHUNKS", "CHUNK"),
        tunable=("BLOCK_S", "launch_pdl"),
        fixed=("PAGE", "CHUNK"),
    )


def reach(selection: Selection) -> int:
    """Blocks before a chunk whose windows reach into it."""
    return 0 if selection.pooled is None else 1
