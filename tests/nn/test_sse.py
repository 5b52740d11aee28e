"""The layer of SSE: the recurrence that it computes, packed samples, generation, and what torch does to layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from splagen.errors import InputError
from splagen.nn import SSEAttention
from splagen.sse_spec import Router, SSESpec

WIDTH, HEADS, LENGTH, PARTITIONS = 24, 4, 21, 3
SPECS = {
    "vector": SSESpec(head_dim=16, backbone="vector", router=Router(PARTITIONS)),
    "scalar": SSESpec(head_dim=16, backbone="scalar", value_dim=24, router=Router(PARTITIONS)),
    "constant": SSESpec(head_dim=16, backbone="constant", group_size=2, router=Router(PARTITIONS, scope="head")),
    "delta": SSESpec(head_dim=16, backbone="delta", group_size=2, router=Router(PARTITIONS)),
    "none": SSESpec(head_dim=16, backbone="none", shared=False, router=Router(PARTITIONS)),
    "no router": SSESpec(head_dim=16, backbone="vector", group_size=2, router=None),
}


@pytest.fixture
def make(folder: Path) -> Callable[..., SSEAttention]:
    def layer(spec: SSESpec = SPECS["vector"], **options: Any) -> SSEAttention:
        return SSEAttention(WIDTH, HEADS, spec, **{"dtype": torch.float64, "folder": folder} | options)

    return layer


def rows(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def by_hand(layer: SSEAttention, x: Tensor) -> Tensor:
    """The layer on one sample x [T, width], by token and value head: docs/semantics.md, "SSE: one token"."""
    spec, out = layer.spec, []
    silu = nn.functional.silu
    k_map: Callable[[Tensor], Tensor] = silu if spec.backbone == "delta" else lambda k: k.softmax(-1)
    kinds = ["shared"] * spec.shared + ["sparse"] * (spec.router is not None)
    states = torch.zeros(1 + PARTITIONS, HEADS, spec.head_dim, spec.value_dim, dtype=x.dtype)

    def low_rank(pair: nn.Sequential, y: Tensor) -> Tensor:
        return pair[1](pair[0](y))

    def unit(row: Tensor) -> Tensor:
        return row / (row.square().sum() + 1e-6).sqrt() if spec.backbone == "delta" else row

    def decay(n: int, head: int, y: Tensor) -> Tensor:
        """One number, or one per feature of keys."""
        match spec.backbone:
            case "none":
                return torch.zeros(1, dtype=x.dtype)
            case "vector":
                g = low_rank(layer.decay[n], y).view(-1, spec.head_dim)[head // spec.group_size]
            case "scalar":
                g = low_rank(layer.decay[n], y)[head : head + 1]
            case "constant":
                g = layer.decay_bias[n, head : head + 1]
            case "delta":
                at = n * HEADS + head
                step = nn.functional.softplus(layer.step_proj(y)[at] + layer.step_bias[at])
                return -layer.rate_log[at].exp() * step[None]
        return nn.functional.logsigmoid(g) / 16

    for y in x:
        v = silu(layer.v_proj(y)).view(HEADS, -1)
        o = torch.zeros_like(v)
        for n, kind in enumerate(kinds):
            q, k = layer.q_proj(y), layer.k_proj(y)
            if kind == "sparse":
                q, k = q + low_rank(layer.q_sparse, y), k + low_rank(layer.k_sparse, y)
            for head in range(HEADS):
                key_head = head // spec.group_size
                part, gate = 0, 1.0
                if kind == "sparse":
                    logits = layer.router(y).view(-1, PARTITIONS)
                    eta = logits[key_head if spec.router.scope == "head" else 0].softmax(-1)
                    part, gate = 1 + int(eta.argmax()), eta.max()
                key = gate * unit(k_map(k.view(-1, spec.head_dim)[key_head]))
                query = gate * unit(silu(q.view(-1, spec.head_dim)[key_head]))
                state = decay(n, head, y).exp()[:, None] * states[part, head]
                new = v[head]
                if spec.backbone == "delta":
                    new = layer.beta_proj(y)[n * HEADS + head].sigmoid() * (new - key @ state)
                states[part, head] = state + key[:, None] * new
                o[head] += spec.head_dim**-0.5 * query @ states[part, head]
        o = (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight).flatten()
        out.append(layer.o_proj(o if layer.output_gate is None else o * silu(low_rank(layer.output_gate, y))))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "output_gate"), [*((name, True) for name in SPECS), pytest.param("vector", False, id="no output gate")]
)
def test_the_layer_is_the_recurrence_of_its_tokens(
    make: Callable[..., SSEAttention], name: str, output_gate: bool
) -> None:
    layer, x = make(SPECS[name], output_gate=output_gate), rows()
    nn.init.normal_(layer.norm.weight)
    with torch.no_grad():
        y, balance = layer(x)
        torch.testing.assert_close(y[0], by_hand(layer, x[0]))
    if name == "no router":
        assert balance is None
        return
    eta = layer.router(x).view(-1, PARTITIONS).softmax(-1)  # of tokens, or of key heads too
    often = nn.functional.one_hot(eta.argmax(-1), PARTITIONS).double().mean(0)
    want = PARTITIONS * (often * eta.mean(0)).sum()
    torch.testing.assert_close(balance.double(), want, atol=1e-6, rtol=0)  # it is float32


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_learns(make: Callable[..., SSEAttention], name: str) -> None:
    layer = make(SPECS[name])
    y, balance = layer(rows())
    (y.square().mean() + (balance if balance is not None else 0)).backward()
    assert (balance is None) == (name == "no router")
    still = {n for n, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-10}
    assert still == set()


@pytest.mark.parametrize("name", ["vector", "constant", "delta"])
def test_pieces_on_a_cache_are_the_whole(make: Callable[..., SSEAttention], name: str) -> None:
    """States are float32 between the pieces."""
    layer, x = make(SPECS[name]), rows(2)
    cache = layer.cache(2)
    with torch.no_grad():
        pieces = [layer(piece, cache)[0] for piece in x.split([8, 1, 1, LENGTH - 10], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), layer(x)[0], atol=1e-5, rtol=1e-4)
    assert cache.length == LENGTH


def test_packed_samples_are_samples(make: Callable[..., SSEAttention]) -> None:
    layer, x = make(), rows()
    packed, _ = layer(x, cu_seqlens=torch.tensor([0, 9, LENGTH], dtype=torch.int32))
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :9])[0], layer(x[:, 9:])[0]], 1))
    with pytest.raises(InputError, match="cu_seqlens with a cache"):
        layer(x, layer.cache(1), cu_seqlens=torch.tensor([0, LENGTH], dtype=torch.int32))


def test_decays_start_between_their_bounds(make: Callable[..., SSEAttention]) -> None:
    """Constant: heads forget 1/8 to 1/256 of a state per token; delta: steps from 0.001 to 0.1, rates from 1 to 16."""
    constant = make(SPECS["constant"])._decays(rows())["g1"]
    assert (constant.diff() > 0).all()
    torch.testing.assert_close(1 - constant[[0, -1]].exp(), torch.tensor([2.0**-3, 2.0**-8], dtype=torch.float64))
    layer = make(SPECS["delta"])
    step = nn.functional.softplus(layer.step_bias)
    assert (step > 0.99e-3).all()
    assert (step < 0.101).all()
    assert (layer.rate_log >= 0).all()
    assert (layer.rate_log.exp() <= 16).all()


def test_checkpointing_changes_nothing(make: Callable[..., SSEAttention]) -> None:
    layer, x = make(), rows()

    def gradients(y: Tensor, balance: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().mean() + balance, list(layer.parameters()))

    again = gradients(*checkpoint(layer, x, use_reentrant=False))
    for got, want in zip(again, gradients(*layer(x)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_one_graph_serves_every_length(make: Callable[..., SSEAttention]) -> None:
    layer = make(SPECS["scalar"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (LENGTH, 13):
        x = rows(1, length)
        torch.testing.assert_close(compiled(x), layer(x))


def test_under_autocast_rows_are_narrow_and_near(
    make: Callable[..., SSEAttention], by_equations: Callable[[nn.Module], None]
) -> None:
    layer, x = make(dtype=torch.float32), rows().float()
    by_equations(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y, balance = layer(x)
        (y.square().mean() + balance).backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    want, _ = layer(x)
    torch.testing.assert_close(y.float(), want, atol=5e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_on_a_gpu_the_layer_is_that_of_the_cpu(make: Callable[..., SSEAttention], name: str) -> None:
    layer, x = make(SPECS[name]), rows(2, 100)
    want, _ = layer(x)
    got, _ = layer.float().cuda()(x.float().cuda())
    torch.testing.assert_close(got.double().cpu(), want, atol=1e-4, rtol=1e-3)


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(InputError, match="group_size, 2"):
        SSEAttention(WIDTH, 3, SPECS["delta"])
