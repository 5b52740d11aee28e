"""Measure works of `benchmarks.works`, each with the systems beside it: python -m benchmarks.run [WORK ...].

Every op is compared with the oracle first; what is wrong is not timed, its row says in what it is wrong, and the exit
status is 1.  A system that is not there or fails is a row with the reason.  One record is written for each work,
benchmarks/results/WORK.json: runs of different works may share a folder, and a machine with several GPUs.

    python -m benchmarks.run --list
    python -m benchmarks.run sparse selection --kv-heads 2
    python -m benchmarks.run sparse --alike 0.5 0.9 --strategies  # random blocks that neighbours choose alike too
    python -m benchmarks.run sparse --qk qk.pt    # chosen blocks of a model's q [1, L, Hq, D] and k [1, L, Hkv, D] too
    python -m benchmarks.run sparse --qk qk.pt --lengths 8192 --kv-heads 2 --strategies --record sparse_text
    python -m benchmarks.run whole --strategies --out strategies  # README's tables are of the default choices
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import FINDINGS, Options, Run, strategies_of
from benchmarks.op import op_of
from benchmarks.peers import text_of
from benchmarks.record import write
from benchmarks.works import WORKS, Timed, Work
from splagen.spec import Spec, from_toml, to_toml

# -- compilation ahead of time, in processes of their own that fill Triton's cache ---------------------------------


def compile_case(text: str, timed: Timed, heads: int, options: Options) -> str | None:
    """Run forward and backward at the sizes of the gate; the text of what fails, which the gate then meets again."""
    try:
        op = op_of(from_toml(text), timed, options.build)
        inputs = op.inputs(op.gate_shape(heads), options.dtype, options.device)
        for _, strategies in strategies_of(op, options):
            results = op.forward(inputs, strategies)
            if timed != "selection":
                op.backward(inputs, results, strategies)
        torch.cuda.synchronize()
    except Exception as error:
        return text_of(error)
    return None


def compile_all(cases: Sequence[tuple[Spec, Timed, int]], options: Options) -> list[str]:
    """Compile every op side by side; what failed."""
    context = multiprocessing.get_context("spawn")
    jobs = dict.fromkeys((to_toml(spec), timed, heads) for spec, timed, heads in cases)
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(compile_case, *job, options) for job in jobs]
        return [text for f in futures if (text := text_of(e) if (e := f.exception()) else f.result())]


# -- the command ---------------------------------------------------------------------------------------------------


def line_of(work: str, row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    name = " ".join(str(row[n]) for n in ("system", "variant", "strategy") if n in row)
    chosen = row.get("selection", "")
    name += f" ({chosen})" if chosen == "text" or chosen.startswith("alike") else ""
    text = f"{work:14} {name:34} L={row['length']:7} Hkv={row['kv_heads']:2} G={row['group_size']:2}"
    for n in ("forward", "backward"):
        if f"{n}_ms" in row:
            text += f"  {n} {row[f'{n}_ms']:8.2f} ms"
            text += f" (floor {row['floor_ms'][n]:.2f}" if "floor_ms" in row else ""
            text += f", at least {row['at_least_ms'][n]:g}, aim {row['aim_ms'][n]:g}" if "aim_ms" in row else ""
            text += ")" if "floor_ms" in row else ""
    text += f"  peak {row['peak_gib_beyond_inputs']:.2f} GiB" if "peak_gib_beyond_inputs" in row else ""
    text += f"  REFUSED, wrong: {', '.join(row['refused'])}" if "refused" in row else ""
    return text + "".join(f"  {row[n]}" for n in ("reason", "backward_reason") if n in row)


def kernel_lines(row: dict[str, Any]) -> list[str]:
    """Milliseconds of each kernel, and its floor."""
    least = row.get("kernels_floor_ms", {})
    return [f"    {n:40} {ms:8.3f} ms  floor {least[n]:7.3f}" for n, ms in row.get("kernels_ms", {}).items()]


def listing(work: Work) -> str:
    """A work as `--list` prints it."""
    lines = [f"{work.name}: {work.summary}; {' and '.join(work.passes)}"]
    for case in work.cases():
        asked = f"; at least {case.target.at_least}, aim {case.target.aim} ms" if case.target else ""
        beside = f"; beside {', '.join(case.size.beside)}" if case.size.beside else ""
        lines.append("    " + ", ".join(f"{n} {x}" for n, x in case.label.items()) + asked + beside)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the records, and print a table; the exit status is 1 if an op was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="instead of a work's own")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[], help="only these, or others than a work's own")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--record", metavar="NAME", help="of one work's record, instead of the work's own")
    parser.add_argument("--repeats", type=int, help="default: as often as takes about a second and a half, 3 to 20")
    parser.add_argument("--strategies", action="store_true", help="time every strategy beside the module's own choice")
    parser.add_argument("--qk", type=Path, metavar="FILE.pt", help="q and k of a model, to choose blocks from")
    parser.add_argument(
        "--alike",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="random blocks that neighbours choose alike: 0 to 1",
    )
    parser.add_argument("--seconds", type=float, default=540, help="no case is started later than this")
    parser.add_argument("--list", action="store_true", help="print works, sizes and what is asked for; measure nothing")
    given = parser.parse_args(arguments)
    unknown = set(given.works) - WORKS.keys()
    if unknown:
        parser.error(f"unknown work {', '.join(sorted(unknown))}: one of {', '.join(WORKS)}")
    works = [WORKS[name] for name in given.works or WORKS]
    if given.record and len(works) != 1:
        parser.error(f"--record {given.record} is the name of one record: name one work, not {len(works)}")
    if given.list:
        print("\n".join(listing(work) for work in works))
        return 0
    cases = {work.name: work.cases(given.lengths, given.kv_heads) for work in works}
    options = Options(repeats=given.repeats, strategies=given.strategies, qk=given.qk, alike=tuple(given.alike))
    run = Run(options, given.seconds)
    for text in compile_all([(c.spec, w.timed, c.shape[1]) for w in works for c in cases[w.name]], options):
        run.report(f"failed ahead of time: {text}")
    run.report("compiled")
    lines = []
    for work in works:
        shown = 0
        for figures in run.figures(work, cases[work.name]):
            write(given.record or work.name, figures, given.out)
            for row in figures["rows"][shown:]:
                run.report(line_of(work.name, row))
                lines += kernel_lines(row)
                lines.append(line_of(work.name, row))
            shown = len(figures["rows"])
        lines += [f"{work.name:14} {text}: {row}" for text in FINDINGS for row in figures[text]]
    print("\n".join(lines))
    for name in run.wrong:
        print(f"wrong or failed: {name}")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
