"""Ranks of a job have the Schedules of rank 0: two processes over gloo, each with a cache of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANK = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from splagen import errors
from splagen.autotune import tuner
from tests.autotune.test_tuner import EFFORT, FakeBench, SHAPE, target, tuned, H200

rank, folder, fails = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
os.environ["SPLAGEN_CACHE_DIR"] = str(folder / f"cache{rank}")
meet, wait = f"file://{folder}/meet", timedelta(seconds=90)
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=wait)
tuner.Bench, tuned.this_device = FakeBench, lambda: H200

def verify(*_):
    if fails:
        raise errors.WrongResult("dq is wrong")

tuner._verify = verify
wanted = target("spla", folder / f"out{rank}")
try:
    found = tuner.tune(wanted, SimpleNamespace(), effort=EFFORT)
except errors.SplagenError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error.message}"}))
else:
    schedules = {name: dict(s) for name, s in found.schedules.items()}
    sizes = tuner.Bucket.of(wanted.spec, SHAPE)
    taken = tuned.TunedSchedules(wanted.spec).get(("bf16", sizes.length, sizes.batch), {})
    print(json.dumps({"found": schedules, "taken": taken, "searched": bool(found.results)}))
"""


def job(folder: Path, outcome: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder), outcome], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]


@pytest.mark.timeout(150)
def test_every_rank_has_what_the_first_found_in_its_cache(tmp_path: Path) -> None:
    first, second = job(tmp_path, "succeeds")
    assert (first["searched"], second["searched"]) == (True, False)
    assert second["found"] == first["found"]
    assert second["taken"] == first["taken"] == first["found"]


@pytest.mark.timeout(150)
def test_a_failure_of_the_first_ends_all(tmp_path: Path) -> None:
    first, second = job(tmp_path, "fails")
    assert first == {"error": "WrongResult: dq is wrong"}
    assert second == {"error": "TuningError: rank 0 found no Schedules: dq is wrong"}
