"""Schedules that are not legal are refused by name, and every default is legal."""

from dataclasses import replace

import pytest

from splagen.codegen import sequence_schedule
from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Kernel
from splagen.codegen.schedule import DTYPES, TARGETS, check_schedule, default_schedule
from splagen.errors import ScheduleError
from splagen.pipeline import kernels
from splagen.spec import Select, SPLASpec, windows
from splagen.sse_spec import Router, SSESpec
from tests.kernels.cases import GPU, SMALL

SPEC = SPLASpec(head_dim=64, group_size=2, select=Select(block_size=64, statistics=windows()))


def kernel_of(template: str, spec: SPLASpec = SPEC) -> tuple[Kernel, Geometry]:
    template, _, many = template.partition(" of ")
    part = kernels(replace(spec, group_size=16) if many else spec)
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
        ("block_sparse_dkv", {"maxnreg": 8}, r"maxnreg=8 of block_sparse_dkv with \d warps"),
        ("block_sparse_dkv", {"maxnreg": 256}, r"maxnreg=256 of block_sparse_dkv"),
        ("block_sparse_dkv", {"maxnreg": 168, "num_warps": 16}, r"maxnreg=168 of block_sparse_dkv with 16 warps"),
        ("block_states", {"BLOCK_E": 128}, r"BLOCK_E=128 does not divide the 64 columns of a state in states_"),
        ("read_out", {"BLOCK_E": 256}, r"BLOCK_E=256 does not divide the \d+ columns of a state in read_"),
        ("read_out of many rows", {"BLOCK_R": 32}, r"BLOCK_R=32 of read_rest_kv_all is no multiple of BLOCK_M=64"),
    ],
)  # fmt: skip
def test_illegal_schedules_are_refused_by_name(template: str, change: dict[str, int | None], what: str) -> None:
    kernel, geometry = kernel_of(template)
    wanted = {**default_schedule(kernel, geometry, "sm_90", "bf16"), **change}
    with pytest.raises(ScheduleError, match=what):
        check_schedule(kernel, geometry, {k: v for k, v in wanted.items() if v is not None})


def test_registers_may_be_limited_where_products_are() -> None:
    for template, schedule in (
        ("block_sparse_forward", {"maxnreg": 255, "num_warps": 8}),
        ("read_out", {"maxnreg": 96}),
    ):
        kernel, geometry = kernel_of(template)
        check_schedule(kernel, geometry, {**default_schedule(kernel, geometry, "sm_90", "bf16"), **schedule})


@pytest.mark.parametrize(
    ("template", "change", "what"),
    [
        ("chunk_loop", {"CHUNK": 256}, "CHUNK=256 of .* is more than 128"),
        ("chunk_loop", {"CHUNK": 48}, "CHUNK=48 of .* is not a power of two"),
        ("chunk_loop", {"BLOCK_E": 128}, "BLOCK_E=128 of .* is more than 64 columns of v"),
        ("chunk_loop", {"maxnreg": 255, "num_warps": 16}, "maxnreg=255 of .* with 16 warps"),
        ("step", {"BLOCK_E": 128}, "BLOCK_E=128 of step is more than 64 columns of v"),
        ("step", {"maxnreg": 128}, "step takes"),
        ("route", {"CHUNK": 0}, "CHUNK=0 of route"),
    ],
)
def test_illegal_schedules_of_recurrences_are_refused_by_name(template: str, change: dict[str, int], what: str) -> None:
    spec = SSESpec(head_dim=32, value_dim=40)
    kernel = next(k for k in kernels(spec).kernels if k.template == template)
    schedule = sequence_schedule.default_schedule(kernel, spec, "sm_90", "bf16")
    with pytest.raises(ScheduleError, match=what):
        sequence_schedule.check_schedule(kernel, spec, {**schedule, **change})


def test_a_statistic_needs_whole_cells() -> None:
    kernel, geometry = kernel_of("statistics", SPLASpec(head_dim=64, select=Select(block_size=64)))
    schedule = {**default_schedule(kernel, geometry, "sm_90", "bf16"), "BLOCK_N": 32}
    with pytest.raises(ScheduleError, match=r"BLOCK_N=32 of statistics is no\w* .*multiple of the cell of 64"):
        check_schedule(kernel, geometry, schedule)


PLAIN = SSESpec(head_dim=128, backbone="none", router=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", TARGETS)
def test_rows_that_sum_all_columns_have_all_of_them_in_a_program(arch: str, dtype: str) -> None:
    found = {k.name: k for k in kernels(PLAIN).kernels}
    assert {"dreads1", "dwrites1"} <= found.keys()
    for kernel in (found["dreads1"], found["dwrites1"]):
        default = sequence_schedule.default_schedule(kernel, PLAIN, arch, dtype)
        assert default["BLOCK_E"] == 128
        with pytest.raises(ScheduleError, match=r"BLOCK_E=64 of \w+ is not 128, all columns of v"):
            sequence_schedule.check_schedule(kernel, PLAIN, {**default, "BLOCK_E": 64})


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        (PLAIN, False),
        (SSESpec(head_dim=256, backbone="none", router=None), True),  # a state does not fit into registers
        (SSESpec(head_dim=64, value_dim=256, backbone="none", router=None), False),
        (SSESpec(head_dim=64, backbone="scalar", router=None), True),  # a decay's gradient reads both
    ],
)
def test_states_are_kept_per_chunk_only_where_rows_need_them(spec: SSESpec, kept: bool) -> None:
    names = {k.name for k in kernels(spec).kernels}
    assert names >= ({"states1", "dstates1", "gradient1"} if kept else {"dreads1", "dwrites1"})
    assert not names & ({"dreads1", "dwrites1"} if kept else {"states1", "dstates1", "gradient1"})


def test_a_gate_of_rows_reads_states_on_both_sides() -> None:
    gated = {k.name for k in kernels(SSESpec(head_dim=16, backbone="none", router=Router(2))).kernels}
    assert {"dreads1", "dwrites1", "states2", "dstates2"} <= gated
