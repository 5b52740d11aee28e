"""What binds each kernel of a work: how busy memory, caches and issue slots are while it runs, by Nsight Compute.

python -m benchmarks.bounds WORK [--variant NAME] [--kv-heads N] [--length N] [--kernels NAME ...] [--out DIR]

WORK is one of `benchmarks.run`, by default its first variant, or spla_step.  ncu, on the PATH, runs this module again
with `--once`, and each kernel several times with other counters; the card's clocks are left alone.  Times under it are
not those of other records.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import spla_step
from benchmarks.op import op_of
from benchmarks.record import ROOT, write
from benchmarks.works import WORKS, Case
from splagen import pipeline
from splagen.pipeline import DecodingLibrary

STEP = "spla_step"
STEP_CASE = 1  # of spla_step.CASES: the most sequences
STEP_LENGTH = 32_768  # as many blocks are attended to as of longer sequences, and ncu saves less memory
SECTIONS = ("SpeedOfLight", "SchedulerStats", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
BUSY = {
    "dram": "DRAM Throughput",
    "l2": "L2 Cache Throughput",
    "l1": "L1/TEX Cache Throughput",
    "sm": "Compute (SM) Throughput",
}
"""Shares of what the hardware can do, in percent: the first level of cache serves shared memory too."""
OTHERS = {
    "no_eligible_warp": "No Eligible",
    "warps_per_sm": "Achieved Active Warps Per SM",
    "registers": "Registers Per Thread",
    "spill_requests": "Local Memory Spilling Requests",
    "l2_hit_rate": "L2 Hit Rate",
}
MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}
BOUND = 70.0  # percent: below it nothing is busy enough to bind, and programs wait for their own results
_KERNEL = re.compile(r"^  (\w+)_kernel \(", re.MULTILINE)
_METRIC = re.compile(r"^    (\S.*?\S)  +(?:(\S+) +)?([\d,.]+) *$", re.MULTILINE)


def parsed(text: str) -> list[dict[str, Any]]:
    """A row for every kernel in what ncu prints, the first launch of each."""
    found: dict[str, dict[str, Any]] = {}
    names = list(_KERNEL.finditer(text))
    ends = [*(name.start() for name in names), len(text)][1:]
    for name, end in zip(names, ends, strict=True):
        part = text[name.end() : end]
        metrics = {m: (unit, float(number.replace(",", ""))) for m, unit, number in _METRIC.findall(part)}
        if name[1] in found or "Duration" not in metrics:
            continue
        unit, time = metrics["Duration"]
        busy = {key: metrics[m][1] for key, m in BUSY.items() if m in metrics}
        row = {"kernel": name[1], "under_ncu_ms": time * MILLISECONDS[unit], "busy_percent": busy}
        row |= {key: metrics[m][1] for key, m in OTHERS.items() if m in metrics}
        found[name[1]] = row | {"bound": bound(busy)}
    return list(found.values())


def bound(busy: dict[str, float]) -> str:
    """What is busiest, or "latency" where nothing is busy enough."""
    most = max(busy, key=lambda key: busy[key])
    return most if busy[most] >= BOUND else "latency"


def step_library() -> DecodingLibrary:
    """The module of a step."""
    return pipeline.generate_decoding(spla_step.spec_of(spla_step.CASES[STEP_CASE][1]), "build")


def case_of(work: str, kv_heads: int | None, length: int | None, variant: str | None = None) -> Case:
    """A work's variant, by default the first, of a size."""
    cases = WORKS[work].cases([length] if length else [], [kv_heads] if kv_heads else [])
    return next(c for c in cases if variant in (None, c.variant))


def kernels_of(work: str, kv_heads: int | None, variant: str | None = None) -> list[str]:
    """The names of the kernels that a work's module has."""
    if work == STEP:
        module = step_library().module
    else:
        module = op_of(case_of(work, kv_heads, None, variant).spec, WORKS[work].timed).module
    return [name.removesuffix("_kernel") for name in vars(module) if name.endswith("_kernel")]


def once(work: str, kv_heads: int | None, length: int | None, variant: str | None = None) -> None:
    """Forward and backward of a case, or one step; nothing is compared with the oracle."""
    if work == STEP:
        library, (batch, heads, _, _) = step_library(), spla_step.CASES[STEP_CASE]
        cache = spla_step.filled(library, batch, heads, length or STEP_LENGTH)
        cache.step(*spla_step.given(library.spec, batch, heads))
    else:
        case = case_of(work, kv_heads, length, variant)
        op = op_of(case.spec, WORKS[work].timed)
        inputs = op.inputs(case.shape, torch.bfloat16, "cuda")
        results = op.forward(inputs)
        if "backward" in WORKS[work].passes:
            op.backward(inputs, results)
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*WORKS, STEP], metavar="WORK")
    parser.add_argument("--variant", help="default: the first of the work")
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--length", type=int, help="default: the first of the work")
    parser.add_argument("--kernels", nargs="+", help="names, or regular expressions of them; default: all")
    parser.add_argument("--most", type=int, default=40, help="launches")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--once", action="store_true", help="what ncu runs")
    given = parser.parse_args(arguments)
    variants = WORKS[given.work].specs if given.work in WORKS else ()
    if given.variant is not None and given.variant not in variants:
        known = ", ".join(map(repr, variants)) or "none"
        parser.error(f"{given.work} has no variant {given.variant!r}, but {known}")
    if given.once:
        once(given.work, given.kv_heads, given.length, given.variant)
        return
    sections = [x for s in SECTIONS for x in ("--section", s)]
    names = "|".join(given.kernels or kernels_of(given.work, given.kv_heads, given.variant))
    which = ["-k", f"regex:^({names})_kernel$", "-c", str(given.most)]  # torch's own kernels have such names too
    child = [sys.executable, "-m", "benchmarks.bounds", given.work, "--once"]
    sizes = {"--variant": given.variant, "--kv-heads": given.kv_heads, "--length": given.length}
    child += [str(x) for pair in sizes.items() if pair[1] for x in pair]
    command = ["ncu", "--clock-control", "none", *sections, *which, *child]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    what = {"work": given.work, "variant": given.variant}
    rows = [what | {"kv_heads": given.kv_heads, "length": given.length} | row for row in parsed(text)]
    if not rows:
        raise SystemExit(f"ncu measured no kernel:\n{text[-2000:]}")
    write(re.sub(r"\W+", "_", "_".join(["bounds", *filter(None, what.values())])), {"rows": rows}, given.out)
    for row in rows:
        shares = "  ".join(f"{key} {x:5.1f} %" for key, x in row["busy_percent"].items())
        print(f"{row['kernel']:24} {row['under_ncu_ms']:9.3f} ms  {shares}  {row['bound']}")


if __name__ == "__main__":
    main()
