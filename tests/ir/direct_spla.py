"""SPLA written row by row in NumPy, from spla.md alone: the truth that the Program is compared with."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from splagen.ir.frontend_spla import block_size, tile_size
from splagen.spec import Select, SPLASpec
from tests.ir.blocked import value

Array = NDArray[np.float64]
Rows = dict[str, Tensor]


def small_spec(**changes: object) -> SPLASpec:
    spec = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=1, sinks=1, local=0))
    return replace(spec, **changes)  # type: ignore[arg-type]


def assert_near(got: Tensor, want: Tensor | Array, limit: float = 1e-12) -> None:
    error = np.abs(np.asarray(got) - np.asarray(want)).max(initial=0)
    assert error <= limit * max(1.0, np.abs(np.asarray(want)).max(initial=0)), error


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def features(name: str, x: Array) -> Array:
    """phi of one row."""
    match name:
        case "hedgehog":
            return np.concatenate([softmax(x), softmax(-x)])
        case "softmax":
            return softmax(x)
        case "relu":
            return np.maximum(x, 0)
        case "relu2":
            return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
        case "elu1":
            return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
        case "exp":
            return np.exp(x)
        case "silu":
            return x / (1 + np.exp(-x))
        case "identity":
            return x
    raise AssertionError(name)


def far_blocks(spec: SPLASpec, t: int, length: int) -> list[int]:
    """Blocks that query t's tile may choose or leave (spla.md section 1, and 9.3, 9.4)."""
    assert spec.select is not None
    if length < spec.dense_below:
        return []
    block, select = spec.select.block_size, spec.select
    first = t // select.tile * select.tile
    own = [i // block for i in range(first, first + select.tile)]
    found = range(select.sinks, -(-length // block))
    if spec.causal:
        return [b for b in found if b < own[0] - select.local]
    return [b for b in found if all(b < c - select.local or b > c + select.local for c in own)]


def rms(x: Array, gain: Array) -> Array:
    return gain * x / np.sqrt((x * x).mean() + 1e-6)


def direct(spec: SPLASpec, rows: Rows, chosen: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """(o, o_s, o_r) of batch entry 0, [L, Hq, E]; chosen [Hkv, L, blocks] is the selection of every query."""
    r = {n: x.numpy() for n, x in rows.items()}
    q, k, v = (r[n][0] for n in "qkv")
    q_r, k_r = (r.get(f"{n}_r", r[n])[0] for n in "qk")
    length, heads = q.shape[:2]
    block = block_size(spec)
    out = np.zeros((3, length, heads, spec.value_dim))
    for t in range(length):
        for h in range(heads):
            kv, g = divmod(h, spec.group_size)
            far = far_blocks(spec, t, length) if spec.select else []
            left = [b for b in far if not chosen[kv, t, b]]
            seen = range(t + 1) if spec.causal else range(length)
            exact = [j for j in seen if j // block not in left]
            p = softmax(spec.scale * k[exact, kv] @ q[t, h])
            o_s = p @ v[exact, kv]
            o_r = np.zeros(spec.value_dim)
            linear = spec.linear
            if linear and left:
                warm = np.exp(r["temperature"][kv]) if linear.temperature else 1.0
                name = linear.feature_map.name
                weights = [
                    (j, features(name, warm * q_r[t, h]) @ features(name, warm * k_r[j, kv]))
                    for b in left
                    for j in range(block * b, min(block * (b + 1), length))
                ]
                o_r = sum((w * v[j, kv] for j, w in weights), o_r)
                if linear.normaliser:
                    o_r = o_r / max(sum(w for _, w in weights), 1e-6)
            match spec.combine:
                case "none":
                    o = o_s
                case "add":
                    o = o_s + o_r
                case "rms":
                    o = rms(o_s, r["gamma_s"][kv, g]) + rms(o_r, r["gamma_r"][kv, g])
                case "rms_residual":
                    o = o_s + rms(o_r, r["gamma_r"][kv, g])
                case "gate":
                    o = r["gate_s"][0, t, h] * o_s + r["gate_r"][0, t, h] * o_r
            out[:, t, h] = o, o_s, o_r
    return out[0], out[1], out[2]


def selection(spec: SPLASpec, rows: Rows) -> NDArray[np.bool_]:
    """[Hkv, L, blocks] of batch entry 0: what the Program chose for every query."""
    free = value(spec, rows, "free")[0].numpy()
    return np.repeat(free, tile_size(spec), 1)[:, : rows["q"].shape[1]]
