"""Run the GPU tests and keep the counts.

    python -m benchmarks.gpu_tests [--workers N] [--ignore FILE ...] [--seconds N]

Workers share the GPUs that there are; tests of several GPUs at once run without workers (`pytest -m gpu`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.record import ROOT, write


def main() -> None:
    """Run `pytest -m gpu` in place, print its output, write counts and the slowest tests; exit as pytest does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--ignore", nargs="+", default=[], help="files that are left out; the record names them")
    parser.add_argument("--seconds", type=int, help="no test begins later than this; the record says so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", str(args.workers), "--dist", "worksteal"]
        command += [f"--ignore={name}" for name in args.ignore]
        command += [f"--session-timeout={args.seconds}"] if args.seconds else []
        start = time.perf_counter()
        status = subprocess.run([*command, f"--junitxml={report}", "--tb=short"], cwd=ROOT, check=False).returncode
        seconds = time.perf_counter() - start
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    counts = {k: sum(any(c.find(t) is not None for t in tags) for c in cases) for k, tags in kinds.items()}
    counts["passed"] = len(cases) - sum(counts.values())
    wrong = [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find("failure") is not None]
    slowest = sorted(((float(c.get("time", 0)), str(c.get("name"))) for c in cases), reverse=True)[:10]
    listed = {"failing": wrong, "ignored": args.ignore, "slowest": [[n, t] for t, n in slowest]}
    listed |= {"none_begun_after_seconds": args.seconds}
    figures = {**counts, "seconds": seconds, **listed}
    write("gpu_tests", figures, args.out)
    print({k: figures[k] for k in ("passed", "failed", "skipped", "seconds")})
    raise SystemExit(status)


if __name__ == "__main__":
    main()
