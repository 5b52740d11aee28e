"""Decoding with SSE: one token per sequence inside a CUDA graph, beside the time of the bytes that it must move.

python -m benchmarks.sse_step [--batches 1 16 64] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import PEAK_BYTES
from benchmarks.record import write
from benchmarks.timing import time_ms
from splagen import pipeline
from splagen.codegen.sequence_partition import parts_of
from splagen.sequence import SSEOracle, input_names
from splagen.sse_spec import Router, SSESpec
from splagen.verification import relative_error

H, D = 32, 128
CASES = [(b, k) for b in ("scalar", "vector", "delta") for k in (1, 2)]
LIMIT = 4e-3


def inputs(spec: SSESpec, batch: int) -> dict[str, Tensor]:
    """Random rows of one token per sequence, and a table of states with twice as many slots."""
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda")

    x: dict[str, Tensor] = {}
    for name in input_names(spec):
        if name[0] in "qkv":
            x[name] = normal(batch, H, D).to(torch.bfloat16)
        elif name == "logits":
            x[name] = normal(batch, 4)
        elif name.startswith("beta"):
            x[name] = normal(batch, H).sigmoid()
        else:
            shape = (batch, H, D) if spec.backbone == "vector" else (batch, H)
            x[name] = torch.nn.functional.logsigmoid(normal(*shape)) / 16
    x["table"] = normal(2 * batch, parts_of(spec), H, D, D)
    x["slots"] = torch.randperm(2 * batch, generator=draw, device="cuda")[:batch].to(torch.int32)
    return x


def error_of(spec: SSESpec, module: Any, x: dict[str, Tensor]) -> float:
    """The larger relative error of o and of the states, against the oracle."""
    names = input_names(spec)
    used = x["slots"].long()
    batch = used.shape[0]
    ends = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    truth = SSEOracle(spec).values({**{n: x[n] for n in names}, "state": x["table"][used], "cu_seqlens": ends})
    table = x["table"].clone()
    o = module.step(module.schedules_for(x["v"]), *(x[n] for n in names), table, x["slots"])
    return max(relative_error(o, truth["o"]), relative_error(table[used], truth["final"]))


def replay_us(spec: SSESpec, module: Any, x: dict[str, Tensor], repeats: int = 50) -> float:
    """Median microseconds of one replay, the L2 cache flushed before."""
    names = input_names(spec)
    op = getattr(module, f"{spec.name}_step")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            op(*(x[n] for n in names), x["table"], x["slots"])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*(x[n] for n in names), x["table"], x["slots"])
    return 1e3 * time_ms(graph.replay, repeats, 1).median


def main() -> None:
    """Check every case, time it, write the record and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    for backbone, k in CASES:
        spec = SSESpec(backbone=backbone, router=Router(writers=k))  # type: ignore[arg-type]
        module = pipeline.generate(spec, "build").module
        for batch in args.batches:
            x = inputs(spec, batch)
            error = error_of(spec, module, x)
            floor = 1e6 * 2 * (1 + k) * batch * H * D * D * 4 / PEAK_BYTES
            row: dict[str, Any] = {
                "backbone": backbone,
                "N": 4,
                "k": k,
                "batch": batch,
                "error": error,
                "floor_us": floor,
            }
            if error <= LIMIT:
                row["us"] = replay_us(spec, module, x)
                row["share_of_floor"] = floor / row["us"]
            rows.append(row)
            print({n: round(f, 4) if isinstance(f, float) else f for n, f in row.items()}, flush=True)
    write("sse_step", {"heads": H, "head_dim": D, "rows": rows}, args.out)
    if any(row["error"] > LIMIT for row in rows):
        raise SystemExit("a step is wrong, and not timed")


if __name__ == "__main__":
    main()
