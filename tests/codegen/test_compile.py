"""Kernels compile for every target, without a GPU and although this process interprets kernels."""

from pathlib import Path
from typing import Any

import pytest

from splagen import pipeline
from splagen.codegen import compile as ahead_of_time
from splagen.codegen.compile import Built, Compiler, compile_module, launched, raise_if_failed
from splagen.codegen.compile_worker import register_a_wgmmas, resources
from splagen.codegen.decoding import decoding
from splagen.codegen.geometry import Geometry
from splagen.codegen.schedule import DTYPES, TARGETS, default_schedule
from splagen.codegen.unions import visits_union
from splagen.errors import CompileError, InputError
from splagen.spec import Select, Spec, SPLASpec, digest, read_spec
from splagen.sse_spec import Router, SSESpec

ROOT = Path(__file__).resolve().parent.parent.parent
SPECS = sorted((ROOT / "examples/specs").glob("*.toml"))
SMALL = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=2))
UNIONS = [k for k in pipeline.kernels(SMALL).kernels if visits_union(k)]
GEOMETRY = Geometry.of(pipeline.kernels(SMALL).program)
ROUTED = SSESpec(head_dim=16, group_size=2, backbone="scalar", shared=False, router=Router(partitions=3, writers=2))
DENSE = SPLASpec(head_dim=16, select=None, linear=None)


def compiled(spec: Spec, folder: Path, **given: Any) -> list[Built]:
    return compile_module(pipeline.generate(spec, folder).path, pipeline.kernels(spec), progress=False, **given)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Built]:
    return compiled(SMALL, tmp_path_factory.mktemp("kernels"))


def test_every_kernel_of_a_small_spec_compiles_for_every_target(rows: list[Built]) -> None:
    raise_if_failed(rows)
    names = [k.name for k in pipeline.kernels(SMALL).all_kernels if not visits_union(k)]
    index = ("index_tally", "index_starts", "index", "index_entries")
    expected = [(arch, name) for arch in TARGETS for name in names] + [(arch, x) for x in index for arch in TARGETS]
    assert [(r.arch, r.kernel) for r in rows] == expected


def test_kernels_of_a_decoding_step_compile_for_every_target(tmp_path: Path) -> None:
    """Triton before 3.7.1 may miscompile products with A in registers on Hopper: attend alone has some.

    It forms features of keys there; tests on a GPU compare it with the oracle at these sizes (`GPU` in
    tests/kernels/test_decoding.py).
    """
    spec = SPLASpec(head_dim=128, group_size=4, select=Select(budget=61))
    found = compile_module(pipeline.generate_decoding(spec, tmp_path).path, decoding(spec), progress=False)
    raise_if_failed(found)
    assert len(found) == 4 * len(TARGETS)
    spilled = {r.kernel: r.spilled for r in found if r.arch == "sm_90" and r.spilled}
    few = {"attend": 96, "score": 32}  # two numbers a visit, the others outside of loops; where a cell completes
    assert all(n < few.get(kernel, 0) for kernel, n in spilled.items()), spilled
    assert {r.kernel for r in found if r.register_a} == {"attend"}


@pytest.mark.parametrize("targets", [("sm_90",), pytest.param(("sm_100", "gfx942"), marks=pytest.mark.slow)], ids=str)
def test_kernels_of_a_step_on_8_bit_pages_compile_where_there_is_e4m3(targets: list[str], tmp_path: Path) -> None:
    spec = SPLASpec(head_dim=128, group_size=4, select=Select(budget=3))
    path, part = pipeline.generate_decoding(spec, tmp_path, page_type="e4m3").path, decoding(spec, "e4m3")
    found = compile_module(path, part, targets=targets, progress=False)
    raise_if_failed(found)
    assert all(r.spilled is not None and r.spilled < 64 for r in found)


def test_kernels_by_union_which_no_default_chooses_compile_for_every_target(tmp_path: Path) -> None:
    part, path = pipeline.kernels(SMALL), pipeline.generate(SMALL, tmp_path).path
    with Compiler(path, part) as compiler:
        wanted = [(k, arch, default_schedule(k, GEOMETRY, arch, "bf16")) for k in UNIONS for arch in TARGETS]
        raise_if_failed([f.result() for f in [compiler.submit(k, arch, "bf16", s) for k, arch, s in wanted]])


def test_the_rows_say_what_a_kernel_uses(rows: list[Built]) -> None:
    for r in rows:
        assert r.registers is not None
        assert 0 < r.registers <= 512
        assert r.shared is not None
        assert r.shared <= TARGETS[r.arch].shared_bytes
        assert r.spilled is not None
        assert r.spilled < 64
        assert r.seconds is not None
        assert (r.register_a is None) == (r.arch == "gfx942")
        assert r.schedule["num_warps"] in (1, 2, 4, 8)
    assert max(r.shared or 0 for r in rows) > 0


def test_the_kernels_of_a_recurrence_compile_with_the_schedules_of_their_module(tmp_path: Path) -> None:
    found = compiled(ROUTED, tmp_path, targets=["sm_90"])
    raise_if_failed(found)
    assert [r.kernel for r in found] == [k.name for k in pipeline.kernels(ROUTED).kernels]
    table = pipeline.generate(ROUTED, tmp_path).module.SCHEDULES["sm_90"]["bf16"]
    assert {r.kernel: r.schedule for r in found} == table
    assert all(r.registers and r.shared is not None and r.spilled is not None for r in found)


def test_pointers_are_those_that_the_launcher_of_a_recurrence_passes(tmp_path: Path) -> None:
    part = pipeline.kernels(ROUTED)
    table = pipeline.generate(ROUTED, tmp_path).module.SCHEDULES["sm_90"]["bf16"]
    types: dict[str, str] = {}
    for k in part.kernels:
        types |= ahead_of_time._request(tmp_path, part, k, "sm_90", "bf16", table[k.name])["types"]
    pointed = {n.removesuffix("_ptr"): t for n, t in types.items() if n.endswith("_ptr")}
    whole = {"offsets", "tokens", "places", "writes", "chosen", "slots"}
    assert {n for n, t in pointed.items() if t == "*i32"} == whole
    assert all(pointed[n] == "*bf16" for n in ("q2", "k2", "v", "do", "o", "dq2", "dv"))
    assert all(pointed[n] == "*fp32" for n in ("g2", "logits", "dlogits", "gates", "eta", "state", "final", "dbalance"))
    assert types["v_t"] == "i32"
    assert types["g2_h"] == "constexpr"
    assert types["logits_h"] == "constexpr"  # [T, partitions]
    assert pointed["table"] == "*fp32"


def test_strides_of_prefill_count_the_heads_of_queries_and_of_keys() -> None:
    """A head of 24 columns: 16 divides the row of all heads of queries, not that of the key heads."""
    spec = SPLASpec(head_dim=24, group_size=2, select=Select(block_size=16, budget=2))
    part = pipeline.prefill_kernels(spec)
    strides = {
        a.name: ahead_of_time._strides(a, part, kv_heads=1, length=64)
        for k in part.kernels
        for a in k.arrays
        if a.layout == "token_rows"
    }
    assert strides == {x: [48, 24] for x in ("q_tokens", "o_tokens")} | {x: [24, 24] for x in ("k_tokens", "v_tokens")}


def test_a_file_without_schedules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="no Schedules"):
        compile_module(tmp_path / "empty.py", pipeline.kernels(DENSE))


def test_every_module_level_kernel_is_compiled_or_reported(tmp_path: Path) -> None:
    path = pipeline.generate(DENSE, tmp_path).path
    part = pipeline.kernels(DENSE)
    part.backward.clear()
    found = compile_module(path, part, targets=["sm_90"], progress=False)
    assert [r.kernel for r in found if r.ok] == [k.name for k in part.kernels]
    assert {r.error for r in found if not r.ok} == {"not part of the partition: not compiled"}


def test_a_failure_is_a_row_with_the_reason(tmp_path: Path) -> None:
    path = pipeline.generate(DENSE, tmp_path).path
    text = path.read_text()
    broken = tmp_path / "broken.py"
    part = pipeline.kernels(DENSE)
    part.backward.clear()
    (name,) = (k.name for k in part.forward)
    start = text.index(f"def {name}_kernel(")
    end = text.index("\ndef ", start)
    broken.write_text(text[:start] + text[start:end].replace("tl.zeros", "tl.nothing", 1) + text[end:])
    row, *_ = compile_module(broken, part, targets=["sm_90"], progress=False)
    assert not row.ok
    assert "has no attribute 'nothing'" in (row.error or "")
    with pytest.raises(CompileError, match=rf"{name} for sm_90 in bf16"):
        raise_if_failed([row])


def test_a_worker_that_dies_is_a_row_too(tmp_path: Path) -> None:
    path = pipeline.generate(DENSE, tmp_path).path
    deadly = tmp_path / "deadly.py"
    deadly.write_text(f"import os\nprint('out of luck', flush=True)\nos._exit(7)\n{path.read_text()}")
    part = pipeline.kernels(DENSE)
    part.backward.clear()
    row, *_ = compile_module(deadly, part, targets=["sm_80"], progress=False)
    assert "ended with status 7" in (row.error or "")
    assert "out of luck" in (row.error or "")


def test_a_worker_that_takes_too_long_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "_SECONDS", 0.01)
    part = pipeline.kernels(DENSE)
    part.backward.clear()
    row, *_ = compile_module(pipeline.generate(DENSE, tmp_path).path, part, targets=["sm_80"], progress=False)
    assert row.error == "the compiler was stopped after 0.01 s: take smaller tiles or fewer stages"


def test_too_much_shared_memory_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "TARGETS", {"sm_90": TARGETS["sm_90"].__class__("sm_90", 1)})
    part = pipeline.kernels(DENSE)
    part.backward.clear()
    row, *_ = compile_module(pipeline.generate(DENSE, tmp_path).path, part, targets=["sm_90"], progress=False)
    assert "bytes of shared memory; sm_90 has 1" in (row.error or "")


@pytest.mark.parametrize("wrong", [{"targets": ["sm_70"]}, {"dtypes": ["fp8"]}])
def test_unknown_targets_and_dtypes_are_refused(wrong: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown"):
        compile_module(tmp_path / "none.py", pipeline.kernels(DENSE), **wrong)  # type: ignore[arg-type]


def test_register_operands_of_wgmma_are_counted() -> None:
    accumulator = "{%f1, %f2}"
    shared = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accumulator}, %rd1, %rd2, 1, 1, 1, 0, 0;"
    register = shared.replace("%rd1", "{%r1, %r2,\n\t.loc 1 2 3\n %r3, %r4}")
    assert register_a_wgmmas("") == 0
    assert register_a_wgmmas(shared) == 0
    assert register_a_wgmmas(f"{register}\n{shared}\n{register}") == 2


def test_amd_metadata_is_read() -> None:
    text = "    .private_segment_fixed_size: 24\n    .vgpr_count:     130\n    .vgpr_spill_count: 6\n"
    assert resources({"amdgcn": text}) == {"registers": 130, "spilled": 24, "register_a": None}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_the_examples_compile_for_every_target_and_dtype(path: Path, tmp_path: Path) -> None:
    spec = read_spec(path)
    found = compiled(spec, tmp_path, dtypes=tuple(DTYPES))
    raise_if_failed(found)
    assert {(r.arch, r.dtype) for r in found} == {(a, d) for a in TARGETS for d in DTYPES}
    assert digest(spec)[:8] in pipeline.generate(spec, tmp_path).path.stem


@pytest.mark.parametrize("strategy", [0, 1, 2])
def test_kernels_of_strategies_that_no_schedule_chooses_are_not_compiled(strategy: int) -> None:
    """By row always is: calls whose parts do not fit into memory run so."""
    part = pipeline.kernels(SMALL)
    names = {k.name for k in launched(part, {c.name: {"strategy": strategy} for c in part.strategies})}
    assert {"block_sparse_forward", "block_sparse_dq", "block_sparse_dkv", "statistics", "merge_segments"} <= names
    assert ({"block_sparse_parts", "block_sparse_merge", "linear_dqkv"} <= names) == (strategy == 1)
    assert ({k.name for k in UNIONS} <= names) == (strategy == 2)
