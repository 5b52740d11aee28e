"""Real text without a network: sources and documentation that are installed with Python and its packages."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SUFFIXES = (".py", ".md", ".rst", ".txt")
SITES = ("site-packages", "dist-packages")
SMALLEST, LARGEST = 64, 1 << 19  # bytes of a file: beyond are tables and manuals in one string
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Corpus:
    """Text in two parts, each file followed by a NUL, memory-mapped.

    Attributes:
        train: uint8.
        validation: uint8, of other files.
        digest: sha256 of both parts; equal digests are equal bytes.
        files: how many files each part has.
    """

    train: Bytes
    validation: Bytes
    digest: str
    files: tuple[int, int]

    def figures(self) -> dict[str, Any]:
        """What a record tells of it."""
        sizes = {"bytes": (len(self.train), len(self.validation)), "files": self.files}
        return {"digest": self.digest} | {
            k: dict(zip(("train", "validation"), v, strict=True)) for k, v in sizes.items()
        }


def installed() -> dict[str, Path]:
    """Where Python and its packages lie, by a name that does not depend on the machine."""
    found = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    sites = dict.fromkeys(Path(p) for p in sys.path if Path(p).name in SITES and Path(p).is_dir())
    return found | {f"site{i}": p for i, p in enumerate(sites)}


def files(roots: Mapping[str, Path]) -> Iterator[Path]:
    """Files of text below the roots, neighbours together, in an order that follows from names alone."""
    for name in sorted(roots):
        for folder, folders, names in os.walk(roots[name]):
            folders[:] = sorted(f for f in folders if f not in (*SITES, "__pycache__"))
            for file in sorted(names):
                path = Path(folder, file)
                if file.endswith(SUFFIXES) and path.is_file() and SMALLEST <= path.stat().st_size <= LARGEST:
                    yield path


def identity(source: bytes) -> bytes:
    """What files have in common that differ in white space only: they count as copies."""
    return hashlib.sha256(b"".join(source.split())).digest()


def held_out(source: bytes) -> bool:
    """Whether a file is for validation: it follows from its identity, so no other file can move it."""
    return int.from_bytes(identity(source)[:8], "big") % 100 < HELD_OUT_PERCENT


def load(folder: Path, roots: Mapping[str, Path] | None = None) -> Corpus:
    """Read the text below `roots`, what is installed by default, into two files in `folder`, and map them.

    Copies of a file are left out, and files with a NUL.  Neighbours of a package stay neighbours: a window that spans
    files has something to remember.

    Raises:
        ValueError: nothing is left for one of the parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    counts, digests = [0, 0], [hashlib.sha256(), hashlib.sha256()]
    partial: list[Path] = []
    try:
        streams: list[IO[bytes]] = []
        for _ in range(2):
            handle, name = tempfile.mkstemp(dir=folder, suffix=".partial")
            partial.append(Path(name))
            streams.append(os.fdopen(handle, "wb"))
        for path in files(installed() if roots is None else roots):
            source = path.read_bytes()
            known = identity(source)
            if known in seen or b"\0" in source:
                continue
            seen.add(known)
            side = held_out(source)
            streams[side].write(source + b"\0")
            digests[side].update(source + b"\0")
            counts[side] += 1
        for stream in streams:
            stream.close()
        if not all(counts):
            raise ValueError(
                f"{counts[0]} files to train on and {counts[1]} to validate on: name folders with more text"
            )
        digest = hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()
        targets = [folder / f"{part}-{digest[:16]}.bin" for part in ("train", "validation")]
        for old, new in zip(partial, targets, strict=True):
            os.replace(old, new)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    train, validation = (np.memmap(t, np.uint8, "r") for t in targets)
    return Corpus(train, validation, digest, (counts[0], counts[1]))


def windows(text: Bytes, starts: NDArray[np.int64], length: int) -> Bytes:
    """Copies of `length` bytes from each start, uint8 [len(starts), length]."""
    return np.stack([text[s : s + length] for s in starts.tolist()])


def spread(text: Bytes, length: int, count: int) -> Bytes:
    """`count` windows spread evenly over the text, the same for every model.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(text) < length:
        raise ValueError(f"{len(text)} bytes of text for windows of {length}: install more packages or shorten windows")
    return windows(text, np.linspace(0, len(text) - length, count).astype(np.int64), length)
