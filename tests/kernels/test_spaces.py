"""Schedules drawn from the spaces that tuning searches do not change a result."""

import random
from pathlib import Path

import pytest
import torch

from splagen import sequence_verification, verification
from splagen.autotune.device import DEVICES
from splagen.autotune.space import common_values, spaces
from splagen.codegen.partition import Partition
from splagen.codegen.schedule import Agreement, Divides, check_constraints
from splagen.codegen.sequence_partition import SequencePartition
from splagen.kinds import kind_of, oracle
from splagen.library import taylor
from splagen.pipeline import generate, kernels
from splagen.spec import Residual, Select, Spec, SPLASpec, to_toml, windows
from splagen.sse_spec import Router, SSESpec
from tests.kernels.embedding import fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")

H200 = DEVICES["NVIDIA H200"]
ATTENTION = {
    "tiles": SPLASpec(
        head_dim=24,
        group_size=2,
        select=Select(block_size=32, budget=2, granularity="tile", tile=16, metric=taylor(covariance="diag")),
        linear=Residual(temperature=True),
    ),
    "windows": SPLASpec(head_dim=16, value_dim=40, group_size=3, select=Select(budget=1, statistics=windows())),
}
RECURRENCES = {
    "vector": SSESpec(head_dim=16, value_dim=40, router=Router(2), group_size=1),
    "scalar": SSESpec(head_dim=16, value_dim=20, backbone="scalar", router=Router(3, 2), group_size=2),
    "routed": SSESpec(head_dim=16, backbone="scalar", router=Router(2), form="routed"),
    "delta": SSESpec(head_dim=16, value_dim=40, backbone="delta", router=Router(2), shared=False),
}

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


def drawn(spec: Spec, part: Partition | SequencePartition, seed: int) -> dict[str, dict[str, int]]:
    """A Schedule of its space for every kernel, with the values that they must agree on."""
    rng = random.Random(seed)
    made = spaces(spec, part, H200, "fp32")
    for c in part.constraints:
        if isinstance(c, Agreement):
            value = rng.choice(common_values(made, c))
            made |= {k: made[k].fixed(c.name, value) for k in c.kernels}
    found = {name: rng.choice(list(space.all())) for name, space in made.items()}
    for measured in {c.measured for c in part.constraints if isinstance(c, Divides)}:
        users = {k for c in part.constraints if isinstance(c, Divides) and c.measured == measured for k in c.kernels}
        longest = max(found[k]["CHUNK"] for k in users)
        found[measured] = rng.choice(list(made[measured].within("CHUNK", lambda x, n=longest: x % n == 0).all()))
    check_constraints(part.constraints, found)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, seed: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ATTENTION[name]
    truth, module = oracle(to_toml(spec)), generate(spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    shape = (1, spec.group_size, 170)
    inputs = verification.random_inputs(truth, shape, torch.float32, device, seed)
    rows = verification.compare(module, truth, inputs, shape, drawn(spec, truth.partition, seed))
    verification.Report(spec.name, tuple(rows)).raise_if_wrong()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences(
    name: str, seed: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RECURRENCES[name]
    module = generate(spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    truth, lengths = kind_of(spec).oracle(spec), [43, 0, 1, 23]
    inputs = sequence_verification.random_inputs(truth, lengths, spec.group_size, torch.float32, device, seed)
    shape, schedules = (1, spec.group_size, sum(lengths)), drawn(spec, kernels(spec), seed)
    rows = sequence_verification.compare(module, truth, inputs, shape, "", schedules)
    verification.Report(spec.name, tuple(rows)).raise_if_wrong()
