"""Random specs: each is generated, compiled ahead of time for sm_90, and compared with the oracle.

    python -m benchmarks.random_specs --count 200 --seed 0 --workers 2 --out FILE.json
    python -m benchmarks.random_specs --count 100 --seed 1 --workers 14 --device cuda --out random_specs_gpu.json

The specs are those of tests/strategies.py over every axis, with head dimensions that the interpreter can
bear.  On a GPU each runs by every strategy, in bfloat16 and float32, with the Schedules of the module.  A spec is ok,
refused (an error of splagen that names an axis) or failed; what is not ok is in the record as TOML.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from benchmarks.op import DEFAULT, Strategies, every_strategy
from splagen.codegen.geometry import Geometry
from splagen.codegen.partition import Partition
from splagen.errors import SplagenError
from splagen.spec import Residual, Select, SPLASpec, Statistics, from_toml, to_toml
from tests.strategies import specs

SHAPES = (1, 5, 12)  # sixteenths of a block (and one position) in the last block
HEAD_DIMS = (16, 16, 16, 24, 32, 40, 48, 64, 80, 96)
AXES = sorted({f.name for part in (SPLASpec, Select, Residual, Statistics) for f in dataclasses.fields(part)})


@dataclass(frozen=True)
class Outcome:
    """What became of a spec: why it is not ok, and the seconds of generating, compiling and comparing."""

    status: str  # ok, refused, failed or, where time was short, left
    reason: str = ""
    kernels: int = 0
    largest_error: float = 0.0  # relative to its limit
    seconds: tuple[float, ...] = ()


@st.composite
def small_specs(draw: st.DrawFn) -> SPLASpec:
    """A spec over every axis that the interpreter runs in seconds."""
    selecting = specs().filter(lambda s: s.select is not None)
    spec = draw(st.one_of(specs(), selecting, selecting.filter(lambda s: s.linear is not None)))
    changes: dict[str, object] = {
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
        "value_dim": draw(st.sampled_from(HEAD_DIMS)),
        "group_size": draw(st.sampled_from([1, 2, 2, 3, 4, 5, 6, 7, 8, 16, spec.group_size])),
    }
    if spec.select:
        few = st.sampled_from([0, 0, 1, 2])
        changes["dense_below"] = draw(st.sampled_from([0, 0, 0, 40, 100, 8192]))
        changes["select"] = dataclasses.replace(
            spec.select,
            budget=draw(st.sampled_from([1, 1, 2, 3, spec.select.budget])),
            sinks=draw(few | st.just(spec.select.sinks)),
            local=draw(few | st.just(spec.select.local)),
        )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def length(spec: SPLASpec, sixteenths: int) -> int:
    """A ragged length with blocks that are not selected, where that takes few enough positions."""
    if spec.select is None:
        return 40 + sixteenths
    select = spec.select
    blocks = min(select.sinks, 2) + min(select.local, 2) + min(select.budget, 2) + 1
    most = (300 if select.block_size == 128 else 200) if select.granularity == "token" else 500
    return min(blocks * select.block_size + sixteenths * select.block_size // 16 + 1, most - 8 * sixteenths)


def draw(count: int, seed: int) -> list[tuple[SPLASpec, int]]:
    """`count` different specs with their shapes, the same for the same seed and versions."""
    found: dict[str, tuple[SPLASpec, int]] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2 * count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(small_specs(), st.sampled_from(SHAPES))
    def collect(spec: SPLASpec, sixteenths: int) -> None:
        found.setdefault(to_toml(spec), (spec, sixteenths))

    collect()
    return list(found.values())[:count]


def wide(module: ModuleType, part: Partition) -> dict[str, dict[str, int]]:
    """Schedules of few large tiles: to the interpreter a small one costs as much; results stay the same."""
    geometry = Geometry.of(part.program)
    rows = min(256, max(16, 1 << (geometry.tile * geometry.group - 1).bit_length()))
    tiles = {
        "block_sparse_forward": {"BLOCK_M": rows, "BLOCK_N": geometry.block},
        "block_sparse_dq": {"BLOCK_M": rows, "BLOCK_N": geometry.block},
        "block_sparse_dkv": {"BLOCK_M": 128, "BLOCK_N": geometry.block},
    }
    default = module.SCHEDULES["sm_90"]["fp32"]
    return {k.name: {**default[k.name], **tiles[k.template]} for k in part.kernels if k.template in tiles}


def ways(
    module: ModuleType, part: Partition, device: str, length: int
) -> list[tuple[int, torch.dtype, Strategies | None]]:
    """Lengths, dtypes and Schedules to compare a spec with: one way in the interpreter, every strategy on a GPU.

    Sequences of few blocks have kernels of their own (None), and strategies longer ones on a GPU.
    """
    most = part.direct.blocks * Geometry.of(part.program).block if part.direct else 0
    few: list[Strategies | None] = [None] if length <= most else []
    if device == "cpu":
        return [(length, torch.float32, x) for x in (wide(module, part), *few)]
    strategies = every_strategy(part) or [DEFAULT]
    own = [(length, dtype, x) for dtype in (torch.float32, torch.bfloat16) for x in few]
    longer = length + most if few else length
    return [*own, (longer, torch.float32, strategies[0]), *((longer, torch.bfloat16, s) for s in strategies)]


def attempt(
    spec: SPLASpec,
    sixteenths: int,
    folder: Path,
    compile_for: Sequence[str] = ("sm_90",),
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """Generate, compile and compare one spec; on the CPU it needs a process in which Triton interprets kernels."""
    from splagen import pipeline, verification
    from splagen.codegen.compile import compile_module
    from splagen.kinds import oracle

    seconds = [time.perf_counter()]
    try:
        library = pipeline.generate(spec, folder)
        kernels = pipeline.kernels(spec)
        seconds.append(time.perf_counter())
        if compile_for:
            rows = compile_module(library.path, kernels, targets=compile_for, dtypes=("bf16",), jobs=1, progress=False)
            if wrong := [f"{r.kernel} for {r.arch}: {r.error}" for r in rows if not r.ok]:
                return Outcome("failed", "\n".join(wrong), len(kernels.kernels))
        seconds.append(time.perf_counter())
        one_tile_per_query = spec.select is not None and spec.select.granularity == "token"
        heads = spec.group_size * (1 if one_tile_per_query or spec.group_size > 2 else 2)
        truth = oracle(to_toml(spec))
        compared: list[verification.Row] = []
        for positions, dtype, schedules in ways(library.module, kernels, device, length(spec, sixteenths)):
            where: dict[str, Any] = {"shapes": [(1, heads, positions)], "dtypes": [dtype], "device": device}
            compared += verification.verify(library.module, truth, **where, seed=seed, schedules=schedules).rows
        seconds.append(time.perf_counter())
    except SplagenError as error:
        named = any(axis in str(error) for axis in AXES)
        return Outcome("refused" if named else "failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")
    took = tuple(round(b - a, 3) for a, b in itertools.pairwise(seconds))
    wrong = [f"{r.quantity} at {r.shape}, {r.dtype}: {r.error:.2e} > {r.limit:.0e}" for r in compared if not r.ok]
    largest = max((r.error / r.limit for r in compared if r.limit), default=0.0)
    status = "failed" if wrong else "ok"
    return Outcome(status, "\n".join(wrong), len(kernels.kernels), largest if not wrong else 0.0, took)


def _prepare(device: str) -> None:
    torch.set_num_threads(1)
    if device == "cpu":
        from tests.interpreter_sort import patch

        patch()


def _attempt(text: str, sixteenths: int, compile_for: Sequence[str], device: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return attempt(from_toml(text), sixteenths, Path(folder), compile_for, device=device)


def run(
    drawn: Sequence[tuple[SPLASpec, int]],
    workers: int,
    compile_for: Sequence[str],
    progress: Callable[[int, Outcome], None] = lambda done, outcome: None,
    device: str = "cpu",
    limit_s: float = math.inf,
) -> list[Outcome]:
    """The outcomes of the specs, in order, from processes that interpret kernels or launch them on a GPU.

    None is begun after `limit_s` seconds.
    """
    end = time.monotonic() + limit_s
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(device,)) as pool:
        futures = [pool.submit(_attempt, to_toml(spec), shape, tuple(compile_for), device) for spec, shape in drawn]
        for done, future in enumerate(as_completed(futures), 1):
            progress(done, _outcome(future))
            if time.monotonic() > end:
                for f in futures:
                    f.cancel()
        return [_outcome(f) for f in futures]


def _outcome(future: Future[Outcome]) -> Outcome:
    if future.cancelled():
        return Outcome("left")
    try:
        return future.result()
    except Exception as error:  # the process died
        return Outcome("failed", f"{type(error).__name__}: {error}")


def figures(drawn: Sequence[tuple[SPLASpec, int]], outcomes: Sequence[Outcome], seed: int) -> dict[str, object]:
    """Counts, the specs that are not ok, and which axes were drawn."""
    counts = Counter(o.status for o in outcomes)
    bad = [
        {"status": o.status, "reason": o.reason, "length": length(spec, shape), "spec": to_toml(spec)}
        for (spec, shape), o in zip(drawn, outcomes, strict=True)
        if o.status in ("refused", "failed")
    ]
    seconds = [o.seconds for o in outcomes if len(o.seconds) == 3]
    totals = reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], seconds, [0.0, 0.0, 0.0])
    return {
        "seed": seed,
        "specs": len(drawn),
        **{status: counts[status] for status in ("ok", "refused", "failed", "left")},
        "kernels": sum(o.kernels for o in outcomes),
        "largest_error_over_limit": max((o.largest_error for o in outcomes), default=0.0),
        "seconds": dict(zip(("generate", "compile", "compare"), (round(x, 1) for x in totals), strict=True)),
        "not_ok": bad,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, run and record; the exit status is 1 if a spec failed."""
    from benchmarks.record import write

    parser = argparse.ArgumentParser(description="random specs: generate, compile, compare")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", nargs="*", default=["sm_90"], help="architectures to compile for")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no spec is begun later than this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: by Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/random_specs.json"))
    given = parser.parse_args(arguments)
    drawn = draw(given.count, given.seed)

    def show(done: int, outcome: Outcome) -> None:
        end = "\n" if outcome.status != "ok" or done == len(drawn) else "\r"
        print(f"{done}/{len(drawn)} {outcome.status} {outcome.reason[:150]}", end=end, file=sys.stderr)

    targets = given.targets if given.device == "cpu" else ()
    outcomes = run(drawn, given.workers, targets, show, given.device, given.seconds)
    found = {"device": given.device, **figures(drawn, outcomes, given.seed)}
    path = write(given.out.stem, found, given.out.parent)
    print(f"{path}: {found['ok']} ok, {found['refused']} refused, {found['failed']} failed")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
