"""Steps of several tokens, of which the first ones are accepted: each is as if nothing else had been tried."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splagen.errors import InputError
from tests.kernels.decoding import BY_TOKEN, GPU, LIMIT, REAL, SMALL, SPECS, cache_of, follow, inputs, some

pytestmark = pytest.mark.usefixtures("fast_sort")

SPECULATIVE = [(8, [8, 6]), (8, [8, 1]), (5, [3, 5]), (8, [0, 7]), (4, [4, 4])]
LONG = [
    (8, [8, 6]),
    (8, [8, 8]),
    (8, [8, 1]),
    (5, [5, 0]),
    (8, [3, 8]),
    (8, [7, 8]),
    (3, [0, 3]),
    (8, [8, 2]),
    (8, [8, 8]),
]


def test_steps_of_several_tokens_of_which_some_are_kept(tmp_path: Path, device: torch.device) -> None:
    """Blocks become far, and cells complete, within steps, and are taken back; sequences go on at their own pace."""
    spec = replace(SPECS["no sinks, no local"], group_size=1)
    cache = cache_of(spec, tmp_path, device, kv_heads=1, step_tokens=8)
    cache.allocate(112), cache.allocate(112)
    rows = inputs(spec, 2, 64, 1, torch.float32, device)
    for t in range(0, 24, 8):  # from 32 on, more blocks are far than are chosen
        cache.step(*some(rows, [t, t], 8))
    assert follow(cache, rows, SPECULATIVE, 24) < LIMIT[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_more_steps_of_several_tokens(name: str, tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(SPECS[name], tmp_path, device, kv_heads=1, step_tokens=8)
    cache.allocate(112), cache.allocate(112)
    rows = inputs(SPECS[name], 2, 112, 1, torch.float32, device)
    for t in range(0, 40, 8):
        cache.step(*some(rows, [t, t], 8))
    assert follow(cache, rows, LONG, 40) < LIMIT[torch.float32]


def test_cells_that_a_step_completes_are_a_split_of_their_own(tmp_path: Path, device: torch.device) -> None:
    """Their scores come from the programs that append: those of the other cells would read what is not yet written."""
    cache = cache_of(SMALL, tmp_path, device, sequences=1, kv_heads=1, step_tokens=8)
    cache.allocate(64)
    rows = inputs(SMALL, 1, 48, 1, torch.float32, device)
    found = []
    for start, count in ((0, 8), (8, 7), (15, 1), (16, 8), (24, 8)):
        cache.step(*some(rows, [start], count))
        peaks = cache.scratch["score_max"][:count, 0]  # [count, splits]
        found.append((peaks[:, 0].isfinite().tolist(), peaks[:, 1:].isfinite().any(1).tolist()))
    completed, before = zip(*found, strict=True)
    assert list(completed) == [[False] * 8, [False] * 7, [True], [False] * 8, [False] * 7 + [True]]
    assert list(before) == [[False] * 8, [False] * 7, [False], [True] * 8, [True] * 8]


def test_a_fork_shares_no_page_that_its_origin_may_cut(tmp_path: Path, device: torch.device) -> None:
    """Tokens 14 to 17 are taken back on both sides of the fork, and each side writes others in their place."""
    cache = cache_of(replace(SMALL, group_size=1), tmp_path, device, kv_heads=1, page_size=16, step_tokens=8)
    rows = inputs(cache.library.spec, 2, 40, 1, torch.float32, device)
    for n in rows.keys() & BY_TOKEN:
        rows[n][1, :14] = rows[n][0, :14]
    cache.allocate(64)
    for count, start in ((8, 0), (6, 8), (4, 14)):
        cache.step(*some(rows, [start, start], count))
    cache.fork(0)
    cache.accept(torch.zeros(2, dtype=torch.int32, device=device))
    assert cache.seqlens.tolist() == [14, 14]
    assert follow(cache, rows, [(8, [8, 8]), (1, [1, 1])], 14) < LIMIT[torch.float32]


def test_a_step_without_room_for_all_of_its_tokens_takes_none(tmp_path: Path, device: torch.device) -> None:
    """It settles what it has all the same: what is accepted behind it takes nothing back."""
    cache = cache_of(SMALL, tmp_path, device, kv_heads=1, tokens=32, page_size=16, step_tokens=8)
    cache.allocate(32), cache.allocate(16)
    rows = inputs(SMALL, 2, 32, 1, torch.float32, device)
    cache.step(*some(rows, [0, 0], 8))
    cache.step(*some(rows, [8, 8], 4))
    before = {n: x.clone() for n, x in cache.pages.items()}
    o = cache.step(*some(rows, [12, 12], 5))
    assert cache.seqlens.tolist() == [17, 12]
    assert o[1].isnan().all()
    assert torch.isfinite(o[0]).all()
    mine = cache.page_table[1, 0]
    assert all(torch.equal(x[mine], before[n][mine]) for n, x in cache.pages.items())
    cache.accept(torch.tensor([2, 2], dtype=torch.int32, device=device))
    assert cache.seqlens.tolist() == [14, 12]


def test_room_for_all_tokens_of_a_step_is_checked(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(SMALL, tmp_path, device, sequences=1, kv_heads=1, tokens=32, page_size=16, step_tokens=8)
    cache.allocate(16)
    rows = inputs(SMALL, 1, 32, 1, torch.float32, device)
    monkeypatch.setenv("SPLAGEN_CHECK_CACHE", "1")
    cache.step(*some(rows, [0], 8))
    cache.step(*some(rows, [8], 3))
    with pytest.raises(InputError, match="sequence 0 of 11 tokens has page -1 at 1"):
        cache.step(*some(rows, [11], 6))
    cache.step(*some(rows, [11], 5))


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GPU)
def test_steps_of_several_tokens_on_a_gpu(name: str, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(GPU[name], tmp_path, device, tokens=1024, page_size=128, dtype=dtype, step_tokens=8)
    rows = inputs(GPU[name], 2, 1000, 2, dtype, device)
    cache.allocate(1024), cache.allocate(1024)
    for t in range(0, 504, 8):
        cache.step(*some(rows, [t, t], 8))
    assert follow(cache, rows, LONG * 3, 504) < LIMIT[dtype]


@pytest.mark.gpu
def test_steps_and_accepts_are_captured_together(tmp_path: Path, device: torch.device) -> None:
    """A graph of a step of four tokens and its accept, replayed, leaves what both leave outside of it, bit by bit."""
    made = [
        cache_of(REAL, tmp_path, device, tokens=1024, page_size=64, dtype=torch.bfloat16, step_tokens=4) for _ in "ab"
    ]
    rows = inputs(REAL, 2, 1000, 2, torch.bfloat16, device)
    for cache in made:
        cache.allocate(1024), cache.allocate(1024)
    static = [x.clone() for x in some(rows, [0, 0], 4)]
    kept = torch.zeros(2, dtype=torch.int32, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made[0].step(*static)
        made[0].accept(kept)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made[0].step(*static)
        made[0].accept(kept)
    draw = torch.Generator().manual_seed(0)
    for t in range(200):
        for x, y in zip(static, some(rows, [4 * t, 4 * t], 4), strict=True):
            x.copy_(y)
        kept.copy_(torch.randint(5, (2,), generator=draw, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, made[1].step(*static))
        made[1].accept(kept)
        assert torch.equal(made[0].seqlens, made[1].seqlens)
    assert made[0].seqlens.min() > 300
    assert all(torch.equal(made[0].states[n], x) for n, x in made[1].states.items())
