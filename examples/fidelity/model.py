"""A small byte-level decoder: pre-norm, short convolution, RoPE, SwiGLU, tied embedding; attention by variant."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.fidelity.presets import Shape
from examples.fidelity.variants import KINDS, Variant
from splagen.nn import Rotary, SPLAAttention, SSEAttention
from splagen.sse_spec import SSESpec

VOCABULARY = 256
NORM_EPS = 1e-6
THETA = 10_000.0
TAPS = 4  # rows that a short convolution sums


def attention(kind: str, shape: Shape) -> SPLAAttention | SSEAttention:
    """The attention of one layer: softmax and the scores of blocks see RoPE, residual and linear attention do not."""
    spec = KINDS[kind](shape)
    if isinstance(spec, SSESpec):
        return SSEAttention(shape.width, shape.heads, spec, eps=NORM_EPS)
    return SPLAAttention(shape.width, shape.heads, spec, rotary=Rotary(theta=THETA), qk_norm=True, eps=NORM_EPS)


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


class ShortConvolution(nn.Module):
    """x [B, L, width] plus a sum of its row and the rows before, channel by channel, as models with states have it.

    A key then tells what came before it: to look a value up by its name takes one layer, in every variant.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum, in x's shape and dtype."""
        length, before = x.shape[1], F.pad(x, (0, 0, TAPS - 1, 0))
        taps = self.weight.to(x.dtype)
        return x + sum(taps[i] * before[:, i : i + length] for i in range(TAPS))


class Block(nn.Module):
    """One layer.  What its attention has more or less than the dense one's is taken from or given to the MLP."""

    def __init__(self, kind: str, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.convolution = ShortConvolution(width)
        self.attention = attention(kind, shape)
        kv = shape.kv_heads * shape.head_dim
        dense = 2 * width * (width + kv) + 2 * shape.head_dim
        hidden = shape.hidden - 16 * round((parameters(self.attention) - dense) / (3 * width * 16))
        self.norm_mlp = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's output [B, L, width] of x [B, L, width], and the balance loss of a router."""
        made = self.attention(self.convolution(self.norm_attention(x)))
        y, balance = made if isinstance(made, tuple) else (made, None)
        x = x + y
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), balance


class Decoder(nn.Module):
    """Logits [B, L, 256] of the next byte from bytes [B, L] (int64), and the sum of balance losses."""

    def __init__(self, variant: Variant, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(kind, shape) for kind in variant.kinds)
        self.norm = nn.RMSNorm(shape.width, eps=NORM_EPS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model."""
        x = self.embedding(tokens)
        total = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, balance = block(x)
            if balance is not None:
                total = total + balance
        return F.linear(self.norm(x), self.embedding.weight), total


def build(variant: Variant, shape: Shape, seed: int, device: torch.device) -> Decoder:
    """A model whose weights follow from the seed; matrices of one name and shape are alike in every variant."""
    torch.manual_seed(seed)
    model = Decoder(variant, shape)
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            own = hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]
            draw = torch.Generator().manual_seed(int.from_bytes(own, "big"))
            # Layers write into one residual stream: its variance stays near that of the embedding.
            writes = name.endswith(("o_proj.weight", "down.weight"))
            std = 0.3 if ".convolution." in name else 0.02 / math.sqrt(2 * shape.layers) if writes else 0.02
            nn.init.normal_(weight, std=std, generator=draw)
    return model.to(device)
