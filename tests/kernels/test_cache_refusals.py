"""What a cache refuses leaves it as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splagen.errors import InputError
from splagen.nn.cache import StepCache
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from splagen.spec import SPLASpec
from tests.kernels.decoding import SMALL, inputs, tokens

SIZES = {"sequences": 3, "kv_heads": 1, "tokens": 64, "pages": 9, "page_size": 32}


def cache_of(folder: Path, spec: SPLASpec = SMALL, page_type: str = "input", **other: Any) -> SPLACache:
    given = {**SIZES, "dtype": torch.float32, "device": "cpu", **other}
    return SPLACache(generate_decoding(spec, folder, page_type=page_type), **given)


def state(cache: SPLACache) -> tuple[Any, ...]:
    tensors = {n: x.view(torch.uint8) if x.element_size() == 1 else x for n, x in cache._tensors().items()}
    lists = {slot: list(pages) for slot, pages in cache._held.items()}, sorted(cache._free), +cache._uses
    return (*lists, {n: x.tolist() for n, x in tensors.items()})


def test_a_fork_that_finds_no_room_takes_nothing(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    slot = cache.allocate(64)
    cache.seqlens[slot], cache.settled[slot] = 40, 40  # a whole page, which forks share
    before = state(cache)
    for wanted in (65, 96):  # pages are left for more than a sequence may get
        with pytest.raises(InputError, match=f"{wanted} tokens for sequence 0"):
            cache.fork(slot, wanted)
        assert state(cache) == before
    cache.fork(slot)
    cache.allocate(64)
    before = state(cache)
    with pytest.raises(InputError, match="all 3 slots"):
        cache.fork(slot)
    assert state(cache) == before


def wrong_page(saved: dict[str, Any]) -> None:
    saved["tensors"]["page_table"][0, 0] += 1


def unheld(saved: dict[str, Any]) -> None:
    saved["held"] = {}


def outside(saved: dict[str, Any]) -> None:
    saved["held"] = {0: [99, 98]}
    saved["tensors"]["page_table"][0] = torch.tensor([99, 98])


def no_slot(saved: dict[str, Any]) -> None:
    saved["held"] |= {7: []}


def older(saved: dict[str, Any]) -> None:
    del saved["tensors"]


@pytest.mark.parametrize(
    ("change", "says"),
    [(older, "has no tensors"), *((c, "page table") for c in (wrong_page, unheld, outside, no_slot))],
)
def test_a_damaged_copy_is_not_restored(change: Callable[[dict[str, Any]], None], says: str, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    cache.allocate(64)
    saved = cache.save()
    cache.restore(saved)
    before = state(cache)
    change(saved)
    with pytest.raises(InputError, match=says):
        cache.restore(saved)
    assert state(cache) == before


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"spec": replace(SMALL, combine="add")}, "another spec"),
        ({"dtype": torch.float16}, "torch.float32 dtype"),
        ({"page_size": 16}, "32 page_size"),
        ({"page_type": "e4m3"}, "another type"),
        ({"tokens": 96}, "page_table of sizes"),
        ({"pages": 8}, "_pages of sizes"),
    ],
)
def test_a_copy_of_another_cache_is_not_restored(other: dict[str, Any], says: str, tmp_path: Path) -> None:
    first, cache = cache_of(tmp_path), cache_of(tmp_path, **other)
    first.allocate(64)
    cache.allocate(32)
    before = state(cache)
    with pytest.raises(InputError, match=says):
        cache.restore(first.save())
    assert state(cache) == before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sequences": 0}, "sequences is 0"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"pages": 0}, "pages is 0"),
        ({"page_size": 24}, "a multiple of the block"),
        ({"step_tokens": 9}, "step_tokens is 9"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"sequences": 2**11, "kv_heads": 2**4}, "65535 sequences and query heads"),
        ({"pages": 2**27, "kv_heads": 8}, "fewer than 2.*31 blocks"),
    ],
)
def test_sizes_that_no_launch_takes_are_refused(wrong: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        cache_of(tmp_path, **wrong)


def test_prefill_of_more_than_is_numbered_is_refused(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    cache.allocate(64)
    q, k, v, *others = tokens(inputs(SMALL, 1, 1, 1, torch.float32, torch.device("cpu")), 0)
    before, sizes = state(cache), {"cu_seqlens": torch.zeros(4, dtype=torch.int32), "max_length": 2**30}
    for new in (1, 2**31):  # positions of a sequence, then rows of all
        many = [x.expand(new, *x.shape[1:]) for x in (q, k, v)]
        with pytest.raises(InputError, match="numbered below 2"):
            cache.prefill(*many, *others, max_tokens=1, **sizes)
        sizes["max_length"] = 1
    assert state(cache) == before


def test_a_step_runs_the_module_that_was_imported(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    cache.allocate(64)
    assert cache.library.op is not None
    cache.library.path.unlink()
    rows = tokens(inputs(SMALL, 3, 1, 1, torch.float32, torch.device("cpu")), 0)
    assert cache.step(*rows).shape == (3, 2, 16)


def test_a_cache_that_was_reset_answers_as_a_new_one(tmp_path: Path) -> None:
    given = {"sequences": 1, "kv_heads": 1, "tokens": 64, "dtype": torch.float32, "device": "cpu", "folder": tmp_path}
    used, new = StepCache(SMALL, **given), StepCache(SMALL, **given)
    used.paged.seqlens.fill_(60)
    used.paged.settled.fill_(60)
    for x in (*used.paged.pages.values(), *used.paged.states.values()):
        x.normal_()
    used.reset()
    rows = inputs(SMALL, 1, 2, 1, torch.float32, torch.device("cpu"))
    assert torch.equal(used.attend(rows), new.attend(rows))
    assert used.length == new.length == 2
