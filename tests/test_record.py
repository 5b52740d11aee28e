"""Records: the digest sees every source byte, the file is whole, sorted and carries its circumstances."""

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks import record


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, text in {
        "splagen/z.py": "z",
        "splagen/ir/a.py": "a",
        "splagen/tuned/b.json": "b",
        "templates/k.jinja": "k",
        "templates/README.md": "not a source",
        "splagen/notes.txt": "not a source",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_digest_is_over_path_and_bytes_in_path_order(tree: Path) -> None:
    files = {"splagen/ir/a.py": "a", "splagen/tuned/b.json": "b", "splagen/z.py": "z", "templates/k.jinja": "k"}
    want = hashlib.sha256(b"".join(f"{path}\0{text}\0".encode() for path, text in files.items()))
    assert record.source_digest(tree) == want.hexdigest()


def test_digest_ignores_everything_else(tree: Path) -> None:
    before = record.source_digest(tree)
    (tree / "templates/README.md").write_text("changed")
    assert record.source_digest(tree) == before


def test_digest_sees_a_byte_that_moves_between_files(tree: Path) -> None:
    before = record.source_digest(tree)
    (tree / "splagen/z.py").write_text("")
    (tree / "splagen/ir/a.py").write_text("az")
    assert record.source_digest(tree) != before


def test_a_record_carries_digest_and_environment_with_sorted_keys(tmp_path: Path) -> None:
    path = record.write("speed", {"b": 2.5, "a": [1, 2]}, tmp_path / "results")
    text = path.read_text()
    loaded = json.loads(text)
    assert path.name == "speed.json"
    assert loaded["figures"] == {"a": [1, 2], "b": 2.5}
    assert loaded["source_digest"] == record.source_digest()
    assert loaded["environment"].keys() == {"date", "gpu", "driver", "cuda", "torch", "triton", "python"}
    assert text == json.dumps(loaded, sort_keys=True, indent=1) + "\n"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = record.write("speed", {"ms": 1.0}, tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write("speed", {"ms": float("nan")}, tmp_path)
    with pytest.raises(TypeError):
        record.write("speed", {"ms": object()}, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]
