"""A decoding step from the definition: stepping t tokens is prefill of t tokens, row by row."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from splagen import library as lib
from splagen.errors import ProgramError, SpecError
from splagen.ir.check import check
from splagen.ir.decoding import carry, keep_normalisers, state_pairs, step_program
from splagen.ir.frontend_spla import block_size, spla_program
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Program, Softmax
from splagen.ir.reference import evaluate
from splagen.layout import Blocked
from splagen.spec import Residual, Select, SPLASpec, Statistics, windows
from tests.ir.blocked import blocked, evaluated, output, plain_rows, random_rows

SELECT = Select(block_size=16, budget=1, sinks=1, local=1, metric=lib.taylor(covariance="diag"))
SMALL = SPLASpec(head_dim=16, group_size=2, select=SELECT)
SPECS = {
    "default": replace(SMALL, select=Select(block_size=16, budget=1)),
    "diagonal": SMALL,
    "no sinks, no local": replace(SMALL, select=replace(SELECT, sinks=0, local=0)),
    "budget covers all": replace(SMALL, select=replace(SELECT, budget=9)),
    "normaliser": replace(SMALL, linear=Residual(normaliser=True), combine="add"),
    "temperature, gate": replace(SMALL, linear=Residual(lib.softmax, temperature=True), combine="gate"),
    "user map, softcap": replace(SMALL, linear=Residual(lib.relu2), score=lib.softcap(5.0), combine="rms_residual"),
    "cells": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=Statistics(cell=16))),
    "windows": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=windows())),
    "order 1": replace(SMALL, select=replace(SELECT, metric=lib.taylor(order=1))),
    "no residual": replace(SMALL, linear=None, combine="none"),
    "dense": replace(SMALL, linear=None, select=None, combine="none"),
    "dense window": replace(SMALL, linear=None, select=None, combine="none", score=lib.sliding_window(20)),
}
LENGTH = 82
KEYS = ("k", "v")
BY_TOKEN = ("q", *KEYS, "gate_s", "gate_r")


def stepped(spec: SPLASpec, rows: dict[str, torch.Tensor], steps: Iterable[tuple[int, int]]) -> torch.Tensor:
    """The outputs of steps, each of some tokens of which the first ones are kept, from zero states."""
    program = check(step_program(spec))
    batch, heads = rows["k"].shape[0], rows["k"].shape[2]
    states: dict[str, torch.Tensor] = {}
    found: list[torch.Tensor] = []
    first, settled = 0, 0
    for tokens, kept in steps:
        outputs, after = [], []
        for length in range(first + 1, first + tokens + 1):
            layout = Blocked(program, batch, length, heads)
            seen = {
                n: x[:, :length] if n in KEYS else x[:, length - 1 :][:, :1] for n, x in rows.items() if n in BY_TOKEN
            }
            given = blocked(spec, rows | seen)
            if not spec.select:  # tiles of many queries there, of one here
                given["q"] = given["q"][:, :, :, :, :1]
            for before, _ in state_pairs(program):
                shape = [layout.sizes[a] for a in before.axes]
                given[before.name] = states.get(before.name, torch.zeros(shape, dtype=torch.float64))
            values = evaluate(
                program,
                given,
                scalars={"L": length, "first": first, "settled": settled},
                sizes={"T": 1, "J": layout.blocks, "Jw": layout.blocks},
                offsets={"T": length - 1},
            )
            outputs.append(plain_rows(values[program.outputs[0].name], 1))
            after.append({before.name: values[state.name] for before, state in state_pairs(program)})
        for later in after[1:]:  # every token leaves the same states
            for n, x in later.items():
                torch.testing.assert_close(x, after[0][n], atol=1e-12, rtol=1e-12)
        states = after[0]
        found += outputs[:kept]
        settled, first = first, first + kept
    return torch.cat(found, 1)


def one_by_one(length: int) -> list[tuple[int, int]]:
    return [(1, 1)] * length


@pytest.mark.parametrize("name", SPECS)
def test_stepping_is_prefill_row_by_row(name: str) -> None:
    spec = SPECS[name]
    rows = random_rows(spec, 2, LENGTH, 2)
    torch.testing.assert_close(stepped(spec, rows, one_by_one(LENGTH)), output(spec, rows), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["no sinks, no local", *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "no sinks, no local")],
)
def test_steps_of_several_tokens_of_which_some_are_kept(name: str) -> None:
    """Whatever was rejected before, rows are those of prefill: at 48 a block becomes far and is taken back again."""
    spec = SPECS[name]
    rows = random_rows(spec, 1, LENGTH, 1)
    steps = [(8, 8)] * 5 + [
        (8, 5),
        (8, 0),
        (8, 2),
        (8, 1),
        (8, 0),
        (8, 8),
        (1, 1),
        (3, 0),
        (5, 5),
        (8, 7),
        (8, 4),
        (8, 8),
    ]
    length = sum(kept for _, kept in steps)
    seen = {n: x[:, :length] if n in BY_TOKEN else x for n, x in rows.items()}
    torch.testing.assert_close(stepped(spec, rows, steps), output(spec, seen), atol=1e-11, rtol=1e-9)


def test_several_tokens_are_as_many_steps_where_short_sequences_are_dense() -> None:
    """A step that crosses dense_below: its first tokens are dense, its last ones are not, and nothing is settled."""
    spec = replace(SMALL, dense_below=80)
    rows = random_rows(spec, 1, 100, 1)
    steps = [(8, 8)] * 9 + [(8, 3), (8, 6), (8, 8), (8, 8)]
    length = sum(kept for _, kept in steps)
    want = stepped(spec, rows, one_by_one(length))
    torch.testing.assert_close(stepped(spec, rows, steps), want, atol=1e-11, rtol=1e-9)


def test_a_step_is_the_last_row_at_its_length_where_short_sequences_are_dense() -> None:
    """Below dense_below every key is exact; the step that reaches it takes all that has become far into the state."""
    spec = replace(SMALL, dense_below=80)
    rows = random_rows(spec, 1, 100, 1)
    got = stepped(spec, rows, one_by_one(100))
    for length in (1, 60, 79, 80, 81, 100):
        short = {n: x[:, :length] if n in "qkv" else x for n, x in rows.items()}
        torch.testing.assert_close(got[:, length - 1], output(spec, short)[:, -1], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", SPECS)
def test_normalisers_of_keys_are_kept_and_change_no_value(name: str) -> None:
    spec = SPECS[name]
    before = spla_program(spec)
    after = check(keep_normalisers(before))
    softmaxes = [eq.op.axes for eq in after.equations if isinstance(eq.op, Softmax) and "n" in eq.out.axes]
    assert all({"J", "C", "n"} & {*axes} for axes in softmaxes)
    rows = random_rows(spec, 1, 50, 1)
    got, want = (evaluated(p, spec, rows)[p.outputs[0].name] for p in (after, before))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_a_step_adds_few_blocks_to_its_states() -> None:
    """After `carry` no sum over all far blocks is left: one block becomes far every block_size steps."""
    program = step_program(SMALL)
    pairs = state_pairs(program)
    assert len(pairs) == 2  # features of either sign
    assert {after for _, after in pairs} <= {*program.outputs}
    fresh = program.var("fresh")
    block = block_size(SMALL)
    counts = []
    for t in range(6 * block):
        sizes = {"T": 1, "J": 6, "Jw": 6, "b": 1, "h": 1}
        scalars = {"L": t + 1, "first": t, "settled": max(t - 1, 0)}
        found = evaluate(program, {}, scalars=scalars, sizes=sizes, offsets={"T": t}, wanted=[fresh])
        counts.append(int(found["fresh"].sum()))
    assert [t for t, n in enumerate(counts) if n] == [3 * block, 4 * block, 5 * block]
    assert max(counts) == 1


def test_what_depends_on_later_tokens_is_refused() -> None:
    with pytest.raises(SpecError, match="causal"):
        step_program(replace(SMALL, causal=False))
    with pytest.raises(SpecError, match="granularity"):
        step_program(replace(SMALL, select=replace(SELECT, granularity="tile", tile=16)))


def test_a_mask_that_may_stop_to_hold_is_not_carried() -> None:
    def lowered(spec: SPLASpec) -> Program:
        return run(spla_program(spec), tuple(p for p in LOWERING if p.__name__ != "take_from_total"))

    with pytest.raises(ProgramError, match="may stop to hold"):
        carry(lowered(replace(SMALL, causal=False)))
