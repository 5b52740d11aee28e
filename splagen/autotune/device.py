"""What a kernel may use of a GPU, and how fast that is."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace

from splagen.codegen.schedule import REGISTERS, TARGETS
from splagen.errors import InputError


@dataclass(frozen=True)
class Device:
    """A GPU as the search sees it.

    Attributes:
        name: as torch gives it.
        arch: the target of its Schedules, such as sm_90.
        shared_bytes: shared memory that one program can have.
        registers: of a multiprocessor, 32 bits each.
        sms: multiprocessors.
        bandwidth: of memory, bytes per second.
        flops: of products of 16-bit numbers, per second.
    """

    name: str
    arch: str
    shared_bytes: int
    registers: int
    sms: int
    bandwidth: float
    flops: float

    @property
    def nvidia(self) -> bool:
        """True where Schedules may limit registers (maxnreg)."""
        return self.arch.startswith("sm_")

    @property
    def warp(self) -> int:
        """Threads of a warp."""
        return 32 if self.nvidia else 64


def _device(name: str, arch: str, sms: int, bandwidth: float, flops: float, registers: int = REGISTERS) -> Device:
    return Device(name, arch, TARGETS[arch].shared_bytes, registers, sms, bandwidth, flops)


# Speeds of the H200 were measured, those of the others are their makers' figures for dense products.  The first
# device of an architecture stands for every other one of it.
DEVICES = {
    d.name: d
    for d in (
        _device("NVIDIA H200", "sm_90", 132, 4.3e12, 7.9e14),
        _device("NVIDIA H100 80GB HBM3", "sm_90", 132, 3.35e12, 9.89e14),
        _device("NVIDIA A100-SXM4-80GB", "sm_80", 108, 2.04e12, 3.12e14),
        _device("NVIDIA B200", "sm_100", 148, 8.0e12, 2.25e15),
        _device("AMD Instinct MI300X", "gfx942", 304, 5.3e12, 1.307e15, registers=131_072),
    )
}


def this_device(index: int | None = None) -> Device:
    """The GPU that torch would use, or its `index`-th one.

    One that is not in DEVICES takes the speeds of the nearest architecture, says so once, and keeps what torch knows
    of it: name, multiprocessors, registers, shared memory.

    Raises:
        InputError: torch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("torch finds no GPU here", f"name one of {', '.join(DEVICES)}")
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if found.name in DEVICES:
        return DEVICES[found.name]
    arch = nearest_arch(found.major, hip=torch.version.hip is not None)
    known = next(d for d in DEVICES.values() if d.arch == arch)
    _say_once(f"splagen does not know {found.name}: its speeds are taken to be those of {known.name}")
    return replace(
        known,
        name=found.name,
        sms=found.multi_processor_count,
        shared_bytes=getattr(found, "shared_memory_per_block_optin", known.shared_bytes),  # not every torch says
        registers=getattr(found, "regs_per_multiprocessor", known.registers),
    )


def nearest_arch(major: int, *, hip: bool) -> str:
    """The architecture whose Schedules a GPU takes, by its compute capability: as generated modules choose it."""
    return "gfx942" if hip else {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)
