"""Which kernels a generated module launches."""

from types import ModuleType

import pytest

PREFIX = "launch_"


def record_launches(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that the module launches from here to the end of the test, in order."""
    launched: list[str] = []
    for name, launch in list(vars(module).items()):
        if name.startswith(PREFIX):
            kernel = name.removeprefix(PREFIX)
            monkeypatch.setattr(
                module, name, lambda *a, kernel=kernel, launch=launch: (launched.append(kernel), launch(*a))[1]
            )
    return launched
