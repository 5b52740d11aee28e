"""The pass that takes the rest of a sequence from one total."""

import pytest

from splagen.ir.check import check
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.totals import take_from_total
from splagen.spec import Select, SPLASpec
from tests.ir.blocked import evaluated
from tests.ir.test_passes import asked_values, assert_same, spla_rows


def far_spec(causal: bool, sinks: int, local: int, group: int) -> SPLASpec:
    select = Select(block_size=16, budget=1, sinks=sinks, local=local)
    return SPLASpec(head_dim=16, group_size=group, causal=causal, select=select)


@pytest.mark.parametrize(
    ("causal", "sinks", "local", "group", "taken"),
    [
        (False, 0, 0, 1, True),
        (False, 2, 3, 4, True),
        (False, 1, 31, 1, True),  # 64 blocks of 16 keys
        (False, 2, 31, 1, False),
        (False, 0, 0, 64, True),
        (False, 1, 0, 64, False),
        (True, 0, 0, 1, False),  # what is not far is half of the sequence
    ],
)
def test_the_rest_is_taken_from_the_total_where_little_else_is_seen(
    causal: bool, sinks: int, local: int, group: int, taken: bool
) -> None:
    p = spla_program(far_spec(causal, sinks, local, group))
    after = take_from_total(p)
    assert (after != p) == taken
    total = [eq for eq in run(p, LOWERING).equations if eq.out.axes == ("b", "h", "s", "d", "e")]
    assert len(total) == taken
    if taken:
        (read,) = [eq for eq in after.equations if eq.out.name == "rest_kv_all"]
        assert {v.name for v in read.args} == {"valid", "phi_q", "phi_k", "v"}


def test_a_total_keeps_the_value_of_sums_forward_and_backward() -> None:
    """Also where a sequence is so short that everything is near."""
    spec = far_spec(False, 1, 1, 2)
    p = derive_gradient(spla_program(spec))
    after = check(take_from_total(p))
    assert sum(eq.out.name.endswith("_all") for eq in after.equations) == 4
    for length in (5, 16, 63, 130):
        rows = spla_rows(spec, length)
        assert_same(asked_values(after, evaluated(after, spec, rows)), asked_values(p, evaluated(p, spec, rows)))
