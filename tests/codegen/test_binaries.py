"""A build runs without a compiler, wherever it lies; whatever does not fit is one warning, and Triton compiles."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splagen import pipeline
from splagen.codegen.binaries import Build, module_text, write_build
from splagen.codegen.binary_loader import MachineCode
from splagen.codegen.compile import Kept, keep_module, raise_if_failed
from splagen.codegen.index_kernels import index_kernels
from splagen.codegen.partition import Partition
from splagen.codegen.unions import visits_union
from splagen.errors import GeneratedFileError
from splagen.kinds import kind_of, oracle
from splagen.library import taylor
from splagen.paged_cache import SPLACache
from splagen.spec import Select, Spec, SPLASpec, to_toml
from splagen.sse_spec import Router, SSESpec
from splagen.verification import TOLERANCE
from tests.kernels.decoding import errors, inputs

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = Path(__file__).with_name("absent_gpu.py")
DENSE = SPLASpec(head_dim=16, select=None, linear=None, name="dense")
SPECS: dict[str, Spec] = {
    "spla": SPLASpec(
        head_dim=16, group_size=2, select=Select(block_size=16, budget=2, metric=taylor(covariance="diag"))
    ),
    "sse": SSESpec(head_dim=16, group_size=2, backbone="scalar", router=Router(partitions=3, writers=2)),
    "sse_by_head": SSESpec(
        head_dim=16, backbone="delta", shared=False, router=Router(partitions=2, writers=1, scope="head")
    ),
}


def machine_code(spec: Spec, folder: Path) -> tuple[Path, list[Kept]]:
    """A generated module, and what is kept of its kernels."""
    source = pipeline.generate(spec, folder).path
    rows, kept = keep_module(source, pipeline.kernels(spec), targets=["sm_90"], progress=False)
    raise_if_failed(rows)
    return source, kept


def built(spec: Spec, folder: Path, out: Path) -> Build:
    return write_build(*machine_code(spec, folder), out, dtypes=["bf16"])


def launch(path: Path, cache: Path, *heads: int, gpu: int = 90) -> dict[str, Any]:
    """Launch every kernel of a module in a process of its own, which has this cache of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, str(LAUNCH), str(path), str(gpu), "sm_90", "bf16", *map(str, heads or (1,))],
        capture_output=True, text=True, timeout=250, env=environment, cwd=path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kept]]:
    return machine_code(DENSE, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def dense(compiled: tuple[Path, list[Kept]], tmp_path_factory: pytest.TempPathFactory) -> Build:
    return write_build(*compiled, tmp_path_factory.mktemp("dense"), dtypes=["bf16"])


@pytest.fixture(scope="module")
def cache(dense: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache after a run of the build: it has the launchers, which cannot be linked without a GPU's library."""
    folder = tmp_path_factory.mktemp("triton")
    launch(dense.path, folder)
    return folder


@pytest.fixture
def copied(dense: Build, tmp_path: Path) -> Build:
    """The build in another place, to be spoilt."""
    shutil.copytree(dense.path.parent, tmp_path / "copied")
    path = tmp_path / "copied" / dense.path.name
    return Build(path, MachineCode(path).folder, dense.specialisations, dense.size, dense.notes)


def manifest_of(build: Build) -> dict[str, Any]:
    return dict(json.loads((build.folder / "manifest.json").read_text()))


def rewrite(build: Build, **fields: Any) -> None:
    """The build as another machine would have written it: the module knows the digest of the new manifest."""
    path = build.folder / "manifest.json"
    old, new = path.read_bytes(), json.dumps(manifest_of(build) | fields).encode()
    path.write_bytes(new)
    digests = [hashlib.sha256(data).hexdigest() for data in (old, new)]
    build.path.write_text(build.path.read_text().replace(*digests))


def names(spec: Spec) -> list[str]:
    """Kernels that the default Schedules launch: by row or by key, never by union."""
    part = pipeline.kernels(spec)
    chosen = [k for k in part.kernels if not visits_union(k)]
    index = index_kernels(part.program, part.kernels) if isinstance(part, Partition) else ()
    return [f"{k.name}_kernel" for k in (*chosen, *index)]


# -- a build that fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spla", "sse", pytest.param("sse_by_head", marks=pytest.mark.slow)])
def test_no_kernel_is_compiled_at_its_first_launch(name: str, tmp_path: Path) -> None:
    """In another folder than the build was written to, with an empty cache, for heads of every divisibility."""
    build = built(SPECS[name], tmp_path, tmp_path / "out")
    moved = shutil.move(build.path.parent, tmp_path / "moved")
    found = launch(Path(moved) / build.path.name, tmp_path / "triton", 1, 2, 3, 16)
    assert set(found["launched"]) == set(names(SPECS[name]))
    assert found["compiled"] == []
    assert set(found["started"]) <= {"file"}  # by which Python's `platform` finds how wide a pointer is
    assert found["warnings"] == []
    assert build.specialisations > len(names(SPECS[name]))


@pytest.mark.parametrize("page_type", ["input", pytest.param("e4m3", marks=pytest.mark.slow)])
def test_no_kernel_of_a_decoding_step_is_compiled_at_its_first_launch(page_type: str, tmp_path: Path) -> None:
    """16 divides the rows of two heads of 24 columns, not those of one: strides of queries and of keys differ."""
    spec = SPLASpec(head_dim=24, group_size=2, select=Select(block_size=16, budget=2, metric=taylor(covariance="diag")))
    library = pipeline.generate_decoding(spec, tmp_path, page_type=page_type)
    source, part = library.path, pipeline.decode_kernels(spec, page_type)
    rows, kept = keep_module(source, part, targets=["sm_90"], progress=False)
    raise_if_failed(rows)
    build = write_build(source, kept, tmp_path / "out", dtypes=["bf16"])
    found = launch(build.path, tmp_path / "triton", 1, 2)
    assert set(found["launched"]) == {f"{k.name}_kernel" for k in part.kernels}
    assert found["compiled"] == []
    assert found["warnings"] == []


def test_no_kernel_of_a_strategy_that_schedules_choose_is_compiled_at_its_first_launch(tmp_path: Path) -> None:
    spec = SPECS["spla"]
    source = pipeline.generate(spec, tmp_path).path
    source.write_text(re.sub(r'_strategy": {"strategy": \d}', '_strategy": {"strategy": 2}', source.read_text()))
    rows, kept = keep_module(source, pipeline.kernels(spec), targets=["sm_90"], progress=False)
    raise_if_failed(rows)
    build = write_build(source, kept, tmp_path / "out", dtypes=["bf16"])
    found = launch(build.path, tmp_path / "triton", 1, 2, 3, 16)
    assert {f"{k.name}_kernel" for k in pipeline.kernels(spec).kernels if visits_union(k)} <= set(found["launched"])
    assert found["compiled"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["spla", "sse"])
def test_on_the_gpu_a_build_is_right_without_a_compiler(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.compiler

    spec = SPECS[name]
    path = built(spec, tmp_path, tmp_path / "out").path
    monkeypatch.setattr(triton.compiler, "compile", lambda source, *_, **__: pytest.fail(f"{source.name} is compiled"))
    truth = oracle(to_toml(spec))
    options: dict[str, Any] = {"shapes": [(1, 4, 203)], "dtypes": [torch.bfloat16], "device": "cuda"}
    kind_of(spec).verify(pipeline.Library(spec, path).module, truth, **options).raise_if_wrong()


@pytest.mark.gpu
def test_on_the_gpu_a_build_of_decoding_is_right_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    import triton.compiler

    spec = SPLASpec(head_dim=64, group_size=2, select=Select(block_size=32, budget=3, metric=taylor(covariance="diag")))
    source = pipeline.generate_decoding(spec, tmp_path).path
    rows, kept = keep_module(source, pipeline.decode_kernels(spec), targets=["sm_90"], progress=False)
    raise_if_failed(rows)
    path = write_build(source, kept, tmp_path / "out", dtypes=["bf16"]).path
    monkeypatch.setattr(triton.compiler, "compile", lambda source, *_, **__: pytest.fail(f"{source.name} is compiled"))
    library = pipeline.DecodingLibrary(spec, path)
    cache = SPLACache(library, sequences=2, kv_heads=2, tokens=512, dtype=torch.bfloat16, device=device)
    cache.allocate(512), cache.allocate(512)
    given = inputs(spec, 2, 300, 2, torch.bfloat16, device)
    assert errors(spec, cache, given, range(1, 301), every=43) < TOLERANCE[torch.bfloat16][0]


def test_without_a_build_each_kernel_is_compiled(dense: Build, cache: Path, tmp_path: Path) -> None:
    plain = pipeline.generate(DENSE, tmp_path).path
    found = launch(plain, cache)
    assert set(found["compiled"]) == set(names(DENSE))
    assert found["warnings"] == []


def test_the_manifest_names_every_file_and_every_file_is_sound(dense: Build) -> None:
    import triton

    digest = hashlib.sha256((dense.folder / "manifest.json").read_bytes()).hexdigest()
    kept = MachineCode(dense.path, digest)
    kept.manifest = kept.read_manifest(triton.__version__)
    assert kept.manifest == manifest_of(dense)
    assert kept.manifest["targets"] == ["cuda 90"]
    assert kept.manifest["dtypes"] == ["bf16"]
    assert set(kept.manifest["kernels"]) == set(names(DENSE))
    assert sum(map(len, kept.manifest["kernels"].values())) == dense.specialisations
    assert {p.name for p in dense.folder.iterdir()} == {*kept.manifest["files"], "manifest.json"}
    assert sum(len(kept.read(name)) for name in kept.manifest["files"]) == dense.size


def test_a_build_replaces_an_earlier_one(copied: Build, tmp_path: Path) -> None:
    stale, foreign = copied.folder / f"{'0' * 64}.cubin", copied.folder / "notes.txt"
    stale.write_text("")
    foreign.write_text("")
    before = manifest_of(copied)
    again = built(DENSE, tmp_path, copied.path.parent)
    assert again.folder == copied.folder
    assert manifest_of(again) == before
    assert not stale.exists()
    assert foreign.exists()


def test_the_module_is_the_generated_one_with_a_loader_behind_it(dense: Build) -> None:
    assert dense.path.read_text() == module_text(pipeline.source(DENSE), (dense.folder / "manifest.json").read_text())
    assert dense.path.read_text().startswith(pipeline.source(DENSE))
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run([ruff, "check", "--isolated", str(dense.path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.filterwarnings("error")
def test_interpreted_kernels_take_no_notice_of_a_build(copied: Build) -> None:
    (copied.folder / "manifest.json").unlink()
    assert pipeline.Library(DENSE, copied.path).op is not None


# -- a build that does not -------------------------------------------------------------------------------


def spoil_binary(build: Build) -> None:
    next(build.folder.glob("*.cubin")).write_bytes(b"\x00" * 16)


def flip_bits(build: Build) -> None:
    path = next(build.folder.glob("*.cubin"))
    path.write_bytes(bytes(255 - x for x in path.read_bytes()))


def lose_metadata(build: Build) -> None:
    for path in build.folder.glob("*.json"):
        if path.name != "manifest.json":
            path.unlink()


def truncate_manifest(build: Build) -> None:
    path = build.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])


def lose_the_folder(build: Build) -> None:
    shutil.rmtree(build.folder)


def edit_the_module(build: Build) -> None:
    text = build.path.read_text()
    assert "# [BLOCK_M]" in text
    build.path.write_text(text.replace("# [BLOCK_M]", "# edited"))  # a kernel's comment: its lines stay


SPOILT: dict[str, tuple[Callable[[Build], None], str]] = {
    "a short file": (spoil_binary, "has another size"),
    "other bytes": (flip_bits, "is damaged"),
    "no metadata": (lose_metadata, "No such file"),
    "half a manifest": (truncate_manifest, "manifest.json is damaged, or of another build"),
    "no folder": (lose_the_folder, "No such file"),
    "another module": (edit_the_module, "built from another text of dense"),
    "another Triton": (lambda b: rewrite(b, triton="1.2.3"), "built by triton 1.2.3, and this is triton"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_does_not_fit_is_refused_with_the_reason(case: str, copied: Build) -> None:
    import triton

    spoil, reason = SPOILT[case]
    spoil(copied)
    (digest,) = re.findall('"([0-9a-f]{64})"', copied.path.read_text().partition(MachineCode.BEHIND)[2])
    kept = MachineCode(copied.path, digest)

    def read_all() -> None:
        kept.manifest = kept.read_manifest(triton.__version__)
        for name in kept.manifest["files"]:
            kept.read(name)

    with pytest.raises((OSError, ValueError), match=reason):
        read_all()


# one found at import, and one at a launch
OFTEN = ("no folder", "other bytes")


@pytest.mark.parametrize("case", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in SPOILT])
def test_what_does_not_fit_is_one_warning_and_is_compiled(case: str, copied: Build, cache: Path) -> None:
    spoil, reason = SPOILT[case]
    spoil(copied)
    found = launch(copied.path, cache, 1, 2)
    (warning,) = found["warnings"]
    assert reason in warning
    assert "Triton compiles kernels when they are first launched" in warning
    assert found["compiled"]
    assert set(found["launched"]) == set(names(DENSE))


def test_another_gpu_is_one_warning(dense: Build, cache: Path) -> None:
    found = launch(dense.path, cache, gpu=80)
    (warning,) = found["warnings"]
    assert "built for cuda 90, and this GPU is cuda 80" in warning
    assert set(found["compiled"]) == set(names(DENSE))


def test_another_python_loses_the_launchers_only(copied: Build, cache: Path) -> None:
    rewrite(copied, python=".cpython-27.so")
    found = launch(copied.path, cache)
    assert found["compiled"] == []
    assert [w for w in found["warnings"] if "built by Python with .cpython-27.so" not in w] == []
    assert len(found["warnings"]) == bool(manifest_of(copied)["extensions"])


DAMAGE: dict[str, Callable[[str], str]] = {
    "not a table": lambda text: f"[{text}]",
    "another file": lambda text: text.replace(".cubin", ".hsaco", 1),
    "one space more": lambda text: text + " ",
    "deep": lambda _: "[" * 100_000,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_changed_manifest_is_refused(case: str, copied: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module knows its digest: whatever stands in another one is not even parsed."""
    import triton

    path = copied.folder / "manifest.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(DAMAGE[case](path.read_text()))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    namespace: dict[str, Any] = {}
    with pytest.warns(RuntimeWarning, match="of another build") as caught:
        MachineCode(copied.path, digest).attach(namespace)
    assert len(caught) == 1
    assert namespace == {}


# -- writing ---------------------------------------------------------------------------------------------


def test_a_foreign_file_in_the_way_is_kept(compiled: tuple[Path, list[Kept]], tmp_path: Path) -> None:
    source, kept = compiled
    path = tmp_path / "out" / source.name
    path.parent.mkdir()
    path.write_text("mine\n")
    with pytest.raises(GeneratedFileError, match="not overwritten"):
        write_build(source, kept, path.parent, dtypes=["bf16"])
    assert path.read_text() == "mine\n"
    path.unlink()
    MachineCode(path).folder.rmdir()
    MachineCode(path).folder.write_text("mine too\n")
    with pytest.raises(GeneratedFileError, match="cannot write"):
        write_build(source, kept, path.parent, dtypes=["bf16"])
