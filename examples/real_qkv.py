"""q, k, v as attention meets them in a model that reads real text, for checks on more than random numbers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from examples.byte_lm import TINY, Training, build, load_text, train


@torch.no_grad()
def real_qkv(
    length: int,
    *,
    q_heads: int = TINY.q_heads,
    kv_heads: int = TINY.kv_heads,
    head_dim: int = TINY.head_dim,
    layer: int = 1,
    steps: int = 0,
    context: int = TINY.context,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a tiny dense byte model over `length` bytes of the source of argparse; return one layer's q, k, v.

    Args:
        length: bytes of text, from 1 to the size of that file (about 100 000).
        q_heads: query heads; a multiple of kv_heads.
        kv_heads: key and value heads.
        head_dim: channels of a head, even.
        layer: the layer to look at, from 0; the model has two.
        steps: training steps before the reading (about 0.1 s each); 0 leaves the initial weights.
        context: bytes of a training window; beyond it the model has learnt nothing.
        seed: of weights and batches.

    Returns:
        q [1, length, q_heads, head_dim] and k, v [1, length, kv_heads, head_dim]: float32, on the CPU,
        contiguous; q and k with rotary positions.

    Raises:
        ValueError: the text is shorter than `length`, or the heads do not divide.
    """
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"q_heads={q_heads} is no multiple of kv_heads={kv_heads}")
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    if not 1 <= length <= len(text):
        raise ValueError(f"length={length}: the text has {len(text)} bytes; ask for 1 to {len(text)}")
    config = replace(TINY, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, context=context)
    model = build(config, seed, torch.device("cpu"))
    if steps:
        few = Training(steps=steps, batch=4, seed=seed, validate_every=steps, validation_windows=1)
        with torch.enable_grad():
            train(model, load_text(), few, report=lambda line: None)
    q, k, v = model.qkv(text[:length].to(torch.int64)[None], layer)
    return q.contiguous(), k.contiguous(), v.contiguous()
