"""README is true: its Python runs, its commands print what it shows, its tables are those of the records."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import readme_tables
from splagen.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall(README)
SLOW = {"verify", "compile", "doctor"}  # they launch or compile kernels


def console(document: str) -> list[tuple[str, list[str]]]:
    """Every command of the console blocks, with the lines shown under it."""
    found: list[tuple[str, list[str]]] = []
    for language, text in BLOCK.findall(document):
        if language == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    found.append((line[2:], []))
                else:
                    found[-1][1].append(line)
    return found


def words(command: str) -> list[str]:
    program, *arguments = shlex.split(command)
    assert program == "splagen", command
    return arguments


QUICK = [entry for entry in console(README) if words(entry[0])[0] not in SLOW]
DEAR = [entry for entry in console(README) if entry not in QUICK]


def shown(line: str) -> re.Pattern[str]:
    """What a shown line must match: `...` is any text, a run of spaces any run of spaces."""
    parts = [re.escape(" ".join(part.split())) for part in line.split("...")]
    return re.compile(r"\s*.*?\s*".join(parts))


def check_output(output: str, lines: list[str]) -> None:
    """Each shown line is one of the output's, in order; a line of dots stands for any number of lines."""
    printed = iter(" ".join(line.split()) for line in output.splitlines())
    for line in lines:
        if line.strip() != "...":
            assert any(shown(line).match(p) for p in printed), f"README shows `{line}`; printed:\n{output}"


def run_in(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command in a folder that has the examples; what it prints."""
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, words(command))
    assert result.exit_code == 0, result.output
    return result.stdout


def run_blocks(text: str, folder: Path, **settings: str) -> str:
    """Run the Python blocks of a document in order, as one program in a folder; what it prints."""
    code = "".join(block for language, block in BLOCK.findall(text) if language == "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPLAGEN_CACHE_DIR": str(folder / "cache"), **settings}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    printed = run_blocks(README, tmp_path, TRITON_INTERPRET="1")
    assert printed.startswith("program spla\n")
    assert "torch.Size([1, 80, 2, 16])" in printed
    assert [path.name for path in (tmp_path / "kernels").glob("spla_*.py")]


def test_the_example_has_the_promised_length() -> None:
    first = next(text for language, text in BLOCKS if language == "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize(("command", "lines"), QUICK, ids=[c for c, _ in QUICK])
def test_commands_print_what_is_shown(
    command: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(run_in(tmp_path, command, monkeypatch), lines)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "lines"), DEAR, ids=[c for c, _ in DEAR])
def test_slow_commands_print_what_is_shown(
    command: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(run_in(tmp_path, command, monkeypatch), lines)


@pytest.mark.parametrize(("command", "lines"), DEAR, ids=[c for c, _ in DEAR])
def test_slow_commands_parse(command: str, lines: list[str]) -> None:
    name, *arguments = words(command)
    group = typer.main.get_command(app)
    chosen = group.commands[name]  # type: ignore[attr-defined]
    chosen.make_context(name, arguments)


def test_a_shown_line_that_is_not_printed_fails() -> None:
    check_output("a  b\nskipped\nc 1.5e-3 ok\n", ["a b", "...", "c ... ok"])
    with pytest.raises(AssertionError, match="README shows"):
        check_output("c 1.5e-3 WRONG\n", ["c ... ok"])
    with pytest.raises(AssertionError, match="README shows"):
        check_output("b\na\n", ["a", "b"])


def test_files_and_targets_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:splagen|templates|examples|docs)/[\w/.]*)`", README):
        if not path.endswith("byte_lm.png"):  # drawn from the records
            assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", readme_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme_tables.updated(text) == text, "run python -m benchmarks.readme_tables"
    for target in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (page.parent / target).exists(), target


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    text = "before\n<!-- results:begin speed: system -->\nold\n<!-- results:end -->\nafter\n"
    new = readme_tables.updated(text, tmp_path)
    assert "*No record `benchmarks/results/speed.json` yet.*" in new
    assert "old" not in new
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert readme_tables.updated(new, tmp_path) == new


def test_rows_become_a_table_of_the_columns_asked_for(tmp_path: Path) -> None:
    """Those that say nothing in them are left out."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    rows = [
        {"system": "a", "forward_ms": 1.23456, "errors": {"o": 1e-3, "dq": 2e-3}},
        {"system": "b"},
        {"system": "c", "reason": "refused"},
    ]
    record = {"environment": {"gpu": "H200", "date": "2026-11-22T01:02:03"}, "figures": {"rows": rows}}
    (tmp_path / "benchmarks/results/speed.json").write_text(json.dumps(record))
    text = "<!-- results:begin speed: system forward_ms errors.max reason -->\n<!-- results:end -->\n"
    assert readme_tables.updated(text, tmp_path).splitlines()[1:] == [
        "| system | forward, ms | largest error | reason |",
        "| --- | ---: | ---: | --- |",
        "| a | 1.23 | 0.002 |  |",
        "| c |  |  | refused |",
        "",
        "`benchmarks/results/speed.json`: H200, 2026-11-22.",
        "<!-- results:end -->",
    ]


def test_figures_of_a_pass_are_columns_with_units(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    rows = [
        {"system": "a", "N": 16, "floor_ms": {"forward": 0.5}, "forward": {"ms": 1.25, "kernels_ms": {"add1": 1.0}}},
        {"system": "a", "N": 4, "floor_ms": {"forward": 2.5}, "forward": {"skipped": "it would need about 99 GiB"}},
        {"system": "dense", "forward": {"ms": 2.5, "peak_gib_beyond_inputs": 3.0}, "us": 7.0},
    ]
    (tmp_path / "benchmarks/results/sse.json").write_text(json.dumps({"figures": {"fla": {}, "rows": rows}}))
    columns = "system N floor_ms.forward forward.ms forward.peak_gib_beyond_inputs us"
    text = f"<!-- results:begin sse: {columns} -->\n<!-- results:end -->\n"
    assert readme_tables.updated(text, tmp_path).splitlines()[1:6] == [
        "| system | N | floor forward, ms | forward, ms | forward peak beyond inputs, GiB | time, µs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 16 | 0.5 | 1.25 |  |  |",
        "| a | 4 | 2.5 |  |  |  |",
        "| dense |  |  | 2.5 | 3 | 7 |",
    ]


def test_another_list_of_a_record_is_a_table_and_pictures_are_shown_once_drawn(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    figures = {"rows": [{"system": "a"}], "crossover": [{"kv_heads": 2, "length": 13000, "ratio": {"forward": 1.5}}]}
    (tmp_path / "benchmarks/results/whole.json").write_text(json.dumps({"figures": figures}))
    text = "<!-- results:begin whole/crossover: kv_heads length ratio.forward -->\n<!-- results:end -->\n"
    assert "| 2 | 13 000 | 1.5 |" in readme_tables.updated(text, tmp_path)
    text = "<!-- results:begin pictures -->\n<!-- results:end -->\n"
    assert "benchmarks.plots" in readme_tables.updated(text, tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/roofline.png").write_bytes(b"")
    assert readme_tables.updated(text, tmp_path).splitlines()[1] == (
        "![Kernels under the roofs of an H200](docs/roofline.png)"
    )


def test_figures_without_rows_become_a_list_and_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    path = tmp_path / "benchmarks/results/gpu_tests.json"
    path.write_text(json.dumps({"figures": {"passed": 1234, "failed": 0}}))
    text = "<!-- results:begin gpu_tests -->\n<!-- results:end -->\n"
    assert "| passed | 1 234 |\n| failed | 0 |" in readme_tables.updated(text, tmp_path)
    path.write_text('{"figures": ')
    with pytest.raises(ValueError, match=r"gpu_tests\.json"):
        readme_tables.updated(text, tmp_path)


def test_models_are_compared_with_dense(tmp_path: Path) -> None:
    folder = tmp_path / "examples/results"
    folder.mkdir(parents=True)
    for kind, loss in (("dense", 1.0), ("spla", 1.1)):
        figures = {"validation": [[0, 5.5], [500, loss]], "seconds": 12.3}
        (folder / f"byte_lm_{kind}.json").write_text(json.dumps({"figures": figures}))
    text = "<!-- results:begin byte_lm -->\n<!-- results:end -->\n"
    assert "| spla | 500 | 1.1000 | +10.0 % | 12 |" in readme_tables.updated(text, tmp_path)
    assert "byte_lm.png" not in readme_tables.updated(text, tmp_path)
    (folder / "byte_lm.png").write_bytes(b"")
    assert "![Loss curves](examples/results/byte_lm.png)" in readme_tables.updated(text, tmp_path)
