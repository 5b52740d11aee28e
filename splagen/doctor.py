"""What `splagen doctor` looks at: versions, GPU, known faults, folders, and whether a kernel runs at all."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from splagen import settings
from splagen.errors import SplagenError

TORCH, TRITON = ((2, 11), (2, 14)), ((3, 6), (3, 10))  # from the first to before the second
MISCOMPILES = ((3, 4), (3, 7, 1))  # Hopper, some chunked backwards: flash-linear-attention issue 640
HOPPER = 9

_PROBE = """
import torch, triton, triton.language as tl

@triton.jit
def probe(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i[:, None] * 16 + i[None, :])
    tl.store(y_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, x, input_precision="ieee"))

x = torch.arange(256, dtype=torch.float32).reshape(16, 16) / 256
y = torch.empty_like(x)
probe[(1,)](x, y)
assert torch.allclose(y, x @ x), "wrong numbers"
"""


@dataclass(frozen=True)
class Check:
    """One finding: "bad" keeps splagen from working here, a "warning" from working well."""

    name: str
    value: str
    status: Literal["good", "warning", "bad"] = "good"
    hint: str | None = None


def checks() -> Iterator[Check]:
    """Every check in turn; the last ones take seconds."""
    yield Check("splagen", _version("splagen") or "runs from a checkout")
    yield Check("python", f"{platform.python_version()} on {platform.machine()}")
    yield _package("torch", TORCH)
    yield _package("triton", TRITON)
    yield Check("numpy", _version("numpy") or "not found", "good" if _version("numpy") else "bad")
    yield from _gpu()
    yield _cache()
    yield _templates()
    yield _interpreter()


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 7, 1) for 3.7.1+git1a2b."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, span: tuple[tuple[int, ...], tuple[int, ...]]) -> Check:
    tried = f"{'.'.join(map(str, span[0]))} to before {'.'.join(map(str, span[1]))}"
    version = _version(name)
    if version is None:
        return Check(name, "not found", "bad", f"pip install {name}, {tried}")
    if not span[0] <= numbers(version) < span[1]:
        return Check(name, version, "warning", f"splagen was tried with {name} {tried}")
    return Check(name, version)


def _gpu() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("gpu", f"torch cannot be imported: {error}", "bad")
        return
    major = 0
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        name = torch.cuda.get_device_name()
        yield Check("gpu", f"{torch.cuda.device_count()} x {name}, capability {major}.{minor}, {built}")
    else:
        hint = "kernels run in Triton's interpreter (float32 and float16, slowly) and compile for every target"
        yield Check("gpu", "none found", "warning", hint)
    triton = _version("triton") or "0"
    if not MISCOMPILES[0] <= numbers(triton) < MISCOMPILES[1]:
        yield Check("known miscompiles", "none of this triton")
    elif major in (0, HOPPER):
        here = "this GPU is one" if major == HOPPER else "no GPU here"
        hint = "check gradients with `splagen verify --device cuda`, or take triton 3.7.1 or later"
        yield Check("known miscompiles", f"triton {triton} on Hopper; {here}", "warning", hint)
    else:
        yield Check("known miscompiles", f"triton {triton} on Hopper only")


def _cache() -> Check:
    folder = settings.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache", str(folder))
    except OSError as error:
        return Check("cache", f"{folder}: {error}", "bad", "set SPLAGEN_CACHE_DIR to a folder that can be written")


def _templates() -> Check:
    try:
        from splagen.codegen.render import template_directory

        folder = template_directory()
    except (ImportError, SplagenError) as error:
        return Check("templates", str(error), "bad", "reinstall splagen")
    count = len(list(folder.glob("*.jinja")))
    return Check("templates", f"{count} in {folder}", "good" if count else "bad")


def _interpreter() -> Check:
    """A small kernel in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.py"
        file.write_text(_PROBE)
        command = [sys.executable, str(file)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return Check("interpreter", "a small kernel does not end", "bad")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("interpreter", reason, "bad", "triton 3.6 needs numpy before 2.4: pip install 'numpy<2.4'")
    return Check("interpreter", "runs a small kernel")
