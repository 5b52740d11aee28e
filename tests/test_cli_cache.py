"""splagen cache: what it lists, explains, deletes and exchanges; and that generating never looks at it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splagen import pipeline
from splagen.autotune import cache as tuned
from splagen.autotune.device import DEVICES
from splagen.autotune.entry import Entry, now
from splagen.autotune.key import Bucket, Key, key_of
from splagen.autotune.space import spaces
from splagen.spec import read_spec
from tests.test_cli import ROOT, SMALL, document, refused, run

SPEC = read_spec(SMALL)
H200 = DEVICES["NVIDIA H200"]
ENTRY = Entry({"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}, 0.25, 0.01, "quick", now())


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fill(length: int = 1024, batch: int = 4) -> list[Key]:
    """An entry for every kernel of SPEC, and for every choice among them."""
    part = pipeline.kernels(SPEC)
    keys = [key_of(SPEC, k, "bf16", Bucket(length, batch), H200) for k in (*part.kernels, *part.strategies)]
    for key in keys:
        tuned.put(key, ENTRY)
    return keys


def explained(*arguments: object) -> dict[str, dict[str, object]]:
    result = run("cache", "explain", SMALL, "--gpu", "H200", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return {k["kernel"]: k for k in document(result)["kernels"]}


def test_explain_of_decoding_asks_for_its_kernels_and_its_splits() -> None:
    part = pipeline.decode_kernels(SPEC)
    tuned.put(key_of(SPEC, part.splitting, "bf16", Bucket(4096, 4), H200), ENTRY)
    found = explained("--decode", "--shape", "4,2,4096")
    assert {n for n, k in found.items() if k["hit"]} == {"splitting"}
    assert found.keys() == {"score", "select", "attend", "merge", "splitting"}
    assert not any(k["hit"] for n, k in explained().items())
    tuned.put(key_of(SPEC, part.splitting, "bf16", Bucket(256, 4), H200), ENTRY)
    assert explained("--decode", "--shape", "4,2,100")["splitting"]["hit"]  # of a cache, whose pages have 256 tokens


def test_ls_lists_every_entry() -> None:
    empty = run("cache", "ls")
    assert empty.exit_code == 0
    assert "no tuned Schedules in " in empty.stdout
    assert document(run("cache", "ls", "--json"))["entries"] == []
    keys = fill()
    found = document(run("cache", "ls", "--json"))
    assert {Key(**e["key"]) for e in found["entries"]} == set(keys)
    assert all(Entry(**e["value"]) == ENTRY for e in found["entries"])
    shown = run("cache", "ls").stdout
    assert "BLOCK_M=64 warps=4 stages=2" in shown
    assert "NVIDIA H200" in shown


def test_names_from_files_have_no_markup() -> None:
    tuned.put(replace(fill()[0], gpu="[bold]name[/nothing]"), ENTRY)
    assert "[bold]name[/nothing]" in run("cache", "ls").stdout


def test_explain_says_hit_or_what_differs() -> None:
    assert not any(k["hit"] for k in explained().values())
    assert "the cache has no entry" in run("cache", "explain", SMALL, "--gpu", "H200").stdout
    fill()
    assert all(k["hit"] and k["found"]["ms"] == 0.25 for k in explained().values())  # type: ignore[index]
    assert all(k["hit"] for k in explained("--shape", "2,4,1000").values())
    (only,) = explained("--shape", "1,2,5000", "--kernel", "score_topk").values()
    assert only["differs"] == ["length", "batch"]
    assert explained("--dtype", "fp16")["score_lse"]["differs"] == ["dtype"]
    shown = run("cache", "explain", SMALL, "--gpu", "B200", "--kernel", "score_lse").stdout
    assert "miss" in shown
    assert "gpu: NVIDIA H200 there, NVIDIA B200 here, arch: sm_90 there, sm_100 here" in shown


def test_explain_says_that_an_entry_is_damaged() -> None:
    key = fill()[0]
    tuned.path_of(key).write_text("{")
    found = explained("--shape", "2,4,1000")[key.kernel]
    assert not found["hit"]
    assert "not JSON" in str(found["damaged"])


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    assert "--gpu NAME, of NVIDIA H200" in refused("cache", "explain", SMALL)
    assert "names 0 known GPUs" in refused("cache", "explain", SMALL, "--gpu", "TPU")
    assert "names 4 known GPUs" in refused("cache", "explain", SMALL, "--gpu", "nvidia")
    assert "unknown kernel" in refused("cache", "explain", SMALL, "--gpu", "H200", "--kernel", "forward")
    assert "unknown dtype" in refused("cache", "explain", SMALL, "--gpu", "H200", "--dtype", "fp8")
    assert "multiple of 2" in refused("cache", "explain", SMALL, "--gpu", "H200", "--shape", "1,3,9")
    assert "cannot read" in refused("cache", "explain", tmp_path / "nothing.toml", "--gpu", "H200")
    assert "no GPU" in refused("cache", "prune", "--other-gpus")
    assert "there is no file" in refused("cache", "import", tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    assert "no bundle" in refused("cache", "import", tmp_path / "other.json")
    assert "no bundle" in document(run("cache", "import", tmp_path / "other.json", "--json"))["error"]


def test_prune_deletes_other_versions_and_damaged_entries() -> None:
    keys = fill()
    old = replace(keys[0], triton="3.0.0")
    tuned.put(old, ENTRY)
    tuned.path_of(keys[1]).write_text("{")
    found = document(run("cache", "prune", "--dry-run", "--json"))
    assert {Path(p["path"]).name for p in found["pruned"]} == {tuned.path_of(k).name for k in (old, keys[1])}
    assert "triton is 3.0.0" in run("cache", "prune").stdout
    assert len(tuned.entries()) == len(keys) - 1
    assert "nothing to delete" in run("cache", "prune").stdout
    assert len(document(run("cache", "prune", "--older-than", 0, "--json"))["pruned"]) == len(keys) - 1


def test_export_and_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(fill())
    bundle = tmp_path / "bundle.json"
    assert document(run("cache", "export", bundle, "--json")) == {"path": str(bundle), "exported": count}
    assert f"{count} tuned Schedules in" in run("cache", "export", bundle).stdout
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path / "other"))
    found = document(run("cache", "import", bundle, "--json"))
    assert found == {"path": str(bundle), "added": count, "replaced": 0, "kept": 0, "refused": 0}
    assert f"0 added, 0 replaced, {count} kept, 0 refused" in run("cache", "import", bundle).stdout
    assert all(k["hit"] for k in explained().values())


@pytest.mark.parametrize("name", ["small", "sse_gla"])
def test_generate_does_not_look_at_the_cache(name: str, tmp_path: Path) -> None:
    """The same bytes with an empty cache and with one that has another Schedule for every kernel and GPU."""
    path = ROOT / f"examples/specs/{name}.toml"
    spec = read_spec(path)

    def digest(out: Path) -> str:
        return hashlib.sha256(
            Path(document(run("generate", path, "--out", out, "--json"))["path"]).read_bytes()
        ).hexdigest()

    before = digest(tmp_path / "before")
    part = pipeline.kernels(spec)
    for device in DEVICES.values():
        for name, space in spaces(spec, part, device, "bf16").items():
            kernel = next(k for k in (*part.kernels, *part.strategies) if k.name == name)
            other = next(s for s in space.all() if s != space.default)
            tuned.put(key_of(spec, kernel, "bf16", Bucket(1024, 4), device), replace(ENTRY, schedule=other))
    assert len(tuned.entries()) == len(DEVICES) * len((*part.kernels, *part.strategies))
    assert digest(tmp_path / "after") == before
