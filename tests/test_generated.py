"""The generated text: the same bytes everywhere, importable alone, tidy; and four whole modules."""

import difflib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from splagen import library as lib
from splagen import pipeline
from splagen.errors import SpecError
from splagen.spec import Residual, Select, SPLASpec, Statistics, to_toml

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

DIAGONAL = lib.taylor(covariance="diag")
PLAIN = SPLASpec(head_dim=64, group_size=4, select=Select(budget=4, metric=DIAGONAL), linear=None, name="block_sparse")
SPECS = {
    "block_sparse": PLAIN,
    "sparse_linear": SPLASpec(head_dim=128, group_size=16, select=Select(metric=DIAGONAL), name="sparse_linear"),
    "tile": SPLASpec(
        head_dim=96,
        value_dim=64,
        group_size=2,
        causal=False,
        select=Select(
            granularity="tile",
            tile=64,
            statistics=Statistics(cell=16),
            metric=lib.cumulant(covariance="diag", clamp=8.0),
        ),
        linear=Residual(lib.elu1, temperature=True, normaliser=True),
        combine="gate",
        name="tile",
    ),
    "softcap": SPLASpec(head_dim=64, group_size=2, select=None, linear=None, score=lib.softcap(30.0), name="softcap"),
}


@pytest.mark.parametrize("name", SPECS)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    """The whole text of four modules; --update-golden writes them."""
    text, path = pipeline.source(SPECS[name]), GOLDEN / f"{name}.py.txt"
    if request.config.getoption("--update-golden"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    if not path.exists():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: pytest tests/test_generated.py --update-golden")
    before = path.read_text().splitlines()
    changes = list(difflib.unified_diff(before, text.splitlines(), "golden", "generated", lineterm="", n=1))
    if changes:
        shown = "\n".join(changes[:60])
        pytest.fail(f"{name} changed; look, then pytest tests/test_generated.py --update-golden\n{shown}")


def test_there_are_exactly_four_golden_files() -> None:
    assert {p.name for p in GOLDEN.glob("*")} == {f"{name}.py.txt" for name in SPECS}


def run(code: str, *arguments: str, path: Path | None = ROOT, **environment: str) -> str:
    """Run Python in a process of its own; `path` is what it may import besides its packages."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | environment
    if path is not None:
        env["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=250, env=env, cwd=path or Path(sys.prefix),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_same_bytes_for_every_hash_seed(tmp_path: Path) -> None:
    code = (
        "import hashlib, sys\n"
        "from splagen import pipeline, spec\n"
        "for path in sys.argv[1:]:\n"
        "    text = pipeline.source(spec.read_spec(path))\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    files = []
    for name, spec in SPECS.items():
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(to_toml(spec))
    found = {run(code, *map(str, files), PYTHONHASHSEED=seed) for seed in ("0", "1", "4711")}
    assert len(found) == 1
    assert len(set(found.pop().split())) == len(SPECS)


IMPORT = """
import importlib.util, sys, time
import torch, triton, triton.language
assert importlib.util.find_spec("splagen") is None, "splagen is on the path"
times = []
for path in sys.argv[1:]:
    start = time.process_time()
    found = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(found)
    sys.modules["module"] = module
    found.loader.exec_module(module)
    times.append(time.process_time() - start)
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert "splagen" not in sys.modules
print(*times)
"""


def test_a_module_needs_torch_and_triton_only_and_imports_fast(tmp_path: Path) -> None:
    """In a folder of its own, without splagen; the first import pays for what torch loads lazily."""
    try:
        run("import splagen", path=None)
    except AssertionError:
        pass
    else:
        pytest.skip("splagen is installed here")
    paths = [pipeline.generate(spec, tmp_path).path for spec in SPECS.values()]
    times = [float(x) for x in run(IMPORT, *map(str, paths), path=None).split()]
    assert max(times) < 0.3, f"CPU seconds to import: {times}"


FIRST_CALL = """
import os, sys, importlib.util
os.environ["TRITON_INTERPRET"] = "1"
import torch

found = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)
q, k, v = (torch.randn(1, 16, h, 64, requires_grad=True) for h in (2, 1, 1))
module.softcap(q, k, v).sum().backward()
assert q.grad.any()
print("torch._dynamo" in sys.modules)
"""


def test_a_first_call_does_not_import_the_compiler_of_torch(tmp_path: Path) -> None:
    """It takes seconds, and a process that serves a model pays for it at its first request."""
    path = pipeline.generate(SPECS["softcap"], tmp_path).path
    assert run(FIRST_CALL, str(path), path=None).strip() == "False"


SHADOWED = ("forward", "check_inputs", "torch", "Sizes", "GROUP", "NamedTuple", "max")


@pytest.mark.parametrize("name", SHADOWED)
def test_an_op_has_no_name_of_something_else_in_its_module(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"its module has another {name}"):
        pipeline.generate(replace(SPECS["softcap"], name=name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_splagen_the_cpu_says_what_is_missing(tmp_path: Path) -> None:
    path = pipeline.generate(SPECS["softcap"], tmp_path).path
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(path.parent)!r})\n"
        "sys.modules['splagen'] = None\n"
        f"from {path.stem} import softcap\n"
        "try:\n"
        "    softcap(*(torch.zeros(1, 8, h, 64) for h in (2, 1, 1)))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "pip install splagen" in run(code, path=None)


@pytest.mark.parametrize("name", SPECS)
def test_ruff_finds_nothing(name: str, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    path = pipeline.generate(SPECS[name], tmp_path).path
    for command in (["check", "--isolated"], ["format", "--check", "--isolated"]):
        result = subprocess.run([ruff, *command, str(path)], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", SPECS)
def test_a_module_names_itself_and_its_spec(name: str, tmp_path: Path) -> None:
    library = pipeline.generate(SPECS[name], tmp_path)
    text = library.path.read_text()
    assert text.startswith(f'"""{library.path.stem}: attention kernels generated by splagen')
    assert to_toml(SPECS[name]) in text
    assert library.path.stem.startswith(f"{SPECS[name].name}_")
    lines = text.splitlines()
    assert not [line for line in lines if line != line.rstrip()]
    assert str(ROOT) not in text
