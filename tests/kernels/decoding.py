"""Steps of decoding beside the definition at the last query, with the blocks that the kernels chose."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen import library as lib
from splagen.ir.frontend_spla import spla_program
from splagen.ir.reference import evaluate
from splagen.paged_cache import SPLACache
from splagen.pipeline import DecodingLibrary, generate_decoding
from splagen.spec import Residual, Select, SPLASpec, windows
from splagen.step_verification import MARGIN
from splagen.verification import TOLERANCE, relative_error
from tests.ir.blocked import blocked, plain_rows
from tests.kernels.cases import CELLS, DIAGONAL, USER

ROWS = ("q", "k", "v", "q_m", "k_m", "q_r", "k_r")
BY_TOKEN = (*ROWS, "gate_s", "gate_r")

SELECT = Select(block_size=16, budget=1, sinks=1, local=1, metric=DIAGONAL)
SMALL = SPLASpec(head_dim=16, group_size=2, select=SELECT)
SPECS = {
    "default": replace(SMALL, select=Select(block_size=16, budget=1)),
    "diagonal": SMALL,
    "no sinks, no local": replace(SMALL, select=replace(SELECT, sinks=0, local=0)),
    "normaliser": replace(SMALL, linear=Residual(normaliser=True), combine="add"),
    "temperature, gate": replace(SMALL, linear=Residual(lib.softmax, temperature=True), combine="gate"),
    "user map, softcap": replace(SMALL, linear=Residual(USER), score=lib.softcap(5.0), combine="rms_residual"),
    "alibi": replace(SMALL, score=lib.alibi()),
    "cells": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=CELLS)),
    "windows": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=windows())),
    "order 1": replace(SMALL, select=replace(SELECT, metric=lib.taylor(order=1))),
    "cumulant": replace(SMALL, select=replace(SELECT, metric=lib.cumulant(covariance="diag", clamp=2.0))),
    "rank 4": replace(SMALL, select=replace(SELECT, metric=lib.taylor(covariance="rank4"))),
    "rank 3, cells, head 24": replace(
        SMALL,
        head_dim=24,
        select=replace(SELECT, block_size=32, statistics=CELLS, metric=lib.cumulant(covariance="rank3")),
    ),
    "no residual": replace(SMALL, linear=None, combine="none"),
    "dense window": replace(SMALL, linear=None, select=None, combine="none", score=lib.sliding_window(20)),
    "dense below": replace(SMALL, dense_below=68),
    "head 24 value 40 group 3": replace(SMALL, head_dim=24, value_dim=40, group_size=3, scale=0.3),
    "group 1": replace(SMALL, group_size=1),
    "own rows": replace(SMALL, select=replace(SELECT, own_rows=True), linear=Residual(own_rows=True)),
}
LIMIT = {dtype: limits[0] for dtype, limits in TOLERANCE.items()}

REAL = SPLASpec(head_dim=128, group_size=4, select=Select(block_size=64, budget=4, metric=DIAGONAL))
GPU = {
    "default": replace(REAL, select=Select(block_size=64, budget=4)),
    "diagonal": REAL,
    "group 16": replace(REAL, group_size=16),
    "cells, value 64": replace(REAL, value_dim=64, select=replace(REAL.select, statistics=CELLS)),  # type: ignore[type-var]
    "rank 4": replace(REAL, select=replace(REAL.select, metric=lib.taylor(covariance="rank4"))),  # type: ignore[type-var]
    "no residual, head 80": replace(REAL, head_dim=80, linear=None, combine="none"),
    "normaliser": replace(REAL, linear=Residual(lib.elu1, normaliser=True), combine="add"),
    "head 256": replace(REAL, head_dim=256, value_dim=256),
}


def cache_of(spec: SPLASpec, folder: Path, device: torch.device, **sizes: object) -> SPLACache:
    block = spec.select.block_size if spec.select else 64
    given = {"sequences": 2, "kv_heads": 2, "tokens": 112, "page_size": max(32, block), "dtype": torch.float32} | sizes
    return SPLACache(generate_decoding(spec, folder), device=device, **given)  # type: ignore[arg-type]


def every_schedule(library: DecodingLibrary) -> list[dict[str, dict[str, int]]]:
    """Schedules of a step's kernels, for each architecture and dtype."""
    return [schedules for by_dtype in library.module.SCHEDULES.values() for schedules in by_dtype.values()]


def change_schedules(library: DecodingLibrary, patch: pytest.MonkeyPatch, **changes: Mapping[str, int]) -> None:
    """Other numbers in Schedules of a step's kernels, for each architecture and dtype, until the patch is undone."""
    for schedules in every_schedule(library):
        for name, change in changes.items():
            patch.setitem(schedules, name, {**schedules[name], **change})


def inputs(
    spec: SPLASpec,
    batch: int,
    length: int,
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random rows of whole sequences by name: [B, L, heads, ...], and parameters, as an op takes them."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * spec.group_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = {
        "q": normal(batch, length, heads, spec.head_dim),
        "k": normal(batch, length, kv_heads, spec.head_dim),
        "v": normal(batch, length, kv_heads, spec.value_dim),
        "gamma_s": 1 + normal(heads, spec.value_dim) / 4,
        "gamma_r": 1 + normal(heads, spec.value_dim) / 4,
        "gate_s": normal(batch, length, heads),
        "gate_r": normal(batch, length, heads),
        "temperature": normal(kv_heads) / 4,
        "q_m": normal(batch, length, heads, spec.head_dim),
        "k_m": normal(batch, length, kv_heads, spec.head_dim),
        "q_r": normal(batch, length, heads, spec.head_dim),
        "k_r": normal(batch, length, kv_heads, spec.head_dim),
    }
    wanted = [v.name for v in spla_program(spec).inputs]
    return {n: rows[n].to(device=device, dtype=dtype if n in ROWS else torch.float32) for n in wanted}


def tokens(rows: Mapping[str, Tensor], t: int) -> list[Tensor]:
    """What a step takes at position t."""
    return [x[:, t] if n in BY_TOKEN else x for n, x in rows.items()]


def chosen_blocks(
    cache: SPLACache, rows: Mapping[str, Tensor], length: int, which: slice = slice(None)
) -> Tensor | None:
    """The choice of the last step for `which` of its rows, [B, Hkv, 1, blocks]; None where a spec chooses nothing.

    Each is a token whose sequence, `rows`, has this length with it.  But for ties the choice is the definition's.
    """
    if "block_indices" not in cache.scratch:
        return None
    blocks = -(-length // cache.part.geometry.block)
    indices = cache.scratch["block_indices"][which].long()
    mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
    free = mask.scatter(2, torch.where(indices < 0, blocks, indices), True)[:, :, None, :blocks]
    limit = MARGIN if cache.part.page_type == "e4m3" else TOLERANCE[cache.dtype][2]
    assert selection_gap(cache.library.spec, rows, length, free) <= limit
    return free


def last_row(spec: SPLASpec, rows: Mapping[str, Tensor], length: int, free: Tensor | None, wanted: str = "o") -> Tensor:
    """The definition at query length - 1 of sequences of that length, in float64; `free` replaces the choice."""
    program = spla_program(spec)
    tiled = spec.select is not None  # where nothing is selected, tiles have many queries: all rows, of which the last
    seen = {}
    for n, x in rows.items():
        x = x.double()
        x = x[:, :length] if n in BY_TOKEN else x
        x = x[:, length - 1 :] if n in BY_TOKEN and n[0] not in "kv" and tiled else x
        seen[n] = x.unflatten(0, (-1, spec.group_size)) if n.startswith("gamma") else x
    arrays = blocked(spec, seen)
    blocks = arrays["k"].shape[2]
    sizes = {"T": 1, "J": blocks, "Jw": blocks} if tiled else {}
    given = {} if free is None else {"free": free[..., :blocks]}
    name = program.outputs[0].name if wanted == "o" else wanted
    offsets = {"T": length - 1} if tiled else {}
    asked = [program.var(name)]
    found = evaluate(
        program, arrays, scalars={"L": length}, sizes=sizes, offsets=offsets, given=given, wanted=asked
    )  # fmt: skip
    return plain_rows(found[name], 1 if tiled else length)[:, -1] if wanted == "o" else found[name]


def relative(got: Tensor, want: Tensor) -> float:
    """The relative RMS error, as `verify` measures it."""
    assert torch.isfinite(got).all()
    return relative_error(got, want)


def without_output(cache: SPLACache, patch: pytest.MonkeyPatch) -> None:
    """From here on steps launch their first kernel alone: the others write nothing that stays but the lengths."""
    for kernel in cache.part.kernels[1:]:
        patch.setattr(cache.library.module, f"launch_{kernel.name}", lambda *_: None)


def take(cache: SPLACache, given: Sequence[Tensor]) -> None:
    """A step of one token without its output."""
    with pytest.MonkeyPatch.context() as patch:
        without_output(cache, patch)
        cache.step(*given)
    cache.settled.copy_(torch.where(cache.seqlens < 0, cache.settled, cache.seqlens))
    cache.seqlens += cache.seqlens >= 0


def errors(
    spec: SPLASpec,
    cache: SPLACache,
    rows: Mapping[str, Tensor],
    lengths: range,
    every: int = 1,
    whole: bool = True,
) -> float:
    """Step a cache at these lengths; the relative RMS error against the definition over all that are compared.

    The definition has the blocks that the kernels chose, which are its own but for ties.
    `whole`: the steps between those compute their output too.
    """
    got, want = [], []
    for length in lengths:
        given = tokens(rows, length - 1)
        if not whole and length % every:
            take(cache, given)
            continue
        o = cache.step(*given)
        if length % every == 0:
            got.append(o)
            want.append(last_row(spec, rows, length, chosen_blocks(cache, rows, length)))
    return relative(torch.stack(got), torch.stack(want))


def some(rows: Mapping[str, Tensor], starts: list[int], count: int) -> list[Tensor]:
    """What a step of `count` tokens takes, from position starts[b] of sequence b on."""
    picked = {
        n: torch.stack([x[b, s : s + count] for b, s in enumerate(starts)]) for n, x in rows.items() if n in BY_TOKEN
    }
    return [picked.get(n, x) for n, x in rows.items()]


def follow(cache: SPLACache, rows: Mapping[str, Tensor], steps: list[tuple[int, list[int]]], start: int = 0) -> float:
    """Steps of so many tokens, of which each sequence keeps so many: the error of all of them, kept or not.

    Tokens that are rejected are others than those that then take their place.
    """
    spec, device = cache.library.spec, rows["k"].device
    drawn = inputs(spec, cache.sequences, rows["k"].shape[1], cache.kv_heads, cache.dtype, device, seed=1)
    held = [start] * cache.sequences
    got, want = [], []
    for count, kept in steps:
        tried = {n: x.clone() for n, x in rows.items()}
        for b, (s, k) in enumerate(zip(held, kept, strict=True)):
            for n in tried.keys() & BY_TOKEN:
                tried[n][b, s + k :] = drawn[n][b, s + k :]
        given = some(tried, held, count)
        o = cache.step(*given)
        for b, s in enumerate(held):
            alone = {n: x[b : b + 1] if n in BY_TOKEN else x for n, x in tried.items()}
            for i in range(count):
                row = b * count + i
                free = chosen_blocks(cache, alone, s + i + 1, slice(row, row + 1))
                got.append(o[b, i])
                want.append(last_row(spec, alone, s + i + 1, free)[0])
        cache.accept(torch.tensor(kept, dtype=torch.int32, device=device))
        held = [s + k for s, k in zip(held, kept, strict=True)]
        assert cache.seqlens.tolist() == held
    return relative(torch.stack(got), torch.stack(want))


def selection_gap(spec: SPLASpec, rows: Mapping[str, Tensor], length: int, free: Tensor) -> float:
    """How far a choice is from the definition's: 0 if equal, small where scores tie, infinite if not a choice.

    As `verify` measures it: the best score left out minus the worst chosen, relative to the row's largest.
    """
    want = last_row(spec, rows, length, None, wanted="free")
    if torch.equal(free, want):
        return 0.0
    far = last_row(spec, rows, length, None, wanted="far")
    if bool((free & ~far).any()) or not torch.equal(free.sum(-1), want.sum(-1)):
        return float("inf")
    score = last_row(spec, rows, length, None, wanted="score")
    worst = score.masked_fill(~free, float("inf")).amin(-1)
    best = score.masked_fill(free | ~far, -float("inf")).amax(-1)
    top = score.masked_fill(~far, 0).amax(-1).clamp(min=1e-300)
    return float(((best - worst) / top).clamp(min=0).max())
