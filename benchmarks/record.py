"""Records of measurements: figures beside the machine and the sources they were taken on.

A record is only worth something while the sources it was taken on can be told apart from today's, so each one
carries a digest of everything that can change a kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def source_digest(root: Path = ROOT) -> str:
    """Return the sha256 (64 hex digits) of `splagen/**/*.py`, `splagen/**/*.json` and `templates/**/*.jinja`.

    Files are hashed in the order of their posix paths relative to `root`, all kinds together, each as its
    path and its bytes with a NUL after either: moving a byte or renaming a file changes the digest.
    """
    files = [*root.glob("splagen/**/*.py"), *root.glob("splagen/**/*.json"), *root.glob("templates/**/*.jinja")]
    digest = hashlib.sha256()
    for path, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        digest.update(path.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, str | None]:
    """Return what a figure depends on besides the sources; a part that the machine lacks is None.

    Keys: date (UTC, to the second), gpu, driver, cuda, torch, triton, python.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def write(name: str, figures: Mapping[str, Any], directory: Path) -> Path:
    """Write `figures` with the environment and the source digest to `directory/name.json`; return that path.

    The file appears whole or not at all, and equal records are equal bytes: keys are sorted.

    Raises:
        ValueError: a figure is NaN or infinite; such a record is a failed measurement.
        TypeError: a figure has no JSON form.
    """
    record = {
        "name": name,
        "source_digest": source_digest(),
        "environment": environment(),
        "figures": dict(figures),
    }
    text = json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{name}.json"
    handle, partial = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return target


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.partition("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
