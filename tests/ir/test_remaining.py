"""The pass that reads states of what lists leave over: the same value, and only where lists serve many rows."""

from dataclasses import replace

import pytest

from splagen import library as lib
from splagen.ir.check import check
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.remaining import forward_reads_states, remaining_states
from splagen.spec import Residual, Select, SPLASpec
from tests.ir.blocked import evaluated
from tests.ir.test_passes import asked_values, assert_same, spla_rows

TILES = Select(block_size=16, budget=2, sinks=1, local=0, granularity="tile", tile=32)


def tile_spec(linear: Residual | None = None, head_dim: int = 16, group: int = 1, **select: object) -> SPLASpec:
    chosen = replace(TILES, **select)  # type: ignore[arg-type]
    return SPLASpec(head_dim=head_dim, group_size=group, causal=False, select=chosen, linear=linear or Residual())


@pytest.mark.parametrize(
    "spec",
    [
        tile_spec(Residual(lib.softmax), group=2),
        tile_spec(Residual(lib.elu1, normaliser=True, temperature=True), sinks=2, local=1),
        tile_spec(head_dim=32, block_size=32),  # dφ(k) and dv alone
    ],
    ids=["softmax", "normaliser", "keys alone"],
)
def test_differences_of_states_keep_the_value_forward_and_backward(spec: SPLASpec) -> None:
    """Also where a sequence is so short that nothing is left over."""
    p = derive_gradient(spla_program(spec))
    after = check(remaining_states(p))
    assert after != p
    for length in (5, 33, 150):
        rows = spla_rows(spec, length)
        assert_same(asked_values(after, evaluated(after, spec, rows)), asked_values(p, evaluated(p, spec, rows)))


@pytest.mark.parametrize(
    ("spec", "directions"),
    [
        (tile_spec(Residual(lib.softmax), 128, tile=64, block_size=64), 2),
        (tile_spec(Residual(lib.hedgehog), 128, tile=64, block_size=64), 1),  # forward: 48 products per number read
        (tile_spec(Residual(lib.hedgehog), 128, tile=128, block_size=64), 2),
        (tile_spec(Residual(lib.softmax), 128, tile=32, block_size=32), 0),
        (tile_spec(Residual(lib.softmax), 16, tile=16), 0),  # 16 rows fill no tile
        (tile_spec(Residual(lib.softmax), 16, tile=16, group=2), 2),
        (replace(tile_spec(Residual(lib.softmax)), causal=True), 0),
        (replace(tile_spec(Residual(lib.softmax)), linear=None, combine="none"), 0),
    ],
)
def test_states_are_read_where_pairs_would_cost_more(spec: SPLASpec, directions: int) -> None:
    """A difference for each direction: what queries are left with, and what keys are."""
    definition = spla_program(spec)
    after = remaining_states(derive_gradient(definition))
    names = {eq.out.name for eq in after.equations if eq.out.name.endswith("_remaining")}
    assert len(names) == directions
    assert forward_reads_states(definition) == (directions == 2)


def test_sums_of_one_direction_share_their_states() -> None:
    """Forward and dφ(q) have one difference, dφ(k) and dv another; a normaliser has vectors beside each."""
    after = remaining_states(derive_gradient(spla_program(tile_spec(Residual(lib.elu1, normaliser=True)))))
    states = {eq.out.name: eq.out.axes[2:] for eq in after.equations if eq.out.name.endswith("_states")}
    assert sorted(states.values()) == [("J", "d"), ("J", "d", "e"), ("T", "d"), ("T", "d", "e")]
    reads = [v.name for eq in after.equations for v in eq.args if v.name.endswith("_remaining")]
    assert len(reads) == 2 + 2 + 1 + 2  # rest_z and dφ(q), rest_kv and dφ(q); dφ(k); dφ(k) and dv
