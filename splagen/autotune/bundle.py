"""Every tuned Schedule of a cache as one file, to be taken to another machine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path

from splagen.autotune.cache import entries, get, path_of
from splagen.autotune.entry import Entry, document, parse, read_json, text
from splagen.autotune.key import Key
from splagen.codegen.files import path_lock, replace_file
from splagen.errors import GeneratedFileError, InputError

log = logging.getLogger(__name__)

FORMAT = 1
BUNDLE_BYTES = 1 << 28
HINT = "give a file that `splagen cache export` wrote"


@dataclass(frozen=True)
class Imported:
    """What became of the entries of a bundle: counts."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    refused: int = 0


def export_bundle(path: str | Path, *, folder: Path | None = None) -> int:
    """Write every entry into one JSON file; returns how many.  Equal entries are equal bytes.

    Raises:
        GeneratedFileError: `path` cannot be written.
    """
    path = Path(path)
    listed = [document(s.key, s.entry) for s in entries(folder=folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(
            path, json.dumps({"splagen_schedules": FORMAT, "entries": listed}, indent=1, sort_keys=True) + "\n"
        )
    except OSError as error:
        raise GeneratedFileError(f"cannot write {path}: {error}", "choose another folder") from error
    return len(listed)


def import_bundle(path: str | Path, *, overwrite: bool = False, folder: Path | None = None) -> Imported:
    """Take over the entries of a bundle.

    An entry that cannot be used is refused with a line in the log.  Of two of the same key the faster one stays, unless
    `overwrite` prefers the bundle's.

    Raises:
        InputError: the file cannot be read or is no bundle.
    """
    path = Path(path)
    try:
        found = read_json(path, BUNDLE_BYTES)
    except InputError as error:
        raise InputError(f"{path} is no bundle of tuned Schedules: {error.message}", HINT) from error
    if found is None:
        raise InputError(f"there is no file {path}", HINT)
    listed = found.get("entries") if isinstance(found, dict) and found.get("splagen_schedules") == FORMAT else None
    if not isinstance(listed, list):
        raise InputError(f"{path} is no bundle of tuned Schedules", HINT)
    counts = dict.fromkeys((f.name for f in fields(Imported)), 0)
    for number, given in enumerate(listed):
        try:
            key, entry = parse(given)
            fate = _take(key, entry, overwrite, folder)
        except InputError as error:
            log.warning("entry %d of %s is refused: %s", number, path, error.message)
            fate = "refused"
        counts[fate] += 1
    return Imported(**counts)


def _take(key: Key, entry: Entry, overwrite: bool, folder: Path | None) -> str:
    path = path_of(key, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path_lock(path):
            mine = get(key, folder=folder)
            if mine is not None and (mine == entry or (mine.ms <= entry.ms and not overwrite)):
                return "kept"
            replace_file(path, text(key, entry))
            return "added" if mine is None else "replaced"
    except OSError as error:
        raise InputError(f"it cannot be stored: {error}") from error
