"""The kernels of one generated module, as its file, ahead-of-time compilation and tuning ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Choice, Kernel
from splagen.codegen.schedule import Constraint
from splagen.ir.program import Program


class _Listed(Protocol):
    @property
    def kernels(self) -> Sequence[Kernel]: ...


class ModuleKernels:
    """What every module is asked beside its `kernels` and its `group_size`: nothing, unless it says something else.

    Attributes:
        strategies: ways to compute the same, between which a Schedule chooses.
    """

    strategies: Sequence[Choice] = ()

    @property
    def all_kernels(self: _Listed) -> Sequence[Kernel]:
        """Those too that run beside `kernels` and are not tuned."""
        return self.kernels

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """What Schedules must agree on."""
        return ()

    @property
    def fixed(self) -> Mapping[str, int]:
        """Values of the scalars that kernels are compiled for, where machine code is made ahead of time."""
        return {}

    @property
    def wide(self) -> frozenset[str]:
        """Rows of the op that are float32 beside 16-bit q, k and v."""
        return frozenset()


class ProgramKernels(ModuleKernels):
    """Kernels of one Program; where there is a choice, `forward` and `backward` list those of its first option."""

    program: Program
    forward: Sequence[Kernel]
    backward: Sequence[Kernel] = ()

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return Geometry.of(self.program).group

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel once, by name."""
        chosen = [k for c in self.strategies for k in c.kernels]
        return list({k.name: k for k in (*self.forward, *self.backward, *chosen)}.values())
