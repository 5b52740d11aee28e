"""The kernels of SSE, forward and backward, against the oracle: packed sequences, every backbone, every routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from splagen import library as lib
from splagen.codegen import sequence_partition, sequence_schedule
from splagen.errors import PartitionError
from splagen.pipeline import generate
from splagen.sequence import SSEOracle
from splagen.sequence_verification import compare
from splagen.sse_spec import Router, SSESpec
from splagen.verification import Report
from tests.ir.sse_rows import outputs_of, packed
from tests.kernels.embedding import embed, fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = frozenset(["state", "cu_seqlens", "dfinal", "dbalance"])  # what is not rows


@dataclass(frozen=True)
class Case:
    """A spec with packed lengths, key heads, the size of log decays, and changes of the Schedules of the loops."""

    name: str
    spec: SSESpec
    dtypes: tuple[torch.dtype, ...]
    lengths: tuple[int, ...]
    heads: int = 1
    decay: float = 0.3
    schedule: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.name


SHORT = (0, 1, 15, 37)


def small(name: str, *dtypes: torch.dtype, schedule: Mapping[str, int] = {}, decay: float = 0.3, **axes: Any) -> Case:
    """A case for the interpreter: N = 4, k = 1 and two value heads per key head unless told."""
    lengths, heads = axes.pop("lengths", SHORT), axes.pop("heads", 1)
    given = {"head_dim": 16, "value_dim": 20, "group_size": 2} | axes
    return Case(name, SSESpec(**given), dtypes or (FP32,), lengths, heads, decay, tuple(schedule.items()))


UNIT_RELU = lib.feature_map(lambda x: lib.where(x > 0, x, 0), l2norm=True)
LONG = {"router": None, "group_size": 1, "lengths": (530, 0, 20), "schedule": {"CHUNK": 64}}  # groups of 512 rows

SMALL = (
    # backbones and routers
    small("constant per-head router", backbone="constant", router=Router(2, scope="head"), heads=2, group_size=1),
    small("scalar k 2", backbone="scalar", router=Router(3, 2, normalise="selected")),
    small("vector", backbone="vector", router=Router(2), group_size=1),
    small("delta", FP32, FP16, backbone="delta", router=Router(2), group_size=1),
    small("delta pre_norm alone", backbone="delta", gate_site="pre_norm", router=Router(1), shared=False),
    small("vector no router", backbone="vector", router=None),
    small("none no router", FP32, FP16, backbone="none", router=None),
    small("none no gate", backbone="none", router=Router(2, gate="none"), group_size=1, shared=False),
    small("scalar N 16", backbone="scalar", router=Router(16), group_size=1, shared=False, lengths=(0, 37)),
    # the masked form, where readers may differ from writers
    small("vector masked", backbone="vector", router=Router(3, 1, 2), form="masked", group_size=1, shared=False),
    small("scalar masked", backbone="scalar", router=Router(2, 1, 2), form="masked", group_size=1),
    # the routed form, where all states are carried together
    small("scalar routed", backbone="scalar", router=Router(2), form="routed"),
    small("none routed readers 2", backbone="none", router=Router(3, 1, 2), form="routed", group_size=1, shared=False),
    # feature maps
    small("unit rows, row sparse", backbone="scalar", router=None, q_map=UNIT_RELU, k_map=lib.topk_softmax(4),
          head_dim=20, group_size=1),
    # slices of v, and chunks
    small("scalar k 2 slices", backbone="scalar", value_dim=40, group_size=1, router=Router(2, 2), shared=False,
          schedule={"CHUNK": 32, "BLOCK_E": 16}),
    # decay
    small("vector strong decay", FP32, FP16, backbone="vector", router=None, decay=5.0),
    small("scalar strong decay", backbone="scalar", router=Router(2), group_size=1, shared=False, decay=5.0),
    # several groups in a segment
    small("vector groups", backbone="vector", **LONG),
    small("none groups of many segments", backbone="none", **LONG | {"lengths": (513, 0, 1, 1030, 0, 20)}),
)  # fmt: skip
SWEEP = (
    small("none", backbone="none", head_dim=20, value_dim=24, group_size=1),
    small("scalar k 2", FP16, backbone="scalar", router=Router(3, 2, normalise="selected")),
    small("vector", FP16, backbone="vector", router=Router(2), group_size=1),
    small("scalar routed", FP16, backbone="scalar", router=Router(2), form="routed"),
    small("vector N 4", backbone="vector"),
    small("delta N 4", backbone="delta"),
    small("vector per-head router", backbone="vector", router=Router(2, scope="head"), heads=2, group_size=1),
    small("delta per-head router", backbone="delta", router=Router(3, 2, scope="head"), heads=2),
    small("vector N 1", backbone="vector", router=Router(1), group_size=1),
    small("none N 16 k 2", backbone="none", router=Router(16, 2), group_size=1),
    small("vector k 2 gate of writers", backbone="vector", router=Router(3, 2, gate="write"), group_size=1),
    small("delta k 2 gate of readers", backbone="delta", router=Router(3, 2, gate="read"), group_size=1),
    small("delta masked", backbone="delta", router=Router(3, 2, 1), form="masked", group_size=1),
    small("delta no gate", backbone="delta", router=Router(2, gate="none")),
    small("scalar masked per-head", backbone="scalar", router=Router(3, 1, 3, scope="head"), form="masked"),
    small("scalar k 2 slices", backbone="scalar", router=Router(3, 2), schedule={"CHUNK": 16, "BLOCK_E": 16}),
    small("vector slices", backbone="vector", value_dim=40, group_size=1, router=Router(2), shared=False,
          schedule={"CHUNK": 32, "BLOCK_E": 16}),
    small("delta slices", backbone="delta", value_dim=40, router=Router(2), schedule={"CHUNK": 32, "BLOCK_E": 32}),
    small("scalar slices", backbone="scalar", value_dim=60, router=Router(2), schedule={"CHUNK": 32, "BLOCK_E": 16}),
    small("delta chunk 64", backbone="delta", router=None, schedule={"CHUNK": 64}),
    small("vector chunk 64", backbone="vector", router=Router(2), group_size=1, schedule={"CHUNK": 64}),
    small("delta no decay", FP32, FP16, backbone="delta", router=Router(2), group_size=1, decay=0.0),
    small("delta strong decay", FP32, FP16, backbone="delta", router=Router(2), group_size=1, decay=5.0),
    small("scalar groups", backbone="scalar", **LONG),
    small("constant groups", backbone="constant", **LONG),
    small("none groups", backbone="none", **LONG),
    small("delta groups", backbone="delta", **LONG),
    small("constant routed per-head", backbone="constant", router=Router(2, scope="head"), form="routed", heads=2),
    small("scalar routed N 4 k 2", backbone="scalar", router=Router(4, 2), form="routed", head_dim=20, group_size=1),
    small("scalar routed no gate", backbone="scalar", router=Router(3, 2, 1, gate="none"), form="routed"),
    small("scalar routed strong decay", FP32, FP16, backbone="scalar", router=Router(2), form="routed", decay=5.0),
    small("none routed N 1", backbone="none", router=Router(1), form="routed", group_size=1),
    small("scalar routed no router", backbone="scalar", router=None, form="routed"),
    small("scalar routed slices", backbone="scalar", value_dim=60, router=Router(2), form="routed",
          schedule={"CHUNK": 32, "BLOCK_E": 16}),
    small("constant routed groups", backbone="constant", form="routed", **LONG | {"router": Router(2)}),
    small("sorted groups", backbone="vector", **LONG | {"router": Router(2)}),
)  # fmt: skip


REAL = (0, 1, 15, 63, 64, 65, 1000, 4095)


def real(name: str, *dtypes: torch.dtype, schedule: Mapping[str, int] = {}, decay: float = 0.3, **axes: Any) -> Case:
    """A case for a GPU: D = E = 64, two key heads and a router of N = 4, k = 1 unless told."""
    given = {"head_dim": 64} | axes
    return Case(name, SSESpec(**given), dtypes or (BF16,), REAL, 2, decay, tuple(schedule.items()))


GPU = (
    real("vector 128", BF16, FP16, backbone="vector", head_dim=128),
    real("vector 64", FP32, backbone="vector"),
    real("vector N 16 k 2", backbone="vector", router=Router(16, 2), group_size=2),
    real("vector head 80 value 48 per-head router", backbone="vector", head_dim=80, value_dim=48,
         router=Router(3, 2, scope="head"), group_size=2),
    real("vector strong decay", BF16, FP16, FP32, backbone="vector", router=None, decay=5.0),
    real("scalar 128 k 2", backbone="scalar", head_dim=128, router=Router(4, 2), group_size=2),
    real("scalar 64 N 1", FP32, FP16, backbone="scalar", router=Router(1)),
    real("scalar value 256", backbone="scalar", head_dim=128, value_dim=256, router=Router(16), shared=False),
    real("scalar routed", BF16, FP32, backbone="scalar", head_dim=128, router=Router(4, 2, 1), form="routed"),
    real("constant masked", backbone="constant", router=Router(4, 1, 2), form="masked"),
    real("none", backbone="none", head_dim=64, value_dim=128, router=Router(2), group_size=2),
    real("none no router", BF16, FP16, FP32, backbone="none", head_dim=128, router=None),
    real("none no router, wide values", BF16, backbone="none", head_dim=64, value_dim=128, router=None),
    real("none no router, chunks of 32", BF16, backbone="none", head_dim=128, router=None, schedule={"CHUNK": 32}),
    real("delta 128 k 2", backbone="delta", head_dim=128, router=Router(4, 2)),
    real("delta 64", FP32, FP16, backbone="delta", group_size=2),
    real("delta pre_norm N 16 no decay", backbone="delta", gate_site="pre_norm", router=Router(16), decay=0.0),
    real("delta strong decay", backbone="delta", head_dim=128, router=None, decay=5.0),
)  # fmt: skip
SCHEDULED = tuple(
    real(f"{backbone} chunk {chunk} warps {warps}", backbone=backbone, router=Router(4, 2),
         schedule={"CHUNK": chunk, "num_warps": warps, "num_stages": 1})
    for backbone in ("vector", "scalar", "delta")
    for chunk, warps in ((32, 4), (64, 8))
)  # fmt: skip


def pairs(cases: Sequence[Case]) -> list[object]:
    """(case, dtype), named after both."""
    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case in cases
        for dtype in case.dtypes
    ]


def schedules_of(module: ModuleType, case: Case, v: Tensor) -> dict[str, dict[str, int]]:
    """The default Schedules with the case's changes in every loop over chunks."""
    schedules = module.schedules_for(v).items()
    return {n: {**s, **dict(case.schedule)} if {"CHUNK", "BLOCK_E"} <= s.keys() else s for n, s in schedules}


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Rows inside larger storages full of NaN."""
    given = packed(case.spec, case.lengths, case.heads, dtype=dtype, decay=case.decay, seed=seed, device=device)
    return {n: x if n in ROWS else embed(x) for n, x in given.items()}


class Recorded:
    """A generated module that keeps what its kernels returned."""

    def __init__(self, module: ModuleType, spec: SSESpec) -> None:
        self.module, self.out = module, {}
        self.schedules_for, self.__name__ = module.schedules_for, module.__name__
        self.outputs = outputs_of(spec)
        self.gradients = [f"d{n}" for n in (*SSEOracle(spec).names, "state")]

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        found = self.module.forward(*arguments)
        self.out |= dict(zip(self.outputs, found, strict=True))
        return found

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        found = self.module.backward(*arguments)
        self.out |= dict(zip(self.gradients, found, strict=True))
        return found


def check(
    module: ModuleType, case: Case, inputs: Mapping[str, Tensor], schedules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Everything within its limit; returns outputs and gradients by name."""
    shape = (len(case.lengths), case.heads * case.spec.group_size, sum(case.lengths))
    recorded = Recorded(module, case.spec)
    rows = compare(recorded, SSEOracle(case.spec), inputs, shape, schedules=schedules)  # type: ignore[arg-type]
    Report(case.name, tuple(rows)).raise_if_wrong()
    return recorded.out


def verify(case: Case, dtype: torch.dtype, device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN around every row and in every array that a kernel is to fill."""
    module = generate(case.spec, folder).module
    fill_empty_with_nan(module, monkeypatch)
    inputs = inputs_of(case, dtype, device)
    check(module, case, inputs, schedules_of(module, case, inputs["v"]))


@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL))
def test_the_interpreter_agrees_with_the_oracle(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(case, dtype, device, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), pairs(SWEEP))
def test_the_interpreter_agrees_with_the_oracle_on_more(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(case, dtype, device, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), pairs((*GPU, *SCHEDULED)))
def test_the_gpu_agrees_with_the_oracle_and_with_itself(
    case: Case, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also two runs of the default Schedules give the same bits."""
    verify(case, dtype, device, tmp_path, monkeypatch)
    if not case.schedule:
        recorded = Recorded(generate(case.spec, tmp_path).module, case.spec)
        assert torch_equal(*(run(recorded, inputs_of(case, dtype, device)) for _ in range(2)))


@pytest.mark.parametrize(
    ("backbone", "form", "columns"),
    [
        ("scalar", "sorted", 32),
        ("scalar", "routed", 16),
        pytest.param("vector", "sorted", 32, marks=pytest.mark.slow),
        ("delta", "sorted", 32),
    ],
)
def test_slices_of_columns(
    backbone: str, form: Any, columns: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state too large for one program takes several; a gradient takes its columns one after another."""
    for module in (sequence_partition, sequence_schedule):
        monkeypatch.setattr(module, "STATE_TILE", 16 * 32)
    axes = {"form": form, "value_dim": 60, "router": Router(2), "group_size": 1, "shared": backbone == "delta"}
    case = small("slices", backbone=backbone, **axes)
    module = generate(case.spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    inputs = inputs_of(case, FP32, device)
    assert module.schedules_for(inputs["v"])["gradient2"]["BLOCK_E"] == columns
    check(module, case, inputs, {})


# -- where tokens go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "backbone", "writers"),
    [("one", "scalar", 1), ("never", "vector", 1), ("tie", "scalar", 2), ("one", "none", 2)],
)
def test_where_tokens_go(
    where: str, backbone: str, writers: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All to one partition, all logits equal, and a partition that nobody chooses: its state passes bit for bit."""
    case = small("routing", backbone=backbone, router=Router(4, writers), group_size=1)
    module = generate(case.spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    given = inputs_of(case, FP32, device)
    logits = given["logits"]
    if where == "one":
        logits[:, 2] += 60
    elif where == "tie":
        logits.fill_(0.25)
    else:
        logits[:, 1] -= 60
    out = check(module, case, given, {})
    idle = {"one": [1, 2, 4] if writers == 1 else [], "tie": [3, 4], "never": [2]}[where]
    busy = {"one": [0, 3], "tie": [0, 1, 2], "never": [0, 1, 3, 4]}[where]
    for after, before in (("final", "state"), ("dstate", "dfinal")):
        assert torch.equal(out[after][:, idle], given[before][:, idle])
        assert torch.equal(out[after][0], given[before][0]), "a sequence of no token"
        assert not (out[after][3, busy] == given[before][3, busy]).flatten(1).all(1).any()


TWICE = {c.name: c for c in SMALL}


@pytest.mark.parametrize("name", ["vector", "constant per-head router", "scalar masked"])
def test_two_runs_give_the_same_bits(name: str, device: torch.device, tmp_path: Path) -> None:
    case = replace(TWICE[name], lengths=(1, 20))
    recorded = Recorded(generate(case.spec, tmp_path).module, case.spec)
    assert torch_equal(*(run(recorded, inputs_of(case, FP32, device)) for _ in range(2)))


def run(recorded: Recorded, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    schedules = recorded.schedules_for(given["v"])
    names = [n.removeprefix("d") for n in recorded.gradients]
    arguments = [given[n] for n in (*names, "cu_seqlens")]
    recorded.forward(schedules, *arguments)
    recorded.backward(schedules, *arguments, *(given[f"d{n}"] for n in recorded.outputs))
    return dict(recorded.out)


def torch_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, second[n]) for n, x in first.items())


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_token_at_all(
    lengths: tuple[int, ...], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states pass, and the balance loss of nothing is 0."""
    spec = SSESpec(head_dim=16, router=Router(2))
    module = generate(spec, tmp_path).module
    fill_empty_with_nan(module, monkeypatch)
    given, truth = packed(spec, lengths, dtype=FP32, device=device), SSEOracle(spec)
    out = run(Recorded(module, spec), given)
    want = truth.values(given) | {f"d{n}": x for n, x in truth.gradients(given).items()}
    for n, x in out.items():
        assert torch.equal(x.double(), want[n]), n


@pytest.mark.parametrize(("head_dim", "most"), [(72, 8), (136, 4)])
def test_states_that_one_program_cannot_carry_are_refused(head_dim: int, most: int, tmp_path: Path) -> None:
    spec = SSESpec(head_dim=head_dim, backbone="scalar", router=Router(most), form="routed")
    generate(spec, tmp_path / "most")
    what = f'form "routed" carries all states together: {most + 1} of {head_dim} key features'
    for readers, other in ((1, "sorted"), (2, "masked")):
        with pytest.raises(PartitionError, match=what) as caught:
            generate(replace(spec, router=Router(most + 1, 1, readers)), tmp_path / other)
        assert caught.value.hint == f'take form "{other}", whose results are the same, or at most {most} partitions'
        assert not (tmp_path / other).exists()


def test_every_axis_has_a_case() -> None:
    for cases in (SMALL, GPU):
        specs = [c.spec for c in cases]
        routers = [s.router for s in specs if s.router]
        assert {s.backbone for s in specs} == {"none", "constant", "scalar", "vector", "delta"}
        assert {s.gate_site for s in specs} == {None, "pre_norm", "post_norm"}
        assert {s.shared for s in specs} == {True, False}
        assert {s.group_size for s in specs} == {1, 2}
        assert any(s.router is None for s in specs)
        assert {r.partitions for r in routers} >= {1, 2, 3, 16}
        assert {r.writers for r in routers} == {1, 2}
        assert {r.scope for r in routers} == {"token", "head"}
        for form in ("masked", "routed"):
            assert any(s.router and s.router.readers != s.router.writers and s.form == form for s in specs)
        assert {0.3, 5.0} <= {c.decay for c in cases}
        assert {FP32, FP16} <= {t for c in cases for t in c.dtypes}
    every = [c.spec for c in (*SMALL, *SWEEP)]
    assert {s.router.gate for s in every if s.router} == {"both", "write", "read", "none"}
    assert {s.router.normalise for s in every if s.router} == {"all", "selected"}
    assert {s.form for s in every} == {"sorted", "masked", "routed"}
    assert {s.backbone for s in every if s.form == "routed"} == {"none", "constant", "scalar"}
