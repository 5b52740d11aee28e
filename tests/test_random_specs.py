"""Random specs, whole: generated, imported, and compared with the oracle in the interpreter."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.random_specs import SHAPES, attempt, small_specs
from splagen.spec import SPLASpec, to_toml
from tests.interpreter_sort import patch

patch()
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def check(spec: SPLASpec, blocks: int, folder: Path) -> None:
    """No spec that is drawn is refused."""
    outcome = attempt(spec, blocks, folder, compile_for=())
    assert outcome.status == "ok", f"{outcome.status}: {outcome.reason}\n{to_toml(spec)}"


@given(small_specs(), st.sampled_from(SHAPES))
@settings(
    max_examples=2,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_a_few_random_specs(tmp_path: Path, spec: SPLASpec, blocks: int) -> None:
    check(spec, blocks, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@given(small_specs(), st.sampled_from(SHAPES))
@settings(
    max_examples=5000 if NIGHTLY else 200,
    derandomize=not NIGHTLY,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_many_random_specs(tmp_path: Path, spec: SPLASpec, blocks: int) -> None:
    check(spec, blocks, tmp_path)
