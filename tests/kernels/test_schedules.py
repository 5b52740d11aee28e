"""A Schedule can never change a result, and the same call twice gives the same bits."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Kernel
from splagen.codegen.schedule import Schedule, check_schedule
from splagen.errors import ScheduleError
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.pipeline import generate
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Report, compare, random_inputs
from tests.kernels.cases import REAL_SPECS
from tests.kernels.embedding import fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")

TINY = SPLASpec(
    head_dim=24,
    group_size=2,
    select=Select(block_size=32, budget=2, granularity="tile", tile=16, metric=taylor(covariance="diag")),
    linear=Residual(temperature=True),
)
REAL = {name: (spec, (1, 8, 1000)) for name, spec in REAL_SPECS.items()}


def halved(schedule: Schedule) -> dict[str, int]:
    """Smaller tiles with more warps; nothing takes more shared memory."""
    changed = {k: x // 2 if k.startswith("BLOCK") else x for k, x in schedule.items()}
    return changed | {"num_warps": 8, "num_stages": 1}


def doubled(schedule: Schedule) -> dict[str, int]:
    """Larger tiles on the query side."""
    changed = {k: 2 * x if k == "BLOCK_M" else x for k, x in schedule.items()}
    return changed | {"num_warps": 8, "num_stages": 1}


def narrow(schedule: Schedule) -> dict[str, int]:
    """The same tiles on half the warps, with another pipeline."""
    stages = 1 if schedule["num_stages"] > 1 else 2
    return {**schedule, "num_warps": 2, "num_stages": stages}


def legal(
    kernels: list[Kernel],
    geometry: Geometry,
    default: Mapping[str, Schedule],
    change: Callable[[Schedule], dict[str, int]],
) -> dict[str, dict[str, int]]:
    """A changed Schedule for every kernel that it is legal for; BLOCKs that may not shrink stay."""
    found = {}
    for kernel in kernels:
        before, wanted = default[kernel.name], change(default[kernel.name])
        for name in [None, *kernel.tunable]:
            tried = wanted if name is None else {**wanted, name: before[name]}
            try:
                check_schedule(kernel, geometry, tried)
            except ScheduleError:
                continue
            found[kernel.name] = tried
            break
    return found


@pytest.mark.parametrize("change", [halved, doubled], ids=["halved", "doubled"])
def test_tiles_do_not_change_a_result_in_the_interpreter(
    change: Callable[[Schedule], dict[str, int]],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth, module = oracle(to_toml(TINY)), generate(TINY, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    shape = (1, 2, 230)
    inputs = random_inputs(truth, shape, torch.float32, device, seed=0)
    default = module.schedules_for(inputs["q"])
    geometry = Geometry.of(truth.partition.program)
    schedules = legal(truth.partition.kernels, geometry, default, change)
    assert len([n for n in schedules if schedules[n] != default[n]]) > len(default) / 2
    Report(TINY.name, tuple(compare(module, truth, inputs, shape, schedules))).raise_if_wrong()


@pytest.mark.gpu
@pytest.mark.parametrize("change", [halved, doubled, narrow], ids=["halved", "doubled", "narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", REAL)
def test_schedules_do_not_change_a_result(
    name: str,
    dtype: torch.dtype,
    change: Callable[[Schedule], dict[str, int]],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, shape = REAL[name]
    if dtype == torch.float32 and (change is not halved or name != "token"):
        pytest.skip("float32 compiles slowly: one other Schedule of one spec")
    truth, module = oracle(to_toml(spec)), generate(spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    inputs = random_inputs(truth, shape, dtype, device, seed=0)
    default = module.schedules_for(inputs["q"])
    schedules = legal(truth.partition.kernels, Geometry.of(truth.partition.program), default, change)
    for kernel in schedules:
        fall_back(module, kernel, default[kernel], monkeypatch)
    Report(spec.name, tuple(compare(module, truth, inputs, shape, schedules))).raise_if_wrong()


def fall_back(module: ModuleType, kernel: str, default: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch a kernel with its default where the wanted Schedule finds no room on the device."""
    from triton.runtime.errors import OutOfResources

    launch = getattr(module, f"launch_{kernel}")

    def careful(n: object, schedule: Schedule, *inputs: object) -> object:
        try:
            return launch(n, schedule, *inputs)
        except OutOfResources:
            return launch(n, default, *inputs)

    monkeypatch.setattr(module, f"launch_{kernel}", careful)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", REAL)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    spec, (_, heads, _) = REAL[name]
    truth, library = oracle(to_toml(spec)), generate(spec, tmp_path)
    inputs = random_inputs(truth, (2, heads, 2048), dtype, device, seed=0)
    names = [a.name for a in truth.partition.inputs]

    def run() -> list[torch.Tensor]:
        leaves = [inputs[n].detach().clone().requires_grad_() for n in names]
        o = library.op(*leaves[:3], **dict(zip(names[3:], leaves[3:], strict=True)))
        return [o, *torch.autograd.grad(o, leaves, inputs[truth.partition.cotangents[0].name])]

    first, second = run(), run()
    for n, one, two in zip(["o", *names], first, second, strict=True):
        assert torch.equal(one, two), f"{n} differs in {int((one != two).sum())} of {one.numel()} places"
