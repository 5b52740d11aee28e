"""What tuning costs and gains on this GPU.

python -m benchmarks.tuning --cases "SPLA G=16 d=128" "SSE scalar k=1" --lengths 8192 65536 [--effort full] [--out DIR]

Cold tuning of forward and backward of each spec at each length, one bucket, bf16; then the whole op with the Schedules
that rules give and with those that were found, in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.timing import time_ms
from splagen import pipeline, sequence_verification, tuning, verification
from splagen.autotune.cost import rank_correlation, schedule_cost
from splagen.autotune.device import this_device
from splagen.autotune.key import Bucket
from splagen.autotune.search import Measurement
from splagen.autotune.tuner import Tuned
from splagen.codegen import schedule as attention
from splagen.codegen import sequence_schedule as recurrences
from splagen.codegen.geometry import Geometry
from splagen.codegen.schedule import Schedule
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.sequence import SSEOracle
from splagen.spec import Select, Spec, SPLASpec, to_toml
from splagen.sse_spec import Router, SSESpec
from splagen.verification import Shape

CASES: dict[str, tuple[Spec, int]] = {  # with the number of heads: of queries, or of values
    f"SPLA G={group} d={d}": (
        SPLASpec(
            head_dim=d,
            group_size=group,
            select=Select(block_size=64, budget=16, metric=taylor(covariance="diag")),
        ),
        4096 // d,
    )
    for d in (64, 128, 256)
    for group in (1, 4, 8, 16)
} | {
    f"SSE {backbone} k={k}": (
        SSESpec(backbone=backbone, q_map="identity", k_map="identity", router=Router(partitions=4, writers=k)),
        32,
    )
    for backbone in ("none", "scalar", "vector", "delta")
    for k in (1, 2)
}


def by_rules(spec: Spec) -> dict[str, Schedule]:
    """The Schedules that every kernel would have if nothing had been tuned."""
    part = pipeline.kernels(spec)
    if isinstance(spec, SSESpec):
        return {k.name: recurrences.default_schedule(k, spec, "sm_90", "bf16") for k in part.kernels}
    geometry = Geometry.of(part.program)
    return {k.name: attention.rule_schedule(k, geometry, "sm_90", "bf16") for k in part.kernels}


def op_ms(spec: Spec, module: ModuleType, shape: Shape, schedules: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of forward and backward with some Schedules, launches included as far as the GPU waits."""
    truth = oracle(to_toml(spec))
    dtype, device = torch.bfloat16, "cuda"
    if isinstance(truth, SSEOracle):
        x = sequence_verification.random_inputs(truth, [shape[2]], shape[1], dtype, device, 0, decay=-0.05)
        rows = [x[n] for n in (*truth.names, "state", "cu_seqlens")]
        more = [x[n] for n in ("do", "dfinal", "dbalance") if n in x]
    else:
        x = verification.random_inputs(truth, shape, dtype, device, 0)
        rows = [x[a.name] for a in truth.partition.inputs]
        more = [x[a.name] for a in truth.partition.cotangents]
    results = module.forward(schedules, *rows)
    saved: list[Tensor] = []
    if not isinstance(truth, SSEOracle):
        part = truth.partition
        outputs = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
        saved = [outputs[a.name] for a in part.residuals]
    return {
        "forward": time_ms(lambda: module.forward(schedules, *rows), 10, asleep=True).median,
        "backward": time_ms(lambda: module.backward(schedules, *rows, *saved, *more), 10, asleep=True).median,
    }


def row_of(name: str, shape: Shape, effort: str, seconds: float | None, jobs: int) -> dict[str, Any]:
    """Tune one spec in an empty cache and time its op."""
    spec, _ = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        library = pipeline.generate(spec, folder)
        start = time.perf_counter()
        options: dict[str, Any] = {"effort": effort, "seconds": seconds, "jobs": jobs, "force": True}
        (tuned,) = tuning.tune(library, shapes=[shape], **options)
        wall = time.perf_counter() - start
        rules = by_rules(spec)
        times = {"rules_ms": op_ms(spec, library.module, shape, rules)}
        times["tuned_ms"] = op_ms(spec, library.module, shape, {**rules, **tuned.schedules})
    cost = schedule_cost(spec, pipeline.kernels(spec), Bucket.of(spec, shape), this_device(), "bf16")
    return {
        "case": name,
        "shape": list(shape),
        "length": shape[2],
        "effort": effort,
        "wall_s": wall,
        **figures(tuned, cost),
        **times,
    }


def figures(tuned: Tuned, cost: Callable[[str, Schedule], float]) -> dict[str, Any]:
    """What the search did, kernel by kernel, and how well the cost model orders the Schedules of each."""
    kernels = {}
    for name, r in tuned.results.items():
        start = r.default.ms if isinstance(r.default, Measurement) else None
        trials = [(t.schedule, t.outcome.ms) for t in r.trials if isinstance(t.outcome, Measurement)]
        measured = [ms for _, ms in trials]
        predicted = [cost(name, schedule) for schedule, _ in trials]
        kernels[name] = {
            "rank_correlation": rank_correlation(predicted, measured) if len(trials) > 2 else None,
            "default_ms": start,
            "ms": r.measurement.ms,
            "schedule": dict(r.schedule),
            "tried": len(r.trials),
            "lost": len(r.lost),
            "trials": {" ".join(f"{n}={x}" for n, x in sorted(s.items())): round(ms, 5) for s, ms in trials},
        }
    wrong = [{"kernel": k, "schedule": dict(s), "seen": seen.partition("\n")[0]} for k, s, seen in tuned.wrong]
    ranks = [k["rank_correlation"] for k in kernels.values() if k["tried"] >= 8 and k["rank_correlation"] is not None]
    return {
        "search_s": tuned.seconds,
        "wrong": wrong,
        "rank_correlation": statistics.median(ranks) if ranks else None,
        "kernels": kernels,
    }


def main() -> None:
    """Tune every case, write the record and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--seconds", type=float, help="no measurement of a case starts later; else the effort's")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--jobs", type=int, default=16, help="compilers side by side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, length in itertools.product(args.cases, args.lengths):
        rows.append(row_of(name, (1, CASES[name][1], length), args.effort, args.seconds, args.jobs))
        r = rows[-1]
        print(name, length, f"wall {r['wall_s']:.1f} s, search {r['search_s']:.1f} s", r["wrong"])
        for which in ("rules_ms", "tuned_ms"):
            print(f"  {which}", " ".join(f"{k} {ms:.3f}" for k, ms in r[which].items()))
        for kernel, k in r["kernels"].items():
            text = f"{k['default_ms']:.4f}" if k["default_ms"] else "lost"
            rank = "" if k["rank_correlation"] is None else f"rank {k['rank_correlation']:.2f}"
            counts = f"tried {k['tried']} lost {k['lost']}"
            print(f"  {kernel:20s} {text} -> {k['ms']:.4f} {counts} {rank} {list(k['schedule'].values())}", flush=True)
        write(f"tuning_{args.effort}", {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
