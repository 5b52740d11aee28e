"""Time kernels on request: one JSON job per line in, one JSON result per line out.

Run by `splagen.autotune.bench` in a process of its own, which can be killed: a Schedule may hang the GPU or end the
process.  The process runs the op once with the default Schedules, keeps what each launcher was given, and times one
launcher at a time on that.  What a Schedule writes is compared with what the default wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from splagen import sequence_verification, verification
from splagen.autotune.search import Lost
from splagen.codegen.compile_worker import failure, imported
from splagen.kinds import oracle
from splagen.sequence import SSEOracle
from splagen.verification import DTYPES, Shape

FLUSH_BYTES = 256 << 20  # several times an H200's L2
SLEEP_CYCLES = 4_000_000  # about 2 ms: the host launches a measurement meanwhile
MOST_RUNS = 3  # whose arrays are kept: that of the defaults, and one for each of two groups of kernels that agree
KEPT_BYTES = 8 << 30  # of a launcher's arguments: larger ones (parts of rows) are not kept beside those of others
COPIED_BYTES = 12 << 30  # of one argument: what kernels change, states of long sequences, is smaller
STEP_SEQUENCES = 64  # of a decoding step
NEIGHBOURS = 16  # queries that have something in common
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # between two Schedules, relative RMS

Schedules = dict[str, dict[str, int]]
Place = tuple[Literal["output", "argument"], int]
Launch = tuple[dict[str, int], tuple[Any, ...]]  # the Schedule and the other arguments of a launcher


class _Zeroed:
    """The module torch, in which nothing is uninitialised: rows that no kernel writes compare equal."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*sizes: Any, **options: Any) -> Tensor:
        return torch.zeros(*sizes, **options)


class Kernels:
    """The launchers of a generated module with what a run of the op gives them."""

    def __init__(
        self,
        module: ModuleType,
        shape: Shape,
        dtype: torch.dtype,
        device: str,
        seed: int = 0,
        alike: float = 0.0,
    ) -> None:
        self.module, self.dtype, self.device = module, dtype, device
        truth = oracle(module.SPEC)
        find = _sequence_run if isinstance(truth, SSEOracle) else partial(_attention_run, alike=alike)
        self.run, self.first = find(module, truth, shape, dtype, device, seed)
        self.kept: dict[str, dict[str, Launch]] = {}
        self.large: tuple[tuple[str, str], Launch] | None = None  # the last one of those that are not kept

    def launch(self, kernel: str, shared: Mapping[str, int]) -> Launch:
        """What a launcher gets where the kernels of `shared` have these chunks (CHUNK by kernel)."""
        key = json.dumps(shared, sort_keys=True)
        found = self.launches(shared)
        if kernel in found:
            return found[kernel]
        if self.large is None or self.large[0] != (key, kernel):
            self.large = None
            self.large = (key, kernel), self.record(shared, only=kernel)[kernel]
        return self.large[1]

    def launches(self, shared: Mapping[str, int]) -> dict[str, Launch]:
        """What every launcher gets whose arguments are kept."""
        key = json.dumps(shared, sort_keys=True)
        found = self.kept.pop(key, None) or self.record(shared)
        self.kept[key] = found  # the last one used stands last
        while len(self.kept) > MOST_RUNS:
            del self.kept[next(iter(self.kept))]
        return found

    def record(self, shared: Mapping[str, int], only: str | None = None) -> dict[str, Launch]:
        """Run the op once with the default Schedules and these chunks; what `only` one launcher gets, or the small."""
        schedules = self.defaults()
        for kernel, chunk in shared.items():
            schedules[kernel]["CHUNK"] = chunk
        found: dict[str, Launch] = {}
        launchers = {n: f for n, f in vars(self.module).items() if n.startswith("launch_")}

        def recorded(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
            kernel = name.removeprefix("launch_")

            def call(n: Any, schedule: Any, *arguments: Any) -> Any:
                size = sum(x.nbytes for x in arguments if isinstance(x, Tensor))
                if kernel == only if only else self.keeps(size):
                    found.setdefault(kernel, (schedule, (n, *arguments)))
                return launch(n, schedule, *arguments)

            return call

        vars(self.module)["torch"] = _Zeroed()
        try:
            for name, launch in launchers.items():
                setattr(self.module, name, recorded(name, launch))
            self.run(schedules)
        finally:
            vars(self.module)["torch"] = torch
            for name, launch in launchers.items():
                setattr(self.module, name, launch)
        return found

    def defaults(self) -> Schedules:
        """The Schedules of the module for what the op is given."""
        return {n: dict(s) for n, s in self.module.schedules_for(self.first).items()}

    def keeps(self, size: int) -> bool:
        """Whether a launcher's arguments of so many bytes are kept beside those of others."""
        return size <= KEPT_BYTES

    def timed(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The result of a job."""
        return self.time(job["kernel"], job["schedule"], job["shared"], job["repetitions"])

    def time(
        self, kernel: str, schedule: dict[str, int], shared: Mapping[str, int], repetitions: int
    ) -> dict[str, Any]:
        """Median and spread in milliseconds, and by how much the result differs from the default's."""
        default, (n, *arguments) = self.launch(kernel, shared)
        launch = getattr(self.module, f"launch_{kernel}")
        n = n._replace(kept=None)  # copies may have other strides
        wanted = self.written(launch, n, default, arguments)
        got = self.written(launch, n, schedule, arguments)
        error = max((difference(got.get(place), want) for place, want in wanted.items()), default=0.0)
        if not error <= LIMIT[self.dtype]:
            return {"error": error}
        changed = [i for kind, i in wanted if kind == "argument"]
        given = [x.clone() if i in changed else x for i, x in enumerate(arguments)]

        def restore() -> None:  # a prefix sum of prefix sums soon is infinite
            for i in changed:
                given[i].copy_(arguments[i])

        n = n._replace(kept={})
        samples = self.samples(lambda: launch(n, schedule, *given), restore, repetitions)
        return {"ms": statistics.median(samples), "spread": max(samples) - min(samples)}

    def written(self, launch: Callable[..., Any], n: Any, schedule: Any, arguments: list[Any]) -> dict[Place, Tensor]:
        """What a launcher returns, and what it changes of copies of its arguments, by place.

        Larger arguments than COPIED_BYTES are given as they are: parts of rows, which no kernel changes.
        """
        given = [x.clone() if isinstance(x, Tensor) and x.nbytes <= COPIED_BYTES else x for x in arguments]
        vars(self.module)["torch"] = _Zeroed()
        try:
            result = launch(n, schedule, *given)
        finally:
            vars(self.module)["torch"] = torch
        found = dict(enumerate(result if isinstance(result, tuple) else () if result is None else (result,)))
        pairs = [(i, x) for i, x in enumerate(arguments) if isinstance(x, Tensor) and x is not given[i]]
        changed = [i for i, x in pairs if not torch.equal(x, given[i])]
        return {("output", i): x for i, x in found.items()} | {("argument", i): given[i] for i in changed}

    def samples(self, run: Callable[[], object], restore: Callable[[], None], repetitions: int) -> list[float]:
        """Milliseconds of each of some runs: on the GPU with its L2 flushed between them, else on the host.

        `restore` comes before each, the first that warms up too, and is not timed.
        """
        if self.device == "cpu":
            found = []
            for _ in range(repetitions):
                restore()
                start = time.perf_counter()
                run()
                found.append(1e3 * (time.perf_counter() - start))
            return found
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        events = [[_event(), _event()] for _ in range(repetitions)]
        restore()
        run()
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        for start_event, end_event in events:
            restore()
            flush.zero_()
            start_event.record()
            run()
            end_event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def difference(got: Tensor | None, want: Tensor) -> float:
    """Relative RMS difference; 0 where the shapes depend on the Schedule, and for what is no number.

    Infinities are results too: a row without keys has a log-sum-exp of -inf, in either.
    """
    if got is None:
        return math.inf
    if got.shape != want.shape or not got.is_floating_point() or not got.numel():
        return 0.0
    error = size = 0.0
    for a, b in zip(_pieces(got), _pieces(want), strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, a.double() - b.double())
        error += float(apart.square().sum())
        size += float(b.double().nan_to_num(0.0, 0.0, 0.0).square().sum())
    found = math.sqrt(error / size) if size > 0 and math.isfinite(error) else math.sqrt(error)
    return found if math.isfinite(found) else math.inf


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of a tensor that are small beside the GPU's memory also as float64."""
    return torch.split(x.flatten(), 1 << 26)


def _sequence_run(
    module: ModuleType, truth: Any, shape: Shape, dtype: torch.dtype, device: str, seed: int
) -> tuple[Callable[[Schedules], None], Tensor]:
    batch, heads, length = shape
    inputs = sequence_verification.random_inputs(truth, [length] * batch, heads, dtype, device, seed, decay=-0.05)
    names = (*truth.names, "state", "cu_seqlens")
    sequences = min(batch * length, STEP_SEQUENCES)
    one = {n: inputs[n] if inputs[n].dim() == 1 else inputs[n][:sequences] for n in truth.names}
    table = torch.randn(sequences, *inputs["state"].shape[1:], device=device)
    slots = torch.arange(sequences, dtype=torch.int32, device=device)
    cotangents = [n for n in ("do", "dfinal", "dbalance") if n in inputs]

    def run(schedules: Schedules) -> None:
        rows = [inputs[n] for n in names]
        module.forward(schedules, *rows)
        module.backward(schedules, *rows, *(inputs[n] for n in cotangents))
        module.step(schedules, *(one[n] for n in truth.names), table, slots)

    return run, inputs["v"]


def related(q: Tensor, alike: float) -> Tensor:
    """Queries [B, L, Hq, D] of which neighbours have the correlation `alike`², and so choose blocks alike."""
    common = q[:, ::NEIGHBOURS].repeat_interleave(NEIGHBOURS, dim=1)[:, : q.shape[1]]
    own = torch.arange(q.shape[1], device=q.device)[:, None, None] % NEIGHBOURS > 0
    return torch.where(own, alike * common + math.sqrt(1 - alike**2) * q, q)


def _attention_run(
    module: ModuleType, truth: Any, shape: Shape, dtype: torch.dtype, device: str, seed: int, alike: float
) -> tuple[Callable[[Schedules], None], Tensor]:
    part = truth.partition
    inputs = verification.random_inputs(truth, shape, dtype, device, seed)
    if alike:
        inputs |= {n: related(inputs[n], alike) for n in ("q", "q_m") if n in inputs}
    arguments = [inputs[a.name] for a in part.inputs]

    def once(schedules: Schedules) -> None:
        results = module.forward(schedules, *arguments)
        results = results if isinstance(results, tuple) else (results,)
        outputs = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
        residuals = [outputs[a.name] for a in part.residuals]
        module.backward(schedules, *arguments, *residuals, *(inputs[a.name] for a in part.cotangents))

    def run(schedules: Schedules) -> None:
        for strategy in range(max((len(c.options) for c in part.strategies), default=1)):
            chosen = {c.name: {"strategy": min(strategy, len(c.options) - 1)} for c in part.strategies}
            once({**schedules, **chosen})

    return run, arguments[0]


def answer(kernels: Kernels, job: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one job, or why its Schedule is lost, or what went wrong."""
    try:
        return kernels.timed(job)
    except Exception as error:
        if lost := Lost.of(error):
            return {"lost": [lost.reason, lost.message]}
        return {"failed" if _gpu_works(kernels.device) else "crash": failure(error)}


def _gpu_works(device: str) -> bool:
    """False after a kernel read or wrote where it may not: nothing runs in this process any more."""
    try:
        torch.empty(1, device=device).zero_().item()
    except RuntimeError:
        return False
    return True


def serve(run: Callable[..., Kernels]) -> None:
    """Set the op up, say so, then answer jobs until the input ends; what the compiler prints goes to stderr.

    `run` takes module, shape, dtype and device, and `alike` where it is not 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", type=Path)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("device")
    parser.add_argument("shape", type=int, nargs=3)
    parser.add_argument("--alike", type=float, default=0.0)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, shape = imported(str(given.module)), tuple(given.shape)
    options = {"alike": given.alike} if given.alike else {}
    kernels = run(module, shape, DTYPES[given.dtype], given.device, **options)
    kernels.launches({})
    answers.write(json.dumps({"ready": sorted(kernels.kept["{}"])}) + "\n")
    for line in sys.stdin:
        found = answer(kernels, json.loads(line))
        answers.write(json.dumps(found) + "\n")
        if "crash" in found:
            return


if __name__ == "__main__":
    serve(Kernels)
