"""What a spec of SPLA learns beside the projections: gains, gates and the temperature of its branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splagen.spec import SPLASpec


class Branches(nn.Module):
    """The learned inputs of an op of SPLA, as it takes them by name.

    gamma_s and gamma_r [Hq, E] start at 1 with `combine = "rms"`; with "rms_residual" gamma_r starts at 0, where the
    residual adds nothing, and temperature [Hkv] at 0.  With "gate", g_s = 2 sigmoid(a) and g_r = tanh(b) start at 1 and
    0: a and b are linear in x, or, without x, a number per head.
    """

    def __init__(
        self,
        spec: SPLASpec,
        heads: int,
        width: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`heads` is Hq, `width` that of the x from which gates are formed; None are gates that see no x."""
        super().__init__()
        self.spec, self.heads = spec, heads

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if spec.combine == "rms":
            self.gamma_s = empty(heads, spec.value_dim)
        if spec.combine in ("rms", "rms_residual"):
            self.gamma_r = empty(heads, spec.value_dim)
        if spec.linear and spec.linear.temperature:
            self.temperature = empty(heads // spec.group_size)
        if spec.combine == "gate":
            self.gate_bias = empty(2, heads)
            self.gate_weight = None if width is None else empty(2 * heads, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: see the class."""
        for name, x in self.named_parameters(recurse=False):
            one = name.startswith("gamma") and self.spec.combine == "rms"
            nn.init.constant_(x, 1.0 if one else 0.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Inputs of the op by name, for x [B, L, width]; where gates see no x only B and L matter."""
        found: dict[str, Tensor] = {n: p for n, p in self.named_parameters(recurse=False) if not n.startswith("gate")}
        if self.spec.combine == "gate":
            rows = self.gate_bias.flatten().expand(*x.shape[:2], -1)
            if self.gate_weight is not None:
                rows = rows + nn.functional.linear(x, self.gate_weight)
            s, r = rows.chunk(2, -1)
            found |= {"gate_s": 2 * s.sigmoid(), "gate_r": r.tanh()}
        return found
