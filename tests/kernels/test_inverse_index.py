"""The inverse index against lists made one block at a time."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from splagen import pipeline
from splagen.library import taylor
from splagen.spec import Select, SPLASpec

BUDGET, BLOCK = 3, 16
CHOOSING = SPLASpec(
    head_dim=16,
    group_size=1,
    select=Select(block_size=BLOCK, budget=BUDGET, metric=taylor(covariance="diag")),
    linear=None,
)
SIZES = [(1, 1, 1), (1, 2, 16), (2, 3, 17), (1, 1, 100), (1, 2, 130 * BLOCK + 5), (2, 200, 180 * BLOCK)]


def check(module: ModuleType, B: int, Hkv: int, L: int, chosen: Tensor | None, device: torch.device) -> None:
    n = module.sizes_of(torch.empty(B, L, Hkv, 16, device=device))
    work = module.inverse_index(n, chosen)
    seen, _ = module.tiles_by_position(L)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in work[:4])
    entries, offsets, blocks, firsts = (x.cpu() for x in work[:4])
    for head in range(0, B * Hkv, 1 + B * Hkv // 7):
        lists: list[Tensor] = [torch.empty(0)] * n.nJ
        if chosen is not None:
            flat = chosen.reshape(B * Hkv, -1)[head].cpu()
            lists = [(flat == j).nonzero()[:, 0] for j in range(n.nJ)]
        pieces = [-(-(int(seen[j]) + len(x)) // work.segment) for j, x in enumerate(lists)]
        starts = torch.tensor([0, *pieces]).cumsum(0)
        assert firsts[head].tolist() == starts.tolist()
        owners = torch.repeat_interleave(torch.arange(n.nJ), torch.tensor(pieces))
        assert len(owners) <= work.segments == blocks.shape[1]
        unused = torch.full((work.segments - len(owners),), n.nJ)
        assert blocks[head].tolist() == torch.cat([owners, unused]).tolist()
        for j, x in enumerate(lists):
            assert entries[head, offsets[head, j] : offsets[head, j + 1]].tolist() == x.tolist()


def run(size: tuple[int, int, int], device: torch.device, folder: Path) -> None:
    B, Hkv, L = size
    module = pipeline.generate(CHOOSING, folder).module
    nT, nJ = L, -(-L // BLOCK)
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(-1, nJ, (B, Hkv, nT, BUDGET), dtype=torch.int32, generator=draw).to(device)
    check(module, B, Hkv, L, chosen, device)
    check(module, B, Hkv, L, torch.full_like(chosen, -1), device)
    check(module, B, Hkv, L, chosen.clamp(max=0), device)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_lists_of_chosen_blocks(size: tuple[int, int, int], tmp_path: Path) -> None:
    run(size, torch.device("cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_lists_of_chosen_blocks_on_the_gpu(size: tuple[int, int, int], tmp_path: Path) -> None:
    run(size, torch.device("cuda"), tmp_path)


@pytest.mark.parametrize("length", [1, 100])
def test_blocks_that_are_seen_by_position_alone(length: int, tmp_path: Path) -> None:
    module = pipeline.generate(SPLASpec(head_dim=16, select=None, linear=None), tmp_path).module
    check(module, 2, 3, length, None, torch.device("cpu"))
