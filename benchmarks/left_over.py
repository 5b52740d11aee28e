"""What no query chose, as a difference of sums and summed block by block: error by query, and time of short sequences.

python -m benchmarks.left_over [--out DIR]

The error of o, in bfloat16, is that of a range of queries of one causal sequence, each of which chooses 13 blocks: the
first ranges have few blocks left over.  Both ways compute the whole sequence; the op takes the sum block by block where
the sequence has few blocks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.op import BUILD
from benchmarks.record import write
from benchmarks.timing import time_ms
from splagen import library as lib
from splagen import pipeline
from splagen.kinds import oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import random_inputs, relative_error

DIFFERENCE, DIRECT = "difference", "block by block"
ENDS = (0, 1024, 1088, 1280, 1664, 4096)  # up to the first no block is left over, then 1, 4, 10 and 48 blocks of 64
SELECT = Select(block_size=64, budget=13, sinks=1, local=1, metric=lib.taylor(covariance="diag"))
TILES = Select(
    block_size=64, budget=16, sinks=0, local=0, granularity="tile", tile=64, metric=lib.taylor(covariance="diag")
)
RESIDUALS = {
    "hedgehog, rms": (Residual(), "rms"),
    "elu1, add": (Residual(lib.elu1), "add"),
    "relu2, rms_residual": (Residual(lib.relu2), "rms_residual"),
}
TIMED = {
    "token, 16 heads per KV head": SPLASpec(head_dim=128, group_size=16, select=SELECT),
    "token, 4 heads per KV head": SPLASpec(head_dim=128, group_size=4, select=SELECT),
    "tiles of 64, not causal": SPLASpec(head_dim=128, group_size=1, causal=False, select=TILES),
}
LENGTHS = (512, 1024, 1536, 2048)


class Both:
    """A spec with inputs of one sequence, computed either way."""

    def __init__(self, spec: SPLASpec, heads: int, length: int) -> None:
        self.module, self.truth = pipeline.generate(spec, BUILD).module, oracle(to_toml(spec))
        self.part = self.truth.partition
        self.inputs = random_inputs(self.truth, (1, heads, length), torch.bfloat16, "cuda", 0)
        self.arguments = [self.inputs[a.name] for a in self.part.inputs]

    def forward(self, way: str) -> dict[str, torch.Tensor]:
        """Everything that forward returns."""
        function = self.module.direct_forward if way == DIRECT else self.module.forward
        found = function(self.module.own_schedules(self.arguments[0]), *self.arguments)
        return dict(zip([a.name for a in (*self.part.outputs, *self.part.saved)], found, strict=True))

    def backward(self, way: str, results: dict[str, torch.Tensor]) -> object:
        """The gradients."""
        function = self.module.direct_backward if way == DIRECT else self.module.backward
        behind = [*(results[a.name] for a in self.part.residuals), *(self.inputs[a.name] for a in self.part.cotangents)]
        return function(self.module.own_schedules(self.arguments[0]), *self.arguments, *behind)


def errors() -> Iterator[dict[str, Any]]:
    """Relative RMS errors of o by range of queries."""
    for name, (residual, combine) in RESIDUALS.items():
        both = Both(SPLASpec(head_dim=64, group_size=4, select=SELECT, linear=residual, combine=combine), 4, ENDS[-1])
        exact = {n: x.double() for n, x in both.inputs.items()}
        for way in (DIFFERENCE, DIRECT):
            results = both.forward(way)
            (want,) = both.truth.values(exact, ["o"], results["block_indices"])
            for first, end in itertools.pairwise(ENDS):
                error = relative_error(results["o"][:, first:end], want[:, first:end])
                yield {"residual": name, "left_over": way, "first": first, "end": end, "error": error}


def times() -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and backward, 32 query heads."""
    for name, spec in TIMED.items():
        for length in LENGTHS:
            both = Both(spec, 32, length)
            few = both.module.takes_direct(both.arguments[0])
            for way in (DIFFERENCE, DIRECT):
                results = both.forward(way)
                forward = time_ms(partial(both.forward, way))
                backward = time_ms(partial(both.backward, way, results))
                row = {"selection": name, "length": length, "left_over": way, "taken": few == (way == DIRECT)}
                yield row | {"forward_ms": forward.median, "backward_ms": backward.median}


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    figures = {"errors": list(errors()), "rows": list(times())}
    write("left_over", figures, given.out)
    for row in (*figures["errors"], *figures["rows"]):
        print(row)


if __name__ == "__main__":
    main()
