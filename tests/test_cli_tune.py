"""splagen tune: what it prints of a search, and its exit status."""

from pathlib import Path
from typing import Any

import pytest

from splagen import pipeline, tuning
from splagen.autotune.entry import Entry, now
from splagen.autotune.search import Lost, Measurement, Result, Trial
from splagen.autotune.tuner import Tuned
from tests.test_cli import SMALL, document, run

DEFAULT, BEST = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}, {"BLOCK_M": 32, "num_warps": 2, "num_stages": 1}
TRIALS = (
    Trial(DEFAULT, Measurement(2.0, 0.1)),
    Trial(BEST, Measurement(1.0, 0.05)),
    Trial({**BEST, "num_warps": 8}, Lost("out of resources", "shared memory")),
)
FOUND = Tuned(
    {"rows": Entry(BEST, 1.0, 0.05, "quick", now())}, {"rows": Result("rows", BEST, Measurement(1.0, 0.05), TRIALS)}
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What the command asks of `tuning.tune`, which answers FOUND or what `answer` holds."""
    calls: list[dict[str, Any]] = []

    def tune(library: pipeline.Library, **options: Any) -> list[Tuned]:
        calls.append({**options, "library": library})
        return [options.pop("answer", FOUND) for _ in options["shapes"]]

    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "tune", tune)
    return calls


def test_a_table_has_what_was_tried_and_what_was_gained(asked: list[dict[str, Any]]) -> None:
    result = run("tune", SMALL, "--shape", "1,2,99", "--effort", "full", "--seconds", "7", "--alike", "0.9")
    assert result.exit_code == 0, result.output
    assert "2.0000" in result.stdout
    assert "1.0000" in result.stdout
    assert "BLOCK_M=32 warps=2 stages=1" in result.stdout
    (call,) = asked
    assert call["shapes"] == [(1, 2, 99)]
    assert (call["effort"], call["seconds"], call["force"], call["alike"]) == ("full", 7.0, False, 0.9)


def test_decode_tunes_the_module_of_decoding(asked: list[dict[str, Any]]) -> None:
    result = run("tune", SMALL, "--decode", "--shape", "16,2,4096")
    assert result.exit_code == 0, result.output
    (call,) = asked
    assert isinstance(call["library"], pipeline.DecodingLibrary)
    assert call["shapes"] == [(16, 2, 4096)]
    sse = run("tune", "examples/specs/sse_gla.toml", "--decode", "--shape", "1,2,99")
    assert (sse.exit_code, len(asked)) == (2, 1)
    assert "sse_gla_step" in sse.stderr


@pytest.mark.usefixtures("asked")
def test_a_document_has_every_trial() -> None:
    result = run("tune", SMALL, "--shape", "1,2,99", "--shape", "2,2,64", "--json")
    found = document(result)
    assert [s["shape"] for s in found["shapes"]] == [[1, 2, 99], [2, 2, 64]]
    (kernel,) = found["shapes"][0]["kernels"]
    assert kernel["schedule"] == BEST
    assert kernel["trials"][0] == {"schedule": DEFAULT, "ms": 2.0, "spread": 0.1}
    assert kernel["trials"][2]["reason"] == "out of resources"


@pytest.mark.usefixtures("asked")
def test_a_wrong_schedule_is_named_and_the_status_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Tuned(FOUND.entries, FOUND.results, [("rows", BEST, "differs by 4.0e-02")])
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [wrong])
    result = run("tune", SMALL, "--shape", "1,2,99")
    assert result.exit_code == 1
    assert "rows with {'BLOCK_M': 32" in result.stderr
    assert "4.0e-02" in result.stderr


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("tune", SMALL, "--shape", "1,2,99")
    assert result.exit_code == 2
    assert "torch finds no GPU here" in result.stderr


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("more", "message"), [(["--dtype", "int8"], "unknown dtype 'int8'"), (["--shape", "1,2"], "three whole numbers")]
)
def test_a_wrong_request_is_one_error(more: list[str], message: str) -> None:
    result = run("tune", SMALL, "--shape", "1,2,99", *more)
    assert result.exit_code == 2
    assert message in result.stderr
