"""The environment variables that splagen reads, and the only place that reads them.

Each is read when asked for, so that a test or a program may set it after the import.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path


def cache_dir() -> Path:
    """Folder of generated kernels and tuned schedules; not created here.

    SPLAGEN_CACHE_DIR, else splagen/ in the user's cache.
    """
    if chosen := os.environ.get("SPLAGEN_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "splagen"


def check_cache() -> bool:
    """True if SPLAGEN_CHECK_CACHE asks a decoding step to check lengths and page tables first, which waits for them."""
    return os.environ.get("SPLAGEN_CHECK_CACHE", "0") not in ("", "0")


def interpreted() -> bool:
    """True if TRITON_INTERPRET asks Triton to run kernels on the CPU, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "y", "yes"}


def interpret() -> None:
    """Ask Triton to run kernels on the CPU; it listens when it is imported, so this comes before.

    NumPy's warnings about log 0 and inf - inf are silenced: both occur in lanes that a mask drops.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
