"""Prefill of a chunk on a cache beside the share that the same rows have of one prefill of the whole sequence.

python -m benchmarks.prefill [--cached 122880] [--new 8192] [--kv-heads 2 8] [--kernels] [--out DIR]

The share is the time of the op on all tokens less that on the cached ones.  A chunk also copies keys and values out of
pages, forms the features of cached keys again, and writes what it brings.  The rows of the chunk are compared with
those of the whole sequence first, and the cache that it leaves with the one that a prefill of the whole leaves; what is
wrong is not timed.

Chunk and whole each take the fastest of their strategies, the cached part that of the whole.  Times are those of the
device, which sleeps until the host has launched everything: a server launches a layer while earlier ones run.  What the
host takes for a chunk stands apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import STRATEGIES
from benchmarks.record import write
from benchmarks.spla_step import HQ, D, spec_of
from benchmarks.timing import host_us, kernel_us, peak_bytes, repeats_for, time_ms
from splagen import pipeline
from splagen.codegen.kernel import Choice
from splagen.codegen.partition import Partition
from splagen.codegen.prefill_partition import FORWARD
from splagen.paged_cache import SPLACache
from splagen.spec import SPLASpec
from splagen.verification import TOLERANCE, relative_error

AIM = 1.3  # chunk / share
SHAPES = [(1, HQ, 1000)]  # for the oracle


def rows(kv_heads: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Normal q, k, v of so many tokens [tokens, heads, D], with a drift in k, and the gains of the norms."""
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda")

    q, k, v = (normal(tokens, heads, D).bfloat16() for heads in (HQ, kv_heads, kv_heads))
    k += 0.7 * normal(-(-tokens // 16), kv_heads, D).repeat_interleave(16, dim=0)[:tokens].bfloat16()
    return [q, k, v], [1 + normal(HQ, D) / 4 for _ in range(2)]


class Chunk:
    """The last `new` of the tokens on a cache that holds the others; each run starts from there."""

    def __init__(self, library: pipeline.DecodingLibrary, given: list[Tensor], gains: list[Tensor], new: int) -> None:
        tokens, kv_heads = given[1].shape[:2]
        self.cached, self.given, self.gains, self.new = tokens - new, given, gains, new
        self.cache = SPLACache(library, sequences=1, kv_heads=kv_heads, tokens=tokens, dtype=given[0].dtype)
        self.cache.allocate(tokens)
        # made ahead: a copy from the host waits for the device
        first, self.bounds = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (self.cached, new))
        self._take(0, self.cached, first)
        self.states = {name: x.clone() for name, x in self.cache.states.items()}

    def _take(self, start: int, stop: int, bounds: Tensor) -> Tensor:
        """Prefill of these tokens."""
        parts = [x[start:stop] for x in self.given]
        return self.cache.prefill(*parts, *self.gains, cu_seqlens=bounds, max_tokens=stop - start)

    def run(self) -> Tensor:
        """The outputs of the chunk."""
        self.cache.seqlens.fill_(self.cached)
        self.cache.settled.fill_(self.cached - 1)
        for name, x in self.states.items():
            self.cache.states[name].copy_(x)
        return self._take(self.cached, self.cached + self.new, self.bounds)


def gate(chunk: Chunk, whole: Tensor, library: pipeline.DecodingLibrary) -> None:
    """Raise if the rows of the chunk, or the cache behind it, are not those of the whole sequence."""
    limit = TOLERANCE[torch.bfloat16][0]
    found = {"o": (chunk.run(), whole[-chunk.new :])}
    single = Chunk(library, chunk.given, chunk.gains, 1)
    single.run()
    for mine, theirs in ((chunk.cache.pages, single.cache.pages), (chunk.cache.states, single.cache.states)):
        found |= {name: (x, theirs[name]) for name, x in mine.items()}
    for name, (x, want) in found.items():
        error = relative_error(x.float(), want.double())
        if not error <= limit:
            raise AssertionError(f"{name} of a chunk differs by {error:.1e} from that of the whole sequence")


def measured(run: Callable[[], object]) -> float:
    """Milliseconds of the device, the median."""
    return time_ms(run, repeats_for(run), asleep=True).median


def strategies(library: pipeline.Library, choices: Sequence[Choice]) -> Iterator[str]:
    """The names of a module's forward strategies, each the one that it takes meanwhile, then its own choice again.

    One whose parts would take too much memory runs by row.
    """
    schedules = library.module.SCHEDULES["sm_90"]["bf16"]
    (choice,) = [c for c in choices if c.name == FORWARD]
    own = schedules[FORWARD]
    for number, name in enumerate(STRATEGIES[: len(choice.options)]):
        schedules[FORWARD] = {"strategy": number}
        yield name
    schedules[FORWARD] = own


def case(spec: SPLASpec, cached: int, new: int, *, kernels: bool) -> dict[str, Any]:
    """The row of a spec: times of chunk and whole, and of each kernel of both if they are asked for."""
    op, library = pipeline.generate(spec, "build"), pipeline.generate_decoding(spec, "build")
    pipeline.verify(op, shapes=SHAPES, dtypes=(torch.bfloat16,), device="cuda").raise_if_wrong()
    given, gains = rows(HQ // spec.group_size, cached + new)
    named = dict(zip(("gamma_s", "gamma_r"), gains, strict=True))

    def full(tokens: int) -> Tensor:
        with torch.no_grad():
            o: Tensor = op.op(*(x[None, :tokens] for x in given), **named)
        return o[0]

    chunk = Chunk(library, given, gains, new)
    right = full(cached + new)
    found: dict[str, Any] = {"chunk_ms": {}, "whole_ms": {}, "cached_ms": {}}
    broken: dict[str, dict[str, float]] = {}
    part = pipeline.kernels(spec)
    assert isinstance(part, Partition)
    for name in strategies(library.prefill, library.prefill.part.strategies):
        gate(chunk, right, library)
        found["chunk_ms"][name] = measured(chunk.run)
        if found["chunk_ms"][name] == min(found["chunk_ms"].values()):
            peak, host = peak_bytes(chunk.run) / 2**30, host_us(chunk.run, calls=2)  # few: a queue holds 1024 launches
            broken["chunk"] = kernel_us(chunk.run) if kernels else {}
    for name in strategies(op, part.strategies):
        error = relative_error(full(cached + new).float(), right.double())
        if not error <= TOLERANCE[torch.bfloat16][0]:
            raise AssertionError(f"the op {name} differs by {error:.1e} from its default")
        found["whole_ms"][name] = measured(lambda: full(cached + new))
        found["cached_ms"][name] = measured(lambda: full(cached))
        if found["whole_ms"][name] == min(found["whole_ms"].values()):
            broken["whole"] = kernel_us(lambda: full(cached + new)) if kernels else {}
    best = {what: min(times, key=times.__getitem__) for what, times in found.items()}
    best["cached_ms"] = best["whole_ms"]
    times = {what: of[best[what]] for what, of in found.items()}
    share = times["whole_ms"] - times["cached_ms"]
    row: dict[str, Any] = {"chunk_by": best["chunk_ms"], "whole_by": best["whole_ms"], **times}
    row |= {"share_ms": share, "ratio": times["chunk_ms"] / share, "aim_ratio": AIM}
    row |= {"host_ms": host / 1e3, "peak_gib": peak, "strategies": found}
    return row | ({"kernels_us": broken} if kernels else {})


def printed(row: dict[str, Any]) -> None:
    """A row, and a line for each of its kernels."""
    kernels = row.get("kernels_us", {})
    row = {name: x for name, x in row.items() if name != "kernels_us"}
    print({n: round(f, 3) if isinstance(f, float) else f for n, f in row.items()}, flush=True)
    for what, times in kernels.items():
        print(f"  {what}: {sum(times.values()):.0f} us in kernels")
        for name, us in times.items():
            print(f"    {us:10.1f}  {name}", flush=True)


def main() -> None:
    """Time every case, write the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cached", type=int, default=120 << 10)
    parser.add_argument("--new", type=int, default=8 << 10)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    for kv_heads in args.kv_heads:
        sizes = {"kv_heads": kv_heads, "cached": args.cached, "new": args.new}
        table.append(sizes | case(spec_of(kv_heads), args.cached, args.new, kernels=args.kernels))
        printed(table[-1])
        torch.cuda.empty_cache()
        if args.out:
            write("prefill", {"heads": HQ, "head_dim": D, "rows": table}, args.out)


if __name__ == "__main__":
    main()
