"""The guides of docs/ are true: their Python runs, in order, their commands print what they show, their specs are read.

A small checkpoint stands in the place of the reader's.
"""

import re
from pathlib import Path

import pytest
import typer

from splagen.cli import app
from splagen.spec import from_toml
from tests.hf.models import llama
from tests.test_readme import BLOCK, ROOT, check_output, console, run_blocks, run_in, words

GUIDE = (ROOT / "docs/use_in_a_model.md").read_text(encoding="utf-8")
PRINTED = {
    "your_own_functions": ["phi_k[b h J C n d] = log1p(exp(k))"],
    "serve": ["[7, 3]", "[6, 6]"],
    "tune": [],
}
GUIDES = {name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in PRINTED}


def test_every_block_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    llama().float().save_pretrained(tmp_path / "my-llama")
    printed = run_blocks(GUIDE, tmp_path, TRITON_INTERPRET="0").splitlines()
    assert printed[0] == "torch.Size([1, 104])"
    assert printed[1] == "['model.layers.0.self_attn.splagen.gamma_r']"
    assert printed[-2:] == ["5", "('dense', 'window', 'spla', 'window', 'window', 'spla')"]


def test_a_converted_model_generates_within_ten_lines() -> None:
    first = BLOCK.findall(GUIDE)[0][1]
    assert "generate(" in first
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


def test_the_version_that_is_named_is_the_one_that_is_required() -> None:
    (named,) = re.findall(r"tested with transformers ([\d.]+)", GUIDE)
    assert f"transformers>={named}," in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", GUIDES)
def test_blocks_of_a_guide_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python first, and commands in the folder where it ran."""
    printed = run_blocks(GUIDES[name], tmp_path, TRITON_INTERPRET="1").splitlines()
    assert [" ".join(line.split()) for line in printed] == PRINTED[name]
    for command, lines in console(GUIDES[name]):
        if words(command)[0] == "plot":
            pytest.importorskip("matplotlib")
        check_output(run_in(tmp_path, command, monkeypatch), lines)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GUIDES)
def test_blocks_of_a_guide_run_on_a_gpu(name: str, tmp_path: Path) -> None:
    run_blocks(GUIDES[name], tmp_path, TRITON_INTERPRET="0")


@pytest.mark.parametrize("name", GUIDES)
def test_specs_and_requests_of_a_guide_are_accepted(name: str) -> None:
    """Commands that need a GPU or minutes are parsed; links lead somewhere."""
    for language, text in BLOCK.findall(GUIDES[name]):
        if language == "toml":
            from_toml(text)
        elif language == "sh":
            for command in text.splitlines():
                command_name, *arguments = words(command)
                chosen = typer.main.get_command(app).commands[command_name]  # type: ignore[attr-defined]
                chosen.make_context(command_name, arguments)
    for target in re.findall(r"\]\(([\w/.]+)\)", GUIDES[name]):
        assert (ROOT / "docs" / target).exists(), target
