"""A small forward and backward of several specs, to run under NVIDIA's checkers.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

from __future__ import annotations

import os

import torch

from splagen import library, pipeline
from splagen.kinds import oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import compare, random_inputs

SPECS = (
    SPLASpec(head_dim=64, group_size=4, select=Select(block_size=32, budget=3)),
    SPLASpec(
        head_dim=48,
        value_dim=80,
        group_size=3,
        causal=False,
        select=Select(block_size=16, budget=2, granularity="tile", tile=32, metric=library.taylor(covariance="diag")),
        linear=Residual(library.elu1, normaliser=True),
        combine="add",
    ),
    SPLASpec(head_dim=64, group_size=2, select=None, linear=None),
)


def main() -> None:
    """Run each spec at a ragged length and compare it with the oracle; the exit status is 1 where it differs."""
    wrong = 0
    for spec in SPECS:
        library_ = pipeline.generate(spec, os.environ.get("SPLAGEN_CACHE_DIR", "build"))
        found = oracle(to_toml(spec))
        shape = (2, 2 * spec.group_size, 203)
        for row in compare(library_.module, found, random_inputs(found, shape, torch.bfloat16, "cuda", 0), shape):
            print(row.quantity, f"{row.error:.1e}", "ok" if row.ok else "WRONG")
            wrong += not row.ok
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
