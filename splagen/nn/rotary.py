"""Rotary position embedding, with a choice for each branch of SPLA."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splagen.errors import InputError
from splagen.spec import SPLASpec


@dataclass(frozen=True)
class Rotary:
    """RoPE (arXiv 2104.09864) in the half-split layout of Llama, and what sees it.

    RAttention's residual (arXiv 2506.15545) takes q and k before RoPE also where the softmax takes them after it: that
    is the default.

    Attributes:
        theta: base of the wavelengths.
        attention: whether the softmax sees rotated rows.
        statistics: whether the scores of blocks do.
        residual: whether the residual branch does.
    """

    theta: float = 10_000.0
    attention: bool = True
    statistics: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise InputError(f"theta is {self.theta}", "a positive number such as 10000.0")

    def spec(self, spec: SPLASpec) -> SPLASpec:
        """The spec with rows of their own for the branches that see other rows than the softmax."""
        select, linear = spec.select, spec.linear
        if select and self.statistics != self.attention:
            select = replace(select, own_rows=True)
        if linear and self.residual != self.attention:
            linear = replace(linear, own_rows=True)
        return replace(spec, select=select, linear=linear)

    def rows(self, spec: SPLASpec, q: Tensor, k: Tensor, start: int) -> dict[str, Tensor]:
        """q, k, and where the spec wants rows of their own q_m, k_m and q_r, k_r, from rows before RoPE.

        q is [B, L, Hq, D], k [B, L, Hkv, D]; the first row has position `start`.
        """
        positions = torch.arange(start, start + q.shape[1], device=q.device)
        plain = q, k
        turned = rotated(q, positions, self.theta), rotated(k, positions, self.theta)
        found = dict(zip(("q", "k"), turned if self.attention else plain, strict=True))
        if spec.select and spec.select.own_rows:
            found |= zip(("q_m", "k_m"), turned if self.statistics else plain, strict=True)
        if spec.linear and spec.linear.own_rows:
            found |= zip(("q_r", "k_r"), turned if self.residual else plain, strict=True)
        return found


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rows x [B, L, H, D] with the pair (i, i + D/2) of one at position p turned by p theta^(-2i/D)."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(half, device=x.device, dtype=wide)
    angles = positions.to(wide)[:, None, None] * theta ** (-pairs / half)  # [L, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
