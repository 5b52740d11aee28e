"""The cache: a hit for the same key and a named miss for every other; damaged files are misses and one line each."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splagen.autotune import cache as tuned
from splagen.autotune.entry import ENTRY_BYTES, Entry, now
from splagen.codegen.schedule import Schedule
from splagen.errors import InputError, ScheduleError
from tests.autotune.examples import ENTRY, KEY, OTHER
from tests.autotune.examples import entries as any_entry
from tests.autotune.examples import keys as any_key


def test_what_was_put_is_got() -> None:
    assert tuned.get(KEY) is None
    assert tuned.entries() == []
    assert tuned.put(KEY, ENTRY)
    assert tuned.get(KEY) == ENTRY
    better = replace(ENTRY, ms=0.125)
    assert tuned.put(KEY, better)
    assert tuned.get(KEY) == better
    assert [(s.key, s.entry, s.path) for s in tuned.entries()] == [(KEY, better, tuned.path_of(KEY))]


@given(key=any_key(), entry=any_entry())
def test_any_entry_survives_the_file(key: Any, entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("schedules")
    assert tuned.put(key, entry, folder=folder)
    assert tuned.get(key, folder=folder) == entry
    assert tuned.explain(key, folder=folder).found == entry


def test_every_field_of_a_key_has_another_value() -> None:
    assert OTHER.keys() == asdict(KEY).keys()


@pytest.mark.parametrize("field", OTHER)
def test_a_changed_field_is_a_miss_that_explain_names(field: str) -> None:
    tuned.put(KEY, ENTRY)
    asked = replace(KEY, **{field: OTHER[field]})
    assert tuned.get(asked) is None
    assert tuned.explain(asked) == tuned.Explanation(None, KEY, (field,))
    assert tuned.explain(KEY) == tuned.Explanation(ENTRY, KEY, ())
    assert tuned.explain(asked, free=frozenset({field})).found == ENTRY


def test_the_nearest_entry_is_of_the_same_kernel_and_spec() -> None:
    assert tuned.explain(KEY) == tuned.Explanation(None)
    tuned.put(replace(KEY, kernel="rows"), ENTRY)
    tuned.put(replace(KEY, triton="3.7.1", cuda="12.8", generator=9), ENTRY)
    assert tuned.explain(KEY).differs == ("generator", "triton", "cuda")
    tuned.put(replace(KEY, gpu="NVIDIA B200", arch="sm_100"), ENTRY)
    assert tuned.explain(KEY).differs == ("gpu", "arch")


# -- damaged files -----------------------------------------------------------------------------------------

VALUE = {"key": asdict(KEY), "value": asdict(ENTRY)}


def changed(**fields: object) -> bytes:
    """An entry whose value has these fields."""
    return json.dumps({**VALUE, "value": {**asdict(ENTRY), **fields}}).encode()


DAMAGED = {
    "empty": b"",
    "truncated": json.dumps(VALUE).encode()[:-20],
    "null": b"null",
    "number": b"7",
    "list": b"[]",
    "no value": json.dumps({"key": asdict(KEY)}).encode(),
    "other key": json.dumps({**VALUE, "key": {**asdict(KEY), "gpu": "another"}}).encode(),
    "key is text": json.dumps({**VALUE, "key": "key"}).encode(),
    "unknown field": changed(extra=1),
    "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 30_000,
    "long": b" " * (ENTRY_BYTES + 1),
    "huge number": b'{"key": ' + b"9" * 10_000 + b"}",
    "no Schedule": changed(schedule={}),
    "Schedule of text": changed(schedule={"num_warps": "4"}),
    "Schedule of truth": changed(schedule={"num_warps": True}),
    "unknown name": changed(schedule={"num_ctas": 2}),
    "argument": changed(schedule={"q_ptr": 2}),
    "range": changed(schedule={"num_warps": 4096}),
    "negative": changed(schedule={"BLOCK_M": -64}),
    "fraction": changed(schedule={"BLOCK_M": 64.0}),
    "NaN": changed(ms=float("nan")),
    "infinite": changed(ms=float("inf")),
    "no time": changed(found="yesterday"),
    "time without a zone": changed(found="2026-11-02T12:00:00"),
    "escape": changed(found="2026-11-02\x1b12:00:00+00:00"),
    "effort": changed(effort="a\nb"),
    "pickle": b"\x80\x04\x95cos\nsystem\n",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_entry_is_a_miss_with_one_line(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.path_of(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert tuned.get(KEY) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert tuned.entries() == []
    why = tuned.explain(KEY)
    assert why.found is None
    assert why.damaged
    assert tuned.put(KEY, ENTRY)
    assert tuned.get(KEY) == ENTRY


@given(data=st.binary() | st.text().map(str.encode) | st.integers(0, 400).map(lambda n: changed()[:n]))
def test_garbage_is_never_an_exception(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("schedules")
    tuned.path_of(KEY, folder).write_bytes(data)
    assert tuned.get(KEY, folder=folder) is None
    assert tuned.entries(folder=folder) == []
    assert tuned.explain(KEY, folder=folder).damaged
    assert len(tuned.prune(folder=folder)) == 1
    assert list(folder.iterdir()) == []


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.just({})


@given(field=st.sampled_from(sorted(asdict(ENTRY))), value=leaves | st.dictionaries(st.text(), leaves))
def test_a_value_of_the_wrong_kind_is_refused(field: str, value: object) -> None:
    try:
        found = Entry(**{**asdict(ENTRY), field: value})
    except InputError:
        return
    assert type(getattr(found, field)) in {type(getattr(ENTRY, field)), int}


def test_a_folder_or_an_unreadable_file_in_the_way_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    tuned.path_of(KEY).mkdir(parents=True)
    assert tuned.get(KEY) is None
    assert not tuned.put(KEY, ENTRY)
    assert tuned.entries() == []
    assert "not stored" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path / "plain" / "cache"))
    assert tuned.get(KEY) is None
    assert not tuned.put(KEY, ENTRY)
    assert tuned.get_or_find(KEY, lambda: ENTRY) == ENTRY
    assert tuned.entries() == []
    assert tuned.prune() == []


def test_a_schedule_that_the_kernel_does_not_take_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    tuned.put(KEY, ENTRY)

    def check(_: object) -> None:
        raise ScheduleError("BLOCK_M=64 is too much")

    assert tuned.get(KEY, check=check) is None
    assert "BLOCK_M=64 is too much" in caplog.text
    assert tuned.get_or_find(KEY, lambda: replace(ENTRY, ms=1.0), check=check).ms == 1.0


def test_get_or_find_finds_once_and_lets_errors_pass() -> None:
    found: list[int] = []

    def find() -> Entry:
        found.append(1)
        if len(found) == 1:
            raise RuntimeError("the first fails")
        return ENTRY

    with pytest.raises(RuntimeError):
        tuned.get_or_find(KEY, find)
    assert tuned.get_or_find(KEY, find) == ENTRY
    assert tuned.get_or_find(KEY, find) == ENTRY
    assert len(found) == 2


@pytest.mark.parametrize("data", [b"{", changed(ms=0.0)])
def test_a_damaged_entry_is_said_once_and_found_anew(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tuned.put(KEY, ENTRY)
    tuned.path_of(KEY).write_bytes(data)
    assert tuned.get_or_find(KEY, lambda: ENTRY) == ENTRY
    assert len(caplog.records) == 1
    assert tuned.get(KEY) == ENTRY


def test_entries_that_do_not_go_together_are_found_together(caplog: pytest.LogCaptureFixture) -> None:
    keys = {name: replace(KEY, kernel=name) for name in ("states1", "gradient1", "dvalues1")}
    calls: list[int] = []

    def find() -> dict[str, Entry]:
        calls.append(1)
        return {name: replace(ENTRY, schedule={"CHUNK": 64}) for name in keys}

    def check(schedules: Mapping[str, Schedule]) -> None:
        if len({s["CHUNK"] for s in schedules.values()}) > 1:
            raise ScheduleError("they need one CHUNK")

    def ask() -> set[int]:
        return {e.schedule["CHUNK"] for e in tuned.get_or_find_together(keys, find, check=check).values()}

    assert (ask(), ask(), len(calls)) == ({64}, {64}, 1)
    tuned.path_of(keys["states1"]).unlink()  # a part is missing
    assert (ask(), len(calls)) == ({64}, 2)
    assert not caplog.records
    tuned.put(keys["gradient1"], replace(ENTRY, schedule={"CHUNK": 32}))  # of another search
    assert (ask(), len(calls)) == ({64}, 3)
    assert [r.message for r in caplog.records if "they need one CHUNK" in r.message]
    assert len(caplog.records) == 1


# -- prune -------------------------------------------------------------------------------------------------


def days_ago(days: float) -> str:
    from datetime import datetime, timedelta, timezone

    return (datetime.now(timezone.utc) - timedelta(days=days)).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, set()),
        ({"generator": 1}, {"generator"}),
        ({"triton": "3.6.0"}, {"triton"}),
        ({"gpu": "NVIDIA H200"}, {"gpu"}),
        ({"days": 30}, {"old"}),
        ({"days": 0.5, "generator": 1, "triton": "3.6.0", "gpu": "NVIDIA H200"}, {"generator", "triton", "gpu", "old"}),
    ],
)
def test_prune_deletes_what_it_is_asked_to_and_what_is_damaged(options: dict[str, Any], gone: set[str]) -> None:
    kept = {name: replace(KEY, **{name: OTHER[name]}) for name in ("generator", "triton", "gpu")}
    kept |= {"same": KEY, "old": replace(KEY, length=1)}
    for name, key in kept.items():
        tuned.put(key, replace(ENTRY, found=days_ago(31) if name == "old" else now()))
    damaged = tuned.schedules_dir() / "0.json"
    damaged.write_text("{")
    lost = tuned.schedules_dir() / ".1.json.0123"
    lost.write_text("{")
    os.utime(lost, (time.time() - 7200,) * 2)
    fresh = lost.with_name(".2.json.0123")
    fresh.write_text("{")
    wanted = {tuned.path_of(kept[name]) for name in gone} | {damaged, lost}
    assert {path for path, _ in tuned.prune(**options, dry_run=True)} == wanted
    assert len(tuned.entries()) == len(kept)
    assert {path for path, _ in tuned.prune(**options)} == wanted
    assert {s.key for s in tuned.entries()} == {key for name, key in kept.items() if name not in gone}
    assert fresh.exists()
    assert not damaged.exists()
    assert not lost.exists()


@pytest.mark.parametrize("call", [tuned.entries, tuned.prune, lambda: tuned.explain(KEY)])
def test_an_empty_cache_is_no_error(call: Callable[[], object]) -> None:
    assert call() in ([], tuned.Explanation(None))
