"""When the programs of a step's kernels come to which point, by the clock of the GPU.

python -m benchmarks.timeline [--cases N ...] [--out DIR]

CASES are those of `benchmarks.spla_step` with one sequence.  What is timed is a copy of the module: each program stores
the clock when it begins, before and behind its wait for the launch before, when it lets the next begin, and when it
ends.  A stamp is a barrier and a store, 10 to 20 ns; the first program of a step begins at 0.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.spla_step import CASES, captured, filled, given, spec_of
from benchmarks.timing import SLEEP_CYCLES, flushing
from splagen.pipeline import DecodingLibrary, generate_decoding

POINTS = ("begins", "waits", "goes_on", "lets_next_begin", "ends")
MOST_PROGRAMS = 4096  # of a launch
REPLAYS = 30
STAMP = """
@triton.jit
def stamp(kernel: tl.constexpr, point: tl.constexpr):
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    tl.debug_barrier()
    place = ADDRESS + ((kernel * {most} + program) * {points} + point).to(tl.int64) * 8
    tl.store(place.to(tl.pointer_type(tl.int64), bitcast=True), tl.extra.cuda.globaltimer())


"""


def stamped(text: str, kernels: list[str], address: int) -> str:
    """A module's text in which the programs of the kernels store the clock: int64 [kernels, MOST_PROGRAMS, POINTS]."""
    for number, name in enumerate(kernels):
        begin = text.index(f"def {name}_kernel(")
        end = text.index(f"def launch_{name}(", begin)
        signature, _, rest = text[begin:end].partition('"""')
        doc, _, body = rest.partition('"""')
        points = {p: f"stamp({number}, {i})\n" for i, p in enumerate(POINTS)}
        body = re.sub(
            r"^( *)(wait_for_earlier\(.*\)\n)",
            rf"\1{points['waits']}\1\2\1{points['goes_on']}",
            body,
            flags=re.MULTILINE,
        )
        body = re.sub(r"^( *)(let_next_begin\()", rf"\1{points['lets_next_begin']}\1\2", body, flags=re.MULTILINE)
        whole = f'{signature}"""{doc}"""\n    {points["begins"].rstrip()}{body.rstrip()}\n    {points["ends"]}\n\n'
        text = text[:begin] + whole + text[end:]
    at = text.index("@triton.jit")
    stamp = STAMP.lstrip().format(most=MOST_PROGRAMS, points=len(POINTS))
    return f"{text[:at]}ADDRESS = tl.constexpr({address})\n\n\n{stamp}{text[at:]}"


def times_of(stamps: Tensor) -> list[dict[str, float]]:
    """Of every kernel, in microseconds: when its first programs begin and go on, and its last let the next and end."""
    zero = stamps[0, :, 0][stamps[0, :, 0] > 0].min()
    found = []
    for kernel in stamps:
        reached = [(x[x > 0] - zero).double() / 1e3 for x in kernel.T]
        row = {"programs": float(reached[0].numel())}
        for point, pick in (("begins", min), ("goes_on", min), ("lets_next_begin", max), ("ends", max)):
            times = reached[POINTS.index(point)].tolist()
            if times:
                row[f"{point}_us"] = pick(times)
        found.append(row)
    return found


def timeline(case: int) -> list[dict[str, object]]:
    """Medians over the replays of a case, the second level of cache flushed before each."""
    batch, kv_heads, length, _ = CASES[case]
    spec = spec_of(kv_heads)
    library = generate_decoding(spec, "build")
    kernels = [k.name for k in library.part.kernels]
    stamps = torch.zeros(len(kernels), MOST_PROGRAMS, len(POINTS), dtype=torch.int64, device="cuda")
    path = library.path.with_name(f"{library.path.stem}_stamped.py")
    path.write_text(stamped(library.path.read_text(), kernels, stamps.data_ptr()))
    cache, tokens = filled(DecodingLibrary(spec, path), batch, kv_heads, length), given(spec, batch, kv_heads)
    start = cache.seqlens.clone()
    graph = captured(cache, tokens, torch.empty_like(tokens[0]))
    flush, runs = flushing(), []
    for _ in range(REPLAYS):
        cache.seqlens.copy_(start)
        stamps.zero_()
        flush()
        torch.cuda._sleep(SLEEP_CYCLES)
        graph.replay()
        torch.cuda.synchronize()
        runs.append(times_of(stamps.cpu()))
    which = {"batch": batch, "kv_heads": kv_heads, "length": length}
    return [
        which | {"kernel": name} | {key: statistics.median(r[i][key] for r in runs) for key in runs[0][i]}
        for i, name in enumerate(kernels)
    ]


def main() -> None:
    """Time every case, write the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = [i for i, (batch, *_) in enumerate(CASES) if batch == 1]
    parser.add_argument("--cases", type=int, nargs="+", default=alone, choices=alone)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = [row for case in args.cases for row in timeline(case)]
    write("timeline_spla_step", {"rows": rows}, args.out)
    for row in rows:
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
