"""SSE as a layer: shared and sparse projections, router, decay, output norm and gate around the op."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splagen.errors import InputError
from splagen.nn.cache import StateCache
from splagen.nn.layer import AttentionLayer
from splagen.nn.norm import normed
from splagen.sse_spec import SSESpec

DECAY_RANK = 16
DECAY_TEMPER = 16  # a decay is sigmoid(.) ** (1 / 16): near 1 at the start, as in GLA (arXiv 2312.06635)


class LowRank(nn.Sequential):
    """W_2 W_1 x, of rank `rank`; `bias` is that of W_2."""

    def __init__(
        self,
        width: int,
        rank: int,
        out: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            nn.Linear(width, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, out, bias=bias, device=device, dtype=dtype),
        )


class SSEAttention(AttentionLayer):
    """SSE (arXiv 2507.16577) on x [B, T, width], as its authors' layers have it.

    q1 = W_q x and k1 = W_k x are those of the shared state; q2 = q1 + B_q A_q x and k2 = k1 + B_k A_k x those of all
    sparse states; v = silu(W_v x), the logits of the router W_e x.  The shared and the sparse states have log-decays of
    their own: with backbone "vector" and "scalar" logsigmoid(D C x + b) / 16; "constant" learns it per head; "delta"
    has g = -exp(A) softplus(W_a x + b) and beta = sigmoid(W_b x).  y = W_o (RMSNorm(o) * silu(B_g A_g x)), with the
    norm over the values of a head.  Short convolutions are left out: the released models have none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        spec: SSESpec,
        *,
        output_gate: bool = True,
        eps: float = 1e-5,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Generate the kernels, and start values.

        `output_gate`: the normed output is multiplied by silu of a low-rank projection of x.  Other arguments and
        errors are those of every `AttentionLayer`.
        """
        super().__init__(heads, spec, folder)
        self.spec, self.key_heads = spec, heads // spec.group_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = self.key_heads * spec.head_dim, heads * spec.value_dim

        def low_rank(rank: int, out: int, bias: bool = False) -> LowRank:
            return LowRank(width, rank, out, bias=bias, device=device, dtype=dtype)

        self.states = [n for n, there in (("1", spec.shared), ("2", spec.router is not None)) if there]
        self.q_proj = nn.Linear(width, keys, bias=False, **made)
        self.k_proj = nn.Linear(width, keys, bias=False, **made)
        self.v_proj = nn.Linear(width, values, bias=False, **made)
        self.o_proj = nn.Linear(values, width, bias=False, **made)
        self.norm = nn.RMSNorm(spec.value_dim, eps=eps, **made)
        self.output_gate = low_rank(spec.value_dim, values) if output_gate else None
        if spec.router:
            self.q_sparse, self.k_sparse = low_rank(spec.value_dim, keys), low_rank(spec.value_dim, keys)
            by_head = self.key_heads if spec.router.scope == "head" else 1
            self.router = nn.Linear(width, by_head * spec.router.partitions, bias=False, **made)
        count = len(self.states)
        if spec.backbone in ("vector", "scalar"):
            out = keys if spec.backbone == "vector" else heads
            self.decay = nn.ModuleList(low_rank(DECAY_RANK, out, bias=True) for _ in self.states)
        if spec.backbone == "constant":
            self.decay_bias = nn.Parameter(torch.empty(count, heads, **made))
        if spec.backbone == "delta":
            self.beta_proj = nn.Linear(width, count * heads, bias=False, **made)
            self.step_proj = nn.Linear(width, count * heads, bias=False, **made)
            self.rate_log = nn.Parameter(torch.empty(count * heads, **made))
            self.step_bias = nn.Parameter(torch.empty(count * heads, **made))
        self.reset_decay()

    def reset_decay(self) -> None:
        """Start values of what is no projection: heads from slow to fast decays."""
        if self.spec.backbone == "constant":
            # a memory of 2^(i+3) tokens, as in RetNet (arXiv 2307.08621), before the temper
            with torch.no_grad():
                gone = 2.0 ** -(3 + 5 * torch.arange(self.heads) / max(1, self.heads - 1))
                self.decay_bias.copy_(torch.logit((1 - gone) ** DECAY_TEMPER))
        if self.spec.backbone == "delta":
            # as in Mamba-2 (arXiv 2405.21060): rates 1 to 16, steps 0.001 to 0.1
            nn.init.uniform_(self.rate_log, 0, math.log(16))
            with torch.no_grad():
                step = torch.exp(torch.empty_like(self.step_bias).uniform_(math.log(1e-3), math.log(1e-1)))
                self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(
        self, x: Tensor, cache: StateCache | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's y [B, T, width] of x [B, T, width], and the balance loss of the router, a number.

        The loss is 1 where tokens spread evenly; add it over layers, times 0.01 in the paper.  It is None without a
        router, and for a single token on a cache.  With a cache the T positions follow those that it holds, and its
        states have no gradient.  `cu_seqlens` [samples + 1] packs samples into one row of x.

        Raises:
            InputError: cu_seqlens together with a cache.
        """
        if cache is not None and cu_seqlens is not None:
            raise InputError("cu_seqlens with a cache", "generate from sequences of equal length, one per row of x")
        rows = self._rows(x)
        balance: Tensor | None = None
        if cache is None:
            o, _, *rest = self.generated.op(**rows, cu_seqlens=cu_seqlens)
            balance = rest[0] if rest else None
        elif x.shape[1] == 1:
            token = {n: r if r.ndim == 1 else r[:, 0] for n, r in rows.items()}
            o = self.generated.step(**token, table=cache.table, slots=cache.slots, check=False)[:, None]
        else:
            o, states, *rest = self.generated.op(**rows, initial_state=cache.table)
            balance = rest[0] if rest else None
            cache.table.copy_(states.detach())
        if cache is not None:
            cache.length += x.shape[1]
        o = normed(self.norm, o).flatten(2)
        if self.output_gate is not None:
            o = o * nn.functional.silu(self.output_gate(x))
        return self.o_proj(o), balance

    def _rows(self, x: Tensor) -> dict[str, Tensor]:
        """The op's inputs by name."""
        spec = self.spec
        q, k, v = self.q_proj(x), self.k_proj(x), nn.functional.silu(self.v_proj(x))
        rows = {"q1": q, "k1": k} if spec.shared else {}
        if spec.router:
            rows |= {"q2": q + self.q_sparse(x), "k2": k + self.k_sparse(x)}
        rows = {n: _heads(r, self.key_heads) for n, r in rows.items()}
        rows["v"] = _heads(v, self.heads)
        rows |= self._decays(x)
        if spec.router:
            logits = self.router(x).float() if x.dtype != torch.float64 else self.router(x)
            rows["logits"] = _heads(logits, self.key_heads) if spec.router.scope == "head" else logits
        return rows

    def _decays(self, x: Tensor) -> dict[str, Tensor]:
        spec, found = self.spec, {}
        wide = torch.promote_types(x.dtype, torch.float32)
        log_sigmoid = nn.functional.logsigmoid
        if spec.backbone in ("vector", "scalar"):
            for n, projection in zip(self.states, self.decay, strict=True):
                g = log_sigmoid(projection(x).to(wide)) / DECAY_TEMPER
                found[f"g{n}"] = _heads(g, self.key_heads) if spec.backbone == "vector" else g
        if spec.backbone == "constant":
            found |= {
                f"g{n}": log_sigmoid(b.to(wide)) / DECAY_TEMPER
                for n, b in zip(self.states, self.decay_bias, strict=True)
            }
        if spec.backbone == "delta":
            beta = self.beta_proj(x).to(wide).sigmoid()
            step = nn.functional.softplus((self.step_proj(x) + self.step_bias).to(wide))
            g = -self.rate_log.to(wide).exp() * step
            for name, both in (("beta", beta), ("g", g)):
                found |= {
                    f"{name}{n}": part for n, part in zip(self.states, both.chunk(len(self.states), -1), strict=True)
                }
        return found

    def cache(self, sequences: int) -> StateCache:
        """Zero states for generation with `sequences` sequences."""
        device = self.v_proj.weight.device
        return StateCache(self.spec, sequences=sequences, value_heads=self.heads, device=device)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Rows [..., heads * D] as [..., heads, D]."""
    return x.reshape(*x.shape[:-1], heads, -1)
