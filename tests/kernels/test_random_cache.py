"""What a cache of random tokens holds beside them is what steps over the same tokens leave."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from splagen import random_cache
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from tests.kernels.decoding import SPECS, inputs, some, without_output

MORE = ("default", "rank 3, cells, head 24", "normaliser", "head 24 value 40 group 3", "own rows", "no residual")
ROUNDING = {"input": 2e-6, "e4m3": 0.13}  # the last of 4 digits, where a sum in another order rounds otherwise


@pytest.mark.parametrize(
    ("name", "scales", "kv_heads", "length"),
    [
        pytest.param("windows", {}, 1, 72, marks=pytest.mark.slow),
        ("temperature, gate", {}, 1, 72),
        ("default", {"k": 0.5, "v": 0.25}, 1, 72),
        *(pytest.param(name, {}, 2, 104, marks=pytest.mark.slow) for name in MORE),
    ],
)
def test_it_is_what_steps_over_the_same_tokens_leave(
    name: str,
    scales: Mapping[str, float],
    kv_heads: int,
    length: int,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Statistics of complete windows, numbers of keys, and states as of the first token of the last step."""
    kind = "e4m3" if scales else "input"
    library = generate_decoding(SPECS[name], tmp_path, page_type=kind)
    cache = SPLACache(
        library, sequences=3, kv_heads=kv_heads, tokens=128, page_size=32, step_tokens=8, dtype=torch.float32,
        device=device, scales=scales or None,
    )  # fmt: skip
    cache.allocate(length), cache.allocate(128)  # the third has no pages
    rows = inputs(SPECS[name], 2, length, kv_heads, torch.float32, device)
    rows |= {n: torch.cat([x, x[:1]]) for n, x in rows.items() if x.shape[:2] == (2, length)}
    without_output(cache, monkeypatch)
    for t in range(0, length, 8):
        cache.step(*(given := some(rows, [t] * 3, 8)))
        cache.settled[:2], cache.seqlens[:2] = t, t + 8
    parameters = {a.name: x for a, x in zip(cache.part.tokens, given, strict=True) if a.name in cache.part.parameters}
    states = {n: x.clone() for n, x in cache.states.items()}
    pages = {n: x.float().clone() for n, x in cache.pages.items()}
    for at_a_time in (1, 1 << 17):
        for x in (*cache.states.values(), *(x for n, x in cache.pages.items() if n[:-6] not in cache.part.key_rows)):
            x.copy_(torch.full(x.shape, float("nan")))
        monkeypatch.setattr(random_cache, "KEYS", at_a_time)
        random_cache.settle(cache.made, cache.part, parameters)
        compare(cache, length, pages, states)


def compare(
    cache: SPLACache, length: int, pages: Mapping[str, torch.Tensor], states: Mapping[str, torch.Tensor]
) -> None:
    """What two sequences have that is not yet to come: states, rows of tokens, complete windows."""
    for n, x in cache.states.items():
        assert states[n][:2].any(), "some blocks are far"
        torch.testing.assert_close(x[:2], states[n][:2], rtol=0, atol=2e-6 * float(states[n].abs().max()))
    tokens = {a.name for a in cache.part.keys}
    for n, x in cache.pages.items():
        cell = 1 if n in tokens else cache.part.geometry.cell
        whole = length if n in tokens else (length - cache.part.overhang) // cell
        for table in cache.page_table[:2]:
            held = table[: -(-length // cache.page_size)].long()
            got, want = (y[held].transpose(1, 2).flatten(0, 1)[:whole] for y in (x.float(), pages[n]))
            limit = ROUNDING["e4m3" if x.element_size() == 1 else "input"]
            torch.testing.assert_close(got, want, rtol=limit, atol=2e-6 * float(want.abs().max()))


def test_pages_of_a_sequence_hold_other_tokens_than_its_neighbours(tmp_path: Path, device: torch.device) -> None:
    library = generate_decoding(SPECS["default"], tmp_path)
    cache = SPLACache(library, sequences=2, kv_heads=2, tokens=128, page_size=32, dtype=torch.float32, device=device)
    cache.allocate(128), cache.allocate(128)
    cache.settled.fill_(100)
    random_cache.fill(cache.made, cache.part, torch.Generator(device=device).manual_seed(0), {})
    for x in (*cache.pages.values(), *cache.states.values()):
        flat = x.flatten(2).flatten(0, 1)
        assert torch.isfinite(flat).all()
        assert len(flat.unique(dim=0)) == len(flat), "of each page and head"
    keys = torch.cat([cache.pages[n].flatten() for n in ("k_pages", "v_pages")])
    assert abs(float(keys.mean())) < 0.02
    assert float(keys.std()) == pytest.approx(1, abs=0.02)
