"""What no query chose summed block by block, where blocks are few: as exact as what was chosen."""

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splagen import library as lib
from splagen.codegen.tile_code import BITS_OF_A_MASK
from splagen.errors import WrongResult
from splagen.ir.frontend_spla import spla_program
from splagen.ir.remaining import forward_reads_states
from splagen.kinds import oracle
from splagen.pipeline import default_shapes, generate, kernels
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Report, compare, random_inputs, verify
from tests.kernels.cases import GPU, SMALL, Case, Shape, select
from tests.kernels.embedding import embedded, fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")

QUICK = {"default", "identity add", "normaliser hedgehog rms", "everything at once", "non-causal", "group 3"} | {
    "tile 64 block 16",
    "sums apart non-causal",
    "own rows of both, head 24, tile 16",
}


def fits(case: Case, shape: Shape) -> bool:
    select = case.spec.select
    if not select or not case.spec.linear or forward_reads_states(spla_program(case.spec)):
        return False
    return shape[2] <= BITS_OF_A_MASK * select.block_size


def pairs(cases: tuple[Case, ...], *, quick: bool) -> list[object]:
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{str(dtype)[6:]}",
            marks=[] if quick or case.name in QUICK else [pytest.mark.slow],
        )
        for case in cases
        for dtype in case.dtypes
        if any(fits(case, s) for s in case.shapes)
    ]


def directly(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here to the end of the test the module takes all sequences to have few blocks."""
    monkeypatch.setattr(module, "takes_direct", lambda _: True)


def check(case: Case, dtype: torch.dtype, device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, truth = generate(case.spec, folder).module, oracle(to_toml(case.spec))
    fill_empty_with_nan(module, monkeypatch)
    directly(module, monkeypatch)
    rows = []
    for seed, shape in enumerate(s for s in case.shapes if fits(case, s)):
        rows += compare(module, truth, embedded(random_inputs(truth, shape, dtype, device, seed)), shape)
    Report(case.spec.name, tuple(rows)).raise_if_wrong()


@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL, quick=False))
def test_the_direct_sum_is_what_the_oracle_gives(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, dtype, device, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), pairs(GPU, quick=True))
def test_the_direct_sum_on_the_gpu(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, dtype, device, tmp_path, monkeypatch)


LEFT_OVER = [(1, 32, 67), (32, 32, 67), (128, 16, 150)]  # tile, block, length: the first is summed directly


def left_over(head_dim: int, group: int, tile: int, block: int) -> SPLASpec:
    """Each query sees its tile's own blocks, chooses one of the others, and leaves one.

    No temperature beside a normaliser: of elu1, nearly linear where x > 0, its gradient nearly cancels.
    """
    few = select(block_size=block, sinks=0, local=0, **({"tile": tile} if tile > 1 else {}))
    linear = Residual(lib.elu1, temperature=tile <= 32, normaliser=tile > 32)
    return SPLASpec(head_dim=head_dim, group_size=group, causal=False, select=few, linear=linear, combine="add")


def report_of(
    spec: SPLASpec, shape: Shape, device: torch.device, folder: Path, schedules: dict[str, dict[str, int]] | None = None
) -> Report:
    library, dtypes = generate(spec, folder), [torch.bfloat16]
    return verify(
        library.module, oracle(to_toml(spec)), shapes=[shape], dtypes=dtypes, device=device, schedules=schedules
    )


@pytest.mark.usefixtures("bf16_interpreter")
@pytest.mark.parametrize(("tile", "block", "length"), LEFT_OVER)
def test_what_is_left_over_is_as_exact_as_what_was_chosen(
    tile: int, block: int, length: int, device: torch.device, tmp_path: Path
) -> None:
    """The op takes the direct sum by itself; the difference of sums, of 16-bit scores, is beyond the limits there.

    Where tiles read states, a difference is exactly the sum of the states that are left, in float32.
    """
    spec, shape = left_over(16, 2, tile, block), (1, 4, length)
    report_of(spec, shape, device, tmp_path).raise_if_wrong()
    if tile > 1:
        assert kernels(spec).direct is None
        return
    with pytest.raises(WrongResult):
        report_of(spec, shape, device, tmp_path, schedules={}).raise_if_wrong()


@pytest.mark.gpu
@pytest.mark.parametrize(("tile", "block", "length"), LEFT_OVER)
def test_what_is_left_over_is_exact_on_the_gpu(
    tile: int, block: int, length: int, device: torch.device, tmp_path: Path
) -> None:
    report_of(left_over(64, 4, tile, block), (1, 8, length), device, tmp_path).raise_if_wrong()


def test_the_op_takes_it_for_few_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token less or more decides, forward and backward alike."""
    spec = SPLASpec(head_dim=16, group_size=1, select=Select(block_size=16, budget=1), combine="add")
    library = generate(spec, tmp_path)
    module, direct = library.module, kernels(spec).direct
    assert direct
    assert direct.blocks == 8
    taken: list[str] = []
    for name in ("forward", "direct_forward", "backward", "direct_backward"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, f=function: (taken.append(name), f(*a))[1])
    for length, expected in ((128, ["direct_forward", "direct_backward"]), (129, ["forward", "backward"])):
        q, k, v = (torch.randn(1, length, 1, 16, requires_grad=True) for _ in range(3))
        library.op(q, k, v).sum().backward()
        assert taken == expected
        taken.clear()


@pytest.mark.parametrize(
    ("causal", "axes", "blocks"),
    [
        (True, {"budget": 1}, 8),
        (True, {"budget": 13}, 3 + 26),  # the first, the one before and the query's own
        (True, {"budget": 13, "sinks": 2, "local": 4}, 7 + 26),
        (False, {"budget": 13}, 4 + 26),  # and the one behind
        (True, {"budget": 3, "sinks": 0, "local": 0, "granularity": "tile", "tile": 128}, 8 + 6),
        (True, {"budget": 62}, 64),  # bits of a mask
    ],
)
def test_what_are_few_blocks(causal: bool, axes: dict[str, Any], blocks: int) -> None:
    """Those that a query sees by position, and twice as many as it chooses."""
    spec = SPLASpec(head_dim=16, group_size=1, causal=causal, select=Select(block_size=16, **axes))
    direct = kernels(spec).direct
    assert direct
    assert direct.blocks == blocks


def test_verify_takes_both_kinds_of_kernels_if_it_is_told_no_shape() -> None:
    spec = SPLASpec(head_dim=16, group_size=1, select=Select(block_size=16, budget=2))
    few = kernels(spec).direct.blocks  # type: ignore[union-attr]
    for device in ("cpu", "cuda"):
        blocks = [-(-length // 16) for _, _, length in default_shapes(spec, device)]
        assert min(blocks) <= few < max(blocks)
    large = SPLASpec(head_dim=16, group_size=1, select=Select(block_size=128, budget=62))
    assert default_shapes(large, "cpu") == [(1, 1, 6 * 128 + 3)], "the interpreter would take an hour for more"
    assert max(length for _, _, length in default_shapes(large, "cuda")) > 64 * 128


def test_there_is_none_without_a_residual() -> None:
    assert (
        kernels(SPLASpec(head_dim=16, group_size=1, select=Select(block_size=16, budget=1), linear=None)).direct is None
    )


@pytest.mark.slow
@settings(max_examples=12)
@given(st.integers(1, 150), st.integers(1, 5), st.sampled_from([0, 1]), st.booleans(), st.integers(0, 2**16))
def test_any_length_and_budget(length: int, budget: int, sinks: int, causal: bool, seed: int) -> None:
    few = Select(block_size=16, budget=budget, sinks=sinks, local=sinks, metric=lib.taylor(covariance="diag"))
    spec = SPLASpec(head_dim=16, group_size=1, causal=causal, select=few)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        module, truth = generate(spec, folder).module, oracle(to_toml(spec))
        directly(module, patches)
        inputs = random_inputs(truth, (1, 1, length), torch.float32, "cpu", seed)
        Report(spec.name, tuple(compare(module, truth, inputs, (1, 1, length)))).raise_if_wrong()
