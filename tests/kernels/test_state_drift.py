"""The state of a long sequence beside recomputation: a block is added once, and costs the state one rounding.

n blocks then cost at most n 2^-24 of its size; 100 000 tokens in blocks of 64 are 1563, and less than 1e-4.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen.ir.decoding import step_program
from splagen.ir.reference import evaluate
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from splagen.spec import Select, SPLASpec
from tests.ir.blocked import blocked
from tests.kernels.decoding import inputs, relative, tokens

pytestmark = pytest.mark.usefixtures("fast_sort")

ROUNDING = 2.0**-24
SPEC = SPLASpec(head_dim=16, group_size=1, select=Select(block_size=16, budget=1, sinks=0, local=0))


def recomputed(cache: SPLACache, rows: dict[str, Tensor], settled: int) -> Tensor:
    """The state of keys far from position `settled` on, in float64; features in the dtype that kernels multiply."""
    spec, dtype = cache.library.spec, cache.dtype
    program = step_program(spec)
    arrays = blocked(spec, {n: x[:, :settled].float() if n in "kv" else x[:, :1].float() for n, x in rows.items()})
    (after,) = program.outputs[1:]
    (before,) = [v for v in program.inputs if v.name.endswith("_state")]
    zeros = cache.states[before.name].unflatten(2, (2, -1))
    sizes = {"T": 1}
    phi = evaluate(
        program, arrays, scalars={"L": settled}, sizes=sizes, wanted=[program.var("phi_k")], dtype=torch.float32
    )
    return evaluate(
        program,
        arrays | {before.name: torch.zeros_like(zeros, dtype=torch.float64)},
        scalars={"L": settled, "first": settled, "settled": 0},
        sizes=sizes,
        given={"phi_k": phi["phi_k"].to(dtype).double()},
        wanted=[after],
    )[after.name].flatten(2, 3)


def test_a_block_costs_the_state_one_rounding(tmp_path: Path, device: torch.device) -> None:
    """One step per block, on pages that hold the keys between already."""
    blocks = 16
    cache = SPLACache(
        generate_decoding(SPEC, tmp_path), sequences=1, kv_heads=1, tokens=16 * (blocks + 1), page_size=16,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    rows = inputs(SPEC, 1, 16 * (blocks + 1), 1, torch.float32, device)
    cache.allocate(16 * (blocks + 1))
    for name in ("k", "v"):
        cache.pages[f"{name}_pages"][cache.page_table[0].long(), 0] = rows[name][0, :, 0].unflatten(0, (-1, 16))
    for block in range(1, blocks + 1):
        cache.seqlens[0] = 16 * block
        cache.step(*tokens(rows, 16 * block))
    (state,) = cache.states.values()
    assert relative(state, recomputed(cache, rows, 16 * blocks)) <= blocks * ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_100_000_steps_drift_less_than_one_in_ten_thousand(
    dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    steps = 100_000
    spec = replace(SPEC, head_dim=64, group_size=4, select=Select(block_size=64, budget=4))
    library = generate_decoding(spec, tmp_path)
    cache = SPLACache(library, sequences=1, kv_heads=1, tokens=steps, dtype=dtype, device=device)
    rows = inputs(spec, 1, steps, 1, dtype, device)
    cache.allocate(steps)
    for t in range(steps):
        o = cache.step(*tokens(rows, t))
    assert torch.isfinite(o).all()
    assert cache.settled.tolist() == [steps - 1]
    (state,) = cache.states.values()
    assert relative(state, recomputed(cache, rows, steps - 1)) <= 1e-4
