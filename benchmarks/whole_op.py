"""The whole op, forward and backward, beside dense cuDNN attention and the floor: python -m benchmarks.whole_op.

The op is verified against the oracle first, and nothing is timed if it is wrong.  Shapes: B = 1, Hq = 32, D = 128,
bf16, block 64, 1 sink, 1 local block and the current one, 13 free blocks, hedgehog residual, RMS + RMS.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import write
from benchmarks.timing import time_ms
from splagen import pipeline
from splagen.kinds import oracle
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import random_inputs

HQ, D, BLOCK, FREE, FORCED = 32, 128, 64, 13, 3
PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12  # what an H200 gives to a large bf16 product and to a device copy


def spec_of(kv_heads: int) -> SPLASpec:
    """The spec that is timed, at a number of KV heads."""
    return SPLASpec(
        head_dim=D,
        group_size=HQ // kv_heads,
        select=Select(block_size=BLOCK, budget=FREE, sinks=1, local=1),
        linear=Residual(),
        combine="rms",
    )


def floor_ms(length: int, kv_heads: int) -> tuple[float, float]:
    """The floor of forward and backward: operations over the matrix rate, or bytes over the copy rate if larger.

    Forward: two scoring passes of the metric (mean and variance), q k^T and p v over 16 blocks, the residual's two
    products over 13 (d' = 2 d), states and read-out.  Backward: five products of the softmax and four of the residual
    for either side's scores formed once.  Each input is read and each output written once.
    """
    score = 2 * HQ * length * (length / 2 / BLOCK) * 4 * D
    softmax, residual = (2 * HQ * length * n * BLOCK for n in (FREE + FORCED, FREE))
    state = 2 * 2 * (HQ + kv_heads) * length * 2 * D * D
    forward = score + softmax * 2 * D + residual * 3 * D + state
    backward = softmax * 5 * D + residual * 8 * D + 3 * state
    moved = 2 * length * D * (2 * HQ + 2 * kv_heads)
    return tuple(1e3 * max(f / PEAK_FLOPS, b / PEAK_BYTES) for f, b in ((forward, moved), (backward, 2 * moved)))  # type: ignore[return-value]


def dense_ms(length: int, kv_heads: int) -> dict[str, float]:
    """Dense causal attention by cuDNN at the same shape, KV heads repeated as it needs them."""
    shape = (1, HQ, length, D)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    do = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        forward = time_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), 5, 1)
        backward = time_ms(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True), 5, 1)
    return {"forward_ms": forward.median, "backward_ms": backward.median}


def op_ms(spec: SPLASpec, length: int) -> dict[str, Any]:
    """Times of the op's forward and backward, of each kernel, and the peak memory."""
    module = pipeline.generate(spec, "build").module
    found = oracle(to_toml(spec))
    inputs = random_inputs(found, (1, HQ, length), torch.bfloat16, "cuda", 0)
    arguments = [inputs[a.name].requires_grad_() for a in found.partition.inputs]
    do = inputs[found.partition.cotangents[0].name]
    op = getattr(module, spec.name)
    named = {a.name: x for a, x in zip(found.partition.inputs[3:], arguments[3:], strict=True)}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out = op(*arguments[:3], **named)
    torch.autograd.grad(out, arguments, do)
    peak = torch.cuda.max_memory_allocated() - held
    forward = time_ms(lambda: op(*arguments[:3], **named), 10)
    out = op(*arguments[:3], **named)
    backward = time_ms(lambda: torch.autograd.grad(out, arguments, do, retain_graph=True), 10)
    return {
        "forward_ms": forward.median,
        "backward_ms": backward.median,
        "forward_spread_ms": forward.spread,
        "backward_spread_ms": backward.spread,
        "peak_gib_beyond_inputs": peak / 2**30,
        "kernels_ms": kernel_ms(module, arguments, do, found),
    }


def kernel_ms(module: Any, arguments: list[torch.Tensor], do: torch.Tensor, found: Any) -> dict[str, float]:
    """Each launcher's time in one forward and backward, the median of five."""
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    kept = {}

    def timed(name: str, launch: Any) -> Any:
        def run(*args: Any) -> Any:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = launch(*args)
            end.record()
            samples.setdefault(name, []).append((start, end))
            return result

        return run

    names = [*(f"launch_{k.name}" for k in found.partition.kernels), "inverse_index"]
    for name in names:
        kept[name] = getattr(module, name)
        setattr(module, name, timed(name.removeprefix("launch_"), kept[name]))
    try:
        for _ in range(5):
            plain = [x.detach() for x in arguments]
            results = dict(
                zip(
                    [a.name for a in (*found.partition.outputs, *found.partition.saved)],
                    module.forward(module.schedules_for(plain[0]), *plain),
                    strict=True,
                )
            )
            module.backward(
                module.schedules_for(plain[0]), *plain, *(results[a.name] for a in found.partition.residuals), do
            )
        torch.cuda.synchronize()
    finally:
        for name, launch in kept.items():
            setattr(module, name, launch)
    return {n: sorted(a.elapsed_time(b) for a, b in pairs)[len(pairs) // 2] for n, pairs in samples.items()}


def main() -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kv_heads in args.kv_heads:
        spec = spec_of(kv_heads)
        library = pipeline.generate(spec, "build")
        pipeline.verify(library, shapes=[(1, HQ, 1000)], dtypes=[torch.bfloat16], device="cuda").raise_if_wrong()
        for length in args.lengths:
            forward, backward = floor_ms(length, kv_heads)
            shape = {"length": length, "kv_heads": kv_heads}
            rows.append({"system": "splagen SPLA", **shape, **op_ms(spec, length)})
            torch.cuda.empty_cache()
            rows.append({"system": "dense cuDNN", **shape, **dense_ms(length, kv_heads)})
            rows.append({"system": "floor", **shape, "forward_ms": forward, "backward_ms": backward})
            torch.cuda.empty_cache()
    write("whole_op", {"rows": rows}, args.out)
    for row in rows:
        for name, ms in row.get("kernels_ms", {}).items():
            print(f"    {name:36} {ms:8.3f} ms")
    for row in rows:
        memory = f"  peak {row['peak_gib_beyond_inputs']:.1f} GiB" if "peak_gib_beyond_inputs" in row else ""
        print(
            f"{row['system']:14} L={row['length']:7} Hkv={row['kv_heads']}  forward {row['forward_ms']:8.2f} ms"
            f"  backward {row['backward_ms']:8.2f} ms{memory}"
        )


if __name__ == "__main__":
    main()
