"""Run the GPU tests and keep the counts.

    python -m benchmarks.gpu_tests [--workers N] [--ignore FILE ...] [--seconds N]

Workers share the GPUs that there are; tests of several GPUs at once run without workers (`pytest -m gpu`).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write

OUTCOME = re.compile(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (.*\S)")
DURATION = re.compile(r"([\d.]+)s (?:call|setup) +(.*\S)")
ITEMS = re.compile(r"\d+ workers? \[(\d+) items\]")


def figures_of(lines: Iterable[str]) -> dict[str, Any]:
    """What pytest-xdist says with -v: outcomes, those that failed, those that never ended, and the slowest tests."""
    items, outcomes, failing, slowest = 0, Counter[str](), list[str](), list[tuple[float, str]]()
    for line in lines:
        if found := OUTCOME.match(line):
            outcomes[found[1]] += 1
            failing += [found[2]] if found[1] in ("FAILED", "ERROR") else []
        elif found := DURATION.match(line):
            slowest.append((float(found[1]), found[2]))
        elif found := ITEMS.match(line):
            items = int(found[1])
    counts = {"passed": outcomes["PASSED"], "failed": len(failing), "skipped": outcomes["SKIPPED"]}
    return {**counts, "not_ended": items - sum(counts.values()), "failing": failing, "slowest": slowest}


def main() -> None:
    """Run `pytest -m gpu` in place, print its output, write counts and the slowest tests; exit as pytest does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--ignore", nargs="+", default=[], help="files that are left out; the record names them")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what has not ended by then is counted as such")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-n", str(args.workers), "--dist", "worksteal"]
    command += [f"--ignore={name}" for name in args.ignore]
    start = time.perf_counter()
    run = subprocess.Popen(
        [*command, "--tb=short", "--durations=10"], cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    stop = threading.Timer(args.seconds, lambda: os.killpg(run.pid, signal.SIGKILL))
    stop.start()
    lines = []
    try:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
        status = run.wait()
    finally:
        stop.cancel()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    figures = figures_of(lines) | {"seconds": time.perf_counter() - start, "ignored": args.ignore}
    write("gpu_tests", figures, args.out)
    print({k: figures[k] for k in ("passed", "failed", "skipped", "not_ended", "seconds")})
    raise SystemExit(abs(status))


if __name__ == "__main__":
    main()
