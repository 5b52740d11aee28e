"""Generate a small spec's kernels, run them on q, k, v of a model that reads text, and check them: make demo.

The kernels run on the GPU if there is one, else in Triton's interpreter.  Exit status 1 if a number is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from splagen import settings

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "examples/specs/small.toml"
OUT = ROOT / "build/demo"
KV_HEADS = 2


def main(length: int | None, steps: int) -> int:
    """Run the demo on `length` bytes of text; return the exit status."""
    gpu = torch.cuda.is_available()
    if not gpu:
        settings.interpret()  # before anything imports triton
    from examples.real_qkv import real_qkv
    from splagen import pipeline
    from splagen.kinds import oracle
    from splagen.spec import read_spec, to_toml
    from splagen.verification import compare, random_inputs

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    start = time.perf_counter()
    spec = read_spec(SPEC)
    library = pipeline.generate(spec, OUT)
    count = len(pipeline.kernels(spec).kernels)
    console.print(f"{SPEC.relative_to(ROOT)}: {count} kernels in {library.path.relative_to(ROOT)}")

    length = length or (4096 if gpu else 160)
    heads = KV_HEADS * spec.group_size
    console.print(f"a byte model, trained for {steps} steps, reads {length} bytes of argparse.py")
    q, k, v = real_qkv(length, q_heads=heads, kv_heads=KV_HEADS, head_dim=spec.head_dim, steps=steps)

    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter on the CPU"
    console.print(f"forward and backward on {where}, against the equations in float64")
    truth = oracle(to_toml(spec))
    shape = (1, heads, length)
    rows = []
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
        device = "cuda" if gpu else "cpu"
        inputs = random_inputs(truth, shape, dtype, device, seed=0)  # gains and cotangents
        inputs |= {name: x.to(device, dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        rows += compare(library.module, truth, inputs, shape)

    table = Table("quantity", "dtype", "relative error", "limit", "", box=box.SIMPLE)
    for row in rows:
        mark = "[green]ok" if row.ok else "[bold red]WRONG"
        table.add_row(row.quantity, row.dtype, f"{row.error:.1e}", f"{row.limit:.0e}", mark)
    console.print(table)
    wrong = sum(not row.ok for row in rows)
    verdict = f"[bold red]{wrong} of {len(rows)} are wrong" if wrong else f"[green]all {len(rows)} agree"
    console.print(f"{verdict}[/], in {time.perf_counter() - start:.0f} s; look at {library.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, help="bytes of text; 160, on a GPU 4096")
    parser.add_argument("--steps", type=int, default=10, help="training steps of the model before the reading")
    given = parser.parse_args()
    sys.exit(main(given.length, given.steps))
