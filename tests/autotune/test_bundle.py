"""Bundles: what is exported is imported, and nothing else."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splagen.autotune import cache as tuned
from splagen.autotune.bundle import FORMAT, Imported, export_bundle, import_bundle
from splagen.autotune.entry import Entry
from splagen.autotune.key import Key
from splagen.errors import GeneratedFileError, InputError
from tests.autotune.examples import ENTRY, KEY
from tests.autotune.examples import entries as any_entry
from tests.autotune.examples import keys as any_key


@given(stored=st.dictionaries(any_key(), any_entry(), max_size=5))
def test_export_and_import_are_a_round_trip(stored: dict[Key, Entry], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for key, entry in stored.items():
        tuned.put(key, entry, folder=folder)
    bundle, again = folder / "out" / "bundle.json", folder / "out" / "again.json"
    assert export_bundle(bundle, folder=folder) == len(stored)
    assert import_bundle(bundle, folder=other) == Imported(added=len(stored))
    assert {s.key: s.entry for s in tuned.entries(folder=other)} == stored
    assert export_bundle(again, folder=other) == len(stored)
    assert bundle.read_bytes() == again.read_bytes()
    assert import_bundle(bundle, folder=other) == Imported(kept=len(stored))


@pytest.mark.parametrize(
    ("mine", "theirs", "overwrite", "fate", "left"),
    [
        (0.2, 0.1, False, "replaced", 0.1),
        (0.1, 0.2, False, "kept", 0.1),
        (0.1, 0.1, False, "kept", 0.1),
        (0.1, 0.2, True, "replaced", 0.2),
        (None, 0.2, False, "added", 0.2),
    ],
)
def test_the_faster_entry_stays(
    mine: float | None, theirs: float, overwrite: bool, fate: str, left: float, tmp_path: Path
) -> None:
    tuned.put(KEY, replace(ENTRY, ms=theirs, effort="full"))
    export_bundle(tmp_path / "bundle.json")
    tuned.path_of(KEY).unlink()
    if mine:
        tuned.put(KEY, replace(ENTRY, ms=mine))
    assert import_bundle(tmp_path / "bundle.json", overwrite=overwrite) == Imported(**{fate: 1})
    found = tuned.get(KEY)
    assert found is not None
    assert found.ms == left


def test_a_damaged_entry_here_is_replaced(tmp_path: Path) -> None:
    tuned.put(KEY, ENTRY)
    export_bundle(tmp_path / "bundle.json")
    tuned.path_of(KEY).write_text("{")
    assert import_bundle(tmp_path / "bundle.json") == Imported(added=1)
    assert tuned.get(KEY) == ENTRY


BAD: list[Any] = [
    None,
    7,
    {},
    {"key": asdict(KEY)},
    {"key": asdict(KEY), "value": {**asdict(ENTRY), "schedule": {"num_warps": 3.5}}},
    {"key": asdict(KEY), "value": {**asdict(ENTRY), "ms": -1}},
    {"key": {**asdict(KEY), "kernel": "../../etc/passwd\n"}, "value": asdict(ENTRY)},
]


def test_entries_that_cannot_be_used_are_refused_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tmp_path / "bundle.json"
    good = {"key": asdict(KEY), "value": asdict(ENTRY)}
    bundle.write_text(json.dumps({"splagen_schedules": FORMAT, "entries": [*BAD, good]}))
    with caplog.at_level(logging.WARNING):
        assert import_bundle(bundle) == Imported(added=1, refused=len(BAD))
    assert len(caplog.records) == len(BAD)
    assert [s.key for s in tuned.entries()] == [KEY]


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{}", b'{"splagen_schedules": 99, "entries": []}', b"\xff", b"[" * 50_000],
)
def test_what_is_no_bundle_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(data)
    with pytest.raises(InputError, match="is no bundle of tuned Schedules"):
        import_bundle(tmp_path / "bundle.json")
    with pytest.raises(InputError, match="there is no file"):
        import_bundle(tmp_path / "nothing.json")


def test_a_bundle_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(GeneratedFileError, match="cannot write"):
        export_bundle(tmp_path / "plain" / "bundle.json")
