"""Time and memory on a GPU: CUDA events, L2 flushed before each run, the median of several with its spread."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton

FLUSH_BYTES = 256 << 20  # several times an H200's L2


@dataclass(frozen=True)
class Timing:
    """Median and spread (largest minus smallest) in milliseconds."""

    median: float
    spread: float


SLEEP_CYCLES = 20_000_000  # about 10 ms


def host_us(run: Callable[[], object], calls: int = 10, rounds: int = 11) -> float:
    """Microseconds that the host takes for a call, launches included, while the GPU sleeps: the median of all calls.

    The first calls behind a pause take twice as long, until the host's caches hold what they need: a mean would be
    theirs.
    """
    return 1e6 * statistics.median(_host_seconds(run, calls, rounds))


def _host_seconds(run: Callable[[], object], calls: int = 10, rounds: int = 11) -> list[float]:
    """Seconds of the host for each call, in order."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        for _ in range(calls):
            begun = time.perf_counter()
            run()
            samples.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    return samples


@triton.jit
def _empty(a, b, c, d, e, f, g, h, i, j, k, m):
    """No work: what a launch costs the host."""


def launch_us() -> float:
    """Microseconds that the host takes to launch a compiled kernel of six tensors and six numbers, as ops do."""
    pointers, numbers = (torch.empty(16, device="cuda"),) * 6, (2, 3, 4, 5, 6, 7)
    compiled = _empty[(1,)](*pointers, *numbers)
    active = triton.runtime.driver.active
    stream = active.get_current_stream(active.get_current_device())
    addresses = [x.data_ptr() for x in pointers]
    fixed = compiled.function, compiled.packed_metadata, None, None, None

    def run() -> None:
        compiled.run(1, 1, 1, stream, *fixed, *addresses, *numbers)

    return host_us(run, calls=100)


def launches_us(module: ModuleType, run: Callable[[], object]) -> tuple[int, float, float]:
    """How many kernels a repeated call of a generated module launches; the host's microseconds for it, and beside it.

    Both are of the same calls, for a host may be twice as slow a second later.  Beside launches a call finds what to
    repeat, and allocates; a clock is read twice for each launch.
    """
    spent: list[float] = []
    launching = module.launching

    def timed(*step: Any) -> Callable[..., None]:
        act = launching(*step)

        def launch(*given: Any) -> None:
            begun = time.perf_counter()
            act(*given)
            spent.append(time.perf_counter() - begun)

        return launch

    module.KEPT.clear()
    module.launching = timed
    try:
        run()  # is recorded
        run()
        each = len(spent)
        spent.clear()
        whole = _host_seconds(run)
    finally:
        module.launching = launching
        module.KEPT.clear()
    sums = [sum(spent[i * each : (i + 1) * each]) for i in range(len(whole))]
    beside = [x - y for x, y in zip(whole, sums, strict=True)]
    return each, 1e6 * statistics.median(sums), 1e6 * statistics.median(beside)


def flushing() -> Callable[[], object]:
    """A function that fills L2 with rows that nobody needs.

    They are read: rows that were written would go back to memory in the time that is measured, at 5 TB/s 12 us.
    """
    return torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda").sum


def time_ms(run: Callable[[], object], repeats: int = 20, warmup: int = 3, *, asleep: bool = False) -> Timing:
    """Time `run` on the current GPU; it is warmed up first.

    `asleep`: the GPU sleeps until the host has launched all of it, so that nothing waits for the host.
    """
    flush = flushing()
    for _ in range(warmup):
        run()
    samples = []
    for _ in range(repeats):
        flush()
        if asleep:
            torch.cuda._sleep(SLEEP_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return Timing(statistics.median(samples), max(samples) - min(samples))


def kernel_us(run: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Microseconds of every kernel of a call by torch's profiler, the longest first; kernels of one name are added."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    found: dict[str, float] = {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    for event in seen.key_averages():
        name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|_kernel$", "", event.key)
        name = re.split(r"[<(]", name)[0] or event.key
        found[name] = found.get(name, 0.0) + event.self_device_time_total / calls
    return {name: round(us, 2) for name, us in sorted(found.items(), key=lambda item: -item[1]) if us}


def repeats_for(run: Callable[[], object], seconds: float = 1.5) -> int:
    """How often to repeat `run` so that it takes about so many seconds, from 3 to 20 times; runs it twice."""
    run()
    return max(3, min(20, int(1e3 * seconds / max(time_ms(run, 1, 0).median, 1e-3))))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` holds beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - held
