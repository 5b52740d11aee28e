"""Prefill on a cache: the last rows of the definition, and the cache that single steps leave."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen.errors import InputError
from splagen.kinds import oracle
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_prefill
from splagen.spec import SPLASpec, to_toml
from splagen.verification import TOLERANCE
from tests.kernels.decoding import BY_TOKEN, GPU, LIMIT, SMALL, SPECS, cache_of, follow, inputs, relative, some

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
    cache: SPLACache, rows: Mapping[str, Tensor], chunks: Sequence[Sequence[int]], held: list[int]
) -> tuple[Tensor, Tensor]:
    """The outputs of chunks of so many tokens of each slot, and what the definition says; `held` grows by them."""
    got, want = [], []
    for counts in chunks:
        where = ends(counts, cache.device)
        got.append(cache.prefill(*packed(rows, held, counts), cu_seqlens=where, max_tokens=max(counts)))
        held[:] = [h + c for h, c in zip(held, counts, strict=True)]
        want.append(last_rows(cache.library.spec, rows, held, counts))
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


def check(spec: SPLASpec, folder: Path, chunks: Sequence[Sequence[int]], device: torch.device) -> None:
    """Chunks, beside single steps and the definition; then steps of several tokens, some of them taken back."""
    made = [cache_of(spec, folder, device, kv_heads=1, step_tokens=8) for _ in "ab"]
    rows, held = inputs(spec, 2, 112, 1, torch.float32, device), [0, 0]
    for cache in made:
        cache.allocate(112), cache.allocate(112)
    got, want = prefill(made[0], rows, chunks, held)
    assert relative(got, want) < LIMIT[torch.float32]
    length = held[0]
    assert held == [length, length]
    for t in range(0, length - 1, 8):
        made[1].step(*some(rows, [t, t], min(8, length - 1 - t)))
    made[1].step(*some(rows, [length - 1] * 2, 1))
    assert_same(made[0], made[1], LIMIT[torch.float32])
    assert follow(made[0], rows, [(3, [1, 3]), (1, [1, 1])], length) < LIMIT[torch.float32]


CHUNKS = [(35, 20), (0, 30), (15, 0)]  # inside blocks; a sequence that takes no part, at either end


def test_chunks_leave_what_single_steps_leave(tmp_path: Path, device: torch.device) -> None:
    check(replace(SPECS["no sinks, no local"], group_size=1), tmp_path, CHUNKS, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SPECS if n != "dense below"])
def test_chunks_of_more_specs_leave_what_single_steps_leave(name: str, tmp_path: Path, device: torch.device) -> None:
    check(SPECS[name], tmp_path, [(70, 33), (1, 0), (10, 48)], device)
