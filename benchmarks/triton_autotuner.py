"""Triton's autotuner, held back: `fla` has up to 48 configurations of a kernel, and each is compiled and measured.

Functions here change the autotuner for the rest of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner

CONFIGURATIONS = 24
_prune, _run, _ALL = Autotuner.prune_configs, Autotuner.run, slice(None)


def fewer_configurations() -> None:
    """Let Triton's autotuner see at most CONFIGURATIONS of a kernel, evenly spaced."""

    def some(tuner: Autotuner, kwargs: dict[str, Any]) -> Any:
        found = _prune(tuner, kwargs)
        return found[:: -(-len(found) // CONFIGURATIONS)]

    Autotuner.prune_configs = some


def compile_ahead(
    tuner: Autotuner, args: Sequence[Any], kwargs: dict[str, Any], pool: Executor, part: slice = _ALL
) -> None:
    """Compile a part of the configurations that a call of an autotuned kernel chooses from; launch none."""
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    with triton.AsyncCompileMode(pool, ignore_errors=True):
        for config in tuner.prune_configs(kwargs)[part]:
            tuner.fn.run(*args, **{**kwargs, "warmup": True}, **config.all_kwargs())


def compile_side_by_side() -> None:
    """Let Triton's autotuner compile what it chooses from on all CPUs, before it measures one after the other."""
    done: set[Any] = set()

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> Any:
        plain = [a if isinstance(a, (int, float, str, bool)) else getattr(a, "dtype", None) for a in args]
        named = {n: a for n, a in kwargs.items() if isinstance(a, (int, float, str, bool))}
        key = id(tuner), repr(plain), repr(named)
        if key not in done:
            done.add(key)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compile_ahead(tuner, args, kwargs, pool)
        return _run(tuner, *args, **kwargs)

    Autotuner.run = run


def tune_briefly() -> None:
    """Let Triton's autotuner measure each configuration for 20 ms."""

    def do_bench(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
        return triton.testing.do_bench(call, warmup=3, rep=20, quantiles=quantiles)

    fewer_configurations()
    Autotuner.do_bench = staticmethod(do_bench)
