"""Chosen blocks visited by union: each once for all rows of a program, with the same results and gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splagen import library as lib
from splagen import pipeline
from splagen.codegen.geometry import Geometry
from splagen.codegen.partition import Partition
from splagen.codegen.schedule import check_schedule
from splagen.codegen.unions import MOST_LISTS, lists_met, lists_text, visits_union
from splagen.errors import ScheduleError
from splagen.kinds import oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Shape, compare, random_inputs
from tests.kernels.embedding import fill_empty_with_nan
from tests.kernels.launched import record_launches
from tests.kernels.test_parts import CASES as BY_KEY
from tests.kernels.test_parts import TOKEN

pytestmark = pytest.mark.usefixtures("fast_sort")

NAME, DQ = "block_sparse_union", "block_sparse_dq_union"
TILES = Select(
    block_size=32, budget=2, sinks=1, local=0, granularity="tile", tile=16, metric=lib.taylor(covariance="diag")
)
# spec, shape, BLOCK_M
CASES: dict[str, tuple[SPLASpec, Shape, int]] = {
    name: (spec, shape, 32) for name, (spec, shape) in BY_KEY.items() if name != "tiles longer than blocks"
} | {
    "as many lists as a mask has bits": (
        SPLASpec(
            head_dim=16,
            group_size=1,
            select=Select(block_size=64, budget=2, sinks=0, local=0, metric=lib.taylor(covariance="diag")),
        ),
        (1, 1, 300),
        64,
    ),
    "three heads, rows that begin inside a list": (SPLASpec(head_dim=16, group_size=3, select=TOKEN), (1, 3, 117), 16),
    "more heads than rows": (SPLASpec(head_dim=16, group_size=32, select=TOKEN, linear=None), (1, 32, 85), 16),
    "tiles of sixteen": (SPLASpec(head_dim=16, group_size=2, select=TILES), (2, 2, 150), 64),
    "tiles of sixteen, not causal": (SPLASpec(head_dim=16, group_size=2, causal=False, select=TILES), (1, 2, 150), 32),
    "shorter than a tile": (SPLASpec(head_dim=16, group_size=2, select=TOKEN), (2, 4, 5), 32),
    "one token": (SPLASpec(head_dim=16, group_size=2, select=TOKEN), (1, 2, 1), 16),
    "a normaliser, whose gradient is a number per row": (
        SPLASpec(head_dim=16, group_size=1, select=TOKEN, linear=Residual(lib.elu1, normaliser=True), combine="add"),
        (1, 1, 85),
        16,
    ),
    "more rows than a chunk": (SPLASpec(head_dim=16, group_size=1, select=TOKEN, linear=None), (1, 2, 99), 64),
}


def check(
    spec: SPLASpec,
    shape: Shape,
    block_m: int,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, truth = pipeline.generate(spec, folder).module, oracle(to_toml(spec))
    fill_empty_with_nan(module, monkeypatch)
    inputs = random_inputs(truth, shape, dtype, device, 0)
    more = {"BLOCK_M": block_m} | ({"num_warps": 8} if block_m > 64 else {})
    schedules = {k: {**module.schedules_for(inputs["q"])[k], **more} for k in (NAME, DQ)}
    chosen = {"forward_strategy": {"strategy": 2}, "backward_strategy": {"strategy": 2}}
    launched = record_launches(module, monkeypatch)
    rows = compare(module, truth, inputs, shape, schedules=chosen | schedules)
    assert {NAME, DQ, "block_sparse_dkv"} <= set(launched)
    others = {"block_sparse_forward", "block_sparse_merge", "block_sparse_dq", "block_sparse_dq_merge"}
    assert not others & set(launched)
    assert not [f"{r.quantity}: {r.error:.1e}" for r in rows if not r.ok]


SLOW = ("more heads than rows",)


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_unions_give_what_the_oracle_gives(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape, block_m = CASES[case]
    check(spec, shape, block_m, torch.float32, torch.device("cpu"), tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("group", "head_dim", "block_m"),
    [(1, 64, 64), (1, 64, 16), (4, 128, 64), (16, 128, 128), (16, 128, 64), (3, 80, 64)],
)
def test_unions_on_the_gpu(
    group: int, head_dim: int, block_m: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPLASpec(
        head_dim=head_dim,
        group_size=group,
        select=Select(block_size=64, budget=5, metric=lib.taylor(covariance="diag")),
    )
    block_m = block_m if dtype != torch.float32 else min(block_m, 32)
    check(spec, (2, 2 * group, 1000), block_m, dtype, torch.device("cuda"), tmp_path, monkeypatch)


@pytest.mark.gpu
def test_two_runs_by_union_give_the_same_bits(tmp_path: Path) -> None:
    spec = SPLASpec(
        head_dim=128, group_size=4, select=Select(block_size=64, budget=5, metric=lib.taylor(covariance="diag"))
    )
    module, truth = pipeline.generate(spec, tmp_path).module, oracle(to_toml(spec))
    part = truth.partition
    inputs = random_inputs(truth, (2, 8, 4000), torch.bfloat16, torch.device("cuda"), 0)
    rows = [inputs[a.name] for a in part.inputs]
    schedules = {**module.schedules_for(rows[0]), **{c.name: {"strategy": 2} for c in part.strategies}}

    def run() -> list[torch.Tensor]:
        results = module.forward(schedules, *rows)
        named = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
        kept = [named[a.name] for a in part.residuals]
        return [*results, *module.backward(schedules, *rows, *kept, *(inputs[a.name] for a in part.cotangents))]

    assert all(torch.equal(one, two) for one, two in zip(run(), run(), strict=True))


def test_programs_have_no_more_lists_than_they_make_room_for() -> None:
    for rows in range(1, 200):
        for block_m in (16, 32, 64, 128):
            starts = range(0, rows * block_m, block_m)
            met = max((s + block_m - 1) // rows - s // rows + 1 for s in starts)
            room = eval(lists_text(rows), {"BLOCK_M": block_m})
            assert met <= lists_met(block_m, rows) <= room
            assert room & (room - 1) == 0


def test_rows_of_more_lists_than_a_mask_has_bits_are_refused() -> None:
    part = pipeline.kernels(
        SPLASpec(
            head_dim=16, group_size=1, select=Select(block_size=128, budget=2, metric=lib.taylor(covariance="diag"))
        )
    )
    assert isinstance(part, Partition)
    kernel = next(k for k in part.kernels if visits_union(k))
    schedule = {"BLOCK_M": MOST_LISTS, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    check_schedule(kernel, Geometry.of(part.program), schedule)
    with pytest.raises(ScheduleError, match=f"more than {MOST_LISTS} lists"):
        check_schedule(kernel, Geometry.of(part.program), {**schedule, "BLOCK_M": 2 * MOST_LISTS})


def test_tiles_as_long_as_blocks_have_one_list_and_no_union() -> None:
    tile = Select(block_size=32, budget=2, granularity="tile", tile=32, metric=lib.taylor(covariance="diag"))
    for select, expected in ((tile, 2), (replace(tile, tile=16), 3)):
        part = pipeline.kernels(SPLASpec(head_dim=16, group_size=2, select=select))
        assert isinstance(part, Partition)
        assert [len(c.options) for c in part.strategies] == [expected, expected]
