"""Where a layer finds the generated module of its spec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import splagen
from splagen.spec import Spec


class Generated:
    """The op of a spec, generated on construction and again where a pickled copy is loaded.

    Layers with one spec and folder share one module.
    """

    def __init__(self, spec: Spec, folder: str | Path | None = None) -> None:
        """`folder` is where the module is written; None is `kernels/` in splagen's cache, with tuned Schedules.

        Raises:
            GeneratedFileError: a foreign file is in the way.
        """
        self.spec, self.folder = spec, None if folder is None else Path(folder)
        self.op = _op(spec, self.folder)

    @property
    def step(self) -> Callable[..., Any]:
        """Of SSE: the step that advances a table of states by a token."""
        return self.op.__globals__[f"{self.spec.name}_step"]  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[type[Generated], tuple[Spec, Path | None]]:
        return Generated, (self.spec, self.folder)


@functools.lru_cache(maxsize=64)
def _op(spec: Spec, folder: Path | None) -> Any:
    return splagen.load(spec) if folder is None else splagen.generate(spec, folder).op
