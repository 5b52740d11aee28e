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
from tests.kernels.decoding import change_schedules

pytestmark = pytest.mark.usefixtures("fast_sort")

SELECT = Select(block_size=16, budget=1, sinks=0, local=0, metric=taylor(covariance="diag"))
SMALL = SPLASpec(head_dim=16, group_size=1, select=SELECT)
SPECS = {
    "default": SMALL,
    "sinks, local": replace(SMALL, group_size=2, select=replace(SELECT, sinks=1, local=1)),
    "windows": replace(SMALL, select=replace(SELECT, block_size=32, statistics=windows())),
    "dense below": replace(SMALL, dense_below=40),
}


def machine(
    spec: SPLASpec, folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, **sizes: Any
) -> type[CacheMachine]:
    """The machine on a cache of a spec."""
    block = spec.select.block_size if spec.select else 16
    library = generate_decoding(spec, folder)
    if device.type == "cpu":  # programs are slow in the interpreter
        change_schedules(library, monkeypatch, splitting={"score": 4, "attend": 4, "chunk": 512})
    given = {"library": library, "device": device, "page_size": block} | sizes
    return type("Machine", (CacheMachine,), given)


def histories(made: type[CacheMachine], examples: int, rules: int) -> None:
    """Random ones."""
    run_state_machine_as_test(made, settings=settings(max_examples=examples, stateful_step_count=rules))  # type: ignore[no-untyped-call]


def test_a_history_of_every_rule(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(SMALL, tmp_path, device, monkeypatch, pages=14, tokens=(1, 2, 8), runs=(1, 1))()

    def then(rule: str, *given: Any) -> Any:
        found = getattr(made, rule)(*given)
        made.lengths_are_those_of_the_sequences()
        made.every_page_is_free_or_held()
        return found

    made.begin()
    then("fork", 0, None)
    assert sorted(made.live) == [0, 1]
    then("step_and_accept", 1, [1, 0])
    then("reset", 0)
    assert [made.live[slot].length for slot in (0, 1)] == [41, 40], "pages that are shared are not reset"
    saved = then("save")
    then("free", 0)
    then("step", 2, 0)
    then("reset", 0)
    then("allocate", 2)
    then("step", 2, 0)
    then("accept", [-1, 9])
    assert [made.live[slot].length for slot in (0, 1)] == [0, 8]
    then("reserve", 3, 0)
    then("step", 1, 0)
    then("restore", saved)
    then("step", 0, 0)
    assert [made.live[slot].length for slot in (0, 1)] == [42, 41]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_histories(name: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    histories(machine(SPECS[name], tmp_path, device, monkeypatch), examples=10, rules=12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["default", "sinks, local", "windows", "dense below"])
def test_histories_on_a_gpu(
    name: str, dtype: torch.dtype, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = SPECS[name].select
    assert select is not None
    spec = replace(SPECS[name], head_dim=64, group_size=4, select=replace(select, budget=3))
    sizes: dict[str, Any] = {"slots": 5, "kv_heads": 2, "width": 24, "pages": 90, "runs": (1, 20)}
    histories(machine(spec, tmp_path, device, monkeypatch, dtype=dtype, **sizes), examples=60, rules=40)
