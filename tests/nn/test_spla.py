"""The layer of SPLA: what it computes, what its branches see, generation, and what torch does to layers."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import splagen
from splagen.errors import InputError, SpecError
from splagen.nn import Rotary, RowCache, SPLAAttention, StepCache
from splagen.nn.rotary import rotated

WIDTH, HEADS, LENGTH = 24, 4, 70
SELECT = splagen.Select(block_size=16, budget=1, sinks=1, local=0)
SPEC = splagen.SPLASpec(head_dim=16, group_size=2, select=SELECT)
GATED = replace(SPEC, combine="gate", linear=splagen.Residual(temperature=True))
DENSE = splagen.SPLASpec(head_dim=16, group_size=2, select=None, linear=None)


@pytest.fixture
def make(folder: Path) -> Callable[..., SPLAAttention]:
    def layer(spec: splagen.SPLASpec = SPEC, **options: Any) -> SPLAAttention:
        given = {"rotary": Rotary(), "qk_norm": True, "dtype": torch.float64, "folder": folder} | options
        return SPLAAttention(WIDTH, HEADS, spec, **given)

    return layer


def rows(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


# -- what it computes ------------------------------------------------------------------------------------------


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE as multiplication of complex numbers, position by position."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    angle = torch.arange(x.shape[1])[:, None, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def test_a_dense_layer_is_torchs_attention(make: Callable[..., SPLAAttention]) -> None:
    layer, x = make(DENSE, rotary=Rotary(theta=100.0), bias=True), rows(2)
    nn.init.normal_(layer.q_norm.weight)
    q = nn.functional.rms_norm(layer.q_proj(x).view(2, LENGTH, 4, 16), (16,), layer.q_norm.weight, 1e-6)
    k = nn.functional.rms_norm(layer.k_proj(x).view(2, LENGTH, 2, 16), (16,), layer.k_norm.weight, 1e-6)
    v = layer.v_proj(x).view(2, LENGTH, 2, 16)
    heads = [y.transpose(1, 2) for y in (turned(q, 100.0), turned(k, 100.0), v)]
    o = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(layer(x), layer.o_proj(o.transpose(1, 2).flatten(2)))


def test_turned_rows_meet_by_their_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(m: int, n: int) -> Tensor:
        return (rotated(q, torch.tensor([m]), 50.0) * rotated(k, torch.tensor([n]), 50.0)).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100))
    assert abs(product(7, 3) - product(7, 4)) > 1e-6


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_each_branch_sees_the_rows_that_it_shall(attention: bool, statistics: bool, residual: bool) -> None:
    rotary = Rotary(10.0, attention, statistics, residual)
    spec = rotary.spec(SPEC)
    q, k = torch.randn(1, 5, 4, 16, dtype=torch.float64), torch.randn(1, 5, 2, 16, dtype=torch.float64)
    found = rotary.rows(spec, q, k, 3)
    positions = torch.arange(3, 8)
    for branch, asked in (("", attention), ("_m", statistics), ("_r", residual)):
        for name, x in (("q", q), ("k", k)):
            got = found.get(name + branch, found[name])
            torch.testing.assert_close(got, rotated(x, positions, 10.0) if asked else x)
    wanted = {v.name for v in splagen.program(spec).inputs if v.name[:2] in ("q", "q_", "k", "k_")}
    assert set(found) == wanted


def test_without_any_rotation_a_layer_is_that_without_rotary(make: Callable[..., SPLAAttention]) -> None:
    torch.manual_seed(1)
    plain = make(rotary=None)
    none = make(rotary=Rotary(attention=False, statistics=False, residual=False))
    none.load_state_dict(plain.state_dict())
    x = rows()
    assert torch.equal(plain(x), none(x))
    seen = make(rotary=Rotary(attention=False, statistics=False, residual=True))
    seen.load_state_dict(plain.state_dict())
    assert not torch.equal(plain(x), seen(x))


def test_a_spec_with_rows_of_its_own_works_without_rotary(make: Callable[..., SPLAAttention]) -> None:
    own = replace(SPEC, select=replace(SELECT, own_rows=True), linear=splagen.Residual(own_rows=True))
    one, other = make(own, rotary=None), make(rotary=None)
    other.load_state_dict(one.state_dict())
    x = rows()
    torch.testing.assert_close(one(x), other(x))


@pytest.mark.parametrize("combine", ["rms_residual", "gate"])
def test_a_new_layer_starts_as_block_sparse_attention(make: Callable[..., SPLAAttention], combine: str) -> None:
    sparse = make(replace(SPEC, linear=None, combine="none"))
    layer = make(replace(SPEC, combine=combine))
    assert not layer.load_state_dict(sparse.state_dict(), strict=False).unexpected_keys
    x = rows()
    torch.testing.assert_close(layer(x), sparse(x))


@pytest.mark.parametrize("spec", [SPEC, GATED], ids=["rms", "gate"])
def test_every_parameter_learns(make: Callable[..., SPLAAttention], spec: splagen.SPLASpec) -> None:
    layer = make(spec)
    for p in layer.branches.parameters():
        nn.init.normal_(p)
    layer(rows()).square().mean().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-8} == set()


# -- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, GATED, DENSE], ids=["rms", "gate", "dense"])
def test_pieces_on_a_cache_are_the_whole(make: Callable[..., SPLAAttention], spec: splagen.SPLASpec) -> None:
    layer, x = make(spec), rows(2)
    nn.init.normal_(layer.branches.gate_weight) if spec is GATED else None
    cache = layer.cache(2, LENGTH)
    assert isinstance(cache, RowCache)
    pieces = [layer(piece, cache) for piece in x.split([33, 1, 1, 20, 15], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), atol=1e-12, rtol=1e-9)
    assert cache.length == LENGTH


@pytest.mark.usefixtures("fast_sort")
@pytest.mark.parametrize("length", [3, 20, pytest.param(60, marks=pytest.mark.slow)])
def test_steps_are_the_whole(make: Callable[..., SPLAAttention], length: int) -> None:
    """A prompt of all but two tokens, by prefill where a step is too short for it, then two tokens."""
    layer, x = make(dtype=torch.float32), rows(2, length).float()
    with torch.no_grad():
        cache = layer.cache(2, length, steps=True)
        assert isinstance(cache, StepCache)
        pieces = [layer(piece, cache) for piece in x.split([length - 2, 1, 1], 1)]
        whole = layer.double()(x.double())
    torch.testing.assert_close(torch.cat(pieces, 1).double(), whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="1 more positions"):
        cache.attend({"q": x[:, :1]})


@pytest.mark.gpu
def test_steps_on_a_gpu_are_the_whole(make: Callable[..., SPLAAttention]) -> None:
    layer = make(dtype=torch.float32, device="cuda")
    x = rows(2, 100).float().cuda()
    with torch.no_grad():
        cache = layer.cache(2, 100)
        assert isinstance(cache, StepCache)
        pieces = [layer(piece, cache) for piece in x.split([90, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), layer(x), atol=1e-4, rtol=1e-3)


def test_what_cannot_generate_is_refused(make: Callable[..., SPLAAttention]) -> None:
    tiles = make(replace(SPEC, select=replace(SELECT, granularity="tile", tile=16)))
    with pytest.raises(SpecError, match="choose together"):
        tiles.cache(1, 10)
    with pytest.raises(SpecError, match="causal"):
        make(replace(DENSE, causal=False)).cache(1, 10)


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(InputError, match="group_size, 2"):
        SPLAAttention(WIDTH, 3, SPEC)
    with pytest.raises(InputError, match="theta"):
        Rotary(theta=0.0)


# -- what torch does to layers ---------------------------------------------------------------------------------


def gradients(layer: nn.Module, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y.square().mean(), parameters), strict=True))


def test_copies_are_equal(make: Callable[..., SPLAAttention]) -> None:
    layer, x = make(), rows()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.generated.op is layer.generated.op


def test_checkpointing_changes_nothing(make: Callable[..., SPLAAttention]) -> None:
    layer, x = make(), rows()
    want, got = gradients(layer, layer(x)), gradients(layer, checkpoint(layer, x, use_reentrant=False))
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


def test_one_graph_serves_every_length(make: Callable[..., SPLAAttention]) -> None:
    layer = make(GATED)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (LENGTH, 51):
        x = rows(1, length)
        torch.testing.assert_close(compiled(x), layer(x))
    want, got = gradients(layer, layer(x)), gradients(layer, compiled(x))
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


def test_under_autocast_rows_are_narrow_and_near(
    make: Callable[..., SPLAAttention], by_equations: Callable[[nn.Module], None]
) -> None:
    layer, x = make(dtype=torch.float32), rows().float()
    by_equations(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x), atol=3e-2, rtol=0)
