"""Imports point one way, the oracle and the kernels share no code, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import splagen

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "splagen"
LINE_CEILING = 450

# A module may import from its own row and the rows above it.  The first name under splagen decides the row.
ROWS = [
    {"errors", "fields", "settings", "expression"},
    {"expression_text"},
    {"library"},
    {"spec", "sse_spec"},
    {"ir"},
    {"codegen"},
    {"layout", "cache_tensors", "random_cache", "qk_file"},
    {"sequence", "ops", "packed_ops", "block_attention"},
    {"verification", "sequence_verification", "step_verification"},
    {"kinds"},
    {"packed_verification"},
    {"autotune"},
    {
        "pipeline",
        "tuning",
        "paged_cache",
        "paged_prefill",
        "terminal",
        "cli_cache",
        "cli_cost",
        "cli_plot",
        "cli_tune",
        "cli",
        "doctor",
        "figure",
        "__main__",
        "__init__",
    },
    {"nn"},
    {"hf"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}

FILES = sorted(PACKAGE.glob("**/*.py"))
needs_package = pytest.mark.skipif(not FILES, reason="splagen/ has no modules yet")


def module_name(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """Return the name that decides a module's row: `ir` for splagen.ir.text, `__init__` for splagen."""
    return module.split(".")[1] if "." in module else "__init__"


def exports(package: str, root: Path = ROOT) -> dict[str, str]:
    """Return where the names that a package's __init__ passes on come from: {name: module}."""
    file = root.joinpath(*package.split("."), "__init__.py")
    if not file.exists():
        return {}
    froms = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in froms if node.level == 0 for alias in node.names}


def imports(file: Path, root: Path = ROOT) -> Iterator[tuple[str, int]]:
    """Yield (module under splagen, line) of every import, also of lazy ones and those for type checking.

    `from splagen.ir import evaluate` is an import of the module that splagen.ir takes evaluate from.
    """
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("splagen."):
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: write imports absolutely"
            source = node.module or ""
            if source != "splagen" and not source.startswith("splagen."):
                continue
            given = exports(source, root)
            for alias in node.names:
                submodule = root.joinpath(*source.split("."), alias.name)
                if submodule.with_suffix(".py").exists() or submodule.is_dir():
                    yield f"{source}.{alias.name}", node.lineno
                else:
                    yield given.get(alias.name, source), node.lineno


@needs_package
def test_every_module_has_a_row() -> None:
    unknown = sorted({part(module_name(file)) for file in FILES} - ROW.keys())
    assert not unknown, f"give these a row in ROWS, where their imports allow it: {unknown}"


@needs_package
def test_imports_point_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in FILES
        for module, line in imports(file)
        if ROW.get(part(module), len(ROWS)) > ROW.get(part(module_name(file)), -1)
    ]
    assert not wrong, "\n".join(wrong)


@needs_package
def test_codegen_never_imports_the_oracle() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(PACKAGE.glob("codegen/**/*.py"))
        for module, line in imports(file)
        if module == "splagen.ir.reference"
    ]
    assert not wrong, "\n".join(wrong)


def test_an_import_counts_as_the_module_that_defines_the_name(tmp_path: Path) -> None:
    (tmp_path / "splagen/ir").mkdir(parents=True)
    (tmp_path / "splagen/ir/__init__.py").write_text("from splagen.ir.reference import evaluate\n")
    (tmp_path / "splagen/ir/reference.py").write_text("")
    user = tmp_path / "splagen/user.py"
    user.write_text(
        "import splagen\nimport splagen.spec\nfrom splagen.ir import evaluate\n"
        "def f():\n    from splagen.ir import reference\n    from splagen import version\n"
    )
    assert sorted(imports(user, tmp_path), key=lambda found: found[1]) == [
        ("splagen.spec", 2),
        ("splagen.ir.reference", 3),
        ("splagen.ir.reference", 5),
        ("splagen", 6),
    ]


@pytest.mark.skipif(not (PACKAGE / "__init__.py").exists(), reason="splagen/__init__.py does not exist yet")
@pytest.mark.parametrize("module", ["splagen", "splagen.nn"])
def test_importing_splagen_loads_no_triton_and_no_cuda(module: str) -> None:
    check = (
        f"import sys, {module}\n"
        "heavy = {'triton', 'transformers'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, f'{heavy} was imported'\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
    )
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@needs_package
def test_files_stay_short() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in FILES}
    assert not {path: n for path, n in lengths.items() if n > LINE_CEILING}


@needs_package
def test_the_wheel_lists_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_name(file) for file in PACKAGE.glob("**/__init__.py")}
    assert found | {"splagen", "splagen.templates"} <= set(listed)


def test_no_part_of_the_package_takes_the_place_of_a_public_name() -> None:
    """A subpackage that was imported is an attribute of the package: `splagen.autotune` cannot be a function."""
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not parts & set(splagen.__all__)


def test_nothing_of_splagen_imports_what_is_made_with_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {m.partition(".")[0] for m in modules} & {"benchmarks", "examples", "tests"}, path
