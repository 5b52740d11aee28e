"""CPU rows of every dtype can go through the equations."""

from collections.abc import Callable

import pytest
from torch import nn


@pytest.fixture
def by_equations(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], None]:
    """Have a layer's op evaluate its equations on the CPU, as it does without TRITON_INTERPRET."""

    def apply(layer: nn.Module) -> None:
        monkeypatch.setitem(layer.generated.op.__globals__, "INTERPRETED", False)  # type: ignore[union-attr]

    return apply
