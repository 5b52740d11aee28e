"""torch's fused attention of a GPU, on the CPU: the operators that the generated code calls, by plain products."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NAMES = {
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
    aten._scaled_dot_product_cudnn_attention_backward.default: "cudnn backward",
    aten._scaled_dot_product_flash_attention.default: "flash",
    aten._scaled_dot_product_flash_attention_backward.default: "flash backward",
}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """O and the log-sum-exp from rows [B, H, L, D]; a KV head serves neighbouring query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def plain_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dq, dk and dv; written down, as autograd stands above the operators of torch."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    p = scores.softmax(-1)
    dp = do @ v.transpose(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (x.unflatten(1, (heads, group)).sum(2) for x in (ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do))
    return ds @ k, dk, dv


class TorchAttention(TorchDispatchMode):
    """While it is entered, cuDNN's and flash attention run on CPU tensors; `calls` names those that did.

    `lse_axes` is what cuDNN's log-sum-exp has behind [B, H, L].
    """

    def __init__(self, lse_axes: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.lse_axes, self.calls = lse_axes, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in NAMES:
            return func(*args, **(kwargs or {}))
        self.calls.append(NAMES[func])
        parameters = func._schema.arguments  # arguments that have their default are left out
        given = {p.name: p.default_value for p in parameters if p.has_default_value()}
        given |= dict(zip([p.name for p in parameters], args, strict=False)) | dict(kwargs or {})
        q, k, v, lse_axes = given["query"], given["key"], given["value"], self.lse_axes
        dtype = q.dtype
        rule = q.float(), k.float(), v.float(), given["is_causal"], given["scale"]
        assert given["dropout_p"] == 0.0
        assert given.get("attn_bias") is None
        assert given.get("compute_log_sumexp", True)
        if "flash" in NAMES[func]:
            assert q.shape[-1] == k.shape[-1] == v.shape[-1]
            lse_axes = ()
        if "backward" not in NAMES[func]:
            o, lse = plain_attention(*rule)
            none = q.new_empty(0)
            return o.to(dtype), lse.reshape(*lse.shape, *lse_axes), none, none, q.shape[2], k.shape[2], none, none, none
        assert given["cum_seq_q"] is None
        assert given["cum_seq_k"] is None
        assert (given["max_q"], given["max_k"]) == (q.shape[2], k.shape[2])
        assert given["logsumexp"].shape == (*q.shape[:3], *lse_axes)
        o, lse = plain_attention(*rule)
        torch.testing.assert_close(given["out"].float(), o, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(given["logsumexp"].reshape(lse.shape), lse, rtol=1e-3, atol=1e-3)
        return tuple(g.to(dtype) for g in plain_gradients(given["grad_out"].float(), *rule))
