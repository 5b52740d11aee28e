"""L * Hq * D beyond 2^31: forward and backward at L = 640k, sampled rows against the oracle.

python -m benchmarks.long_sequence.  Rows of queries are compared directly.  Rows of keys receive from every later
query, so their gradients are compared for a cotangent that is zero but at the sampled queries: then the oracle needs
those queries alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.works import HEADS, D, whole_spec
from splagen import pipeline
from splagen.kinds import oracle
from splagen.ops import Oracle
from splagen.spec import to_toml
from splagen.verification import TOLERANCE, random_inputs, relative_error

LENGTH = 640 * 1024


def samples(length: int, count: int) -> list[int]:
    """Query positions spread over the sequence, its first and last rows and both sides of 2^31 / (Hq D) among them."""
    edge = 2**31 // (HEADS * D)
    fixed = [0, 63, 64, 257, edge - 1, edge, edge + 1, length - 1]
    spread = [(2 * i + 1) * length // (2 * count) for i in range(count)]
    return sorted({p for p in (*fixed, *spread) if p < length})


def at_rows(
    found: Oracle, inputs: Mapping[str, Tensor], rows: list[int], indices: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's o at the sampled rows, and the gradients that these rows alone produce (dq: at the rows)."""
    outputs, dq = [], []
    totals: dict[str, Tensor] = {}
    for row in rows:
        o, gradients = found.at_tile(inputs, row, indices)
        outputs.append(o)
        for name, g in gradients.items():
            if name == "q":
                dq.append(g)
            else:
                totals[name] = totals[name] + g if name in totals else g
    return torch.cat(outputs, dim=1), {"q": torch.cat(dq, dim=1), **totals}


def run(length: int, count: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Errors at the sampled rows, times and peak memory."""
    spec = whole_spec(HEADS // 2)
    module, found = pipeline.generate(spec, "build").module, oracle(to_toml(spec))
    part = found.partition
    inputs = random_inputs(found, (1, HEADS, length), dtype, "cuda", 0)
    do = part.cotangents[0].name
    rows = samples(length, count)
    arguments = [inputs[a.name] for a in part.inputs]
    chosen = module.schedules_for(arguments[0])
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    results = dict(zip([a.name for a in (*part.outputs, *part.saved)], module.forward(chosen, *arguments), strict=True))
    torch.cuda.synchronize()
    forward_ms = 1e3 * (time.perf_counter() - start)
    residuals = [results[a.name] for a in part.residuals]
    start = time.perf_counter()
    gradients = module.backward(chosen, *arguments, *residuals, inputs[do])
    torch.cuda.synchronize()
    backward_ms = 1e3 * (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30
    finite = all(bool(torch.isfinite(g).all()) for g in (*gradients, results[part.outputs[0].name]))
    dq = gradients[0][:, rows].clone()
    del gradients
    probe = torch.zeros_like(inputs[do])
    probe[:, rows] = inputs[do][:, rows]
    inputs[do] = probe
    names = [x.name for x, _ in found.definition.gradients]
    probed = dict(zip(names, module.backward(chosen, *arguments, *residuals, probe), strict=True))
    probed["q"] = dq
    o = results[part.outputs[0].name][:, rows]
    indices = results["block_indices"]
    del residuals, results
    torch.cuda.empty_cache()
    want, truth = at_rows(found, inputs, rows, indices)
    limits = TOLERANCE[dtype]
    errors = {"o": relative_error(o, want)} | {f"d{n}": relative_error(probed[n], g) for n, g in truth.items()}
    ok = finite and all(e <= (limits[0] if n == "o" else limits[1]) for n, e in errors.items())
    return {
        "length": length,
        "elements_of_q": length * HEADS * D,
        "sampled_rows": len(rows),
        "errors": errors,
        "finite": finite,
        "ok": ok,
        "first_call_forward_ms": forward_ms,
        "first_call_backward_ms": backward_ms,
        "peak_gib": peak,
        "peak_kib_per_token": peak * 2**20 / length,
    }


def main() -> None:
    """Run at several lengths, so that memory is seen to grow linearly, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[LENGTH // 4, LENGTH])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        rows.append(run(length, args.samples))
        torch.cuda.empty_cache()
        print({k: v for k, v in rows[-1].items() if k != "errors"}, flush=True)
        print({n: f"{e:.1e}" for n, e in rows[-1]["errors"].items()}, flush=True)
    write("long_sequence", {"rows": rows}, args.out)
    if not all(r["ok"] for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
