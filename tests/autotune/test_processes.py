"""Sixteen processes tune and read one directory, and one of them is killed in the middle of a write."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import asdict, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from splagen.autotune import cache as tuned
from splagen.autotune.entry import Entry, text
from splagen.autotune.key import Key
from tests.autotune.examples import ENTRY, KEY

PROCESSES, KEYS = 16, 12
FIND_SECONDS = 0.02


def key(number: int) -> Key:
    return replace(KEY, length=1 << number)


def fake(number: int) -> Entry:
    """What a fake timer finds for a key."""
    return replace(ENTRY, schedule={"BLOCK_M": 16 + number, "num_warps": 4}, ms=1 + number / 8)


def find(number: int, log: Path) -> Entry:
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
        file.write(f"{number}\n")
    time.sleep(FIND_SECONDS)
    return fake(number)


def tune(worker: int, log: Path, start: Event, wrong: Any) -> None:
    """Ask for every key, each process from another one on; the directory is read all the while."""
    start.wait()
    for i in range(KEYS):
        number = (worker + i) % KEYS
        found = tuned.get_or_find(key(number), lambda number=number: find(number, log))  # type: ignore[misc]
        if found != fake(number) or tuned.get(key(number)) != found:
            wrong.put((worker, number, asdict(found)))
        for stored in tuned.entries():
            if stored.entry != fake(stored.key.length.bit_length() - 1):
                wrong.put((worker, asdict(stored.key), asdict(stored.entry)))


def die_while_writing(number: int, log: Path, writing: Event) -> None:
    """Write half of an entry and hang there, with every lock held."""

    def half(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        writing.set()
        time.sleep(3600)

    os.fsync = half
    tuned.get_or_find(key(number), lambda: find(number, log))


def test_nothing_is_lost_and_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "found.txt"
    tuned.put(key(3), fake(3))
    whole = text(key(4), fake(4))
    tuned.path_of(key(4)).write_text(whole[: len(whole) // 2])
    tuned.path_of(key(5)).write_bytes(os.urandom(500))
    tuned.path_of(key(6)).write_text(text(key(7), fake(7)))
    (tuned.schedules_dir() / "notes.json").write_text("[]")

    context = multiprocessing.get_context("spawn")
    start, writing, wrong = context.Event(), context.Event(), context.Queue()
    victim = context.Process(target=die_while_writing, args=(0, log, writing))
    others = [context.Process(target=tune, args=(n, log, start, wrong)) for n in range(PROCESSES - 1)]
    victim.start()
    for process in others:
        process.start()
    assert writing.wait(60)
    start.set()
    time.sleep(0.5)  # the others meet the locks
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert [p.exitcode for p in others] == [0] * len(others)
    assert wrong.empty()

    searches = Counter(map(int, log.read_text().split()))
    assert searches == {n: 2 if n == 0 else 1 for n in range(KEYS) if n != 3}
    assert {s.key: s.entry for s in tuned.entries()} == {key(n): fake(n) for n in range(KEYS)}
    (left,) = tuned.schedules_dir().glob(".*")  # what the victim was writing
    monkeypatch.setattr(tuned, "LOST_SECONDS", -1)
    assert {p.name for p, _ in tuned.prune()} == {left.name, "notes.json"}
    assert len(list(tuned.schedules_dir().iterdir())) == KEYS
