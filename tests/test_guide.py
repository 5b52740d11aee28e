"""docs/use_in_a_model.md is true: its Python runs, in order, on a small checkpoint in the place of the reader's."""

import re
from pathlib import Path

import pytest

from tests.hf.models import llama
from tests.test_readme import BLOCK, ROOT, run_blocks

GUIDE = (ROOT / "docs/use_in_a_model.md").read_text(encoding="utf-8")


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
