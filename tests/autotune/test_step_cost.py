"""The cost of a decoding step: what is counted is what the definition's masks admit and what a module allocates."""

from dataclasses import replace
from pathlib import Path

import pytest
import sympy as sp
import torch

from splagen import library as lib
from splagen.autotune.cost import costs, default_schedules, evaluate, predict, run_sizes
from splagen.autotune.device import DEVICES
from splagen.autotune.step_cost import Step, step_sizes
from splagen.codegen import predicates
from splagen.codegen.decoding import SPLITTING, decoding
from splagen.ir.reference import evaluate as value
from splagen.pipeline import generate_decoding
from splagen.spec import Residual, Select, SPLASpec, Statistics, windows

SELECT = Select(block_size=32, budget=3, sinks=1, local=1, metric=lib.taylor(covariance="diag"))
SMALL = SPLASpec(head_dim=32, group_size=2, select=SELECT)
SPECS = {
    "default": replace(SMALL, select=Select(block_size=32, budget=3)),
    "diagonal": SMALL,
    "no sinks, two local": replace(SMALL, select=replace(SELECT, sinks=0, local=2)),
    "cells": replace(SMALL, select=replace(SELECT, statistics=Statistics(16))),
    "windows": replace(SMALL, select=replace(SELECT, statistics=windows())),
    "normaliser": replace(SMALL, linear=Residual(normaliser=True), combine="add"),
    "no residual": replace(SMALL, linear=None, combine="none"),
    "dense window": replace(SMALL, linear=None, select=None, combine="none", score=lib.sliding_window(128)),
}
LENGTH = 1024


@pytest.mark.parametrize("name", SPECS)
def test_blocks_are_those_of_the_definition_at_its_last_query(name: str) -> None:
    part = decoding(SPECS[name])
    step = Step.of(part, "bf16")
    blocks = LENGTH // part.geometry.block
    sizes = {"T": 1, "J": blocks, "Jw": blocks}

    def admitted(mask: str, axes: str) -> int:
        """Of these axes, the places at which a mask holds somewhere."""
        v = part.program.var(mask)
        found = value(part.program, {}, scalars={"L": LENGTH}, sizes=sizes, offsets={"T": LENGTH - 1}, wanted=[v])
        return int(found[mask].any(dim=[i for i, a in enumerate(v.axes) if a not in axes]).sum())

    at = {predicates.LENGTH: sp.Integer(LENGTH)}
    selection = step._selection
    if selection is None:
        assert step.forced.xreplace(at) == blocks, "a score function masks keys, and no block"
        return
    assert step.far.xreplace(at) == admitted(selection.far.name, "J")
    assert step.forced.xreplace(at) + admitted(selection.far.name, "J") == blocks
    assert step.usable.xreplace(at) * part.geometry.cells == admitted(selection.usable.name, "JC")


@pytest.mark.parametrize("name", ["default", "cells", "dense window"])
def test_splits_are_those_that_a_module_allocates(name: str, tmp_path: Path) -> None:
    library = generate_decoding(SPECS[name], tmp_path)
    part = decoding(SPECS[name])
    for sequences, kv_heads, tokens in ((1, 1, 32), (1, 2, 4096), (7, 3, 100_000), (64, 8, 65_536), (300, 2, 96)):
        for splitting in (SPLITTING, {"score": 66, "attend": 1000, "chunk": 16}):
            schedules = {"splitting": splitting}
            made = library.module.scratch(schedules, sequences, kv_heads, tokens, torch.float32, "meta")
            sizes = step_sizes(part, sequences, kv_heads, tokens, splitting)
            assert made["row_max_parts"].shape[2] == sizes["ATTEND_SPLITS"]
            if part.budget:
                assert made["score_max"].shape[2] == sizes["SCORE_SPLITS"] + 1
                assert made["candidate_keys"].shape[2] == sizes["CHUNKS"]


@pytest.mark.parametrize(("name", "chunks"), [("default", [1, 1, 4, 16]), ("windows", [1, 3, 5, 17])])
def test_blocks_of_two_chunks_are_one_and_windows_that_reach_into_a_chunk_take_room_in_it(
    name: str, chunks: list[int]
) -> None:
    part = decoding(SPECS[name])
    sizes = [step_sizes(part, 1, 1, n * part.geometry.block, SPLITTING) for n in (1, 2048, 4096, 16384)]
    assert [s["CHUNKS"] for s in sizes] == chunks


def test_the_floor_is_what_a_step_reads_of_the_cache_and_little_else() -> None:
    """Statistics of all blocks, keys and values of the exact ones, states; rows of a token and parameters beside."""
    part = decoding(SMALL)
    floor = Step.of(part, "bf16").floor()
    for batch, heads, length in ((1, 1, 65_536), (8, 4, 1 << 20)):
        sizes = step_sizes(part, batch, heads, length, SPLITTING)
        statistics = length // 32 * 2 * 32 * 2
        exact = (3 + 3) * 32 * 2 * 32 * 2
        states = 2 * 32 * 32 * 4
        read = batch * heads * (statistics + exact + states)
        assert read < evaluate(floor, sizes, "a step") < 1.05 * read


@pytest.mark.parametrize("name", SPECS)
def test_no_kernel_moves_less_than_its_part_of_the_floor(name: str) -> None:
    spec, shape = SPECS[name], (4, 8, 32_768)
    part = decoding(spec)
    sizes = run_sizes(spec, part, shape)
    found = costs(spec, part, default_schedules(spec, part, "sm_90", "bf16"), "bf16")
    assert list(found) == [k.name for k in part.kernels]
    total = sum(evaluate(c.bytes, sizes, c.kernel) for c in found.values())
    assert total > evaluate(Step.of(part, "bf16").floor(), sizes, "a step") > total / 4
    for c in found.values():
        assert evaluate(c.programs, sizes, c.kernel) >= 1
        assert predict(c, sizes, DEVICES["NVIDIA H200"]).ms > 0


def test_scores_and_attention_cost_what_their_products_say() -> None:
    """2 products of a query with statistics of all blocks; q.k, p.v and the two of the residual on 6 blocks."""
    part = decoding(SMALL)
    sizes = run_sizes(SMALL, part, (1, 2, 4096))
    found = costs(SMALL, part, default_schedules(SMALL, part, "sm_90", "bf16"), "bf16")
    folded = 2 * (2 * 32) * 32  # a token's row into states of 2 signs of features
    assert evaluate(found["score"].flops, sizes, "score") == 2 * 2 * 32 * 2 * (4096 // 32) + folded
    softmax = 2 * 2 * 6 * 32 * (32 + 32)
    chosen = 2 * 2 * 3 * 32 * (2 * 32 + 32)  # the residual takes what is chosen off again: 2 signs of features
    states = 2 * 2 * (2 * 32) * 32
    assert evaluate(found["attend"].flops, sizes, "attend") == softmax + chosen + states
    assert found["select"].flops == 0
