"""splagen plot selection: the numbers that it writes, that the picture shows them, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

from splagen.block_attention import coverage
from splagen.spec import read_spec
from tests.test_block_attention import rows
from tests.test_cli import SEQUENCE, document, refused, run

SPEC = """name = "tiny"
head_dim = 16
group_size = 2
[select]
block_size = 16
budget = 2
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def qk(tmp_path: Path) -> Path:
    q, k = rows()
    torch.save({"q": q, "k": k}, tmp_path / "layer.pt")
    return tmp_path / "layer.pt"


def test_numbers_stand_beside_a_picture_that_shows_all_kinds_of_blocks(spec: Path, qk: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import colors, image

    from splagen.cli_plot import KINDS

    out = tmp_path / "pictures/choice.png"
    result = run("plot", "selection", spec, "--qk", qk, "--out", out, "--json", "--tiles", 25)
    assert result.exit_code == 0, result.output
    printed = document(result)
    assert printed == {"path": str(out), **json.loads(out.with_suffix(".json").read_text())}
    want = coverage(read_spec(spec), *rows(), tiles=25)
    assert (printed["length"], printed["block_size"], printed["positions"]) == (151, 16, want.positions.tolist())
    for h, row in enumerate(printed["heads"]):
        assert row["head"] == h
        assert row["covered"] == want.covered[h].tolist()
        assert row["mean"]["forced"] == pytest.approx(float(want.forced_share[h].mean()))
        assert [(i, j) for i, chosen in enumerate(row["chosen"]) for j in chosen] == [
            (i, j) for i, j in want.free[h].nonzero().tolist()
        ]
    pixels = torch.tensor(image.imread(out)[..., :3])
    left, right = pixels[:, : pixels.shape[1] * 3 // 5].flatten(0, 1), pixels[:, pixels.shape[1] * 3 // 5 :]
    for colour in KINDS.values():
        close = (left - torch.tensor(colors.to_rgb(colour))).abs().amax(1) < 0.02
        assert close.float().mean() > 0.01, colour
    assert (right.flatten(0, 1) - torch.tensor(colors.to_rgb(KINDS["chosen"]))).abs().amax(1).min() < 0.02


def test_one_head_has_its_number_and_a_table(spec: Path, qk: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "one.png"
    result = run("plot", "selection", spec, "--qk", qk, "--out", out, "--head", 1, "--tiles", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith(str(out))
    (row,) = json.loads(out.with_suffix(".json").read_text())["heads"]
    assert row["head"] == 1
    assert f"{row['mean']['covered']:.4f}" in result.stdout


def test_wrong_requests_leave_nothing(spec: Path, qk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = tmp_path / "sse.toml"
    sequence.write_text(SEQUENCE)
    out = tmp_path / "out/choice.png"
    given = ("--qk", qk, "--out", out, "--tiles", 2)
    assert "no PNG" in refused("plot", "selection", spec, "--qk", qk, "--out", tmp_path / "choice.pdf")
    assert "selects no blocks" in refused("plot", "selection", sequence, *given)
    assert "KV head 7 of 2" in refused("plot", "selection", spec, *given, "--head", 7)
    assert "cannot read" in refused("plot", "selection", spec, "--qk", tmp_path / "none.pt", "--out", out)
    assert run("plot", "selection", spec, "--out", out).exit_code == 2  # no rows are made up
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(
        "plot", "selection", spec, "--qk", qk, "--out", tmp_path / "file/a.png", "--tiles", 2
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -e '.[plot]'" in refused("plot", "selection", spec, *given)
    assert not out.parent.exists()
