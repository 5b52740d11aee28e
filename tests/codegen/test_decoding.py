"""Every causal spec that selects by token has the kernels of a step, and its module is Python."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from splagen import pipeline
from splagen.codegen.decode_module import decode_module_text
from splagen.codegen.decoding import OVERLAPS, decode_schedules, decoding
from splagen.codegen.render import kernel_text
from splagen.codegen.schedule import check_fields
from splagen.spec import Residual, SPLASpec, digest, to_toml
from tests.kernels.cases import GPU, SMALL

SPECS = [c.spec for c in (*SMALL, *GPU) if c.spec.causal and not (c.spec.select and c.spec.select.tile > 1)]


def text(spec: SPLASpec) -> str:
    return decode_module_text(decoding(spec), spec, digest=digest(spec)[:8], spec_text=to_toml(spec))


def test_every_such_spec_becomes_kernels() -> None:
    for spec in SPECS:
        ast.parse(text(spec))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_default_schedules_have_what_kernels_take(arch: str) -> None:
    for spec in SPECS[:12]:
        part = decoding(spec)
        module = ast.parse(text(spec))
        (table,) = [
            ast.literal_eval(s.value)
            for s in module.body
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) and s.targets[0].id == "SCHEDULES"
        ]
        for schedules in table[arch].values():
            for kernel in part.kernels:
                given = {n: v for n, v in schedules[kernel.name].items() if n != "maxnreg"}
                check_fields(kernel, given)


def test_the_same_spec_gives_the_same_text() -> None:
    assert text(SPECS[0]) == text(SPECS[0])


def launched_over(spec: SPLASpec, name: str, folder: Path, patch: pytest.MonkeyPatch) -> dict[int, dict[str, int]]:
    """What a launch takes of its default Schedule, by the number of splits; builds have machine code for just these."""
    module, part = pipeline.generate_decoding(spec, folder).module, pipeline.decode_kernels(spec)
    (kernel,) = [k for k in part.kernels if k.name == name]
    schedule, taken = module.SCHEDULES["sm_90"]["bf16"][name], {}
    patch.setattr(module, "launch", lambda n, kernel, grid, schedule, *_: taken.update({n.ATTEND_SPLITS: schedule}))
    launch, inputs = getattr(module, f"launch_{name}"), [torch.zeros(1, 1, 1) for _ in kernel.arrays]
    for splits in range(1, 70):
        n = module.Sizes(1, 1, 2, 1, 32, 4, 4, 1, splits, 1, 1, torch.bfloat16, torch.device("cpu"))
        launch(n, schedule, *inputs)
    ahead = kernel.launched(schedule)
    assert all(s in ahead for s in taken.values())
    assert all(s in taken.values() for s in ahead)
    return taken


def test_a_launch_over_few_splits_takes_a_narrow_tile_and_a_warp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = launched_over(SPLASpec(head_dim=16, group_size=2), "merge", tmp_path, monkeypatch)
    wide = taken[69]
    assert [taken[n]["BLOCK_S"] for n in (1, 2, 3, 8, 9)] == [2, 2, 8, 8, wide["BLOCK_S"]]
    assert [taken[n]["num_warps"] for n in (1, 8, 9)] == [1, 1, wide["num_warps"]]
    assert {**taken[8], "BLOCK_S": 0, "num_warps": 0} == {**wide, "BLOCK_S": 0, "num_warps": 0}


def test_a_launch_over_many_splits_reads_a_piece_of_the_states_and_little_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = launched_over(SPLASpec(head_dim=128, group_size=2), "attend", tmp_path, monkeypatch)
    assert [taken[n]["BLOCK_D"] for n in (1, 7, 8, 69)] == [32, 32, 16, 16]
    assert [taken[n]["num_stages"] for n in (1, 7, 8, 69)] == [3, 3, 2, 2]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_before_a_kernel_waits_it_touches_nothing_that_the_one_before_writes(spec: SPLASpec) -> None:
    """It may begin while that one runs; the ones before it have ended, for each waits before it lets the next begin."""
    kernels = decoding(spec).kernels
    assert "launch_pdl" not in kernels[0].tunable, "it begins when everything before the step has ended"
    for before, kernel in pairwise(kernels):
        body = kernel_text(kernel).rpartition(f"def {kernel.name}_kernel(")[2].split('"""')[2]
        early, waited, _ = body.partition("wait_for_earlier(launch_pdl)")
        assert waited
        assert "let_next_begin" not in early
        assert "tl.store" not in early
        assert not {*re.findall(r"(\w+)_ptr", early)} & {a.name for a in before.outputs}


def test_kernels_overlap_where_the_hardware_has_dependent_launches() -> None:
    part = decoding(SPLASpec(head_dim=16, group_size=2))
    overlaps = {
        arch: {s[n] for by_name in of_dtypes.values() for s in by_name.values() for n in s.keys() & {*OVERLAPS}}
        for arch, of_dtypes in decode_schedules(part).items()
    }
    assert overlaps == {"sm_80": {0}, "sm_90": {1}, "sm_100": {1}, "gfx942": {0}}


@pytest.mark.parametrize("normaliser", [False, True])
def test_a_split_stores_one_sum_of_the_residual_and_what_it_is_divided_by(normaliser: bool) -> None:
    """All far blocks less the chosen ones is one sum: merge adds up no two that it would subtract from each other."""
    part = decoding(SPLASpec(head_dim=16, group_size=2, linear=Residual("elu1", normaliser=normaliser)))
    (attend,) = [k for k in part.kernels if k.name == "attend"]
    sums = [a for a in attend.outputs if a.name not in ("row_max_parts", "row_sum_parts")]
    assert [len(a.width) for a in sums] == [1, 1] + [0] * normaliser
