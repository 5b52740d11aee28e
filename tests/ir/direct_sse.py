"""SSE written token by token (arXiv 2507.16577), for torch's autograd: it knows nothing of Programs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splagen.ir.reference import _walk
from splagen.library import FeatureMap
from splagen.sse_spec import Router, SSESpec


def largest(x: Tensor, k: int, dim: int) -> Tensor:
    """Mask of the k largest; ties to the lowest index."""
    ranked = torch.sort(x.detach(), dim=dim, descending=True, stable=True).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter(dim, ranked.narrow(dim, 0, k), True)


def rows(phi: FeatureMap, x: Tensor) -> Tensor:
    """phi of x [..., d]."""
    y = _walk(phi.expr, {"x": x})
    if phi.softmax:
        y = y if phi.topk is None else y.masked_fill(~largest(y, phi.topk, -1), -torch.inf)
        return y.softmax(-1)
    return unit(y) if phi.l2norm else y


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def route(router: Router, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, and the partitions written and read, of logits [..., N]."""
    write, read = largest(logits, router.writers, -1), largest(logits, router.readers, -1)
    seen = logits if router.normalise == "all" else logits.masked_fill(~write, -torch.inf)
    return seen.softmax(-1), write, read


def balance(router: Router, logits: Tensor) -> Tensor:
    """N / k_w sum_n p_n f_n (sse.md section 4) of logits [..., N]: f has no gradient."""
    often = largest(logits, router.writers, -1).double().flatten(0, -2).mean(0)
    return router.partitions / router.writers * (often * logits.softmax(-1).flatten(0, -2).mean(0)).sum()


def sse(spec: SSESpec, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """o, final1, final2, balance from the inputs of the definition, by name, over its axes."""
    v = x["v"]
    h, length = v.shape[1], v.shape[3]
    out: dict[str, Tensor] = {}
    o = [torch.zeros_like(v[:, :, :, 0]) for _ in range(length)]
    if spec.shared:
        out["final1"] = _run(spec, x, "1", x["state1"], None, None, None, o)
    if spec.router:
        logits = x["logits"] if spec.router.scope == "head" else x["logits"].unsqueeze(1).expand(-1, h, -1, -1)
        eta, write, read = route(spec.router, logits)
        finals = []
        for p in range(spec.router.partitions):
            finals.append(_run(spec, x, "2", x["state2"][:, :, :, p], eta[..., p], write[..., p], read[..., p], o))
        out["final2"] = torch.stack(finals, 3)
        out["balance"] = balance(spec.router, x["logits"])
    return {"o": torch.stack(o, 3) if o else v, **out}


def _run(spec, x, n, state, eta, write, read, o):  # type: ignore[no-untyped-def]
    gate = spec.router.gate if eta is not None else "none"
    q, k, v = x[f"q{n}"], x[f"k{n}"], x["v"]
    one = torch.ones_like(q[..., 0])
    w = eta if gate in ("both", "write") else one
    r = eta if gate in ("both", "read") else one
    q, k = rows(spec.q_map, q), rows(spec.k_map, k)
    if spec.backbone == "delta":
        before = spec.gate_site == "pre_norm"
        q, k = unit(q * r[..., None] if before else q), unit(k * w[..., None] if before else k)
        w, r = (one, one) if before else (w, r)
    q, k = spec.scale * q * r[..., None], k * w[..., None]
    for t in range(v.shape[3]):
        kt, vt = k[:, :, None, t, :, None], v[:, :, :, t, None, :]
        match spec.backbone:
            case "none":
                decayed = state
            case "constant":
                decayed = state * x[f"g{n}"].exp()[None, :, :, None, None]
            case "vector":
                decayed = state * x[f"g{n}"][:, :, None, t, :, None].exp()
            case _:
                decayed = state * x[f"g{n}"][:, :, :, t, None, None].exp()
        if spec.backbone == "delta":
            vt = x[f"beta{n}"][:, :, :, t, None, None] * (vt - (kt * decayed).sum(3, keepdim=True))
        new = decayed + kt * vt
        if write is None:
            state, seen = new, torch.ones_like(one[:, :, t], dtype=torch.bool)
        else:
            state = torch.where(write[:, :, t][:, :, None, None, None], new, state)
            seen = read[:, :, t]
        read_out = (q[:, :, None, t, :, None] * state).sum(3)
        o[t] = o[t] + torch.where(seen[:, :, None, None], read_out, 0)
    return state
