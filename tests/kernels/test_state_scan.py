"""Prefix sums of states beside torch.cumsum, with fewer chunks than a step takes, as many, and more."""

from pathlib import Path

import pytest
import torch

from splagen.library import taylor
from splagen.pipeline import generate
from splagen.spec import Residual, Select, SPLASpec
from splagen.verification import relative_error

BLOCK, BLOCK_M = 16, 16
SPEC = SPLASpec(
    head_dim=16,
    group_size=2,
    select=Select(BLOCK, budget=2, sinks=0, metric=taylor(covariance="diag")),
    linear=Residual(),
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunks", [1, BLOCK_M - 1, BLOCK_M, BLOCK_M + 1, 5 * BLOCK_M + 3])
def test_entry_c_is_the_sum_of_the_chunks_before_c(chunks: int, device: str, tmp_path: Path) -> None:
    module = generate(SPEC, tmp_path).module
    q = torch.empty(1, BLOCK * chunks - 3, 4, 16, device=device)
    states = torch.randn(1, 2, chunks + 1, 32, 16, device=device)
    want = states.double()
    want[:, :, 0] = 0.0
    want = want.cumsum(2)
    schedule = {"BLOCK_M": BLOCK_M, "BLOCK_E": 128, "num_warps": 4, "num_stages": 1}
    module.launch_scan_rest_kv_all_states(module.sizes_of(q), schedule, states)
    assert relative_error(states, want) < 1e-6
    assert not states[:, :, 0].any()
