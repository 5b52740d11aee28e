"""Prefill on a cache: the last rows of the definition, and the cache that single steps leave."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from splagen.codegen.compile import compile_module, raise_if_failed
from splagen.errors import InputError
from splagen.kinds import oracle
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding, generate_packed, generate_prefill
from splagen.spec import Select, SPLASpec, to_toml
from tests.kernels.cases import DIAGONAL
from tests.kernels.decoding import (
    BY_TOKEN,
    GPU,
    LIMIT,
    REAL,
    SMALL,
    SPECS,
    cache_of,
    change_schedules,
    follow,
    inputs,
    relative,
    some,
)

FAR = replace(SMALL, group_size=1, select=Select(block_size=16, budget=1, sinks=0, local=0, metric=DIAGONAL))
DEFAULT = replace(FAR, select=Select(block_size=16, budget=1, sinks=0, local=0))

pytestmark = pytest.mark.usefixtures("fast_sort")


def ends(counts: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def packed(rows: Mapping[str, Tensor], held: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """So many tokens of every sequence from the first that it does not hold yet, one sequence behind the other."""
    spans = list(enumerate(zip(held, counts, strict=True)))
    return [torch.cat([x[b, h : h + c] for b, (h, c) in spans]) if n in BY_TOKEN else x for n, x in rows.items()]


def last_rows(spec: SPLASpec, rows: Mapping[str, Tensor], lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The definition at the last rows of sequences of these lengths, in float64."""
    truth, found = oracle(to_toml(spec)), []
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = {n: (x[b : b + 1, :length] if n in BY_TOKEN else x).double() for n, x in rows.items()}
        if count:
            found.append(truth.values(own, [truth.partition.outputs[0].name])[0][0, length - count :])
    return torch.cat(found)


def prefill(
    cache: SPLACache,
    rows: Mapping[str, Tensor],
    chunks: Sequence[Sequence[int]],
    held: list[int],
    slots: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of chunks of so many tokens of each slot, and what the definition says; `held` grows by them.

    `slots` orders them in every call, which is then told the length of the longest.
    """
    got, want = [], []
    order = [*(range(len(held)) if slots is None else slots)]
    rows = {n: x[order] if n in BY_TOKEN else x for n, x in rows.items()}
    for counts in chunks:
        before, own = [held[s] for s in order], [counts[s] for s in order]
        held[:] = [h + c for h, c in zip(held, counts, strict=True)]
        named = {} if slots is None else {"slots": slots, "max_length": max(held)}
        where = ends(own, cache.device)
        got.append(cache.prefill(*packed(rows, before, own), cu_seqlens=where, max_tokens=max(own), **named))
        want.append(last_rows(cache.library.spec, rows, [held[s] for s in order], own))
        assert cache.seqlens.tolist() == held
    return torch.cat(got), torch.cat(want)


def assert_same(a: SPLACache, b: SPLACache, limit: float) -> None:
    """Two caches of one history hold the same; pages that a prefill and steps leave untouched are 0 in both."""
    assert torch.equal(a.page_table, b.page_table)
    assert torch.equal(a.seqlens, b.seqlens)
    assert torch.equal(a.settled, b.settled)
    for mine, theirs in ((a.pages, b.pages), (a.states, b.states)):
        for name, x in mine.items():
            assert torch.equal(x == 0, theirs[name] == 0), name
            assert relative(x, theirs[name].double()) <= limit, name


def check(
    spec: SPLASpec,
    folder: Path,
    chunks: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tokens: int = 112,
) -> None:
    """Chunks, beside single steps and the definition; then steps of several tokens, some of them taken back."""
    made = [cache_of(spec, folder, device, kv_heads=1, step_tokens=t, tokens=tokens, dtype=dtype) for t in (2, 8)]
    rows, held = inputs(spec, 2, tokens, 1, dtype, device), [0, 0]
    for cache in made:
        cache.allocate(tokens), cache.allocate(tokens)
    got, want = prefill(made[0], rows, chunks, held)
    if dtype == torch.float32:  # others may choose other blocks where rounded scores tie
        assert relative(got, want) < LIMIT[dtype]
    length = held[0]
    assert held == [length, length]
    for t in range(0, length - 1, 8):
        made[1].step(*some(rows, [t, t], min(8, length - 1 - t)))
    made[1].step(*some(rows, [length - 1] * 2, 1))
    assert_same(made[0], made[1], LIMIT[dtype])
    assert follow(made[0], rows, [(2, [1, 2]), (1, [1, 1])], length) < LIMIT[dtype]


CHUNKS = [(20, 13), (0, 20), (13, 0)]  # inside blocks; a sequence that takes no part, at either end


def test_chunks_leave_what_single_steps_leave(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"score": 2, "attend": 2, "chunk": 512}  # programs are slow in the interpreter
    change_schedules(generate_decoding(DEFAULT, tmp_path), monkeypatch, splitting=few)
    check(DEFAULT, tmp_path, CHUNKS, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SPECS if n != "dense below"])
def test_chunks_of_more_specs_leave_what_single_steps_leave(name: str, tmp_path: Path, device: torch.device) -> None:
    check(SPECS[name], tmp_path, [(70, 33), (1, 0), (10, 48)], device)


def one_slot(tmp_path: Path, device: torch.device, **sizes: object) -> SPLACache:
    return cache_of(FAR, tmp_path, device, **({"sequences": 2, "kv_heads": 1, "page_size": 16} | sizes))


def test_a_fork_and_a_reset_of_what_was_prefilled(tmp_path: Path, device: torch.device) -> None:
    """The last token may be taken back, as that of a step; a fork and the sequence behind it go on by chunks."""
    cache = one_slot(tmp_path, device)
    rows, held = inputs(FAR, 2, 64, 1, torch.float32, device, seed=2), [0, 0]
    for n in rows.keys() & BY_TOKEN:
        rows[n][1, :36] = rows[n][0, :36]
    cache.allocate(64)
    where = {"max_tokens": 37, "slots": [0]}
    cache.prefill(*packed(rows, [0, 0], [37, 0]), cu_seqlens=ends([37], device), **where)
    assert cache.fork(0) == 1
    cache.accept(torch.zeros(2, dtype=torch.int32, device=device))
    assert cache.seqlens.tolist() == [36, 36]
    held = [36, 36]
    got, want = prefill(cache, rows, [(5, 20)], held)
    assert relative(got, want) < LIMIT[torch.float32]
    cache.free(1)
    cache.reset(0)
    assert not any(x[0].any() for x in cache.states.values())
    o = cache.prefill(*packed(rows, [0, 0], [0, 20]), cu_seqlens=ends([20], device), **where)
    assert relative(o, last_rows(FAR, {n: x[1:] if n in BY_TOKEN else x for n, x in rows.items()}, [20], [20])) < 1e-5


def test_slots_in_another_order_with_the_length_of_the_longest(tmp_path: Path, device: torch.device) -> None:
    """Outputs are the definition's, and the cache is left as by one chunk; pages hold more than that length."""
    one, several = (one_slot(tmp_path, device, tokens=96) for _ in range(2))
    rows = inputs(FAR, 2, 48, 1, torch.float32, device)
    for cache in (one, several):
        cache.allocate(96), cache.allocate(80)
    prefill(one, rows, [(34, 37)], [0, 0])
    got, want = prefill(several, rows, [(0, 21), (34, 16)], [0, 0], slots=[1, 0])
    assert relative(got, want) < LIMIT[torch.float32]
    assert_same(several, one, LIMIT[torch.float32])


def test_states_go_on_from_those_of_the_cache(tmp_path: Path, device: torch.device) -> None:
    """A carried sum is taken as it is: whatever is added to it is in the sum that the chunk leaves, and once."""
    found = []
    for more in (0.0, 3.0):
        cache = one_slot(tmp_path, device, sequences=1, tokens=96)
        cache.allocate(96)
        rows, held = inputs(FAR, 1, 96, 1, torch.float32, device), [0]
        prefill(cache, rows, [[41]], held)
        for state in cache.states.values():
            assert state.any()
            state += more
        given = packed(rows, held, [50])
        o = cache.prefill(*given, cu_seqlens=ends([50], device), max_tokens=50)
        found.append((o, [x.clone() for x in cache.states.values()]))
    (o, states), (moved, others) = found
    for x, y in zip(others, states, strict=True):
        assert relative(x - 3, y.double()) < 1e-5
    assert not torch.allclose(o, moved, atol=1e-2)


class Operations(TorchDispatchMode):
    """Counts the torch operations that are called but for views."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_a_chunk_is_one_op_of_kernels_and_little_else(tmp_path: Path, device: torch.device) -> None:
    """The host launches what it prepared before: each further torch operation of a call is microseconds of it."""
    cache = one_slot(tmp_path, device, sequences=1)
    cache.allocate(48)
    rows = inputs(FAR, 1, 48, 1, torch.float32, device)
    given, where = packed(rows, [0], [20]), ends([20], device)
    with Operations() as seen:
        cache.prefill(*given, cu_seqlens=where, max_tokens=20)
    assert seen.count <= 25


def test_places_of_more_sequences_than_a_step_takes(tmp_path: Path, device: torch.device) -> None:
    """Lengths, rows and tokens of each, beside a loop over them; some have no pages, no tokens or no sequence."""
    module, draw = generate_prefill(FAR, tmp_path).module, random.Random(0)
    count, page, width, aligned = 150, 16, 40, module.ALIGNED
    new = [draw.choice((0, 1, 30, 200)) for _ in range(count)]
    slots = draw.sample(range(160), count)
    held = [draw.choice((-1, 0, 17, 300)) for _ in range(160)]
    table = torch.arange(160 * width, dtype=torch.int32, device=device).view(160, width)
    for slot in draw.sample(range(160), 60):
        table[slot, draw.randrange(20) :] = draw.choice((-1, 160 * width))
    bounds = ends(new, device)
    bounds[7] = -5  # below what stands before it: such a sequence has no tokens, the one behind it those of both
    tokens, most, longest = sum(new) - 3, 150, 400
    pages = {"PAGES": 160 * width, "PAGE": page, "MAX_PAGES": width}
    n = module.sizes(count, 1, torch.empty(tokens, 1, 16, device=device), most, longest)._replace(**pages)
    lengths, settled = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (held, [max(h - 2, 0) for h in held])
    )
    found = module.launch_places(n, bounds, torch.tensor(slots, device=device), lengths, settled, table)
    reached, keys, row = [min(max(x, 0), tokens) for x in itertools.accumulate(bounds.tolist(), max)], [0], 0
    queries, after = [], []
    for s, slot in enumerate(slots):
        own, before = min(reached[s + 1] - reached[s], most), held[slot]
        needed = table[slot, : -(-(before + own) // page)].tolist() if before >= 0 else []
        asked = before >= 0 and own > 0
        fits = asked and before + own <= longest and all(0 <= p < 160 * width for p in needed)
        first, length = (before, before + own) if fits else (0, 0)
        origin = first // aligned * aligned
        last = max(before - 2, 0) if fits else 0
        queries.append([origin, row, last, first, reached[s], own if asked else 0, int(asked and not fits)])
        row += -(-length // aligned) * aligned - origin if fits else 0
        keys.append(keys[-1] + length)
        after.append(length)
    assert [x.tolist() for x in found] == [keys, queries, after]
    assert {q[-1] for q in queries} == {0, 1}


def test_a_sequence_without_pages_is_left_as_it_is(tmp_path: Path, device: torch.device) -> None:
    """It gets NaN, a slot without sequence 0, and what lies in anybody's pages stays; others are not disturbed."""
    cache = one_slot(tmp_path, device, sequences=3, tokens=48, pages=5)
    rows = inputs(FAR, 3, 48, 1, torch.float32, device)
    cache.allocate(48), cache.allocate(16)
    cache.prefill(*packed(rows, [0, 0, 0], [3, 14, 0]), cu_seqlens=ends([3, 14, 0], device), max_tokens=14)
    before = {n: x.clone() for n, x in cache.pages.items()}
    states = {n: x.clone() for n, x in cache.states.items()}
    o = cache.prefill(*packed(rows, [3, 14, 0], [40, 3, 2]), cu_seqlens=ends([40, 3, 2], device), max_tokens=40)
    assert o[40:43].isnan().all()
    assert not o[43:].any()
    alone = {n: x[:1] if n in BY_TOKEN else x for n, x in rows.items()}
    assert relative(o[:40], last_rows(FAR, alone, [43], [40])) < LIMIT[torch.float32]
    assert cache.seqlens.tolist() == [43, 14, -1]
    assert cache.settled.tolist()[:2] == [42, 13]
    others = [p for p in range(5) if p not in cache.page_table[0].tolist()]
    assert all(torch.equal(x[others], before[n][others]) for n, x in cache.pages.items())
    assert all(torch.equal(x[1:], states[n][1:]) for n, x in cache.states.items())


def test_prefill_refuses_what_does_not_fit(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = one_slot(tmp_path, device, tokens=48)
    cache.allocate(16)
    rows = inputs(FAR, 2, 48, 1, torch.float32, device)
    q, k, v, *others = packed(rows, [0, 0], [17, 0])
    given = {"cu_seqlens": ends([17, 0], device), "max_tokens": 17}

    def refused(message: str, *tensors: Tensor, **changed: object) -> None:
        with pytest.raises(InputError, match=message):
            cache.prefill(*(tensors or (q, k, v, *others)), **(given | changed))

    refused("5 tensors|tensors", q, k, v)
    refused("packed rows", q[None], k, v, *others)
    refused("k is torch.float32", q, k[:3], v, *others)
    refused("v is torch.float16", q, k, v.half(), *others)
    refused("cu_seqlens are", cu_seqlens=ends([17], device))
    refused("cu_seqlens are", cu_seqlens=ends([17, 0], device).long())
    refused("positive sizes", max_tokens=0)
    refused("name each once", slots=[0, 0])
    refused("slot 1 has no sequence", slots=[1])
    monkeypatch.setenv("SPLAGEN_CHECK_CACHE", "1")
    refused("sequence 0 of 0 tokens has page -1 at 1")
    assert cache.seqlens.tolist() == [0, -1]


def test_prefill_on_pages_in_e4m3_attends_to_what_they_hold(tmp_path: Path, device: torch.device) -> None:
    """New keys are rounded as cached ones are: the definition at rounded keys and values, by chunks."""
    library = generate_decoding(FAR, tmp_path, page_type="e4m3")
    scales = {"k": 0.5, "v": 0.25}
    sizes = {"sequences": 1, "kv_heads": 1, "tokens": 48, "page_size": 16}
    cache = SPLACache(library, **sizes, dtype=torch.float32, device=device, scales=scales)
    cache.allocate(48)
    rows = inputs(FAR, 1, 48, 1, torch.float32, device)
    rounded = rows | {n: (rows[n] / s).to(torch.float8_e4m3fn).float() * s for n, s in scales.items()}
    held = [0]
    for count in (30, 18):
        given = packed(rows, held, [count])
        o = cache.prefill(*given, cu_seqlens=ends([count], device), max_tokens=count)
        held = [held[0] + count]
        assert relative(o, last_rows(FAR, rounded, held, [count])) < LIMIT[torch.float32]


# -- the op ------------------------------------------------------------------------------------------------------------

QUERIES, KEYS = (9, 0, 5, 1), (70, 20, 5, 64)


@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_the_op_gives_the_last_rows_of_every_sequence(
    strategy: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = generate_prefill(FAR, tmp_path)
    for schedules in library.module.SCHEDULES["sm_90"].values():
        monkeypatch.setitem(schedules, "forward_strategy", {"strategy": strategy})
    rows = inputs(FAR, 4, max(KEYS), 1, torch.float32, device)
    q, *_ = packed(rows, [k - q for q, k in zip(QUERIES, KEYS, strict=True)], QUERIES)
    _, k, v, *gains = packed(rows, [0] * 4, KEYS)
    named = dict(zip(("gamma_s", "gamma_r"), gains, strict=True))
    spare = torch.full_like(q[:2], float("nan"))  # tokens of no sequence, behind the others
    where = ends(QUERIES, device), ends(KEYS, device)
    o = library.op(torch.cat([q, spare]), k, v, *where, max(QUERIES), max(KEYS), **named)
    assert relative(o[: len(q)], last_rows(FAR, rows, KEYS, QUERIES)) < LIMIT[torch.float32]
    assert not o[len(q) :].any()


def test_the_op_refuses_a_gradient_and_more_queries_than_keys(tmp_path: Path) -> None:
    op = generate_prefill(FAR, tmp_path).op
    rows = inputs(FAR, 1, 6, 1, torch.float32, "cpu")
    q, k, v, *gains = (x[0] if n in BY_TOKEN else x for n, x in rows.items())
    named = dict(zip(("gamma_s", "gamma_r"), gains, strict=True))
    with pytest.raises(ValueError, match="sequence 0 has 6 queries and 4 keys"):
        op(q, k[:4], v[:4], ends([6]), ends([4]), 6, 6, **named)
    with pytest.raises(ValueError, match="max_seqlen_q = 5, but sequence 0 has 6"):
        op(q, k, v, ends([6]), ends([6]), 5, 6, **named)
    o = op(q[4:].requires_grad_(), k, v, ends([2]), ends([6]), 2, 6, **named)
    with pytest.raises(NotImplementedError, match="no backward"):
        o.sum().backward()


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time(tmp_path: Path) -> None:
    library = generate_prefill(REAL, tmp_path)
    raise_if_failed(compile_module(library.path, library.part, targets=["sm_90"], jobs=1))


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_the_gpu_gives_rows_the_bits_of_whole_sequences(
    strategy: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs are whole and positions those of the sequence: the last rows of the packed op, bit for bit."""
    queries, keys = (300, 0, 1, 1030), (1000, 130, 64, 4095)
    made, whole = generate_prefill(REAL, tmp_path), generate_packed(REAL, tmp_path)
    for module in (made.module, whole.module):
        for by_dtype in module.SCHEDULES.values():
            monkeypatch.setitem(by_dtype["bf16"], "forward_strategy", {"strategy": strategy})
    rows = inputs(REAL, 4, max(keys), 2, torch.bfloat16, device)
    all_q, k, v, *gains = packed(rows, [0] * 4, keys)
    q = packed(rows, [n - own for own, n in zip(queries, keys, strict=True)], queries)[0]
    named = dict(zip(("gamma_s", "gamma_r"), gains, strict=True))
    where = ends(keys, device)
    want = whole.op(all_q, k, v, where, max(keys), **named)
    last = torch.cat([want[end - own : end] for own, end in zip(queries, where[1:].tolist(), strict=True)])
    found = made.op(q, k, v, ends(queries, device), where, max(queries), max(keys), **named)
    assert torch.equal(found, last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GPU)
def test_chunks_and_steps_on_a_gpu(name: str, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    check(GPU[name], tmp_path, [(300, 500), (0, 1), (501, 300)], device, dtype, 1024)


@pytest.mark.gpu
def test_prefill_waits_for_nothing(tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(REAL, tmp_path, device, sequences=3, tokens=1024, dtype=torch.bfloat16)
    cache.allocate(1024), cache.allocate(1024)
    rows = inputs(REAL, 2, 1000, 2, torch.bfloat16, device)
    where = {"cu_seqlens": ends((300, 20), device), "max_tokens": 300, "slots": [1, 0]}
    first = packed(rows, [0, 0], (300, 20))
    cache.prefill(*first, **where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.prefill(*packed(rows, [300, 20], (300, 20)), **where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.seqlens.tolist() == [40, 600, -1]
