"""The rows of a work: the op behind its gate, its strategies, and the systems beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.breakdown import KernelRun, breakdown
from benchmarks.findings import OURS, crossovers, odd_groups, times_dense
from benchmarks.floors import Floor, Stage, floors, kernel_flops
from benchmarks.given import Selection, chosen_by_metric, overlap, random_selection
from benchmarks.op import BUILD, DEFAULT, BlockSparse, Op, Strategies, every_strategy, op_of
from benchmarks.peers import PEERS, SAME_FOR_ALL_KV_HEADS, Task, measure, text_of
from benchmarks.timing import host_us, launch_us, launches_us, peak_bytes, repeats_for, time_ms
from benchmarks.works import Case, Pass, Timed, Work
from splagen.qk_file import read_qk
from splagen.spec import SPLASpec

STAGES: dict[Timed, tuple[Stage, ...]] = {
    "op": ("selection", "attention"),
    "given": ("attention",),
    "selection": ("selection",),
}
FINDINGS = ("crossover", "times_dense", "group_sizes", "left_out")
STRATEGIES = ("by row", "by key", "by union")  # as a Choice numbers them


@dataclass(frozen=True)
class Options:
    """Where and how often; `repeats` None is as often as takes about a second and a half."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    repeats: int | None = None
    strategies: bool = False
    qk: Path | None = None
    alike: tuple[float, ...] = ()
    build: Path = BUILD


def strategies_of(op: Op, options: Options) -> list[tuple[str, Strategies]]:
    """The module's own choice, without a name, and every strategy where they are asked for."""
    found: list[tuple[str, Strategies]] = [("", DEFAULT)]
    if options.strategies and isinstance(op, BlockSparse):
        found += zip(STRATEGIES, every_strategy(op.part), strict=False)
    return found


class Run:
    """Measures cases and keeps the rows; `wrong` counts ops that were refused or failed."""

    def __init__(self, options: Options, seconds: float = 1e9) -> None:
        """Cases that would start later than `seconds` from now are left out and named."""
        self.options, self.seconds, self.begun = options, seconds, time.perf_counter()
        self.wrong: list[str] = []
        self._gates: dict[tuple[Any, ...], list[str]] = {}
        self._dense: dict[tuple[str, tuple[int, int, int], bool], dict[str, Any]] = {}

    def report(self, what: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {what}", file=sys.stderr, flush=True)

    def figures(self, work: Work, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """The figures of a work after every row."""
        figures: dict[str, Any] = {"summary": work.summary, **{name: [] for name in ("rows", *FINDINGS)}}
        for case in cases:
            if time.perf_counter() - self.begun > self.seconds:
                figures["left_out"].append({**case.label, "reason": "no time left"})
                continue
            for row in self.rows(work, case):
                figures["rows"].append(row)
                known = figures["rows"]
                figures |= {"crossover": crossovers(known), "times_dense": times_dense(known)}
                figures |= {"group_sizes": odd_groups(known)}
                yield figures
        yield figures

    def rows(self, work: Work, case: Case) -> Iterator[dict[str, Any]]:
        """Rows of the op, of its strategies and of the systems beside it; nothing is timed beside a wrong op."""
        head: dict[str, Any] = {"system": OURS, **case.label}
        try:
            op = op_of(case.spec, work.timed, self.options.build)
            for name, strategies in strategies_of(op, self.options):
                row = head | ({"strategy": name} if name else {})
                refused = self._refused(op, work, case, strategies)
                if refused:
                    self.wrong.append(f"{work.name} {case.label}")
                    yield row | {"refused": refused}
                    if not name:
                        return
                    continue
                yield row | self._op_row(work, case, op, strategies)
            yield from self._text_row(work, case, op)
            yield from self._alike_rows(work, case, op)
        except Exception as error:
            self.wrong.append(f"{work.name} {case.label}")
            yield head | {"reason": text_of(error)}
        self._free()
        for system in case.size.beside:
            yield {"system": system, **case.label, **self._peer_row(work, case, system)}
            self._free()

    def _refused(self, op: Op, work: Work, case: Case, strategies: Strategies) -> list[str]:
        """What is wrong with an op: quantities beyond their limit.  Cases that differ in length have one gate."""
        shape = op.gate_shape(case.shape[1])
        key = case.spec, work.timed, shape, repr(strategies)
        if key not in self._gates:
            rows = op.gate(shape, self.options.dtype, self.options.device, strategies)
            self._gates[key] = [f"{r.quantity}: {r.error:.1e} > {r.limit:.0e}" for r in rows if not r.ok]
        return self._gates[key]

    def _op_row(self, work: Work, case: Case, op: Op, strategies: Strategies) -> dict[str, Any]:
        options = self.options
        inputs = op.inputs(case.shape, options.dtype, options.device)
        results = op.forward(inputs, strategies)
        _check_finite(results)

        def forward() -> object:
            return op.forward(inputs, strategies)

        def backward() -> object:
            return op.backward(inputs, results, strategies)

        def both() -> object:
            return op.backward(inputs, op.forward(inputs, strategies), strategies)

        runs: dict[Pass, Callable[[], object]] = {"forward": forward, "backward": backward}
        row: dict[str, Any] = {}
        least, flops = floors(case.spec, case.shape, STAGES[work.timed]), kernel_flops(case.spec, case.shape)
        row["floor_ms"] = {name: least[name].ms for name in work.passes}
        kernels: dict[str, KernelRun] = {}
        for name in work.passes:
            seen = time_ms(runs[name], options.repeats or repeats_for(runs[name]), 1, asleep=True)
            row |= {f"{name}_ms": seen.median, f"{name}_spread_ms": seen.spread}
            kernels |= breakdown(op.module, runs[name])
        row["kernels_ms"] = {n: k.ms for n, k in kernels.items()}
        row["kernels_floor_ms"] = {n: Floor(flops.get(n, 0.0), k.bytes).ms for n, k in kernels.items()}
        row["kernels_flops"] = {n: flops.get(n, 0.0) for n in kernels}
        row["kernels_bytes"] = {n: k.bytes for n, k in kernels.items()}
        row["host_us"] = {}
        if options.device == "cuda":
            row["host_us"] = {name: host_us(runs[name]) for name in work.passes}
            count, spent, beside = launches_us(op.module, runs["forward"])
            row["forward_launches"] = count
            row["host_us"] |= {"in_forward_launches": spent, "forward_beside": beside}
            row["host_us"]["one_launch"] = launch_us()
        if options.device == "cuda" and work.timed == "op" and isinstance(op, BlockSparse) and not strategies:
            given = {n: x.detach().requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
            row["host_us"]["registered_op"] = host_us(lambda: op.call(given))
            row["host_us"]["registered_op_beside"] = launches_us(op.module, lambda: op.call(given))[2]
        results.clear()
        peak = peak_bytes(both if "backward" in work.passes else forward)
        row["peak_gib_beyond_inputs"] = peak / 2**30
        if isinstance(op, BlockSparse) and not op.is_dense(inputs):
            chosen = {**op.module.schedules_for(inputs["q"]), **strategies}
            names = {c.name: STRATEGIES[chosen[c.name]["strategy"]] for c in op.part.strategies}
            row |= {"strategies": names, "selection": "random" if op.given else "by metric"}
            if op.given:
                row["union_of_neighbours"] = overlap(op.given)
        if case.target:
            for kind, ms in (("at_least_ms", case.target.at_least), ("aim_ms", case.target.aim)):
                row[kind] = dict(zip(work.passes, ms, strict=True))
        return row

    def _text_row(self, work: Work, case: Case, op: Op) -> Iterator[dict[str, Any]]:
        """With the blocks that the metric chooses for q and k of a model, at their length and number of KV heads."""
        if self.options.qk is None or work.timed != "given" or not isinstance(op, BlockSparse):
            return
        q, k = read_qk(self.options.qk)
        if k.shape[2] != case.size.kv_heads or not case.size.beside:
            return
        case = replace(case, length=q.shape[1], target=case.target if q.shape[1] == case.length else None)
        given = chosen_by_metric(op.spec, q, k, self.options.device)
        yield from self._chosen_rows(work, case, op, given, "text")

    def _alike_rows(self, work: Work, case: Case, op: Op) -> Iterator[dict[str, Any]]:
        """With random blocks that neighbouring tiles choose more or less alike."""
        if work.timed != "given" or not isinstance(op, BlockSparse):
            return
        for alike in self.options.alike:
            length, kv_heads = case.length, case.size.kv_heads
            given = random_selection(op.spec, length, kv_heads, self.options.device, alike=alike)
            yield from self._chosen_rows(work, case, op, given, f"alike {alike:g}")

    def _chosen_rows(
        self, work: Work, case: Case, op: BlockSparse, given: Selection, name: str
    ) -> Iterator[dict[str, Any]]:
        """By the module's own choice and, where they are asked for, by every strategy."""
        chosen = _Chosen(op.spec, op.timed, op.module, op.truth, chosen=given)
        for strategy, schedules in strategies_of(op, self.options):
            if self._refused(op, work, case, schedules):
                continue
            head: dict[str, Any] = {"system": OURS, **case.label} | ({"strategy": strategy} if strategy else {})
            yield head | self._op_row(work, case, chosen, schedules) | {"selection": name}

    def _peer_row(self, work: Work, case: Case, system: str) -> dict[str, Any]:
        spec = case.spec if isinstance(case.spec, SPLASpec) else None
        key = system, case.shape, spec is None or spec.causal
        if key in self._dense:
            return self._dense[key]
        try:
            task = Task(
                case.shape,
                case.size.kv_heads,
                case.spec.head_dim,
                causal=key[2],
                device=self.options.device,
                dtype=self.options.dtype,
                spec=spec,
                selection=self._peer_selection(work, case),
            )
            found = measure(PEERS[system](task), work.passes)
        except Exception as error:
            return {"reason": text_of(error)}
        if system in SAME_FOR_ALL_KV_HEADS:
            self._dense[key] = found
        return found

    def _peer_selection(self, work: Work, case: Case) -> Selection | None:
        if work.timed != "given" or not isinstance(case.spec, SPLASpec):
            return None
        return random_selection(case.spec, case.length, case.size.kv_heads, self.options.device)

    def _free(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.empty_cache()


@dataclass
class _Chosen(BlockSparse):
    """An op whose chosen blocks are not random."""

    chosen: Selection | None = None

    def _random_selection(self, shape: tuple[int, int, int], device: str) -> Selection | None:
        return self.chosen


def _check_finite(results: Mapping[str, Tensor | None]) -> None:
    """Raise where the first output is not finite; a stage that has none returns None."""
    name, first = next(iter(results.items()))
    if first is not None and first.is_floating_point() and not bool(torch.isfinite(first).all()):
        raise FloatingPointError(f"{name} is not finite at the size that is timed")
