"""The whole pipeline on one screen: spec -> Program -> passes -> kernels -> source -> op."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from splagen import settings
from splagen.codegen.files import write_generated
from splagen.codegen.module import module_text
from splagen.codegen.partition import Partition, partition
from splagen.errors import InputError
from splagen.ir.check import check
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Program
from splagen.ops import oracle
from splagen.spec import SPLASpec, digest, to_toml
from splagen.verification import Report
from splagen.verification import verify as compare_module


@dataclass(frozen=True)
class Library:
    """A generated module on disk."""

    spec: SPLASpec
    path: Path

    @property
    def module(self) -> ModuleType:
        """The module, imported once per process and content."""
        return _imported(self.path)

    @property
    def op(self) -> Callable[..., Any]:
        """The differentiable torch op of the spec."""
        return getattr(self.module, self.spec.name)  # type: ignore[no-any-return]


def program(spec: SPLASpec) -> Program:
    """The definition: what is computed."""
    return check(spla_program(spec))


def stages(spec: SPLASpec) -> dict[str, Program]:
    """The Program after every pass, in order; a pass that runs again has a number."""
    now = program(spec)
    found = {"definition": now}
    for apply in (derive_gradient, *LOWERING):
        now = check(apply(now))
        name, i = apply.__name__, 2
        while name in found:
            name, i = f"{apply.__name__}_{i}", i + 1
        found[name] = now
    return found


def lowered(spec: SPLASpec) -> Program:
    """The definition with its gradient, after every pass."""
    return run(derive_gradient(program(spec)), LOWERING)


def kernels(spec: SPLASpec) -> Partition:
    """The kernels that compute it."""
    return partition(lowered(spec))


def source(spec: SPLASpec) -> str:
    """The generated module's text: the same bytes on every machine."""
    return module_text(kernels(spec), name=spec.name, digest=digest(spec)[:8], spec_text=to_toml(spec))


def generate(spec: SPLASpec, out: str | Path) -> Library:
    """Write `{name}_{digest8}.py` into `out`.  Raises GeneratedFileError where a foreign file is in the way."""
    path = Path(out) / f"{spec.name}_{digest(spec)[:8]}.py"
    write_generated(path, source(spec))
    return Library(spec, path)


def load(spec: SPLASpec) -> Callable[..., Any]:
    """The op of a spec, generated under the cache directory and imported."""
    return generate(spec, settings.cache_dir() / "kernels").op


def verify(
    library: Library | SPLASpec,
    *,
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Compare an op's kernels with the oracle at shapes (B, Hq, L): outputs, gradients, selection.

    On the CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 must ask for before triton is imported.
    """
    if isinstance(library, SPLASpec):
        library = generate(library, settings.cache_dir() / "kernels")
    if device == "cpu" and not settings.interpreted():
        raise InputError("the kernels run on a GPU or in Triton's interpreter", hint="set TRITON_INTERPRET=1")
    found = oracle(to_toml(library.spec))
    return compare_module(library.module, found, shapes=shapes, dtypes=dtypes, device=device, seed=seed)


_modules: dict[str, ModuleType] = {}


def _imported(path: Path) -> ModuleType:
    key = path.read_text()
    if key not in _modules:
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module
        found.loader.exec_module(module)
        _modules[key] = module
    return _modules[key]
