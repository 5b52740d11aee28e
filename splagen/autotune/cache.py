"""Tuned Schedules on disk: one JSON file per key, written whole or not at all.

Any number of processes may read and write a folder.  A file that is damaged, of another key or out of range is a miss
and a line in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from splagen import settings
from splagen.autotune.entry import Entry, Stored, read, text
from splagen.autotune.key import Key
from splagen.codegen.files import path_lock, replace_file
from splagen.codegen.schedule import Schedule
from splagen.errors import InputError, ScheduleError

log = logging.getLogger(__name__)

LOST_SECONDS = 3600  # after which a file that was being written belongs to a process that is gone


@dataclass(frozen=True)
class Explanation:
    """Why a key has an entry or none.

    Attributes:
        found: its entry, or None.
        nearest: where there is none, the key of the entry that differs in the fewest fields, of the same kernel and
            spec if there are any.
        differs: the fields in which that one differs.
        damaged: where the key has a file that cannot be used, why not.
    """

    found: Entry | None
    nearest: Key | None = None
    differs: tuple[str, ...] = ()
    damaged: str | None = None


def schedules_dir() -> Path:
    """The folder of entries; not created here."""
    return settings.cache_dir() / "schedules"


def path_of(key: Key, folder: Path | None = None) -> Path:
    """Where the entry of a key lies."""
    return (folder or schedules_dir()) / f"{key.digest}.json"


# -- one entry -------------------------------------------------------------------------------------------


def get(key: Key, *, check: Callable[[Schedule], None] | None = None, folder: Path | None = None) -> Entry | None:
    """The entry of a key, or None.

    `check` raises ScheduleError for a Schedule that the kernel does not take (`Space.check`): such an entry is a miss.
    """
    try:
        return _usable(key, check, folder)
    except (InputError, ScheduleError) as error:
        _ignored(path_of(key, folder), error)
        return None


def _usable(key: Key, check: Callable[[Schedule], None] | None, folder: Path | None) -> Entry | None:
    """The entry of a key, None where there is no file; raises what is wrong with it."""
    found = read(path_of(key, folder))
    if found is None:
        return None
    if found.key != key:
        raise InputError("it is the entry of another key")
    if check:
        check(found.entry.schedule)
    return found.entry


def get_together(
    keys: Mapping[str, Key],
    *,
    check: Callable[[Mapping[str, Schedule]], None] | None = None,
    folder: Path | None = None,
) -> dict[str, Entry] | None:
    """The entries of kernels that were tuned together, by name: all of them, or None.

    `check` raises ScheduleError where a kernel does not take its Schedule, or where they do not go together.
    """
    try:
        return _usable_together(keys, check, folder)
    except (InputError, ScheduleError) as error:
        _ignored(path_of(keys[min(keys)], folder), error)
        return None


def _usable_together(
    keys: Mapping[str, Key], check: Callable[[Mapping[str, Schedule]], None] | None, folder: Path | None
) -> dict[str, Entry] | None:
    found = {name: _usable(key, None, folder) for name, key in keys.items()}
    usable = {name: entry for name, entry in found.items() if entry is not None}
    if len(usable) < len(keys):
        return None
    if check:
        check({name: entry.schedule for name, entry in usable.items()})
    return usable


def put(key: Key, entry: Entry, *, folder: Path | None = None) -> bool:
    """Store an entry, in the place of an older one.  False, and a line in the log, where it cannot be written."""
    path = path_of(key, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path_lock(path):
            replace_file(path, text(key, entry))
        return True
    except OSError as error:  # filelock's Timeout is one too
        log.warning("the tuned Schedule of %s was not stored: %s", key.kernel, error)
        return False


def get_or_find(
    key: Key,
    find: Callable[[], Entry],
    *,
    check: Callable[[Schedule], None] | None = None,
    folder: Path | None = None,
    wait_seconds: float = 3600,
) -> Entry:
    """The entry of a key; where there is none, one process calls `find` and stores it while others wait for it.

    Who has waited `wait_seconds` calls `find` as well; whatever `find` raises passes, and the next in line tries.
    """
    name = key.kernel
    found = get_or_find_together(
        {name: key},
        lambda: {name: find()},
        check=None if check is None else lambda schedules: check(schedules[name]),
        folder=folder,
        wait_seconds=wait_seconds,
    )
    return found[name]


def get_or_find_together(
    keys: Mapping[str, Key],
    find: Callable[[], Mapping[str, Entry]],
    *,
    check: Callable[[Mapping[str, Schedule]], None] | None = None,
    folder: Path | None = None,
    wait_seconds: float = 3600,
) -> dict[str, Entry]:
    """The entries of kernels that were tuned together, by name: all that are stored, or all from one call of `find`.

    `check` raises ScheduleError where the Schedules do not go together, though each may be right: they come from
    several searches.  Otherwise as `get_or_find`; every process gives the same keys.
    """
    if (found := get_together(keys, check=check, folder=folder)) is not None:
        return found
    first = path_of(keys[min(keys)], folder)
    with _turn(path_lock(first.with_suffix(".search"), wait_seconds)):
        with suppress(InputError, ScheduleError):  # said above
            if (found := _usable_together(keys, check, folder)) is not None:
                return found
        made = dict(find())
        for name, key in keys.items():
            put(key, made[name], folder=folder)
        return made


@contextmanager
def _turn(lock: FileLock) -> Iterator[None]:
    """Hold a lock; without it where it cannot be had, since the work is right either way."""
    try:
        lock.acquire()
    except OSError as error:
        log.warning("searching without waiting for others: %s", error)
    try:
        yield
    finally:
        lock.release()


# -- all entries -----------------------------------------------------------------------------------------


def entries(*, folder: Path | None = None) -> list[Stored]:
    """Every entry that can be used, ordered by kernel, spec, dtype and file."""
    found = []
    for path in _files(folder):
        try:
            stored = read(path)
            if stored is not None:
                found.append(stored)
        except InputError as error:
            _ignored(path, error)
    return sorted(found, key=lambda s: (s.key.kernel, s.key.spec, s.key.dtype, s.path.name))


def explain(
    key: Key,
    *,
    free: frozenset[str] = frozenset(),
    known: Sequence[Stored] | None = None,
    folder: Path | None = None,
) -> Explanation:
    """Whether a key has an entry and, if not, in which fields the nearest one differs.

    Fields in `free` may have any value: an entry that differs in nothing else is a hit.  `known` are the `entries` of
    the folder, where there are many keys to explain.
    """
    damaged = None
    try:
        read(path_of(key, folder))
    except InputError as error:
        damaged = error.message
    known = entries(folder=folder) if known is None else known
    if not known:
        return Explanation(None, damaged=damaged)

    def distance(stored: Stored) -> tuple[bool, bool, int, str]:
        other = stored.key
        return other.kernel != key.kernel, other.spec != key.spec, len(key.differs(other, free)), stored.path.name

    nearest = min(known, key=distance)
    differs = key.differs(nearest.key, free)
    return Explanation(None if differs else nearest.entry, nearest.key, differs, damaged)


def prune(
    *,
    generator: int | None = None,
    triton: str | None = None,
    gpu: str | None = None,
    days: float | None = None,
    dry_run: bool = False,
    folder: Path | None = None,
) -> list[tuple[Path, str]]:
    """Delete what is damaged, and entries of another generator, triton or GPU than the given or older than `days`.

    None keeps entries of every value.  Returns the files with the reason; with `dry_run` they stay.
    """
    wanted = {"generator": generator, "triton": triton, "gpu": gpu}

    def reason(path: Path) -> str | None:
        try:
            stored = read(path)
            if stored is None:
                return None
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # it may be a good one
                raise error.__cause__ from None
            return error.message
        other = [n for n, value in wanted.items() if value is not None and getattr(stored.key, n) != value]
        if other:
            return ", ".join(f"{n} is {getattr(stored.key, n)}" for n in other)
        age = stored.entry.age_days
        if days is not None and age is not None and age > days:
            return f"it is {age:.0f} days old"
        return None

    gone = []
    for path in _files(folder):
        try:
            with path_lock(path):  # nobody writes a good entry between the reading and the deleting
                why = reason(path)
                if why and not dry_run:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays: %s", path, error)
            continue
        if why:
            gone.append((path, why))
    return gone + _lost(folder or schedules_dir(), dry_run=dry_run)


def _files(folder: Path | None) -> list[Path]:
    folder = folder or schedules_dir()
    try:
        return sorted(p for p in folder.glob("*.json") if not p.name.startswith("."))
    except OSError as error:
        log.warning("%s cannot be read: %s", folder, error)
        return []


def _lost(folder: Path, *, dry_run: bool) -> list[tuple[Path, str]]:
    """Files that a killed process was writing."""
    found = []
    for path in sorted(folder.glob(".*.json.*")):
        try:
            if time.time() - path.stat().st_mtime > LOST_SECONDS:
                if not dry_run:
                    path.unlink(missing_ok=True)
                found.append((path, "its writer is gone"))
        except OSError as error:
            log.warning("%s stays: %s", path, error)
    return found


def _ignored(path: Path, error: InputError | ScheduleError) -> None:
    log.warning("%s is ignored: %s", path, error.message)
