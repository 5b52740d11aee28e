"""Packed sequences of random lengths beside as many tokens in sequences of one length, by the same spec.

python -m benchmarks.packed [--sequences 64] [--longest 8192] [--kv-heads 2 8] [--kernels] [--out DIR]

`random` are packed sequences of 1 to `longest` tokens, `equal` packed ones of the mean length, `batch` the op without
packing on those.  The kernels are compared with the oracle first, and some of the random sequences bit for bit with
what each gets alone; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.timing import kernel_us, peak_bytes, repeats_for, time_ms
from splagen import pipeline
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.packed_ops import ROWS
from splagen.pipeline import Library, PackedLibrary
from splagen.spec import Select, SPLASpec, to_toml
from splagen.verification import random_inputs

HQ, D = 32, 128
AIM = 1.15  # random / batch
GATE = (1000, 1, 0, 129, 2047)  # lengths for the oracle
ALIKE = 6  # sequences that are compared with themselves alone: so few that no strategy is left for want of memory


def spec_of(kv_heads: int) -> SPLASpec:
    """16 free blocks of 64, a residual, combination by RMS."""
    select = Select(block_size=64, budget=16, metric=taylor(covariance="diag"))
    return SPLASpec(head_dim=D, group_size=HQ // kv_heads, select=select)


def lengths_of(sequences: int, longest: int, seed: int = 0) -> list[int]:
    """Random lengths, 1 to `longest`, whose sum is a multiple of their number."""
    draw = random.Random(seed)
    found = [draw.randint(1, longest) for _ in range(sequences)]
    for i in range(sequences):
        over = sum(found) % sequences
        taken = min(over, found[i] - 1)
        found[i] -= taken
    return found


def rows(spec: SPLASpec, tokens: int) -> dict[str, Tensor]:
    """Normal rows [1, tokens, ...] by name, a drift in k, and parameters."""
    part = oracle(to_toml(spec)).partition
    short = random_inputs(oracle(to_toml(spec)), (1, HQ, 16), torch.bfloat16, "cuda", 0)
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(length: int, like: Tensor) -> Tensor:
        return torch.randn((1, length, *like.shape[2:]), generator=draw, device="cuda", dtype=like.dtype)

    found = {}
    for a in (*part.inputs, *part.cotangents):
        x = short[a.name]
        found[a.name] = normal(tokens, x) if a.layout in ROWS else x
    found["k"] += 0.7 * normal(-(-tokens // 16), found["k"]).repeat_interleave(16, dim=1)[:, :tokens]
    return found


def rows_of(spec: SPLASpec) -> set[str]:
    """The inputs and cotangents that are rows of tokens."""
    part = oracle(to_toml(spec)).partition
    return {a.name for a in (*part.inputs, *part.cotangents) if a.layout in ROWS}


class Call:
    """Forward and backward kernels of a module on the same inputs; `where` are bounds and longest length, if packed."""

    def __init__(self, library: Library, inputs: dict[str, Tensor], where: tuple[Tensor, int] | None) -> None:
        self.module, self.part = library.module, oracle(to_toml(library.spec)).partition
        self.inputs = [inputs[a.name] for a in self.part.inputs]
        self.cotangents = [inputs[a.name] for a in self.part.cotangents]
        self.bounds, self.longest = ([where[0]], [where[1]]) if where else ([], [])
        sizes = self.module.sizes_of(self.inputs[0], *where) if where else self.inputs[0]
        self.schedules = self.module.schedules_for(sizes)

    def forward(self) -> dict[str, Tensor]:
        """Outputs and what backward reads, by name."""
        found = self.module.forward(self.schedules, *self.inputs, *self.bounds, *self.longest)
        return dict(zip([a.name for a in (*self.part.outputs, *self.part.saved)], found, strict=True))

    def backward(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by the name of the input."""
        kept = [results[a.name] for a in self.part.residuals]
        found = self.module.backward(self.schedules, *self.inputs, *self.bounds, *kept, *self.cotangents, *self.longest)
        return dict(zip([name for name, _ in self.part.gradients], found, strict=True))


def gate(packed: PackedLibrary, alone: Library, inputs: dict[str, Tensor], lengths: Sequence[int]) -> None:
    """Raise if the kernels do not agree with the oracle, or a sequence of the measurement with itself alone."""
    heads = HQ if packed.spec.group_size > 8 else 2 * packed.spec.group_size
    report = pipeline.verify_packed(packed, lengths=GATE, heads=heads, dtypes=(torch.bfloat16,), device="cuda")
    report.raise_if_wrong()
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    taken = rows_of(packed.spec)
    some = {n: x[:, : ends[-1]].contiguous() if n in taken else x for n, x in inputs.items()}
    call = Call(packed, some, (ends.cuda(), max(lengths)))
    results = call.forward()
    gradients = call.backward(results)
    for number, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
        here = slice(begin, end)
        one = Call(alone, {n: x[:, here].clone() if n in taken else x for n, x in inputs.items()}, None)
        right = one.forward()
        found = [(results[a.name], right[a.name]) for a in call.part.outputs]
        found += [(gradients[n], x) for n, x in one.backward(right).items() if n in taken]
        if not all(torch.equal(x[:, here], y) for x, y in found):
            raise AssertionError(f"sequence {number} of {lengths[number]} tokens differs from what it gets alone")


def measured(call: Call, *, kernels: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of the passes, with `kernels` microseconds of each kernel too."""
    forward: Callable[[], object] = call.forward
    results = call.forward()

    def backward() -> object:
        return call.backward(results)

    found: dict[str, Any] = {}
    for name, run in (("forward", forward), ("backward", backward)):
        found[f"{name}_ms"] = time_ms(run, repeats_for(run), asleep=True).median
        found[f"{name}_peak_gib"] = peak_bytes(run) / 2**30
        if kernels:
            found[f"{name}_kernels_us"] = kernel_us(run)
    return found


def main() -> None:
    """Time every case, write the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lengths = lengths_of(args.sequences, args.longest)
    tokens, mean = sum(lengths), sum(lengths) // args.sequences
    table: list[dict[str, Any]] = []
    for kv_heads in args.kv_heads:
        spec = spec_of(kv_heads)
        packed, alone = pipeline.generate_packed(spec, "build"), pipeline.generate(spec, "build")
        inputs = rows(spec, tokens)
        taken = rows_of(spec)
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        even = torch.arange(args.sequences + 1, device="cuda", dtype=torch.int32) * mean
        batch = {n: x.view(args.sequences, mean, *x.shape[2:]) if n in taken else x for n, x in inputs.items()}
        gate(packed, alone, inputs, lengths[:ALIKE])
        calls = {
            "random": Call(packed, inputs, (ends, args.longest)),
            "equal": Call(packed, inputs, (even, mean)),
            "batch": Call(alone, batch, None),
        }
        found = {name: measured(call, kernels=args.kernels) for name, call in calls.items()}
        for name, figures in found.items():
            ratios = {f"{x}_ratio": figures[f"{x}_ms"] / found["batch"][f"{x}_ms"] for x in ("forward", "backward")}
            row = {"sequences": name, "kv_heads": kv_heads, "tokens": tokens, "aim_ratio": AIM, **figures, **ratios}
            table.append(row)
            print({n: round(f, 3) if isinstance(f, float) else f for n, f in row.items()}, flush=True)
        del inputs, batch, calls
        torch.cuda.empty_cache()
        if args.out:
            shape = {"heads": HQ, "head_dim": D, "sequences": args.sequences, "longest": args.longest}
            write("packed", {**shape, "rows": table}, args.out)


if __name__ == "__main__":
    main()
