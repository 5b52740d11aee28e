"""Kernels of a decoding step: small specs in the interpreter, real sizes on a GPU."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen import random_cache
from splagen.codegen.decoding import OVERLAPS
from splagen.errors import InputError, SpecError
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from splagen.spec import Select, SPLASpec, windows
from tests.kernels.decoding import (
    GPU,
    LIMIT,
    REAL,
    SELECT,
    SMALL,
    SPECS,
    cache_of,
    change_schedules,
    chosen_blocks,
    errors,
    every_schedule,
    inputs,
    last_row,
    relative,
    take,
    tokens,
)

pytestmark = pytest.mark.usefixtures("fast_sort")

OFTEN = (
    "default",
    "temperature, gate",
    "windows",
    "no residual",
    "dense below",
    "head 24 value 40 group 3",
    "own rows",
)


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_a_step_is_the_last_row_of_the_definition(name: str, tmp_path: Path, device: torch.device) -> None:
    spec = SPECS[name]
    cache = cache_of(spec, tmp_path, device, sequences=1, kv_heads=1)
    cache.allocate(96)
    rows = inputs(spec, 1, 96, 1, torch.float32, device)
    assert errors(spec, cache, rows, range(1, 79), every=6, whole=name == "default") < LIMIT[torch.float32]
    free = chosen_blocks(cache, rows, 78)
    if free is not None:
        assert torch.equal(free, last_row(spec, rows, 78, None, wanted="free"))


def test_a_step_in_float16(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(SMALL, tmp_path, device, sequences=1, kv_heads=1, tokens=96, dtype=torch.float16)
    cache.allocate(96)
    rows = inputs(SMALL, 1, 76, 1, torch.float16, device)
    assert errors(SMALL, cache, rows, range(1, 77), every=19, whole=False) < LIMIT[torch.float16]


def split(
    spec: SPLASpec, folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, **sizes: object
) -> SPLACache:
    """A cache whose steps have several splits and chunks."""
    splitting = {"score": 3 * 4, "attend": 5 * 4, "chunk": 4}
    change_schedules(generate_decoding(spec, folder), monkeypatch, splitting=splitting)
    return cache_of(spec, folder, device, **sizes)


def cut(
    spec: SPLASpec, folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, splits: int, **sizes: object
) -> SPLACache:
    """A cache of one sequence and KV head whose steps attend in so many splits, and read up to 32 rows of states."""
    changes = {"splitting": {"attend": splits}, "attend": {"BLOCK_D": 32}}
    change_schedules(generate_decoding(spec, folder), monkeypatch, **changes)
    return cache_of(spec, folder, device, sequences=1, kv_heads=1, **sizes)


@pytest.mark.parametrize("splits", [1, pytest.param(3, marks=pytest.mark.slow), 8])
def test_rows_of_states_are_read_in_pieces(
    splits: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 128 rows a program of few reads 32 at a time, and one of 8 only 16."""
    spec = replace(SMALL, head_dim=128, select=replace(SELECT, budget=5))
    cache = cut(spec, tmp_path, device, monkeypatch, splits, tokens=192)
    cache.allocate(192)
    rows = inputs(spec, 1, 180, 1, torch.float32, device)
    assert errors(spec, cache, rows, range(1, 181), every=60, whole=False) < LIMIT[torch.float32]


def each(rows: Mapping[str, Tensor], starts: list[int | None], t: int) -> list[Tensor]:
    """What a step takes in which sequence b has its token t - starts[b]; None and times before it: any token."""
    given = []
    for n, x in rows.items():
        if n in ("q", "k", "v"):
            picked = [x[b, t - s] if s is not None and t >= s else x[b, 0] for b, s in enumerate(starts)]
            given.append(torch.stack(picked))
        else:
            given.append(x)
    return given


def test_sequences_of_different_lengths_in_splits(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots in pages of any order; one without a sequence; one that joins later; several splits."""
    cache = split(SMALL, tmp_path, device, monkeypatch, sequences=3, tokens=128)
    rows = inputs(SMALL, 3, 100, 2, torch.float32, device)
    slots = [cache.allocate(128), cache.allocate(100), cache.allocate(0)]
    assert slots == [0, 1, 2]
    cache.free(2)
    cache.seqlens[1] = -1  # joins later
    assert cache.scratch["score_max"].shape[2] == 1 + 1  # of fewer cells than a split has at the least
    assert cache.scratch["row_max_parts"].shape[2] == 3
    assert cache.scratch["candidate_keys"].shape[2] == 1
    for t in range(60):
        if t == 10:
            cache.seqlens[1] = 0
        given = each(rows, [0, 10, None], t)
        if t % 13 and t < 58:
            take(cache, given)
            continue
        o = cache.step(*given)
        assert not o[2].any()
        for b, start in ((0, 0), (1, 10)):
            if t < start:
                continue
            alone = {n: x[b : b + 1] if n in ("q", "k", "v") else x for n, x in rows.items()}
            free = chosen_blocks(cache, alone, t - start + 1, slice(b, b + 1))
            want = last_row(SMALL, alone, t - start + 1, free)
            assert relative(o[b : b + 1], want) < LIMIT[torch.float32]
    assert cache.seqlens.tolist() == [60, 50, -1]


@pytest.mark.parametrize("name", ["diagonal", pytest.param("windows", marks=pytest.mark.slow)])
def test_lists_of_chunks_meet(name: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lists than are taken at once: the best of those before go on among those behind."""
    spec = SPECS[name]
    cache = split(spec, tmp_path, device, monkeypatch, sequences=1, kv_heads=1, tokens=256)
    assert cache.scratch["candidate_keys"].shape[2:] == ((4, 2) if name == "diagonal" else (3, 2))
    cache.allocate(256)
    rows = inputs(spec, 1, 256, 1, torch.float32, device)
    assert errors(spec, cache, rows, range(1, 233), every=58, whole=False) < LIMIT[torch.float32]
    free = chosen_blocks(cache, rows, 232)
    assert free is not None
    assert torch.equal(free, last_row(spec, rows, 232, None, wanted="free"))
    assert not cache.scratch["arrived"].any()


def test_a_step_beyond_the_pages_writes_nothing(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(SMALL, tmp_path, device, sequences=2, kv_heads=1, tokens=32, page_size=16, pages=3)
    cache.allocate(16)
    cache.allocate(32)
    rows = inputs(SMALL, 2, 33, 1, torch.float32, device)
    for t in range(16):
        cache.step(*tokens(rows, t))
    before = {n: x.clone() for n, x in cache.pages.items()}
    o = cache.step(*tokens(rows, 16))
    assert o[0].isnan().all()
    assert torch.isfinite(o[1]).all()
    assert cache.seqlens.tolist() == [16, 17]
    mine = cache.page_table[0, 0].item()
    assert all(torch.equal(x[mine], before[n][mine]) for n, x in cache.pages.items())
    for t in range(17, 33):
        o = cache.step(*tokens(rows, t))
    assert o.isnan().all()
    assert cache.seqlens.tolist() == [16, 32]


def test_what_is_checked_on_the_device(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(SMALL, tmp_path, device, sequences=2, kv_heads=1, tokens=32, page_size=16)
    cache.allocate(32)
    rows = inputs(SMALL, 2, 2, 1, torch.float32, device)
    monkeypatch.setenv("SPLAGEN_CHECK_CACHE", "1")
    cache.step(*tokens(rows, 0))
    for length, message in ((-1, "sequence 0 has length -1"), (-5, "length -5"), (32, "sequence 0 has 32 tokens")):
        cache.seqlens[0] = length
        with pytest.raises(InputError, match=message):
            cache.step(*tokens(rows, 1))
    cache.seqlens[0] = 17
    cache.page_table[0, 1] = 99
    with pytest.raises(InputError, match="sequence 0 of 17 tokens has page 99 at 1"):
        cache.step(*tokens(rows, 1))
    cache.seqlens[0] = 3
    cache.step(*tokens(rows, 1))  # the page is not needed yet
    cache.settled[0] = 5
    with pytest.raises(InputError, match="sequence 0 of 4 tokens has states as of 5"):
        cache.step(*tokens(rows, 1))


@pytest.mark.slow  # histories of test_cache_machine.py have it among their rules
def test_a_fork_goes_on_alone(tmp_path: Path, device: torch.device) -> None:
    """Prefix pages are shared, the last one and the states are not; neither sequence sees the other's tokens."""
    spec = replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=windows()))
    cache = cache_of(spec, tmp_path, device, sequences=2, kv_heads=1, tokens=128, page_size=32, pages=7)
    rows = inputs(spec, 2, 110, 1, torch.float32, device)
    first = cache.allocate(128)
    for t in range(70):
        cache.step(*tokens(rows, t))
    second = cache.fork(first, tokens=100)
    shared = (cache.page_table[0] == cache.page_table[1]).tolist()
    assert shared == [True, False, False, False]  # a window of the second page takes keys of the third
    with pytest.raises(InputError, match="shares pages"):
        cache.reset(first)
    joined = {
        n: torch.cat([x[:1].expand(2, *x.shape[1:])[:, :70], x[:, 70:]], 1) for n, x in rows.items() if n in "qkv"
    }
    joined |= {n: x for n, x in rows.items() if n not in joined}
    for t in range(70, 98):
        o = cache.step(*tokens(joined, t))
    assert relative(o, last_row(spec, joined, 98, chosen_blocks(cache, joined, 98))) < LIMIT[torch.float32]
    cache.free(first)
    assert len(cache._free) == 3
    cache.free(second)
    assert len(cache._free) == 7


@pytest.mark.slow  # histories of test_cache_machine.py have it among their rules
def test_saved_and_restored_sequences_go_on_alike(tmp_path: Path, device: torch.device) -> None:
    made = [cache_of(SMALL, tmp_path, device, sequences=1, kv_heads=1, tokens=96) for _ in range(2)]
    rows = inputs(SMALL, 1, 82, 1, torch.float32, device)
    made[0].allocate(96)
    for t in range(66):
        made[0].step(*tokens(rows, t))
    saved = made[0].save()
    made[1].restore(saved)
    for t in range(66, 82):
        one, two = (cache.step(*tokens(rows, t)) for cache in made)
        assert torch.equal(one, two)
    with pytest.raises(InputError, match="sizes"):
        cache_of(SMALL, tmp_path, device, sequences=1, kv_heads=2, tokens=96).restore(saved)
    with pytest.raises(InputError, match="another spec"):
        cache_of(replace(SMALL, head_dim=32), tmp_path, device, sequences=1, kv_heads=1, tokens=96).restore(saved)


def test_pages_are_given_out_and_taken_back(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(SMALL, tmp_path, device, sequences=2, kv_heads=1, tokens=64, page_size=16, pages=5)
    one = cache.allocate(33)
    assert (cache.page_table[one] >= 0).sum() == 3
    with pytest.raises(InputError, match="needs 3 more pages of 16 tokens, 2 are free"):
        cache.allocate(48)
    assert cache.allocate(17) == 1
    with pytest.raises(InputError, match="all 2 slots"):
        cache.allocate(1)
    with pytest.raises(InputError, match="65 tokens for sequence 0"):
        cache.reserve(one, 65)
    cache.free(one)
    for use in (cache.fork, cache.free, cache.reset):
        with pytest.raises(InputError, match="slot 0 has no sequence"):
            use(one)
    cache.reserve(1, 64)
    assert cache.seqlens.tolist() == [-1, 0]


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(SMALL, tmp_path, device, kv_heads=1, tokens=32, page_size=16)
    rows = inputs(SMALL, 2, 2, 1, torch.float32, device)
    q, k, v, *rest = tokens(rows, 0)
    for given, message in (
        ((q[:1], k, v), "q has shape"),
        ((q, k[:, :0], v), "k has shape"),
        ((q, k.half(), v), "k is torch.float16"),
        ((q.mT.contiguous().mT, k, v), "stride"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.step(*given, *rest)
    several = [torch.stack([x, x], 1) for x in (q, k, v)]
    with pytest.raises(InputError, match="a step of 2 tokens per sequence, in a cache for 1 to 1"):
        cache.step(*several, *rest)
    wider = cache_of(SMALL, tmp_path, device, kv_heads=1, tokens=32, page_size=16, step_tokens=2)
    for given, message in (
        ((several[0], k, v), "k has shape"),
        ((several[0][:, :0], several[1], several[2]), "a step of 0 tokens"),
        ((several[0].transpose(0, 1).contiguous().transpose(0, 1), *several[1:]), "sequences and tokens of q"),
    ):
        with pytest.raises(ValueError, match=message):
            wider.step(*given, *rest)
    for counts in (torch.zeros(2, device=device), torch.zeros(3, dtype=torch.int32, device=device)):
        with pytest.raises(InputError, match="counts are"):
            wider.accept(counts)
    assert wider.seqlens.tolist() == [-1, -1]
    with pytest.raises(InputError, match="step_tokens is 9"):
        cache_of(SMALL, tmp_path, device, step_tokens=9)
    other = generate_decoding(replace(SMALL, head_dim=32), tmp_path)
    with pytest.raises(ValueError, match="another spec"):
        other.op(q, k, v, *rest, cache=cache)
    with pytest.raises(InputError, match="a multiple of the block"):
        cache_of(SMALL, tmp_path, device, page_size=24)
    with pytest.raises(SpecError, match="causal"):
        generate_decoding(replace(SMALL, causal=False), tmp_path)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GPU)
def test_steps_on_a_gpu(name: str, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    spec = GPU[name]
    cache = cache_of(spec, tmp_path, device, tokens=1024, page_size=128, dtype=dtype)
    rows = inputs(spec, 2, 1000, 2, dtype, device)
    cache.allocate(1024), cache.allocate(1024)
    assert errors(spec, cache, rows, range(1, 1001), every=37) < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_rows_of_states_are_read_in_pieces_on_a_gpu(
    splits: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(REAL, select=Select(block_size=64, budget=6))
    cache = cut(spec, tmp_path, device, monkeypatch, splits, tokens=1536, page_size=128, dtype=torch.bfloat16)
    cache.allocate(1536)
    rows = inputs(spec, 1, 1400, 1, torch.bfloat16, device)
    assert errors(spec, cache, rows, range(1, 1401), every=200) < LIMIT[torch.bfloat16]


@pytest.mark.gpu
def test_a_captured_step_is_replayed_up_to_the_capacity(tmp_path: Path, device: torch.device) -> None:
    """One graph serves every length; it gives what steps outside of it give, bit by bit."""
    made = [cache_of(REAL, tmp_path, device, tokens=700, page_size=64, dtype=torch.bfloat16) for _ in range(2)]
    rows = inputs(REAL, 2, 704, 2, torch.bfloat16, device)
    for cache in made:
        cache.allocate(704), cache.allocate(640)
    static = [x.clone() for x in tokens(rows, 0)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made[0].step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    made[0].reset(0), made[0].reset(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made[0].step(*static)
    for t in range(704):
        for x, y in zip(static, tokens(rows, t), strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out.nan_to_num(7.0), made[1].step(*static).nan_to_num(7.0))
    assert made[0].seqlens.tolist() == [704, 640]
    assert out[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 64])
def test_kernels_that_overlap_give_what_they_give_one_after_the_other(
    sequences: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programmatic dependent launches change no bit: nothing is read before it is there."""
    library, found = generate_decoding(REAL, tmp_path), []
    rows = inputs(REAL, sequences, 100, 2, torch.bfloat16, device)
    for overlap in (0, 1):
        for schedules in every_schedule(library):
            for schedule in schedules.values():
                for name in {*OVERLAPS} & schedule.keys():
                    monkeypatch.setitem(schedule, name, overlap)
        sizes = {"sequences": sequences, "kv_heads": 2, "tokens": 16384}
        cache = cache_of(REAL, tmp_path, device, **sizes, page_size=64, dtype=torch.bfloat16)
        for _ in range(sequences):
            cache.allocate(16384)
        cache.seqlens.fill_(16000), cache.settled.fill_(16000)
        random_cache.fill(cache.made, cache.part, torch.Generator(device=device).manual_seed(0), {})
        outputs = torch.stack([cache.step(*tokens(rows, t)) for t in range(100)])
        found.append([outputs, *cache.states.values(), *cache.pages.values()])
    assert torch.isfinite(found[0][0]).all()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.gpu
def test_a_step_waits_for_nothing_and_allocates_nothing(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(REAL, tmp_path, device, tokens=128, page_size=64, dtype=torch.bfloat16)
    cache.allocate(128), cache.allocate(128)
    rows = inputs(REAL, 2, 4, 2, torch.bfloat16, device)
    given = [tokens(rows, t) for t in range(4)]
    out = torch.empty_like(given[0][0])
    for t in range(3):
        cache.step(*given[t], out=out)
    torch.cuda.synchronize()
    held = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.step(*given[3], out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] <= held + 1  # an empty one of the repetition
