"""Chosen blocks that are given, or all that is run: the two stages of an op apart, selection and attention.

A generated module computes `block_indices` [B, Hkv, tiles, budget] (int32, ascending, -1 behind) and `block_counts`
[B, Hkv, tiles] by a few of its launchers, and everything else from them.  Here launchers of either side are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from splagen import pipeline
from splagen.codegen.kernel import Kernel
from splagen.codegen.partition import Partition
from splagen.codegen.tile_code import COUNTS, INDICES
from splagen.spec import SPLASpec

ROWS = 8192  # tiles whose random scores are in memory at once
NEIGHBOURS = (4, 8, 16)
ALIKE = 16  # neighbouring tiles whose random choices may be alike


@dataclass(frozen=True)
class Selection:
    """Chosen blocks, [B, Hkv, tiles, budget] int32, ascending and -1 behind, and how many, [B, Hkv, tiles] int32."""

    indices: Tensor
    counts: Tensor


# -- which blocks --------------------------------------------------------------------------------------------------


def far(spec: SPLASpec, length: int, tiles: Tensor) -> Tensor:
    """Which blocks the tiles, [T], may choose from: bool [T, blocks]; see docs/semantics.md."""
    select = spec.select
    assert select is not None
    assert not spec.dense_below
    block = torch.arange(-(-length // select.block_size), device=tiles.device)
    first = select.tile * tiles[:, None]
    before = first >= select.block_size * (block + select.local + 1)
    after = first + select.tile - 1 < select.block_size * (block - select.local)
    return (block >= select.sinks) & (before if spec.causal else before | after)


def random_selection(
    spec: SPLASpec, length: int, kv_heads: int, device: str, seed: int = 0, alike: float = 0.0
) -> Selection:
    """Blocks drawn without replacement for every tile and KV head of one sequence; all where the budget covers all.

    `alike`: 0 draws for each tile alone, 1 for ALIKE neighbouring tiles together.
    """
    assert spec.select is not None
    draw = torch.Generator(device).manual_seed(seed)
    budget, blocks = spec.select.budget, -(-length // spec.select.block_size)
    parts = []
    for tiles in torch.arange(-(-length // spec.select.tile), device=device).split(ROWS):
        allowed = far(spec, length, tiles)
        of_heads = []
        for _ in range(kv_heads):
            score = torch.rand(allowed.shape, generator=draw, device=device)
            if alike:
                shared = torch.rand(-(-len(tiles) // ALIKE), blocks, generator=draw, device=device)
                score = (1 - alike) * score + alike * shared.repeat_interleave(ALIKE, dim=0)[: len(tiles)]
            score.masked_fill_(~allowed, -1)
            best, chosen = score.topk(min(budget, blocks), dim=1)
            of_heads.append(torch.where(best < 0, blocks, chosen))
        parts.append(torch.stack(of_heads))
    return _selection(torch.cat(parts, dim=1)[None], budget, blocks)


def _selection(chosen: Tensor, budget: int, blocks: int) -> Selection:
    """From blocks in any order, `blocks` where there is none."""
    ordered = torch.nn.functional.pad(chosen.sort(-1).values, (0, budget - chosen.shape[-1]), value=blocks)
    there = ordered < blocks
    return Selection(torch.where(there, ordered, -1).to(torch.int32), there.sum(-1, dtype=torch.int32))


def attended(spec: SPLASpec, length: int, given: Selection) -> Selection:
    """Every block that a tile attends to, chosen or by position: as wide as both together, for systems that list all.

    Only where tiles lie inside blocks, so that the positions of a tile see the same ones.
    """
    select = spec.select
    assert select is not None
    if select.block_size % select.tile:
        raise ValueError(f"tiles of {select.tile} queries do not lie inside blocks of {select.block_size}")
    blocks, tiles = -(-length // select.block_size), given.indices.shape[2]
    own = (torch.arange(tiles, device=given.indices.device) * select.tile // select.block_size)[:, None]
    after = 0 if spec.causal else select.local
    near = own + torch.arange(-select.local, after + 1, device=own.device)
    sinks = torch.arange(select.sinks, device=own.device).expand(tiles, -1)
    apart = (sinks < own - select.local) | (sinks > own + after) & (not spec.causal)
    near = torch.where((near >= 0) & (near < blocks), near, blocks)
    forced = torch.cat([torch.where(apart & (sinks < blocks), sinks, blocks), near], dim=1)
    chosen = torch.where(given.indices < 0, blocks, given.indices.long())
    every = torch.cat([forced.expand(*chosen.shape[:2], -1, -1), chosen], dim=-1)
    return _selection(every, every.shape[-1], blocks)


def overlap(given: Selection) -> dict[str, float]:
    """How many blocks the neighbours choose together, over how many one chooses: the mean over groups of 4, 8, 16."""
    found, blocks = {}, int(given.indices.max()) + 1
    for n in NEIGHBOURS:
        ratios = []
        groups = given.indices.shape[2] // n
        for head in given.indices[0, :, : groups * n].unbind(0):
            for chosen in head.reshape(groups, n * head.shape[1]).split(ROWS):
                slots = torch.where(chosen < 0, blocks, chosen.long())
                union = torch.zeros(len(slots), blocks + 1, dtype=torch.bool, device=slots.device)
                union = union.scatter_(1, slots, True)[:, :blocks].sum(1)
                own = (chosen >= 0).sum(1) / n
                ratios.append((union / own)[own > 0])
        every = torch.cat(ratios)
        found[str(n)] = float(every.mean()) if len(every) else 1.0
    return found


# -- the stages of a module ----------------------------------------------------------------------------------------


def selecting(part: Partition) -> list[Kernel]:
    """The kernels that produce the chosen blocks, and of those before them the ones that nobody else reads."""
    needed, found = {INDICES.name, COUNTS.name}, dict[str, Kernel]()
    while more := [k for k in part.kernels if k.name not in found and needed & {a.name for a in k.outputs}]:
        for k in more:
            found[k.name] = k
            needed |= {a.name for a in k.inputs}
    others = [k for k in part.kernels if k.name not in found]
    read = {a.name for k in others for a in k.inputs} - {INDICES.name, COUNTS.name}
    return [k for k in found.values() if not read & {a.name for a in k.outputs}]


@contextmanager
def replaced(module: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """A module with other functions under these names."""
    kept = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(kept)


@contextmanager
def with_selection(module: ModuleType, part: Partition, given: Selection) -> Iterator[None]:
    """The module does not select: its forward takes the blocks that are given."""
    tensors: dict[str, Tensor | None] = {INDICES.name: given.indices, COUNTS.name: given.counts}
    with replaced(module, {f"launch_{k.name}": _returning(k, tensors) for k in selecting(part)}):
        yield


@contextmanager
def selecting_only(module: ModuleType, part: Partition) -> Iterator[None]:
    """The module's forward stops behind its selection: the other launchers do nothing and what they return is None."""
    running = {k.name for k in selecting(part)}
    muted = {f"launch_{k.name}": _returning(k, {}) for k in part.kernels if k.name not in running}
    with replaced(module, {**muted, "inverse_index": lambda *_, **__: None}):
        yield


def _returning(kernel: Kernel, tensors: Mapping[str, Tensor | None]) -> Callable[..., Any]:
    results = tuple(tensors.get(a.name) for a in kernel.outputs)
    return lambda *_: results if len(results) != 1 else results[0]


def chosen_by_metric(spec: SPLASpec, q: Tensor, k: Tensor, device: str) -> Selection:
    """What the metric chooses for q [1, L, Hq, D] and k [1, L, Hkv, D]; of `spec` only the selection counts."""
    group, dim = q.shape[2] // k.shape[2], q.shape[3]
    own = SPLASpec(head_dim=dim, group_size=group, causal=spec.causal, select=spec.select, linear=None, name="chosen")
    module, part = pipeline.generate(own, "build").module, pipeline.kernels(own)
    assert isinstance(part, Partition)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (x.to(device=device, dtype=dtype).contiguous() for x in (q, k))
    with selecting_only(module, part):
        results = module.forward(module.schedules_for(q), q, k, k)
    named = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
    return Selection(named[INDICES.name], named[COUNTS.name])
