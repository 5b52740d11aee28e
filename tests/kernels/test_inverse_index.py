"""The inverse index against lists made one block at a time: of a batch, of packed sequences, of their last queries."""

import itertools
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splagen import pipeline
from splagen.codegen.index_kernels import LEAST
from splagen.library import taylor
from splagen.spec import Select, SPLASpec

BUDGET, BLOCK = 3, 16
CHOOSING = SPLASpec(
    head_dim=16,
    group_size=1,
    select=Select(block_size=BLOCK, budget=BUDGET, metric=taylor(covariance="diag")),
    linear=None,
)
TILES = SPLASpec(
    head_dim=16,
    group_size=1,
    causal=False,
    select=Select(block_size=BLOCK, budget=40, granularity="tile", tile=16, metric=taylor(covariance="diag")),
    linear=None,
)
POSITION = SPLASpec(head_dim=16, select=None, linear=None)
SIZES = [(1, 1, 1), (1, 2, 16), (2, 3, 17), (1, 1, 100), (1, 2, 130 * BLOCK + 5), (2, 200, 180 * BLOCK)]
SIZES_OF_TILES = [(1, 1, 1), (1, 2, 1003), (1, 1, 16 * LEAST * 64 + 9)]


def expected(tiles: Tensor, seen: Tensor, segment: int) -> tuple[list[list[int]], Tensor, list[int]]:
    """The list of each block, the first segment of each block, the block of each segment."""
    flat = tiles.reshape(-1)
    lists = [(flat == j).nonzero()[:, 0].tolist() for j in range(len(seen))]
    pieces = [-(-(int(seen[j]) + len(x)) // segment) for j, x in enumerate(lists)]
    owners = [j for j, count in enumerate(pieces) for _ in range(count)]
    return lists, torch.tensor([0, *pieces]).cumsum(0), owners


def check(module: ModuleType, B: int, Hkv: int, L: int, chosen: Tensor | None, device: torch.device) -> None:
    n = module.sizes_of(torch.empty(B, L, Hkv, 16, device=device))
    work = module.inverse_index(n, chosen)
    seen, _ = module.tiles_by_position(L)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in work[:4])
    entries, offsets, blocks, firsts = (x.cpu() for x in work[:4])
    for head in range(0, B * Hkv, 1 + B * Hkv // 7):
        tiles = torch.empty(0) if chosen is None else chosen.reshape(B * Hkv, -1)[head].cpu()
        lists, starts, owners = expected(tiles, seen, work.segment)
        assert firsts[head].tolist() == starts.tolist()
        assert len(owners) <= work.segments == blocks.shape[1]
        assert blocks[head].tolist() == owners + [n.nJ] * (work.segments - len(owners))
        assert offsets[head].diff().tolist() == [len(x) for x in lists]
        first = int(offsets[head, 0])
        assert entries[head, first : first + sum(map(len, lists))].tolist() == [*itertools.chain(*lists)]


def lists(shape: tuple[int, ...], blocks: int, seed: int = 0) -> Tensor:
    """Of each tile some of the blocks, none twice and in any order, between places without one."""
    draw = torch.Generator().manual_seed(seed)
    *tiles, budget = shape
    order = torch.rand(*tiles, max(blocks, budget), generator=draw).argsort(-1)[..., :budget]
    kept = (order < blocks) & (torch.rand(shape, generator=draw) < 0.8)
    return torch.where(kept, order, -1).to(torch.int32)


def run(spec: SPLASpec, size: tuple[int, int, int], device: torch.device, folder: Path) -> None:
    """Random lists, lists without a block, and one block that all have chosen."""
    B, Hkv, L = size
    module = pipeline.generate(spec, folder).module
    n = module.sizes_of(torch.empty(B, L, Hkv, 16))
    chosen = lists((B, Hkv, n.nT, module.BUDGET.value), n.nJ).to(device)
    check(module, B, Hkv, L, chosen, device)
    none = torch.full_like(chosen, -1)
    check(module, B, Hkv, L, none, device)
    none[..., 1] = n.nJ - 1
    check(module, B, Hkv, L, none, device)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_lists_of_chosen_blocks(size: tuple[int, int, int], tmp_path: Path) -> None:
    run(CHOOSING, size, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("size", SIZES_OF_TILES[:-1])
def test_lists_of_blocks_that_tiles_chose(size: tuple[int, int, int], tmp_path: Path) -> None:
    run(TILES, size, torch.device("cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spec", "size"), [*((CHOOSING, s) for s in SIZES), *((TILES, s) for s in SIZES_OF_TILES)], ids=str
)
def test_lists_of_chosen_blocks_on_the_gpu(spec: SPLASpec, size: tuple[int, int, int], tmp_path: Path) -> None:
    run(spec, size, torch.device("cuda"), tmp_path)


def test_segments_are_longer_where_there_are_many_blocks(tmp_path: Path) -> None:
    """A block of average length is one segment, and of uneven ones no more than what there is room for."""
    module = pipeline.generate(CHOOSING, tmp_path).module
    few, many = module.segments_of(1000, 100, 1), module.segments_of(1000, 100, module.MANY // 100 + 1)
    assert (few[0], many[0]) == (10, 20)
    for segment, room in (few, many):
        worst = [segment + 1] * (1000 // (segment + 1))  # each needs one more than it fills
        assert sum(-(-x // segment) for x in worst) <= room


@pytest.mark.parametrize("length", [1, 100])
def test_blocks_that_are_seen_by_position_alone(length: int, tmp_path: Path) -> None:
    module = pipeline.generate(POSITION, tmp_path).module
    check(module, 2, 3, length, None, torch.device("cpu"))


def check_packed(
    folder: str | Path, lengths: list[int], Hkv: int, before: int, seed: int, device: torch.device
) -> None:
    """Every number of a sequence's part, wherever it begins; what lies between is nobody's."""
    alone = pipeline.generate(CHOOSING, folder).module
    packed = pipeline.generate_packed(CHOOSING, folder).module
    bounds = torch.tensor([before, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    firsts = bounds.tolist()
    n = packed.sizes_of(torch.empty(1, firsts[-1], Hkv, 16, device=device), bounds, max(lengths) + seed % 20)
    chosen = torch.full(((firsts[-1] + len(lengths)) * Hkv * BUDGET,), -7, dtype=torch.int32)
    own = [lists((Hkv, length, BUDGET), -(-length // BLOCK), seed + s) for s, length in enumerate(lengths)]
    for s, x in enumerate(own):
        at = (firsts[s] + s) * Hkv * BUDGET
        chosen[at : at + x.numel()] = x.reshape(-1)
    work = packed.inverse_index(n, bounds.to(device), chosen.to(device))

    def part(name: str, first: int, each: int) -> Tensor:
        """What the heads of a sequence have of a tensor, from number `first` of a head on."""
        found: Tensor = getattr(work, name)[first * Hkv : (first + each) * Hkv]
        return found.view(Hkv, each)

    for s, (length, x) in enumerate(zip(lengths, own, strict=True)):
        if length == 0:
            continue
        block, nJ = firsts[s] // BLOCK, -(-length // BLOCK)
        sizes = alone.sizes_of(torch.empty(1, length, Hkv, 16, device=device))
        wanted = alone.inverse_index(sizes, x[None].to(device))
        assert int(work.lengths[s]) == wanted.segment
        for name in ("offsets", "firsts"):
            assert torch.equal(part(name, block + 2 * s, nJ + 1), getattr(wanted, name))
        blocks = part("blocks", 2 * (block + s), 2 * nJ)
        least = min(2 * nJ, wanted.segments)
        assert torch.equal(blocks[:, :least], wanted.blocks[:, :least])
        assert (blocks[:, least:] == nJ).all()
        entries = part("entries", (firsts[s] + s) * BUDGET, length * BUDGET)
        for h, count in enumerate(wanted.offsets[:, -1].tolist()):
            assert torch.equal(entries[h, :count], wanted.entries[h, :count])


@settings(max_examples=4)
@example(lengths=[LEAST * 64 + 1], Hkv=1, before=0, seed=0)
@example(lengths=[0, 0, 1, 16, 8 * LEAST], Hkv=2, before=5, seed=0)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any),
    Hkv=st.integers(1, 3),
    before=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_packed_sequences_have_the_index_that_each_has_alone(
    lengths: list[int], Hkv: int, before: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_packed(folder, lengths, Hkv, before, seed, torch.device("cpu"))


@pytest.mark.gpu
def test_packed_sequences_have_the_index_that_each_has_alone_on_the_gpu(tmp_path: Path) -> None:
    check_packed(tmp_path, [1000, 0, 1, 63, 4095, 16, 20_000], 3, 7, 0, torch.device("cuda"))
