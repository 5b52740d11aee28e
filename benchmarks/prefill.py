"""Prefill of a chunk on a cache beside the share that the same rows have of one prefill of the whole sequence.

python -m benchmarks.prefill [--cached 122880] [--new 8192] [--kv-heads 2 8] [--out DIR]

The share is the time of the op on all tokens less that on the cached ones.  A chunk also copies keys and values out of
pages, forms the features and states of cached keys again, and writes what it brings.  The rows of the chunk are
compared with those of the whole sequence first, and the cache that it leaves with the one that a prefill of the whole
leaves; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from benchmarks.spla_step import HQ, D, spec_of
from benchmarks.timing import peak_bytes, repeats_for, time_ms
from splagen import pipeline
from splagen.paged_cache import SPLACache
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
        self.take(0, self.cached)

    def take(self, start: int, stop: int) -> Tensor:
        """Prefill of these tokens."""
        bounds = torch.tensor([0, stop - start], dtype=torch.int32, device="cuda")
        parts = [x[start:stop] for x in self.given]
        return self.cache.prefill(*parts, *self.gains, cu_seqlens=bounds, max_tokens=stop - start)

    def run(self) -> Tensor:
        """The outputs of the chunk."""
        self.cache.seqlens.fill_(self.cached)
        self.cache.settled.fill_(self.cached - 1)
        return self.take(self.cached, self.cached + self.new)


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
    """Milliseconds, the median."""
    return time_ms(run, repeats_for(run)).median


def main() -> None:
    """Time every case, write the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cached", type=int, default=120 << 10)
    parser.add_argument("--new", type=int, default=8 << 10)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    for kv_heads in args.kv_heads:
        spec = spec_of(kv_heads)
        op, library = pipeline.generate(spec, "build"), pipeline.generate_decoding(spec, "build")
        pipeline.verify(op, shapes=SHAPES, dtypes=(torch.bfloat16,), device="cuda").raise_if_wrong()
        given, gains = rows(kv_heads, args.cached + args.new)
        named = dict(zip(("gamma_s", "gamma_r"), gains, strict=True))

        def full(tokens: int, op=op, given=given, named=named) -> Tensor:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                o: Tensor = op.op(*(x[None, :tokens] for x in given), **named)
            return o[0]

        chunk = Chunk(library, given, gains, args.new)
        gate(chunk, full(args.cached + args.new), library)
        times = {
            "chunk_ms": measured(chunk.run),
            "whole_ms": measured(lambda full=full: full(args.cached + args.new)),  # type: ignore[misc]
            "cached_ms": measured(lambda full=full: full(args.cached)),  # type: ignore[misc]
        }
        share = times["whole_ms"] - times["cached_ms"]
        ratios = {"share_ms": share, "ratio": times["chunk_ms"] / share, "aim_ratio": AIM}
        peak = {"peak_gib": peak_bytes(chunk.run) / 2**30}
        row = {"kv_heads": kv_heads, "cached": args.cached, "new": args.new, **times, **ratios, **peak}
        table.append(row)
        print({n: round(f, 3) if isinstance(f, float) else f for n, f in row.items()}, flush=True)
        del chunk, given
        torch.cuda.empty_cache()
    if args.out:
        write("prefill", {"heads": HQ, "head_dim": D, "rows": table}, args.out)


if __name__ == "__main__":
    main()
