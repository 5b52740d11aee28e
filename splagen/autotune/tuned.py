"""The Schedules that a generated module takes at run time: those that were tuned for a call's sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from splagen.autotune import cache
from splagen.autotune.device import this_device
from splagen.autotune.key import Bucket, key_of
from splagen.autotune.space import check_together, scheduled, spaces
from splagen.codegen.compile import Module
from splagen.codegen.schedule import Schedule
from splagen.kinds import kind_of
from splagen.spec import Spec

Sizes: TypeAlias = tuple[str, int, int]  # dtype, length and batch of a bucket


class TunedSchedules(dict[Sizes, Mapping[str, Schedule]]):
    """TUNED of a generated module: looks a bucket up in the cache when it is first asked for."""

    def __init__(self, spec: Spec, folder: Path | None = None, kernels: Callable[[Spec], Module] | None = None) -> None:
        """`folder` holds the entries, None is the cache directory; `kernels` are the module's, None is the op's."""
        super().__init__()
        self.spec, self.folder = spec, folder
        self.kernels = kernels or (lambda of: kind_of(of).partition(of))
        self.missing: set[Sizes] = set()

    def get(self, sizes: Sizes, default: Mapping[str, Schedule]) -> Mapping[str, Schedule]:  # type: ignore[override]
        """The Schedules of a bucket; `default` where one kernel has none, or they do not go together."""
        if sizes not in self and sizes not in self.missing:
            dtype, length, batch = sizes
            found = stored(self.spec, self.kernels(self.spec), dtype, Bucket(length, batch), self.folder)
            if found:
                self[sizes] = found
            else:
                self.missing.add(sizes)
        return super().get(sizes, default)


def stored(spec: Spec, part: Module, dtype: str, bucket: Bucket, folder: Path | None = None) -> dict[str, Schedule]:
    """What the cache has for all kernels of a part on this GPU; nothing where one is missing or not legal."""
    device = this_device()
    first = key_of(spec, part.kernels[0], dtype, bucket, device)
    if cache.get(first, folder=folder) is None:
        return {}  # the usual case; a key takes its kernel's text, and all of them most of a second
    keys = {k.name: key_of(spec, k, dtype, bucket, device) for k in scheduled(part)}

    def check(schedules: Mapping[str, Schedule]) -> None:
        check_together(spaces(spec, part, device, dtype), part.constraints, schedules)

    found = cache.get_together(keys, check=check, folder=folder) or {}
    return {name: entry.schedule for name, entry in found.items()}
