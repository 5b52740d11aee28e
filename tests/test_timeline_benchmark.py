"""The timeline of a step where no GPU is needed: where programs store the clock, and what is read from it."""

import ast
from pathlib import Path

import pytest
import torch

from benchmarks.timeline import MOST_PROGRAMS, POINTS, stamped, times_of
from splagen.pipeline import generate_decoding
from splagen.spec import SPLASpec


def test_every_kernel_stores_every_point_that_it_comes_to(tmp_path: Path) -> None:
    library = generate_decoding(SPLASpec(head_dim=16, group_size=2), tmp_path)
    names = [k.name for k in library.part.kernels]
    functions = {
        f.name: [tuple(a.value for a in c.args if isinstance(a, ast.Constant)) for c in ast.walk(f) if _is_stamp(c)]  # type: ignore[attr-defined]
        for f in ast.parse(stamped(library.path.read_text(), names, 1 << 40)).body
        if isinstance(f, ast.FunctionDef)
    }
    waits = {POINTS.index("waits"), POINTS.index("goes_on")}
    for number, name in enumerate(names):
        found = functions[f"{name}_kernel"]
        assert len(found) == len({*found})
        assert {n for n, _ in found} == {number}
        missing = {*range(len(POINTS))} - {point for _, point in found}
        assert missing == (
            waits if name == names[0] else {POINTS.index("lets_next_begin")} if name == "merge" else set()
        )


def _is_stamp(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stamp"


def test_times_count_from_the_first_program_and_pass_over_those_that_are_not_there() -> None:
    stamps = torch.zeros(2, MOST_PROGRAMS, len(POINTS), dtype=torch.int64)
    stamps[0, :2] = torch.tensor([[5000, 0, 0, 6000, 7000], [4000, 0, 0, 6500, 6800]])
    stamps[1, 0] = torch.tensor([6600, 6700, 7200, 0, 9000])
    first, second = times_of(stamps)
    assert first == pytest.approx({"programs": 2, "begins_us": 0, "lets_next_begin_us": 2.5, "ends_us": 3})
    assert second == pytest.approx({"programs": 1, "begins_us": 2.6, "goes_on_us": 3.2, "ends_us": 5})
