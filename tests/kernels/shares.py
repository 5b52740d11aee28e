"""Modules whose parts of rows do not fit in memory for all heads at once."""

from types import ModuleType

import pytest


def allow_a_share(module: ModuleType, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the parts of a share of the KV heads: each call goes over them in so many rounds."""
    whole = module.part_bytes
    sizes: list[int] = []
    monkeypatch.setattr(module, "part_bytes", lambda n, each: (sizes.append(whole(n, each)), sizes[-1])[1])
    monkeypatch.setattr(module, "most_parts", lambda device: -(-max(sizes) // rounds))
