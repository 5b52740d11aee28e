"""Where tests run (Triton's interpreter or a GPU), from which seeds, and with how many examples."""

import ast
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from splagen.pipeline import Library

# Of several GPUs each worker of pytest-xdist takes one, before anything is on it.
if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and (_count := torch.cuda.device_count()) > 1:
    _gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(_count)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = _gpus[int(_worker.removeprefix("gw")) % len(_gpus)]

# Drawing a spec or a Program with two workers on two cores is slow without being wrong, and `device` is the
# same for every example of a test.
_TOLERATED = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
for _name, _examples, _fixed in (("dev", 50, False), ("ci", 100, True), ("nightly", 5000, False)):
    hypothesis.settings.register_profile(
        _name,
        max_examples=_examples,
        derandomize=_fixed,
        deadline=None,
        suppress_health_check=_TOLERATED,
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def _holds(node: ast.AST, markers: frozenset[str]) -> bool:
    """Evaluate a `-m` expression, whose grammar is a part of Python's, for a test with these markers."""
    match node:
        case ast.Expression(body=body):
            return _holds(body, markers)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_holds(value, markers) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_holds(value, markers) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _holds(operand, markers)
        case ast.Name(id=name):
            return name in markers
    return False


def only_gpu_tests(expression: str) -> bool:
    """Return whether a `-m` expression selects tests marked gpu and none of the others."""
    if not expression.strip():
        return False
    tree = ast.parse(expression.strip(), mode="eval")
    others = [frozenset[str](), frozenset({"slow"})]
    return any(_holds(tree, m | {"gpu"}) for m in others) and not any(_holds(tree, m) for m in others)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew")


def pytest_configure(config: pytest.Config) -> None:
    """Choose interpreter or GPU before a test module imports a kernel: Triton reads the variable then."""
    if os.environ.get("SPLAGEN_GPU_TESTS") == "1" or only_gpu_tests(config.getoption("markexpr", "")):
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one thread per worker: more only wait for one another


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu, with the reason, where they cannot run."""
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this run: use `pytest -m gpu` or SPLAGEN_GPU_TESTS=1")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or the GPU for a test marked gpu."""
    return torch.device("cpu" if request.node.get_closest_marker("gpu") is None else "cuda")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bf16_interpreter() -> None:
    """Repair bfloat16 in Triton's interpreter for the rest of this process; no effect on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter_bf16 import patch

        patch()


@pytest.fixture(scope="session")
def fast_sort() -> None:
    """Make Triton's interpreter sort fast for the rest of this process: a top-k would take most of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter_sort import patch

        patch()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where layers write their modules, once per run."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> "Callable[[Library], None]":
    """Fail if an op of a library, its kernels or the oracle are reached."""

    def guard(library: "Library") -> None:
        def reached(*_: object, **__: object) -> None:
            raise AssertionError("something was launched")

        for name in ("forward_op", "backward_op", "forward", "backward", "equations"):
            monkeypatch.setattr(library.module, name, reached)

    return guard
