"""Pages in e4m3: a step is the definition at keys and values that are rounded, and at nothing else that is."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splagen import library as lib
from splagen.codegen.decoding import decoding
from splagen.codegen.files import import_file
from splagen.codegen.render import render
from splagen.errors import InputError
from splagen.paged_cache import SPLACache, scale_of
from splagen.pipeline import generate_decoding
from splagen.spec import Residual, Select, SPLASpec
from splagen.verification import TOLERANCE
from tests.kernels.decoding import chosen_blocks, errors, inputs, last_row, relative, tokens

pytestmark = pytest.mark.usefixtures("fast_sort")

SMALL = SPLASpec(
    head_dim=16,
    group_size=2,
    select=Select(block_size=16, budget=1, sinks=0, local=0, metric=lib.taylor(covariance="diag")),
)
DEFAULT = replace(SMALL, select=Select(block_size=16, budget=1, sinks=0, local=0))
TEMPERED = replace(SMALL, linear=Residual(lib.softmax, temperature=True), combine="gate", value_dim=24)
REAL = SPLASpec(head_dim=128, group_size=4, select=Select(block_size=64, budget=3))


def rounded(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """What pages keep of rows [..., Hkv, D], by torch's conversion; a copy of torch's type on the CPU is exact."""
    scale = torch.as_tensor(scale, device=x.device).expand(x.shape[-2])[:, None]
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def cache_of(spec: SPLASpec, folder: Path, device: torch.device, **options: Any) -> SPLACache:
    library = generate_decoding(spec, folder, page_type="e4m3")
    given = {"sequences": 1, "kv_heads": 1, "tokens": 96, "page_size": 32, "dtype": torch.float32} | options
    return SPLACache(library, device=device, **given)


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("rounding") / "rounding.py"
    kernel = (
        "@triton.jit\ndef run(x_ptr, y_ptr, N: tl.constexpr):\n    i = tl.arange(0, N)\n"
        "    tl.store(y_ptr + i, round_e4m3(tl.load(x_ptr + i)))\n"
    )
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n{render('round_e4m3', {})}\n\n{kernel}")
    return import_file(path).run


def test_rounding_is_that_of_torch(rounding: Any, device: torch.device) -> None:
    """All numbers of e4m3, the middles between them, what lies a bit beside these, and what is too large."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    some = torch.cat([codes, middles, torch.nextafter(middles, codes[1:]), torch.nextafter(middles, codes[:-1])])
    draw = torch.Generator().manual_seed(0)
    some = torch.cat([some, *(torch.randn(500, generator=draw) * 10.0**n for n in range(-5, 4))])
    x = torch.zeros(16_384)
    x[: 2 * len(some)] = torch.cat([some, -some])
    x[-4:] = torch.tensor([1e30, -1e30, float("inf"), 449.0])
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    plain, kept = torch.empty(16_384, device=device), torch.zeros(16_384, dtype=torch.float8_e4m3fn, device=device)
    for y in (plain, kept):
        rounding[(1,)](x.to(device), y, 16_384)
        assert torch.equal(y.float().cpu(), want.float()), "what is rounded converts exactly"
    nothing = torch.full((16,), float("nan"), device=device)
    rounding[(1,)](nothing, nothing, 16)
    assert nothing.isnan().all()


@pytest.mark.parametrize(
    "name", ["default", pytest.param("temperature, gate, other value_dim", marks=pytest.mark.slow)]
)
def test_a_step_is_the_definition_at_rounded_keys_and_values(name: str, tmp_path: Path, device: torch.device) -> None:
    """To float32: what is rounded is what lies in the pages, of the new token too, and statistics in the choice."""
    spec = DEFAULT if name == "default" else TEMPERED
    cache = cache_of(spec, tmp_path, device, scales={"k": 0.5, "v": 0.25})
    cache.allocate(96)
    rows = inputs(spec, 1, 80, 1, torch.float32, device)
    near = rows | {"k": rounded(rows["k"], 0.5), "v": rounded(rows["v"], 0.25)}
    got, want, raw = [], [], []
    for t in range(49):
        o = cache.step(*tokens(rows, t))
        if t % 7 == 0:
            free = chosen_blocks(cache, near, t + 1)
            got.append(o), want.append(last_row(spec, near, t + 1, free)), raw.append(last_row(spec, rows, t + 1, free))
    assert relative(torch.stack(got), torch.stack(want)) < TOLERANCE[torch.float32][0]
    assert relative(torch.stack(got), torch.stack(raw)) > 1e-2, "the rounding of e4m3 shows"
    eight = {n for n, x in cache.pages.items() if x.dtype == torch.float8_e4m3fn}
    assert eight == {a.name for a in cache.part.pages if a.features}, "all but numbers of keys"
    keys = cache.pages["k_pages"].float()[cache.page_table[0, :1].long()].transpose(1, 2).flatten(0, 1)[:32]
    assert torch.equal(0.5 * keys, near["k"][0, :32])
    mean = near["k"][0, :48].unflatten(0, (3, 16)).mean(1)  # of the keys as they are kept
    kept = 0.5 * cache.pages["mean_pages"].float()[cache.page_table[0, :2].long()].transpose(1, 2).flatten(0, 1)[:3]
    assert torch.equal(kept[..., :16], rounded(mean, 0.5))


def test_statistics_have_scales_that_go_with_those_of_keys(tmp_path: Path, device: torch.device) -> None:
    degrees = decoding(SMALL, "e4m3").degrees
    assert degrees == {"k_pages": 1, "v_pages": 0, "mean_pages": 1, "variance_pages": 2}
    assert decoding(DEFAULT, "e4m3").degrees["factor_pages"] == 1  # a covariance is the sum of their squares
    cache = cache_of(SMALL, tmp_path, device, kv_heads=2, scales={"k": torch.tensor([4.0, 0.5])})
    found = {n: x.tolist() for n, x in cache.scales.items()}
    assert found == {"k_scale": [4, 0.5], "v_scale": [1, 1], "mean_scale": [4, 0.5], "variance_scale": [16, 0.25]}
    other = cache_of(SMALL, tmp_path, device, kv_heads=2)
    other.restore(cache.save())
    assert other.scales["k_scale"].tolist() == [4, 0.5]


def test_what_is_no_scale_is_refused(tmp_path: Path, device: torch.device) -> None:
    for scales, message in (
        ({"k": 0.3}, "the scale of k is"),
        ({"v": 0.0}, "the scale of v is"),
        ({"k": -2.0}, "the scale of k is"),
        ({"k": float("nan")}, "the scale of k is"),
        ({"q": 1.0}, "scale of q\nhint: pages of k, v"),
    ):
        with pytest.raises(InputError, match=message):
            cache_of(SMALL, tmp_path, device, scales=scales)
    with pytest.raises(InputError, match="the scale of v is"):
        cache_of(SMALL, tmp_path, device, dtype=torch.float16, scales={"v": 2.0**20})
    plain = generate_decoding(SMALL, tmp_path)
    with pytest.raises(InputError, match="scales of pages in the type of q"):
        SPLACache(plain, sequences=1, kv_heads=1, tokens=96, device=device, scales={"k": 1.0})
    with pytest.raises(InputError, match="unknown type of pages 'e5m2'"):
        generate_decoding(SMALL, tmp_path, page_type="e5m2")  # type: ignore[arg-type]


def test_a_scale_is_the_power_of_two_that_leaves_room(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 3, 16, generator=draw) * torch.tensor([0.01, 1.0, 300.0])[:, None]
    found = scale_of(x)
    assert found.shape == (3,)
    assert (torch.frexp(found).mantissa == 0.5).all()
    largest = x.abs().amax((0, 1, 3))
    assert ((4 * largest <= 448 * found) & (8 * largest > 448 * found)).all()


# What a step loses by keys and values in 8 bits, relative RMS of o; docs/semantics.md has this table.
LOST = {"bfloat16": 2.1e-3, "one scale, 1": 3.5e-2, "a scale for each page": 3.5e-2, "small values": 3.9e-2,
        "small values, scale_of": 3.2e-2}  # fmt: skip


def test_what_eight_bits_lose_and_what_scales_of_pages_would_gain() -> None:
    """A scale for each page, from all of its tokens, gains nothing: e4m3 rounds alike over 15 powers of two."""
    spec = SPLASpec(
        head_dim=64, group_size=4, select=Select(block_size=64, budget=8, metric=lib.taylor(covariance="diag"))
    )
    rows = inputs(spec, 1, 2048, 2, torch.float32, "cpu")
    small = rows | {"v": rows["v"] / 50}

    def by_page(x: Tensor) -> Tensor:
        pages = x.unflatten(1, (-1, 256))
        scale = pages.abs().amax((2, 4), keepdim=True) / 448
        return ((pages / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1, 2)

    def lost(given: dict[str, Tensor], k: Tensor, v: Tensor) -> float:
        free = last_row(spec, given, 2048, None, wanted="free")
        return relative(last_row(spec, given | {"k": k, "v": v}, 2048, free), last_row(spec, given, 2048, free))

    k, v, few = rows["k"], rows["v"], small["v"]
    found = {
        "bfloat16": lost(rows, k.bfloat16().float(), v.bfloat16().float()),
        "one scale, 1": lost(rows, rounded(k), rounded(v)),
        "a scale for each page": lost(rows, by_page(k), by_page(v)),
        "small values": lost(small, rounded(k), rounded(few)),
        "small values, scale_of": lost(small, rounded(k, scale_of(k)), rounded(few, scale_of(few))),
    }
    assert found == pytest.approx(LOST, rel=0.05), found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_with_eight_bit_pages_on_a_gpu(dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    cache = cache_of(REAL, tmp_path, device, sequences=2, kv_heads=2, tokens=1024, page_size=128, dtype=dtype)
    rows = inputs(REAL, 2, 1000, 2, dtype, device)
    rows |= {n: rounded(rows[n]) for n in "kv"}  # a fixed point of the rounding
    cache.allocate(1024), cache.allocate(1024)
    assert errors(REAL, cache, rows, range(1, 1001), every=37) < TOLERANCE[dtype][0]
