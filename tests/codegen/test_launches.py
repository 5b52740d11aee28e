"""A call like an earlier one launches what that one launched, with its own tensors, and does not ask the JIT."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from splagen import pipeline
from splagen.library import taylor
from splagen.spec import Select, Spec, SPLASpec
from splagen.sse_spec import Router, SSESpec

ROOT = Path(__file__).resolve().parent.parent.parent
SPECS: dict[str, Spec] = {
    "spla": SPLASpec(
        head_dim=16, group_size=2, select=Select(block_size=16, budget=2, metric=taylor(covariance="diag"))
    ),
    "sse": SSESpec(head_dim=16, group_size=2, backbone="scalar", router=Router(partitions=3, writers=2)),
    "delta": SSESpec(head_dim=16, backbone="delta", router=Router(partitions=2)),
}

# Launches on a GPU that is not there are written down: kernel, grid, numbers.
SCRIPT = """
import importlib.util, json, sys
import torch
from tests.codegen import absent_gpu
from tests.codegen.absent_gpu import Driver, launch_all, valid_routes, watch

seen, asked = [], []

def launcher(self, source, metadata):
    def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        kinds = zip(source.signature.values(), arguments, strict=True)
        told = [kind if kind.startswith("*") else a for kind, a in kinds]
        seen.append([source.name, x, y, z, stream, told])
    return run

watch(90)
Driver.launcher_cls = launcher
Driver.get_current_stream = lambda self, device: 7
found = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(found)
sys.modules["module"] = module
found.loader.exec_module(module)
valid_routes(module)
kernels = [x for n, x in vars(module).items() if n.endswith("_kernel")]
for kernel in kernels:
    kernel.add_pre_run_hook(lambda *a, name=kernel.__name__, **k: asked.append(name))

def calls(length, heads):
    seen.clear(), asked.clear()
    launch_all(module, "sm_90", "bf16", length, heads, (1,))
    return {"seen": list(seen), "asked": list(asked)}

sizes = {"first": (80, 2), "longer": (96, 2), "ragged": (77, 2), "heads": (80, 4)}
answers = {name: calls(*size) for name, size in sizes.items()}
answers["again"] = calls(*sizes["first"])
for name, size in sizes.items():
    module.KEPT.clear()
    answers["fresh " + name] = calls(*size)
module.KEPT.clear()
calls(80, 2)
for kept in module.KEPT.values():
    kept.schedules = []
    for kernel, x in kept.launches.items():
        kept.launches[kernel] = x._replace(schedule={**x.schedule, "num_stages": 9})
answers["another Schedule"] = calls(80, 2)
import triton
hook = lambda metadata: None
triton.knobs.runtime.launch_enter_hook.add(hook)
answers["profiled"] = calls(80, 2)
triton.knobs.runtime.launch_enter_hook.remove(hook)
answers["after"] = calls(80, 2)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module", params=SPECS)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = pipeline.generate(SPECS[request.param], tmp_path_factory.mktemp("launches")).path
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True, text=True, timeout=500, env=environment, cwd=path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.timeout(600)
def test_a_call_like_an_earlier_one_does_not_ask_the_jit(answers: dict[str, Any]) -> None:
    assert len(answers["first"]["asked"]) == len(answers["first"]["seen"]) > 5
    assert answers["again"]["asked"] == []
    assert answers["again"]["seen"] == answers["first"]["seen"]
    assert all(launch[4] == 7 for launch in answers["again"]["seen"]), "on the current stream"


@pytest.mark.timeout(600)
def test_what_is_kept_never_changes_what_is_launched(answers: dict[str, Any]) -> None:
    for case in ("first", "longer", "ragged", "heads"):
        assert answers[case]["seen"] == answers[f"fresh {case}"]["seen"], case
        assert len(answers[f"fresh {case}"]["asked"]) == len(answers[case]["seen"]), case
    assert len({json.dumps(answers[case]["seen"]) for case in ("first", "longer", "ragged", "heads")}) == 4


@pytest.mark.timeout(600)
def test_another_schedule_and_a_profiler_ask_the_jit(answers: dict[str, Any]) -> None:
    for case in ("another Schedule", "profiled"):
        assert len(answers[case]["asked"]) == len(answers[case]["seen"]), case
        assert answers[case]["seen"] == answers["first"]["seen"]
    assert answers["after"]["asked"] == []


@pytest.mark.parametrize("name", SPECS)
def test_a_call_launches_each_kernel_once(name: str) -> None:
    """Launches are kept by kernel: a second one with other strides would take the numbers of the first."""
    functions = [f for f in ast.parse(pipeline.source(SPECS[name])).body if isinstance(f, ast.FunctionDef)]
    calls = [names for f in functions if f.name.endswith("_steps") for names in launched(f.body)]
    assert all(len(names) == len(set(names)) > 0 for names in calls)


def launched(statements: Sequence[ast.stmt]) -> list[list[str]]:
    """The kernels that statements launch, by every way through their branches."""
    found: list[list[str]] = [[]]
    for s in statements:
        if isinstance(s, ast.If):
            ways = [*launched(s.body), *launched(s.orelse)]
        else:
            ways = [re.findall(r"\blaunch_(\w+)\(", ast.unparse(s))]
        found = [before + names for before in found for names in ways]
    return found
