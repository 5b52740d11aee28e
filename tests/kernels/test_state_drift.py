"""The state of a long sequence beside recomputation: a block is added once, and costs the state one rounding.

n blocks then cost at most n 2^-24 of its size; 100 000 tokens in blocks of 64 are 1563, and less than 1e-4.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen.codegen.decode_states import State
from splagen.ir.decoding import state_pairs, step_program
from splagen.ir.reference import evaluate
from splagen.library import taylor
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from splagen.spec import Select, SPLASpec
from tests.ir.blocked import blocked
from tests.kernels.decoding import BY_TOKEN, change_schedules, inputs, relative, some, tokens

pytestmark = pytest.mark.usefixtures("fast_sort")

ROUNDING = 2.0**-24
SPEC = SPLASpec(
    head_dim=16,
    group_size=1,
    select=Select(block_size=16, budget=1, sinks=0, local=0, metric=taylor(covariance="diag")),
)


def drift(cache: SPLACache, rows: dict[str, Tensor], settled: int) -> float:
    """The largest relative error of a state beside the sum over keys far from `settled` on, in float64.

    Features of keys are in the dtype that kernels multiply.
    """
    program = step_program(cache.library.spec)
    states = [State.of(program, *pair) for pair in state_pairs(program)]
    seen = {n: x[:, :settled].float() if n in "kv" else x[:, :1].float() for n, x in rows.items()}
    arrays = blocked(cache.library.spec, seen)
    arrays |= {s.before.name: torch.zeros_like(cache.states[s.before.name], dtype=torch.float64) for s in states}
    scalars = {"L": settled, "first": settled, "settled": 0}
    left = [s.left for s in states]
    features = evaluate(program, arrays, scalars=scalars, sizes={"T": 1}, wanted=left, dtype=torch.float32)
    given = {n: x.to(cache.dtype).double() for n, x in features.items()}
    after = [s.after for s in states]
    want = evaluate(program, arrays, scalars=scalars, sizes={"T": 1}, given=given, wanted=after)
    return max(relative(cache.states[s.before.name], want[s.after.name]) for s in states)


def drift_from_blocks(cache: SPLACache, rows: dict[str, Tensor], blocks: int) -> float:
    """The largest relative error of a state beside the sum, in float64, of those that each block has alone.

    Each block is a sequence of its own, so that kernels form its state of the same features and add it to nothing.
    """
    size = cache.library.part.geometry.block
    alone = SPLACache(
        cache.library, sequences=blocks, kv_heads=1, tokens=size + 8, page_size=size, step_tokens=8, dtype=cache.dtype,
        device=cache.seqlens.device,
    )  # fmt: skip
    for _ in range(blocks):
        alone.allocate(size + 8)
    behind = torch.nn.functional.pad
    split = {n: x[0, : size * blocks].unflatten(0, (blocks, size)) for n, x in rows.items() if n in BY_TOKEN}
    split = {n: behind(x, (*(0, 0) * (x.dim() - 2), 0, 8)) for n, x in split.items()}
    for start in range(0, size + 8, 8):
        alone.step(*some(rows | split, [start] * blocks, 8))
    return max(relative(x[0], alone.states[n].double().sum(0)) for n, x in cache.states.items())


@pytest.mark.slow
def test_a_block_costs_the_state_one_rounding(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, library = 3, generate_decoding(SPEC, tmp_path)
    few = {"score": 1, "attend": 1, "chunk": 512}  # programs are slow in the interpreter
    change_schedules(library, monkeypatch, splitting=few)
    rows = inputs(SPEC, 1, 16 * blocks + 8, 1, torch.float32, device)
    cache = SPLACache(
        library, sequences=1, kv_heads=1, tokens=16 * blocks + 8, page_size=16, step_tokens=8, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    cache.allocate(16 * blocks + 8)
    for start in range(0, 16 * blocks + 8, 8):
        cache.step(*some(rows, [start], 8))
    assert cache.settled.tolist() == [16 * blocks]
    assert drift(cache, rows, 16 * blocks) <= blocks * ROUNDING
    assert drift_from_blocks(cache, rows, blocks) <= blocks * ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_100_000_steps_drift_less_than_one_in_ten_thousand(
    dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    steps = 100_000
    spec = replace(
        SPEC,
        head_dim=64,
        group_size=4,
        select=Select(block_size=64, budget=4, sinks=0, local=0, metric=taylor(covariance="diag")),
    )
    library = generate_decoding(spec, tmp_path)
    cache = SPLACache(library, sequences=1, kv_heads=1, tokens=steps, dtype=dtype, device=device)
    rows = inputs(spec, 1, steps, 1, dtype, device)
    cache.allocate(steps)
    for t in range(steps):
        o = cache.step(*tokens(rows, t))
    assert torch.isfinite(o).all()
    assert cache.settled.tolist() == [steps - 1]
    assert drift_from_blocks(cache, rows, (steps - 1) // 64) <= 1e-4
    if dtype == torch.float32:  # a feature between two numbers of 16 bits may be rounded to the other one in float64
        assert drift(cache, rows, steps - 1) <= 1e-4
