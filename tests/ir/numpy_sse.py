"""SSE in NumPy, one sequence, from features of rows: the recurrent forms of the mathematics that splagen implements.

q, k, g [T, H, K], v [T, H, V], b and eta [T, H] and [T, N], states [H, K, V] and [N, H, K, V]; decay, write, read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def sse_recurrent(p: dict[str, Array], eta: Array, mw: Mask, mr: Mask, scale: float) -> tuple[Array, Array, Array]:
    """Vector decay; a scalar one is constant over K."""
    o, s1, s2 = np.zeros_like(p["v"]), p["S1"].copy(), p["S2"].copy()
    for t in range(len(o)):
        s1 = np.exp(p["g1"][t])[..., None] * s1 + p["k1"][t][..., None] * p["v"][t][:, None]
        o[t] += scale * np.einsum("hk,hkv->hv", p["q1"][t], s1)
        for n in np.nonzero(mw[t])[0]:
            write = eta[t, n] * p["k2"][t][..., None] * p["v"][t][:, None]
            s2[n] = np.exp(p["g2"][t])[..., None] * s2[n] + write
        for n in np.nonzero(mr[t])[0]:
            o[t] += scale * eta[t, n] * np.einsum("hk,hkv->hv", p["q2"][t], s2[n])
    return o, s1, s2


def l2n(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def gdn_rec(q: Array, k: Array, v: Array, g: Array, b: Array, h0: Array, scale: float) -> tuple[Array, Array]:
    """The gated delta rule; q and k are normalised."""
    o, s = np.zeros_like(v), h0.copy()
    for t in range(len(v)):
        s = np.exp(g[t])[:, None, None] * s
        u = b[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], s))
        s = s + k[t][..., None] * u[:, None]
        o[t] = scale * np.einsum("hk,hkv->hv", q[t], s)
    return o, s


def sse_gdn(p: dict[str, Array], eta: Array, m: Mask, scale: float, site: str) -> tuple[Array, Array, Array]:
    """The delta rule per touched state, eta before or after the norm."""

    def gated(x: Array, w: Array) -> Array:
        return l2n(x * w) if site == "pre_norm" else l2n(x) * w

    o, s1 = gdn_rec(l2n(p["q1"]), l2n(p["k1"]), p["v"], p["g1"][..., 0], p["b1"], p["S1"], scale)
    s2 = p["S2"].copy()
    for n in range(len(s2)):
        t = np.nonzero(m[:, n])[0]
        w = eta[t, n][:, None, None]
        q, k = gated(p["q2"][t], w), gated(p["k2"][t], w)
        part, s2[n] = gdn_rec(q, k, p["v"][t], p["g2"][t][..., 0], p["b2"][t], s2[n], scale)
        o[t] += part
    return o, s1, s2
