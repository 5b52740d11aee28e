"""Inputs inside larger storages full of NaN, and torch.empty full of NaN, for one generated module."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def embed(x: Tensor) -> Tensor:
    """The same values as a view with strides of its own; beside every row, head and position lies NaN."""
    match x.ndim:
        case 4:  # [B, L, H, D], stored by head
            batch, length, heads, width = x.shape
            store = x.new_full((batch, heads + 1, length + 3, width + 16), float("nan"))
            view = store.transpose(1, 2)[:, 2 : length + 2, :heads, :width]
        case 3:  # [B, L, H]
            batch, length, heads = x.shape
            store = x.new_full((batch, length + 3, heads + 8), float("nan"))
            view = store[:, 2 : length + 2, :heads]
        case 2:
            store = x.new_full((x.shape[0] + 1, x.shape[1] + 16), float("nan"))
            view = store[: x.shape[0], : x.shape[1]]
        case _:
            store = x.new_full((x.shape[0] + 4,), float("nan"))
            view = store[: x.shape[0]]
    return view.copy_(x)


def embedded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: embed(x) for name, x in inputs.items()}


class _Torch:
    """torch with an `empty` that leaves NaN, and -1 in integers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, **options: Any) -> Tensor:
        x = torch.empty(*size, **options)
        return x.fill_(float("nan") if x.is_floating_point() else -1)


def fill_empty_with_nan(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here to the end of the test the module's torch.empty is full of NaN."""
    monkeypatch.setattr(module, "torch", _Torch())
