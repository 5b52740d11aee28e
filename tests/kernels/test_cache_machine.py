"""Random histories of a cache against recomputation: few and small in the interpreter, more and longer on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from splagen.library import taylor
from splagen.pipeline import generate_decoding
from splagen.spec import Select, SPLASpec, windows
from tests.kernels.cache_machine import CacheMachine

pytestmark = pytest.mark.usefixtures("fast_sort")

SELECT = Select(block_size=16, budget=1, sinks=0, local=0, metric=taylor(covariance="diag"))
SMALL = SPLASpec(head_dim=16, group_size=1, select=SELECT)
SPECS = {
    "default": SMALL,
    "sinks, local": replace(SMALL, group_size=2, select=replace(SELECT, sinks=1, local=1)),
    "windows": replace(SMALL, select=replace(SELECT, block_size=32, statistics=windows())),
    "dense below": replace(SMALL, dense_below=40),
}


def histories(
    spec: SPLASpec, folder: Path, device: torch.device, *, examples: int, rules: int, always: bool = False, **sizes: Any
) -> None:
    """Run the machine on a cache of a spec; `always` with the same histories."""
    block = spec.select.block_size if spec.select else 16
    library = generate_decoding(spec, folder)
    if device.type == "cpu":  # programs are slow in the interpreter
        for by_dtype in library.module.SCHEDULES.values():
            for schedules in by_dtype.values():
                schedules["splitting"] = {"score": 4, "attend": 4, "chunk": 512}
    given = {"library": library, "device": device, "page_size": block} | sizes
    machine = type("Machine", (CacheMachine,), given)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=rules, derandomize=always)
    )  # type: ignore[no-untyped-call]


def test_a_few_histories(tmp_path: Path, device: torch.device) -> None:
    histories(SMALL, tmp_path, device, examples=4, rules=8, always=True, tokens=(1, 2, 8), runs=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_histories(name: str, tmp_path: Path, device: torch.device) -> None:
    histories(SPECS[name], tmp_path, device, examples=10, rules=12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["default", "sinks, local", "windows", "dense below"])
def test_histories_on_a_gpu(name: str, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    select = SPECS[name].select
    assert select is not None
    spec = replace(SPECS[name], head_dim=64, group_size=4, select=replace(select, budget=3))
    histories(
        spec, tmp_path, device, examples=60, rules=40, dtype=dtype, slots=5, kv_heads=2, width=24, pages=90,
        runs=(1, 20),
    )  # fmt: skip
