"""A build runs without a compiler, wherever it lies; whatever does not fit is one warning, and Triton compiles."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splagen import pipeline
from splagen.codegen.binaries import Build, module_text, write_build
from splagen.codegen.binary_loader import MachineCode
from splagen.codegen.compile import keep_module, raise_if_failed
from splagen.errors import GeneratedFileError
from splagen.spec import Select, Spec, SPLASpec
from splagen.sse_spec import Router, SSESpec

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = Path(__file__).with_name("absent_gpu.py")
DENSE = SPLASpec(head_dim=16, select=None, linear=None, name="dense")
SPECS: dict[str, Spec] = {
    "spla": SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=2)),
    "sse": SSESpec(head_dim=16, group_size=2, backbone="scalar", router=Router(partitions=3, writers=2)),
    "sse_by_head": SSESpec(
        head_dim=16, backbone="delta", shared=False, router=Router(partitions=2, writers=1, scope="head")
    ),
}


def built(spec: Spec, folder: Path, out: Path) -> Build:
    source = pipeline.generate(spec, folder).path
    rows, kept = keep_module(source, pipeline.kernels(spec), targets=["sm_90"], progress=False)
    raise_if_failed(rows)
    return write_build(source, kept, out, dtypes=["bf16"])


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
def dense(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("dense")
    return built(DENSE, folder, folder / "out")


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
    (build.folder / "manifest.json").write_text(json.dumps(manifest_of(build) | fields))


def names(spec: Spec) -> list[str]:
    return [f"{k.name}_kernel" for k in pipeline.kernels(spec).kernels]


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


def test_without_a_build_each_kernel_is_compiled(dense: Build, cache: Path, tmp_path: Path) -> None:
    plain = pipeline.generate(DENSE, tmp_path).path
    found = launch(plain, cache)
    assert set(found["compiled"]) == set(names(DENSE))
    assert found["warnings"] == []


def test_the_manifest_names_every_file_and_every_file_is_sound(dense: Build) -> None:
    import triton

    kept = MachineCode(dense.path)
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
    assert dense.path.read_text() == module_text(pipeline.source(DENSE))
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
    build.path.write_text(build.path.read_text() + "# edited\n")


SPOILT: dict[str, tuple[Callable[[Build], None], str]] = {
    "a short file": (spoil_binary, "has another size"),
    "other bytes": (flip_bits, "is damaged"),
    "no metadata": (lose_metadata, "No such file"),
    "half a manifest": (truncate_manifest, "manifest.json is damaged"),
    "no folder": (lose_the_folder, "No such file"),
    "another module": (edit_the_module, "built from another text of dense"),
    "another Triton": (lambda b: rewrite(b, triton="1.2.3"), "built by triton 1.2.3, and this is triton"),
}


@pytest.mark.parametrize("case", SPOILT)
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


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not a table": lambda m: [m],
    "another format": lambda m: m | {"format": 2},
    "one field more": lambda m: m | {"more": 1},
    "one field less": lambda m: {k: x for k, x in m.items() if k != "driver"},
    "a path": lambda m: m | {"files": m["files"] | {f"../{'0' * 64}.cubin": 0}},
    "an absolute path": lambda m: m | {"files": m["files"] | {"/etc/passwd": 0}},
    "a pickle": lambda m: m | {"files": m["files"] | {f"{'0' * 64}.pkl": 0}},
    "a size below 0": lambda m: m | {"files": dict.fromkeys(m["files"], -1)},
    "a size that is none": lambda m: m | {"files": dict.fromkeys(m["files"], "1")},
    "a file that is not listed": lambda m: m | {"files": {}},
    "a launcher that is not listed": lambda m: m | {"kernels": {"k": {"0" * 64: entry(m) | {"launcher": "0" * 64}}}},
    "a kernel that is no digest": lambda m: m | {"kernels": {"k": {"x": entry(m)}}},
    "a kernel with one field more": lambda m: m | {"kernels": {"k": {"0" * 64: entry(m) | {"more": 1}}}},
    "kernels that are a list": lambda m: m | {"kernels": [1]},
    "an extension with a path": lambda m: (
        m | {"extensions": m["extensions"] | {"0" * 64: {"name": "../x", "file": next(iter(m["files"]))}}}
    ),
    "an extension with another key": lambda m: (
        m | {"extensions": m["extensions"] | {"../x": {"name": "x", "file": next(iter(m["files"]))}}}
    ),
    "a driver that is not listed": lambda m: m | {"driver": ["0" * 64]},
}


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(next(iter(next(iter(manifest["kernels"].values())).values())))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_manifest_is_refused(case: str, copied: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    path = copied.folder / "manifest.json"
    path.write_text(json.dumps(DAMAGE[case](manifest_of(copied))))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    namespace: dict[str, Any] = {}
    with pytest.warns(RuntimeWarning, match="is not used") as caught:
        MachineCode(copied.path).attach(namespace)
    assert len(caught) == 1
    assert namespace == {}


def test_a_manifest_that_is_deep_is_refused(copied: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    (copied.folder / "manifest.json").write_text("[" * 100_000)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.warns(RuntimeWarning, match="is not used"):
        MachineCode(copied.path).attach({})


# -- writing ---------------------------------------------------------------------------------------------


def test_a_foreign_file_in_the_way_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out" / pipeline.generate(DENSE, tmp_path).path.name
    path.parent.mkdir()
    path.write_text("mine\n")
    with pytest.raises(GeneratedFileError, match="not overwritten"):
        built(DENSE, tmp_path, path.parent)
    assert path.read_text() == "mine\n"
    path.unlink()
    MachineCode(path).folder.rmdir()
    MachineCode(path).folder.write_text("mine too\n")
    with pytest.raises(GeneratedFileError, match="cannot write"):
        built(DENSE, tmp_path, path.parent)
