"""A tuned Schedule as it is stored.

Files are not trusted: every name and number is checked, and nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from splagen.autotune.key import Key, is_text
from splagen.codegen.decoding import OVERLAPS
from splagen.codegen.schedule import Schedule
from splagen.errors import InputError

# What a Schedule may hold, with the least and the largest value.  Whether a kernel takes it is the Space's question.
RANGES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys((*(f"BLOCK_{x}" for x in "CDEMNRS"), "CHUNK"), (16, 65_536)),
    **dict.fromkeys(("score", "attend", "chunk"), (1, 65_536)),
    "num_warps": (1, 32),
    "num_stages": (1, 16),
    "maxnreg": (16, 255),
    "strategy": (0, 15),
    **dict.fromkeys(OVERLAPS, (0, 1)),
}
LONGEST_MS = 1e9
ENTRY_BYTES = 1 << 16


@dataclass(frozen=True)
class Entry:
    """What a search found.

    Attributes:
        schedule: the fastest Schedule.
        ms: its median time in milliseconds.
        spread: largest minus smallest time, in milliseconds.
        effort: name of the search's preset.
        found: when, ISO 8601 in UTC.
    """

    schedule: Schedule
    ms: float
    spread: float
    effort: str
    found: str

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, dict) or not self.schedule:
            raise InputError(f"a tuned Schedule is {self.schedule!r:.100}", "names with whole numbers")
        for name, value in self.schedule.items():
            low, high = RANGES.get(name, (1, 0))
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"a tuned Schedule has {name!r:.40} = {value!r:.40}")
        for name in ("ms", "spread"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < LONGEST_MS or (name == "ms" and value == 0):
                raise InputError(f"{name} of a tuned Schedule is {value!r:.100}", "milliseconds")
        if not is_text(self.effort):
            raise InputError(f"effort of a tuned Schedule is {self.effort!r:.100}")
        if not is_text(self.found) or self.age_days is None:
            raise InputError(f"found of a tuned Schedule is {self.found!r:.100}", "a time in UTC, ISO 8601")

    @property
    def age_days(self) -> float | None:
        """Days since it was found."""
        try:
            found = datetime.fromisoformat(self.found)
            return (datetime.now(timezone.utc) - found).total_seconds() / 86_400
        except (TypeError, ValueError, OverflowError):  # not a text, not a time, or one without a zone
            return None


@dataclass(frozen=True)
class Stored:
    """An entry with its key and its file."""

    key: Key
    entry: Entry
    path: Path


def now() -> str:
    """The time for `Entry.found`: UTC to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def parse(document: Any) -> tuple[Key, Entry]:
    """Key and entry of a JSON document.  Raises InputError for anything else."""
    if not isinstance(document, dict) or not {"key", "value"} <= document.keys():
        raise InputError("it has no key and value")
    made = []
    for cls, given in ((Key, document["key"]), (Entry, document["value"])):
        names = {f.name for f in fields(cls)}
        if not isinstance(given, dict) or given.keys() != names:
            other = sorted(names ^ given.keys()) if isinstance(given, dict) else "no fields"
            raise InputError(f"its {cls.__name__.lower()} does not have the fields of this version: {other!r:.200}")
        made.append(cls(**given))
    key, entry = made
    assert isinstance(key, Key)
    assert isinstance(entry, Entry)
    return key, entry


def read_json(path: Path, limit: int) -> Any:
    """The JSON document in a file, None where there is no file.

    Raises:
        InputError: it cannot be read, is longer than `limit` bytes or is not JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"it is longer than {limit} bytes")
        document = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"it cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {error!s:.200}") from error
    if document is None:
        raise InputError("it holds nothing")
    return document


def read(path: Path) -> Stored | None:
    """The entry in a file, None where there is no file.

    Raises:
        InputError: what lies there is no entry, or lies under the name of another key.
    """
    document = read_json(path, ENTRY_BYTES)
    if document is None:
        return None
    stored = Stored(*parse(document), path)
    if path.stem != stored.key.digest:
        raise InputError("it is the entry of another key")
    return stored


def document(key: Key, entry: Entry) -> dict[str, Any]:
    """The JSON form of an entry, which `parse` reads."""
    return {"key": asdict(key), "value": asdict(entry)}


def text(key: Key, entry: Entry) -> str:
    """The file of an entry."""
    return json.dumps(document(key, entry), indent=1, sort_keys=True) + "\n"
