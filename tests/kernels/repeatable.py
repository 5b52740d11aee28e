"""A generated module whose interpreted kernels are launched as compiled ones are, so that calls repeat earlier ones.

What a launch gets instead of tensors are addresses: a kernel reads and writes the memory there.
"""

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor


class Compiled:
    """An interpreted kernel in the place of a compiled one: `types` are dtype and bytes behind each pointer."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], ran: list[str]) -> None:
        self.kernel, self.ran = kernel, ran
        self.types = [(x.dtype, _bytes_from(x)) if isinstance(x, Tensor) else None for x in arguments]

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert stream == 7
        arguments = list(rest[5:])
        for i, kind in enumerate(self.types):
            if kind is not None and isinstance(arguments[i], int):
                arguments[i] = _at(arguments[i], *kind)
        self.ran.append(self.kernel.__name__)
        self.kernel[(x, y, z)](*arguments)


class Kernel:
    """What launchers see of a kernel."""

    def __init__(self, kernel: Any, asked: list[str], ran: list[str]) -> None:
        self.kernel, self.asked, self.ran = kernel, asked, ran
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*arguments: Any, **schedule: int) -> Compiled:
            self.asked.append(self.__name__)
            self.kernel[grid](*arguments, **schedule)
            return Compiled(self.kernel, arguments, self.ran)

        return run


def repeatable(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Kernels of the module that the JIT is asked for from here on, and kernels that run without it."""
    asked: list[str] = []
    ran: list[str] = []
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Kernel(kernel, asked, ran))
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(module, "triton", SimpleNamespace(runtime=runtime, knobs=triton.knobs))
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "KEPT", {})  # a module of the same text is imported once
    return asked, ran


def _bytes_from(x: Tensor) -> int:
    return x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()


def _at(address: int, dtype: torch.dtype, size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype)
