"""Queries and keys of one layer of a model, as attention meets them, from a file of torch.save."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from splagen.errors import InputError

HINT = "torch.save a dict with the tensors q [1, L, Hq, D] and k [1, L, Hkv, D]"


def read_qk(path: Path) -> tuple[Tensor, Tensor]:
    """The tensors q [1, L, Hq, D] and k [1, L, Hkv, D] of a file, on the CPU; nothing in it is executed.

    Raises:
        InputError: the file cannot be read as tensors, or holds other names, types or shapes, or numbers that are not
            finite.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file fails anywhere inside torch.load
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {path}: {reason}", HINT) from error
    if not isinstance(found, dict) or not all(isinstance(found.get(n), Tensor) for n in "qk"):
        raise InputError(f"{path} does not hold tensors q and k", HINT)
    q, k = found["q"], found["k"]
    if not (q.ndim == k.ndim == 4 and min(*q.shape, *k.shape) > 0) or (
        q.shape[0] != 1 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]
    ):
        raise InputError(f"{path}: q is {list(q.shape)}, k is {list(k.shape)}", HINT)
    if not (q.is_floating_point() and k.is_floating_point()):
        raise InputError(f"{path}: q is {q.dtype}, k is {k.dtype}", "save them in a floating point type")
    if not (q.isfinite().all() and k.isfinite().all()):
        raise InputError(f"{path}: q or k holds NaN or infinite numbers", "save them where the model has finite ones")
    return q, k
