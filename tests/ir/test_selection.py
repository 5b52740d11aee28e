"""Scores and choices of blocks against a direct loop over queries, heads and windows."""

import math
from dataclasses import replace

import numpy as np
import pytest

from splagen import library
from splagen.ir.frontend_spla import block_size, cell_size, tile_size
from splagen.spec import Residual, Select, SPLASpec, Statistics, windows
from tests.ir.blocked import random_rows, value
from tests.ir.direct_spla import Array, Rows, assert_near, far_blocks, selection, small_spec, softmax


def metric(spec: SPLASpec, q: Array, keys: Array) -> float:
    """Log score of a set of keys for one query (spla.md section 3)."""
    assert spec.select is not None
    kind, mean = spec.select.metric, keys.mean(0)
    a = spec.scale * (q @ mean)
    if kind.order == 1:
        return a
    kappa = spec.scale**2 * second(kind, q, keys - mean)
    if kind.form == "taylor":
        return a + math.log(1 + kappa / 2)
    assert kind.clamp is not None
    return a + min(kappa, kind.clamp) / 2


def second(kind: library.Metric, q: Array, centred: Array) -> float:
    """E (q·k)² over centred keys: by their variances, or by a projection of them on few directions."""
    if not kind.rank:
        return float(q**2 @ (centred**2).mean(0))
    gram = centred @ centred.T
    free, total = np.eye(len(centred)), 0.0  # projector on what the directions before leave of the keys
    for i in range(min(kind.rank, len(centred) - 1)):  # so many directions hold all of them
        y = free @ centred @ [2.0 * ((i + 1) * (d + 1) ** 2 % 521) - 521 for d in range(len(q))]
        for _ in range(3):
            y = free @ gram @ (y / (np.linalg.norm(y) or 1))
        y = y / (np.linalg.norm(y) or 1)
        total += float(y @ centred @ q) ** 2 / len(centred)
        free = free - np.outer(y, y)
    return total


def direct_scores(spec: SPLASpec, rows: Rows) -> Array:
    """[Hkv, tiles, blocks] of batch entry 0."""
    assert spec.select is not None
    q, k = (rows[n][0].numpy() for n in "qk")
    length, heads = q.shape[:2]
    block, cell, statistics = block_size(spec), cell_size(spec), spec.select.statistics
    width, blocks = statistics.width or cell, -(-length // block)
    starts = range(0, blocks * block, cell)
    score = np.zeros((heads // spec.group_size, -(-length // tile_size(spec)), blocks))
    shares = np.zeros((*score.shape[:2], len(starts)))
    for t in range(length):
        for h in range(heads):
            kv = h // spec.group_size
            usable = [
                (n, w) for n, w in enumerate(starts)
                if (w + width - 1 <= t if spec.causal else w + (width if statistics.width else 1) <= length)
            ]  # fmt: skip
            if not usable:
                continue
            logs = []
            for _, w in usable:
                keys = k[w : min(w + width, length), kv]
                partial = not spec.causal and not statistics.width  # |B| differs for the last one only
                logs.append(metric(spec, q[t, h], keys) + (math.log(len(keys)) if partial else 0))
            share = softmax(np.array(logs))
            for (n, _), x in zip(usable, share, strict=True):
                shares[kv, t // tile_size(spec), n] += x
    per = block // cell
    for b in range(blocks):
        if statistics.pool == "max":  # windows that start at block * b - stride ... in the block
            score[..., b] = shares[..., max(per * b - 1, 0) : per * (b + 1)].max(-1)
        else:
            score[..., b] = shares[..., per * b : per * (b + 1)].sum(-1)
    return score


METRICS = {
    "order 1": library.taylor(order=1),
    "Taylor": library.taylor(covariance="diag"),
    "rank 2": library.taylor(),
    "cumulant": library.cumulant(covariance="diag", clamp=1.5),
    "rank 3": library.taylor(covariance="rank3"),
    "cumulant of rank 8": library.cumulant(covariance="rank8", clamp=1.5),
}
STATISTICS = {"block": Statistics(), "cells": Statistics(cell=16), "windows": windows()}
KINDS = {
    f"{kind}-{name}": (METRICS[kind], statistics)
    for kind in METRICS
    for name, statistics in STATISTICS.items()
    if not (METRICS[kind].rank and statistics.width)
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize(("kind", "statistics"), KINDS.values(), ids=KINDS)
def test_scores_and_choice_are_those_of_a_direct_loop(
    kind: library.Metric, statistics: Statistics, tile: int, causal: bool
) -> None:
    select = Select(
        block_size=32, budget=2, sinks=1, local=0, metric=kind, statistics=statistics, tile=tile,
        granularity="token" if tile == 1 else "tile",
    )  # fmt: skip
    spec = small_spec(select=select, causal=causal)
    length = 150
    rows = random_rows(spec, 1, length, 1, spread=1.5)
    want, free = direct_scores(spec, rows), value(spec, rows, "free")[0].numpy()
    got = value(spec, rows, "score")[0].numpy()
    assert_near(got, want, 1e-11)
    chosen = 0
    for t in range(want.shape[1]):
        far = far_blocks(spec, t * tile, length)
        best = sorted(far, key=lambda b, t=t: (-want[0, t, b], b))[: select.budget]
        assert set(np.flatnonzero(free[0, t])) == set(best), t
        chosen += len(best)
    assert chosen > 0


def test_equal_blocks_are_taken_from_the_left() -> None:
    spec = small_spec(select=Select(block_size=16, budget=2, sinks=1, local=0), combine="add")
    rows = random_rows(spec, 1, 112, 1)
    rows["k"] = rows["k"][:, :16].repeat(1, 7, 1, 1)
    chosen = selection(spec, rows)[0]
    assert [np.flatnonzero(chosen[t]).tolist() for t in (15, 32, 48, 111)] == [[], [1], [1, 2], [1, 2]]


def test_the_selection_sees_neither_the_score_function_nor_the_temperature() -> None:
    plain = small_spec(combine="add")
    warm = replace(plain, linear=Residual(temperature=True), score=library.softcap(0.5))
    rows = random_rows(warm, 1, 100, 2)
    assert np.array_equal(selection(plain, {n: rows[n] for n in "qkv"}), selection(warm, rows))
