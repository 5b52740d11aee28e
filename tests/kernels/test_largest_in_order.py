"""The device function that cuts a list at its K largest, beside a stable sort."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splagen.codegen.render import render

KERNEL = """
import triton
import triton.language as tl

{function}

@triton.jit
def chosen_places(keys_ptr, places_ptr, count_ptr, N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr):
    place = tl.arange(0, N)
    chosen, slot, count = largest_in_order(tl.load(keys_ptr + place), K, LANES)
    tl.store(places_ptr + slot, place, mask=chosen)
    tl.store(count_ptr, count)
"""
MOST = 0x7F800000  # the bits of +inf


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("largest") / "largest_in_order_alone.py"
    path.write_text(KERNEL.format(function=render("largest_in_order", {})))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], int]:
    """Keys, of which many may be equal or none, and how many are chosen."""
    n, k = draw(st.sampled_from([(4, 1), (4, 4), (16, 5), (64, 61), (128, 61), (128, 64)]))
    few = st.sampled_from(draw(st.lists(st.integers(-1, MOST), min_size=1, max_size=3)))
    alike = st.integers(MOST - 3, MOST)
    kind = draw(st.sampled_from([few, alike, st.integers(-1, 2), st.integers(-1, MOST), st.just(-1) | few]))
    return draw(st.lists(kind, min_size=n, max_size=n)), k


@given(lists())
def test_of_equal_keys_the_first_are_taken_and_all_lie_in_order(
    kernels: ModuleType, device: torch.device, drawn: tuple[list[int], int]
) -> None:
    keys, k = torch.tensor(drawn[0], dtype=torch.int32, device=device), drawn[1]
    places = torch.full_like(keys, -7)
    count = torch.full((1,), -7, dtype=torch.int32, device=device)
    kernels.chosen_places[(1,)](keys, places, count, len(keys), k, max(2, 1 << (k - 1).bit_length()))
    best = torch.sort(keys, descending=True, stable=True).indices[:k]
    want = best[keys[best] >= 0].sort().values
    assert count.item() == len(want)
    assert torch.equal(places[: len(want)].long(), want)
    assert (places[len(want) :] == -7).all()
