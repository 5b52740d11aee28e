"""Schedules that are not legal are refused by name, and every default is legal."""

import pytest

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Kernel
from splagen.codegen.schedule import DTYPES, TARGETS, check_schedule, default_schedule
from splagen.errors import ScheduleError
from splagen.pipeline import kernels
from splagen.spec import Select, SPLASpec, windows
from tests.kernels.cases import GPU, SMALL

SPEC = SPLASpec(head_dim=64, group_size=2, select=Select(block_size=64, statistics=windows()))


def kernel_of(template: str, spec: SPLASpec = SPEC) -> tuple[Kernel, Geometry]:
    part = kernels(spec)
    return next(k for k in part.kernels if k.template == template), Geometry.of(part.program)


@pytest.mark.parametrize("case", [*SMALL, *GPU], ids=str)
def test_defaults_are_legal_everywhere(case) -> None:  # type: ignore[no-untyped-def]
    part = kernels(case.spec)
    geometry = Geometry.of(part.program)
    for kernel in part.kernels:
        for arch in TARGETS:
            for dtype in DTYPES:
                check_schedule(kernel, geometry, default_schedule(kernel, geometry, arch, dtype))


@pytest.mark.parametrize(
    ("template", "change", "what"),
    [
        ("block_sparse_forward", {"BLOCK_N": 128}, "BLOCK_N=128 does not divide the block of 64 in block_"),
        ("block_sparse_dkv", {"BLOCK_N": 128}, r"BLOCK_N=128 does not divide the block of 64"),
        ("merge_segments", {"BLOCK_N": 8}, "BLOCK_N=8 of merge_segments is not a power"),
        ("block_sparse_forward", {"BLOCK_M": 48}, "BLOCK_M=48 of block_sparse_forward is not a"),
        ("block_sparse_dq", {"BLOCK_M": 0}, r"BLOCK_M=0 of block_sparse_dq"),
        ("read_out", {"BLOCK_E": 24}, r"BLOCK_E=24 of read_\w+ is not a power of two"),
        ("score_topk", {"BLOCK_C": 8}, r"BLOCK_C=8 of score_topk"),
        ("score_topk", {"BLOCK_C": None}, r"score_topk takes \[.*'BLOCK_C'.*\], the Schedule gives"),
        ("rows", {"num_warps": None}, r"takes \[.*'num_warps'.*\], the Schedule gives"),
        ("read_out", {"num_warps": 3}, r"num_warps=3 of read_\w+ is not a power of two"),
        ("rows", {"num_warps": 64}, r"num_warps=64 of \w+ is not a power of two"),
        ("rows", {"num_stages": 0}, r"num_stages=0 of \w+"),
        ("statistics", {"maxnreg": 128}, r"statistics takes .*the Schedule gives \[.*'maxnreg'"),
    ],
)  # fmt: skip
def test_illegal_schedules_are_refused_by_name(template: str, change: dict[str, int | None], what: str) -> None:
    kernel, geometry = kernel_of(template)
    wanted = {**default_schedule(kernel, geometry, "sm_90", "bf16"), **change}
    with pytest.raises(ScheduleError, match=what):
        check_schedule(kernel, geometry, {k: v for k, v in wanted.items() if v is not None})


def test_a_statistic_needs_whole_cells() -> None:
    kernel, geometry = kernel_of("statistics", SPLASpec(head_dim=64, select=Select(block_size=64)))
    schedule = {**default_schedule(kernel, geometry, "sm_90", "bf16"), "BLOCK_N": 32}
    with pytest.raises(ScheduleError, match=r"BLOCK_N=32 of statistics is no\w* .*multiple of the cell of 64"):
        check_schedule(kernel, geometry, schedule)


def test_a_top_k_needs_two_blocks_in_a_tile() -> None:
    """Windows of 32 every 16: nine touch a block of 128 keys, which takes 16 lanes."""
    spec = SPLASpec(head_dim=64, select=Select(block_size=128, statistics=windows()))
    kernel, geometry = kernel_of("score_topk", spec)
    schedule = {**default_schedule(kernel, geometry, "sm_90", "bf16"), "BLOCK_C": 16}
    with pytest.raises(ScheduleError, match="BLOCK_C=16 of score_topk holds fewer than two blocks"):
        check_schedule(kernel, geometry, schedule)
