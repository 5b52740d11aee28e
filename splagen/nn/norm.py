"""RMSNorm of rows that autocast made narrower than the gains."""

from __future__ import annotations

from torch import Tensor, nn


def normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """Rows x through a norm, in the dtype of its gains; x itself without one."""
    if norm is None:
        return x
    made: Tensor = norm(x.to(norm.weight.dtype))
    return made.to(x.dtype)
