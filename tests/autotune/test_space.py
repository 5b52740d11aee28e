"""Laws of spaces, over the kernels of several specs, devices and dtypes."""

import itertools
import random
from pathlib import Path

import pytest

from splagen import pipeline
from splagen.autotune.device import DEVICES, Device
from splagen.autotune.entry import Entry, now
from splagen.autotune.footprint import shared_floor
from splagen.autotune.space import UNLIMITED, Dimension, Space, common_values, spaces
from splagen.codegen.decoding import decoding
from splagen.codegen.geometry import Geometry
from splagen.codegen.partition import Partition
from splagen.codegen.schedule import Agreement, Divides, check_constraints, check_schedule
from splagen.codegen.sequence_partition import Host, SequencePartition
from splagen.codegen.sequence_schedule import check_schedule as check_sequence_schedule
from splagen.errors import ScheduleError
from splagen.spec import Residual, Select, Spec, SPLASpec, read_spec, windows
from splagen.sse_spec import Router, SSESpec

ROOT = Path(__file__).parents[2]
SPECS: dict[str, Spec] = {p.stem: read_spec(p) for p in sorted((ROOT / "examples/specs").glob("*.toml"))}
SPECS |= {
    "windows": SPLASpec(head_dim=64, group_size=5, select=Select(block_size=128, statistics=windows())),
    "wide": SPLASpec(head_dim=256, value_dim=128, group_size=1, select=Select(block_size=16), linear=Residual()),
    "scalar": SSESpec(backbone="scalar", value_dim=256, router=Router(4, 2), group_size=2),
    "plain": SSESpec(head_dim=48, backbone="none", router=None),
    "masked": SSESpec(head_dim=64, backbone="constant", router=Router(4, 1, 2), form="masked"),
}
H200, A100, MI300 = DEVICES["NVIDIA H200"], DEVICES["NVIDIA A100-SXM4-80GB"], DEVICES["AMD Instinct MI300X"]
PLACES = [(A100, "fp16"), (MI300, "bf16"), (H200, "fp32")]


def cases() -> list[object]:
    """Every spec on an H200 and in one other place."""
    return [
        pytest.param(spec, device, dtype, id=f"{name}-{device.arch}-{dtype}")
        for i, (name, spec) in enumerate(SPECS.items())
        for device, dtype in [(H200, "bf16"), PLACES[i % len(PLACES)]]
    ]


def identities(schedules: object) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(s.items()) for s in schedules}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spec", "device", "dtype"), cases())
def test_laws(spec: Spec, device: Device, dtype: str) -> None:
    part = pipeline.kernels(spec)
    made = spaces(spec, part, device, dtype)
    assert list(made) == [k.name for k in (*part.kernels, *part.strategies)]
    assert {k: s.dimensions for k, s in made.items()} == {
        k: s.dimensions for k, s in spaces(spec, part, device, dtype).items()
    }
    check_constraints(part.constraints, {k: s.default for k, s in made.items()})
    rng = random.Random(0)
    for kernel in part.kernels:
        space = made[kernel.name]
        points = list(space.all())
        known = identities(points)
        assert len(known) == len(points) <= space.size
        assert frozenset(space.default.items()) in known
        assert all(d.legal(d.default) for d in space.dimensions)
        assert points[:50] == list(itertools.islice(space.all(), 50))
        for here in [space.default, *rng.sample(points, min(len(points), 5))]:
            assert space.legal(here)
            if isinstance(part, Partition):
                check_schedule(kernel, Geometry.of(part.program), here)
            else:
                assert isinstance(spec, SSESpec)
                check_sequence_schedule(kernel, spec, here)
            for move in (space.neighbours, space.trades):
                near = move(here)
                assert frozenset(here.items()) not in identities(near)
                assert identities(near) <= known
                assert all(frozenset(here.items()) in identities(move(n)) for n in rng.sample(near, min(len(near), 3)))


@pytest.mark.parametrize(("spec", "device", "dtype"), cases())
def test_defaults_are_those_of_the_generated_module(spec: Spec, device: Device, dtype: str) -> None:
    source = pipeline.source(spec)
    table = source[source.index("SCHEDULES = {") :]
    scope: dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]] = {}
    exec(table[: table.index("\n}") + 2], scope)  # type: ignore[arg-type]
    part = pipeline.kernels(spec)
    beside = {k.name for k in part.all_kernels} - {k.name for k in part.kernels}
    tuned = {k: s for k, s in scope["SCHEDULES"][device.arch][dtype].items() if k not in beside}
    assert {k: s.default for k, s in spaces(spec, part, device, dtype).items()} == tuned


def test_whatever_a_search_finds_can_be_stored() -> None:
    steps = [s for s in SPECS.values() if isinstance(s, SPLASpec) and s.select and s.select.tile == 1]
    made = [*((s, pipeline.kernels(s)) for s in SPECS.values()), *((s, decoding(s)) for s in steps)]
    found = [space for spec, part in made for space in spaces(spec, part, H200, "bf16").values()]
    for number in {(d.name, value) for space in found for d in space.dimensions for value in d.values}:
        if number != ("maxnreg", UNLIMITED):
            Entry(dict([number]), 1.0, 0.0, "quick", now())


def test_what_cannot_run_is_ruled_out() -> None:
    part = pipeline.kernels(SPECS["spla"])
    made = spaces(SPECS["spla"], part, H200, "bf16")
    read = made["read_rest_kv_all"]
    with pytest.raises(ScheduleError, match="bytes of shared memory"):
        read.check({**read.default, "BLOCK_M": 128, "num_stages": 5, "num_warps": 8})
    dkv = made["block_sparse_dkv"]
    with pytest.raises(ScheduleError, match="carries more than its 64 registers"):
        dkv.check({**dkv.default, "maxnreg": 64})
    with pytest.raises(ScheduleError, match="is none of"):
        dkv.check({**dkv.default, "BLOCK_M": 4096})
    with pytest.raises(ScheduleError, match="takes"):
        dkv.check({**dkv.default, "BLOCK_E": 16})
    with pytest.raises(ScheduleError, match="num_warps=16 of block_sparse_dkv is none of"):
        dkv.check({**dkv.default, "num_warps": 16})
    assert "maxnreg" not in {d.name for d in spaces(SPECS["spla"], part, MI300, "bf16")["block_sparse_dkv"].dimensions}
    attend = spaces(SPECS["spla"], decoding(SPECS["spla"]), H200, "bf16")["attend"]  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="num_stages=1 of attend is none of"):
        attend.check({**attend.default, "num_stages": 1})


@pytest.mark.parametrize(
    ("kernel", "schedule", "shared"),
    [
        ("block_sparse_forward", {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}, 29_188),
        ("block_sparse_dq", {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4}, 118_784),
        ("block_sparse_dkv", {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4}, 106_816),
        ("states_dphi_k_all_states", {"BLOCK_M": 32, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3}, 61_440),
        ("states_rest_kv_all_states", {"BLOCK_M": 128, "BLOCK_E": 128, "num_warps": 8, "num_stages": 3}, 98_304),
        ("read_dv_all", {"BLOCK_M": 64, "BLOCK_E": 16, "num_warps": 8, "num_stages": 4}, 147_456),
        ("read_rest_kv_all", {"BLOCK_R": 1024, "BLOCK_M": 64, "BLOCK_E": 64, "num_warps": 4, "num_stages": 4}, 212_992),
        ("score_lse", {"BLOCK_M": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}, 163_840),
        ("score_topk", {"BLOCK_M": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 4}, 98_816),
    ],
)  # fmt: skip
def test_the_floor_is_below_what_compiled_kernels_took(kernel: str, schedule: dict[str, int], shared: int) -> None:
    """Shared memory of kernels of examples/specs/spla.toml compiled for sm_90, bf16, by triton 3.6."""
    found = next(k for k in pipeline.kernels(SPECS["spla"]).kernels if k.name == kernel)
    assert 0 <= shared_floor(found, schedule, "bf16") <= shared


# -- what kernels agree on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.kind == "sse"])
def test_constraints_are_what_the_generated_backward_checks(name: str) -> None:
    part = pipeline.kernels(SPECS[name])
    assert isinstance(part, SequencePartition)
    lines = [line for s in (*part.forward, *part.backward) if isinstance(s, Host) for line in s.lines]
    checks = {line for line in lines if line.startswith(("one_chunk(", "no_longer_chunk("))}
    printed = set()
    for c in part.constraints:
        check, names = ("one_chunk", c.kernels)
        if isinstance(c, Divides):
            check, names = ("no_longer_chunk", (c.measured, *c.kernels))
        printed.add(f"{check}(schedules, " + ", ".join(f'"{k}"' for k in names) + ")")
    assert printed == checks
    for agreement in (
        c for c in part.constraints if isinstance(c, Agreement)
    ):  # whoever reads or writes states of chunks
        stem = agreement.kernels[0].removeprefix("states")
        users = {k.name for k in part.kernels for a in (*k.inputs, *k.outputs) if a.layout == "chunk_states"}
        assert {u for u in users if u.endswith(stem)} == set(agreement.kernels)


def test_kernels_that_share_chunks_have_common_values_and_parts_of_their_spaces() -> None:
    spec = SPECS["sse_gla"]
    part = pipeline.kernels(spec)
    made = spaces(spec, part, H200, "bf16")
    first, _ = (c for c in part.constraints if isinstance(c, Agreement))
    assert common_values(made, first) == (32, 16, 64, 128)
    for value in common_values(made, first):
        for kernel in first.kernels:
            fixed = made[kernel].fixed("CHUNK", value)
            assert fixed.default["CHUNK"] == value
            assert fixed.legal(fixed.default)
            assert identities(fixed.all()) == identities(s for s in made[kernel].all() if s["CHUNK"] == value)
    chosen = {k: s.default for k, s in made.items()}
    with pytest.raises(ScheduleError, match="need one CHUNK"):
        check_constraints(part.constraints, {**chosen, "states1": {**chosen["states1"], "CHUNK": 64}})
    for c in part.constraints:
        if isinstance(c, Divides):
            longer = {k: {**chosen[k], "CHUNK": 128} for k in c.kernels}
            with pytest.raises(ScheduleError, match=f"of {c.measured} is no multiple"):
                check_constraints([c], {**chosen, **longer})
            fitting = made[c.measured].within("CHUNK", lambda x: x % 128 == 0)
            check_constraints([c], {**chosen, **longer, c.measured: fitting.default})
    with pytest.raises(ScheduleError, match="no Schedule with such a CHUNK"):
        made["states1"].fixed("CHUNK", 48)


def test_attention_kernels_agree_on_nothing() -> None:
    assert pipeline.kernels(SPECS["spla"]).constraints == ()


def test_a_part_whose_default_is_illegal_starts_from_the_nearest_legal_schedule() -> None:
    def rule(schedule: object) -> None:
        if schedule["x"] * schedule["y"] > 32:  # type: ignore[index]
            raise ScheduleError("too large")

    space = Space("k", (Dimension("x", 2, (1, 2, 4, 8)), Dimension("y", 16, (4, 8, 16))), rule)
    assert space.fixed("x", 4).default == {"x": 4, "y": 8}
    assert space.fixed("x", 8).default == {"x": 8, "y": 4}
    assert [s["y"] for s in space.fixed("x", 1).all()] == [4, 8, 16]
