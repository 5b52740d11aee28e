"""Layouts of hybrids are those that the papers give."""

import pytest

from splagen.errors import InputError
from splagen.nn import SPIKING_BRAIN_2, layout, sse_h


def test_sse_h_has_three_softmax_layers_of_eighteen() -> None:
    assert [i for i, kind in enumerate(sse_h()) if kind == "softmax"] == [5, 11, 17]
    assert set(sse_h(5)) == {"sse"}


def test_spiking_brain_has_26_layers_of_sse() -> None:
    counts = {kind: SPIKING_BRAIN_2.count(kind) for kind in set(SPIKING_BRAIN_2)}
    assert counts == {"sse_window": 26, "moba": 9, "softmax": 1}
    assert SPIKING_BRAIN_2[:5] == ("moba", "moba", "moba", "moba", "sse_window")


def test_every_and_at_together() -> None:
    assert layout(6, "a", every={"b": 3}, at={"c": [0]}) == ("c", "a", "b", "a", "a", "b")


def test_a_layer_of_two_kinds_and_one_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"layer 2 is both 'b' and 'c'"):
        layout(6, "a", every={"b": 3}, at={"c": [2]})
    with pytest.raises(InputError, match=r"layer 6 of kind 'c'"):
        layout(6, "a", at={"c": [6]})
