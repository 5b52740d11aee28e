"""SPLA, block-sparse or dense attention as a layer: projections, norms, RoPE, the op, output projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splagen import settings
from splagen.errors import InputError
from splagen.nn.branches import Branches
from splagen.nn.cache import RowCache, StepCache
from splagen.nn.layer import AttentionLayer
from splagen.nn.norm import normed
from splagen.nn.rotary import Rotary
from splagen.spec import SPLASpec


class SPLAAttention(AttentionLayer):
    """Attention of a spec of SPLA (arXiv 2601.22379) on x [B, L, width].

    q = W_q x, k = W_k x, v = W_v x; q and k optionally through an RMSNorm over the head dimension; RoPE for the
    branches that shall see it; the op; W_o.  A spec without `select` makes it dense attention, one without `linear`
    block-sparse attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        spec: SPLASpec,
        *,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Generate the kernels, and start values.

        `rotary` says which rows RoPE turns, none without it; branches get rows of their own where it needs them.
        `qk_norm`: q and k go through an RMSNorm, with gains that all heads share (Qwen3).  `bias` is that of the
        projections.  Other arguments and errors are those of every `AttentionLayer`.
        """
        own = rotary.spec(spec) if rotary else spec
        super().__init__(heads, own, folder)
        self.spec, self.kv_heads, self.rotary = own, heads // spec.group_size, rotary
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, heads * spec.head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(width, self.kv_heads * spec.head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(width, self.kv_heads * spec.value_dim, bias=bias, **made)
        self.o_proj = nn.Linear(heads * spec.value_dim, width, bias=bias, **made)
        self.q_norm = nn.RMSNorm(spec.head_dim, eps=eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(spec.head_dim, eps=eps, **made) if qk_norm else None
        self.branches = Branches(self.spec, heads, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, cache: RowCache | StepCache | None = None) -> Tensor:
        """The layer's y [B, L, width] of x [B, L, width]; with a cache the L positions follow those that it holds."""
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.spec.value_dim))
        inputs = self.rows(x, cache.length if cache else 0) | {"v": v} | self.branches(x)
        o = self.generated.op(**inputs) if cache is None else cache.attend(inputs)
        return self.o_proj(o.flatten(2))  # type: ignore[no-any-return]

    def rows(self, x: Tensor, start: int = 0) -> dict[str, Tensor]:
        """What attention meets of x [B, L, width] from position `start`: q [B, L, heads, D] and k [B, L, kv_heads, D].

        And q_m, k_m, q_r, k_r, where statistics or residual have rows of their own.
        """
        spec = self.spec
        q = normed(self.q_norm, self.q_proj(x).unflatten(-1, (self.heads, spec.head_dim)))
        k = normed(self.k_norm, self.k_proj(x).unflatten(-1, (self.kv_heads, spec.head_dim)))
        if self.rotary:
            return self.rotary.rows(spec, q, k, start)
        select, linear = spec.select, spec.linear
        own = [
            s
            for s, part in (("", True), ("_m", select and select.own_rows), ("_r", linear and linear.own_rows))
            if part
        ]
        return {f"q{s}": q for s in own} | {f"k{s}": k for s in own}

    def cache(self, sequences: int, tokens: int, *, steps: bool | None = None) -> RowCache | StepCache:
        """An empty cache for generation with `sequences` of up to `tokens` positions, in the parameters' dtype.

        `steps` asks for steps of decoding, which a GPU runs, or Triton's interpreter; without them each call computes
        from all positions.  None is steps where the layer lies on a GPU.

        Raises:
            SpecError: a query of the spec depends on others or on later keys.
            InputError: a size or dtype that `SPLACache` does not take, or steps on a CPU without the interpreter.
        """
        weight = self.v_proj.weight
        if steps is None:
            steps = weight.is_cuda
        if not steps:
            return RowCache(self.spec, self.generated.op)
        if not weight.is_cuda and not settings.interpreted():
            raise InputError("steps of decoding run on a GPU or in Triton's interpreter", "steps=False")
        return StepCache(
            self.spec, sequences=sequences, kv_heads=self.kv_heads, tokens=tokens,
            dtype=weight.dtype, device=weight.device, folder=self.folder,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What is not seen from the parts."""
        return f"{self.spec.name}, heads={self.heads}, kv_heads={self.kv_heads}, rotary={self.rotary}"
