"""Schedules that a search found and that ship with splagen: the defaults of kernels of the same sizes on that GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array, Kernel

ARCH = "sm_90"  # of an H200
FILE = Path(__file__).with_name("pretuned_sm_90.json")  # written by benchmarks/pretuned.py


def pretuned(kernel: Kernel, geometry: Geometry) -> dict[str, int] | None:
    """What a search found for a kernel of 16-bit rows; None where it searched none of these sizes and numbers."""
    found = _table().get(sizes(kernel, geometry), {})
    return dict(found) if {*kernel.tunable} <= found.keys() else None


def sizes(kernel: Kernel, geometry: Geometry) -> str:
    """A kernel's name with everything by which its Schedules are judged: rows of its tiles, columns of its arrays."""
    given, made = (", ".join(map(_columns, arrays)) for arrays in (kernel.inputs, kernel.outputs))
    return f"{kernel.name} {geometry.group}/{geometry.tile}/{geometry.block}: {given} -> {made}"


def _columns(a: Array) -> str:
    return "x".join(map(str, a.width)) or a.layout


@functools.cache
def _table() -> Mapping[str, Mapping[str, int]]:
    return dict(json.loads(FILE.read_text(encoding="utf-8"))["schedules"])
