"""Kernels of states that lists leave over, over any length, list and group."""

import tempfile

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from splagen import library as lib
from splagen.codegen.remaining_kernels import differences
from splagen.kinds import oracle
from splagen.pipeline import generate, generate_packed, kernels, verify_packed
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Report, compare, random_inputs
from tests.kernels.embedding import embedded, fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")


@st.composite
def specs(draw: st.DrawFn) -> SPLASpec:
    block = draw(st.sampled_from([16, 32, 64]))
    forced = draw(st.integers(0, 2))
    select = Select(
        block,
        budget=draw(st.integers(1, 4)),
        sinks=forced,
        local=draw(st.integers(0, 2)),
        granularity="tile",
        tile=draw(st.sampled_from([32, 64, 128])),
        metric=lib.taylor(covariance="diag"),
    )
    linear = Residual(draw(st.sampled_from([lib.softmax, lib.elu1, lib.hedgehog])), normaliser=draw(st.booleans()))
    return SPLASpec(
        head_dim=draw(st.sampled_from([16, 24])),
        value_dim=draw(st.sampled_from([16, 24])),
        group_size=draw(st.integers(1, 3)),
        causal=False,
        select=select,
        linear=linear,
        combine="add",
    )


@pytest.mark.slow
@settings(max_examples=20)
@given(specs(), st.integers(1, 300), st.integers(0, 2**16))
def test_any_length_list_and_group(spec: SPLASpec, length: int, seed: int) -> None:
    assume(differences(kernels(spec).program))
    shape = (1, spec.group_size, length)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        module, truth = generate(spec, folder).module, oracle(to_toml(spec))
        fill_empty_with_nan(module, patches)
        inputs = embedded(random_inputs(truth, shape, torch.float32, "cpu", seed))
        Report(spec.name, tuple(compare(module, truth, inputs, shape))).raise_if_wrong()


@pytest.mark.slow
@settings(max_examples=6)
@given(specs(), st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any))
def test_any_packed_lengths(spec: SPLASpec, lengths: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        verify_packed(generate_packed(spec, folder), lengths=lengths).raise_if_wrong()
