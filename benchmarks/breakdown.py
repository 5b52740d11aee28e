"""One run of a generated module, kernel by kernel: time and the bytes of what each launcher is given and returns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.given import replaced
from benchmarks.timing import time_ms


@dataclass(frozen=True)
class KernelRun:
    """Milliseconds of all launches of a kernel in one run, and the bytes of their tensors, each once per launch."""

    ms: float
    bytes: int


def breakdown(module: ModuleType, run: Callable[[], object], repeats: int = 5) -> dict[str, KernelRun]:
    """What each launcher, plan of rows, inverse index and call of torch's attention takes in one run, medians."""
    names = [n for n, f in vars(module).items() if callable(f) and _is_step(n)]
    launches = {n: getattr(module, n) for n in names}
    runs: list[list[tuple[str, torch.cuda.Event, torch.cuda.Event, int]]] = []

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = launches[name](*args, **named)
            end.record()
            runs[-1].append((name.removeprefix("launch_"), start, end, bytes_of(args, result)))
            return result

        return call

    def one() -> None:
        runs.append([])
        run()

    with replaced(module, {n: timed(n) for n in names}):
        time_ms(one, repeats, 1, asleep=True)
    found: dict[str, list[KernelRun]] = {}
    for events in runs[1:]:  # the first one warms up
        totals: dict[str, KernelRun] = {}
        for name, start, end, moved in events:
            before = totals.get(name, KernelRun(0.0, 0))
            totals[name] = KernelRun(before.ms + start.elapsed_time(end), before.bytes + moved)
        for name, total in totals.items():
            found.setdefault(name, []).append(total)
    return {n: KernelRun(statistics.median(t.ms for t in totals), totals[0].bytes) for n, totals in found.items()}


def bytes_of(*values: object) -> int:
    """Bytes of the tensors in values and, however deep, in tuples, lists and dicts of them; each tensor once."""
    found = {(x.data_ptr(), x.shape): x.numel() * x.element_size() for x in _tensors(values)}
    return sum(found.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _is_step(name: str) -> bool:
    named = name in ("inverse_index", "attend", "attend_backward")
    return named or name.startswith("launch_") or name.endswith("_plan")
