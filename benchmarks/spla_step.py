"""Decoding with SPLA: steps of a sequence's tokens in a CUDA graph, beside their floor and dense attention by cuDNN.

python -m benchmarks.spla_step [--tokens N ...] [--tuned] [--page-type e4m3] [--schedules JSON] [--kernels] [--out DIR]

The sequences hold random keys and values of the length given; statistics and states are those of these keys.  Steps of
one token of each spec are compared with the oracle, at a length of a few blocks, before any is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.floors import PEAK_BYTES
from benchmarks.record import write
from benchmarks.timing import flushing, kernel_us, time_ms
from splagen import random_cache, step_verification
from splagen.autotune.cost import evaluate
from splagen.autotune.step_cost import Step, step_sizes
from splagen.codegen.decoding import SPLITTING, decoding
from splagen.codegen.step_rows import PageType
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.ops import Oracle
from splagen.paged_cache import SPLACache
from splagen.pipeline import DecodingLibrary, generate_decoding
from splagen.spec import Select, SPLASpec, to_toml
from splagen.tuning import load_decoding

HQ, D, BLOCK = 32, 128, 64
FREE = 61  # beside one sink, one local block and the current one: 64 blocks
CASES = [
    (16, 8, 131_072, 150.0),
    (64, 2, 131_072, 150.0),
    (1, 8, 131_072, 30.0),
    (1, 2, 131_072, 30.0),
    (1, 2, 1_048_576, 35.0),
]
DENSE_BYTES = 40 << 30  # of keys and values for cuDNN, beside those of the cache


def spec_of(kv_heads: int) -> SPLASpec:
    """The spec of the cases: 64 of all blocks exact, statistics with their diagonal."""
    select = Select(block_size=BLOCK, budget=FREE, metric=taylor(covariance="diag"))
    return SPLASpec(head_dim=D, group_size=HQ // kv_heads, select=select)


def filled(library: DecodingLibrary, batch: int, kv_heads: int, length: int, step_tokens: int = 1) -> SPLACache:
    """A cache whose sequences have `length - 33` random tokens: steps of one token complete no block meanwhile."""
    most = length if step_tokens == 1 else length + 16 * step_tokens
    cache = SPLACache(
        library, sequences=batch, kv_heads=kv_heads, tokens=most, step_tokens=step_tokens, dtype=torch.bfloat16
    )
    draw = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(batch):
        cache.allocate(most)
    cache.seqlens.fill_(length - 33)
    cache.settled.fill_(length - 33)
    random_cache.fill(cache.made, cache.part, draw, {})
    return cache


def given(spec: SPLASpec, batch: int, kv_heads: int, step_tokens: int = 1) -> list[Tensor]:
    """What a step takes: q, k, v and the gains of the norms."""
    rows = (batch, step_tokens) if step_tokens > 1 else (batch,)
    draw = torch.Generator(device="cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda")

    tokens = [normal(*rows, h, D).to(torch.bfloat16) for h in (HQ, kv_heads, kv_heads)]
    return [*tokens, *(1 + normal(HQ, spec.value_dim) / 4 for _ in range(2))]


def floor_us(batch: int, kv_heads: int, length: int, page_type: PageType = "input") -> float:
    """Microseconds of the bytes that a step of one token has to move, by the cost model.

    A step of several tokens reads as much where they choose alike.
    """
    part = decoding(spec_of(kv_heads), page_type)
    sizes = step_sizes(part, batch, kv_heads, length, SPLITTING)
    return 1e6 * evaluate(Step.of(part, "bf16").floor(), sizes, "a step") / PEAK_BYTES


def gate(library: DecodingLibrary) -> None:
    """Compare steps of the library with the oracle, some blocks left out; raises WrongResult."""
    spec = library.spec
    shape = (1, spec.group_size, (FREE + 9) * BLOCK + 16)
    truth = oracle(to_toml(spec))
    assert isinstance(truth, Oracle)
    report = step_verification.verify(
        library.module, truth, library.part, shapes=[shape], dtypes=[torch.bfloat16], device="cuda"
    )
    report.raise_if_wrong()


def captured(cache: SPLACache, tokens: list[Tensor], out: Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one step, after a few that warm it up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            cache.step(*tokens, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.step(*tokens, out=out)
    return graph


def replay_us(cache: SPLACache, tokens: list[Tensor], repeats: int = 50) -> float:
    """Median microseconds of one replay, L2 flushed before; with one token per step the lengths stay within a block."""
    out = torch.empty_like(tokens[0])
    start = cache.seqlens.clone()
    graph = captured(cache, tokens, out)
    found = []
    for _ in range(repeats // 10):
        cache.seqlens.copy_(start)
        found.append(1e3 * time_ms(graph.replay, 10, 1, asleep=True).median)
    assert torch.isfinite(out).all()
    return sorted(found)[len(found) // 2]


def dense_us(batch: int, kv_heads: int, length: int) -> float | None:
    """Dense attention of one query per sequence by cuDNN in a graph; None where keys and values do not fit."""
    if 4 * batch * kv_heads * length * D > DENSE_BYTES:
        return None
    q = torch.randn(batch, HQ, 1, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, length, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")

    def run() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    run(), torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * time_ms(graph.replay, 20, 3, asleep=True).median


def step_kernel_us(cache: SPLACache, tokens: list[Tensor]) -> dict[str, float]:
    """Microseconds of each kernel of a step, L2 flushed before."""
    start = cache.seqlens.clone()
    out = torch.empty_like(tokens[0])
    flush = flushing()
    times = kernel_us(lambda: (flush(), cache.step(*tokens, out=out)), calls=10)
    cache.seqlens.copy_(start)
    return {name: us for name, us in times.items() if name in cache.library.module.SCHEDULES["sm_90"]["bf16"]}


def main() -> None:
    """Time every case, write the record and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=json.loads, default={}, help="fields that replace those of the Schedules")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1], help="of a step, per sequence")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    parser.add_argument("--dense", action="store_true", help="also dense attention by cuDNN")
    parser.add_argument("--page-type", choices=get_args(PageType), default="input", help="what pages hold")
    parser.add_argument("--tuned", action="store_true", help="Schedules of the cache: `splagen tune --decode`")
    parser.add_argument("--cases", type=int, nargs="+", default=[*range(len(CASES))])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    compared: set[SPLASpec] = set()
    for batch, kv_heads, length, aim in (CASES[i] for i in args.cases):
        spec = spec_of(kv_heads)
        library = (
            load_decoding(spec, page_type=args.page_type)
            if args.tuned
            else generate_decoding(spec, "build", page_type=args.page_type)
        )
        chosen = library.module.SCHEDULES["sm_90"]["bf16"]
        for name, fields in args.schedules.items():
            chosen[name] = {**chosen[name], **fields}
        if spec not in compared:
            gate(library)
            compared.add(spec)
        row: dict[str, Any] = {"batch": batch, "kv_heads": kv_heads, "length": length, "aim_us": aim}
        row |= {"page_type": args.page_type, "tuned": args.tuned}
        if args.dense or args.out:
            row["dense_us"] = dense_us(batch, kv_heads, length)
            torch.cuda.empty_cache()
        for step_tokens in args.tokens:
            cache = filled(library, batch, kv_heads, length, step_tokens)
            tokens = given(spec, batch, kv_heads, step_tokens)
            found = row | {"tokens": step_tokens, "floor_us": floor_us(batch, kv_heads, length, args.page_type)}
            found["us"] = replay_us(cache, tokens)
            found["share_of_floor"] = found["floor_us"] / found["us"]
            if args.kernels:
                found["kernels"] = step_kernel_us(cache, tokens)
            rows.append(found)
            print({n: round(f, 3) if isinstance(f, float) else f for n, f in found.items()}, flush=True)
            del cache
            torch.cuda.empty_cache()
            if args.out:
                sizes = {"heads": HQ, "head_dim": D, "block": BLOCK, "blocks": FREE + 3}
                write("spla_step", {**sizes, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
