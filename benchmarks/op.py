"""A generated op as the benchmarks run it: inputs, the gate before any timing, forward and backward by the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.given import Selection, random_selection, selecting_only, with_selection
from benchmarks.works import Timed
from splagen import pipeline, sequence_verification, verification
from splagen.codegen.partition import Partition
from splagen.kinds import oracle
from splagen.sequence import SSEOracle
from splagen.spec import Spec, SPLASpec, to_toml
from splagen.verification import TOLERANCE, Row, Shape

BUILD = Path("build")
Strategies: TypeAlias = Mapping[str, Mapping[str, int]]
DEFAULT: Strategies = {}
"""What a module chooses by itself."""


def every_strategy(part: Partition) -> list[Strategies]:
    """By row, by key and so on, as a Choice numbers its options; one with fewer takes its last.  Empty without any."""
    most = max((len(c.options) for c in part.strategies), default=0)
    return [{c.name: {"strategy": min(i, len(c.options) - 1)} for c in part.strategies} for i in range(most)]


@dataclass
class BlockSparse:
    """An op of an SPLASpec, whole or a stage of it.

    `given` are the chosen blocks of the inputs that were made last, where the selection is not timed.
    """

    spec: SPLASpec
    timed: Timed
    module: ModuleType
    truth: Any  # splagen.ops.Oracle
    given: Selection | None = None

    @property
    def part(self) -> Partition:
        """The kernels."""
        found = self.truth.partition
        assert isinstance(found, Partition)
        return found

    def gate_shape(self, heads: int) -> Shape:
        """Long enough that blocks are left over, and off the grid of blocks; strides are multiples of 16 as later."""
        select = self.spec.select
        assert select is not None
        near = select.sinks + (select.local if self.spec.causal else 2 * select.local) + 1
        return 1, heads, (near + select.budget + 6) * select.block_size + 3 * select.block_size // 4

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Normal inputs and the cotangent by name, on the device, and random chosen blocks where they are given.

        A drift tells blocks of keys apart, as in `verification.random_inputs`.
        """
        short = verification.random_inputs(self.truth, (1, shape[1], 16), dtype, device, 0)
        draw = torch.Generator(device).manual_seed(0)
        found = {}
        for a in (*self.part.inputs, *self.part.cotangents):
            x = short[a.name]
            if a.layout not in ("head_rows", "kv_head_scalars"):
                x = self._normal(draw, x, shape[2])
            if a.name == "k":
                drift = self._normal(draw, x, -(-shape[2] // 16))
                x = x + 0.7 * drift.repeat_interleave(16, dim=1)[:, : shape[2]]
            found[a.name] = x
        self.given = self._random_selection(shape, device)
        return found

    def _normal(self, draw: torch.Generator, like: Tensor, length: int) -> Tensor:
        sizes = 1, length, *like.shape[2:]
        return torch.randn(sizes, generator=draw, device=like.device, dtype=like.dtype)

    def _random_selection(self, shape: Shape, device: str) -> Selection | None:
        if self.timed != "given":
            return None
        return random_selection(self.spec, shape[2], shape[1] // self.spec.group_size, device)

    @contextmanager
    def stage(self) -> Iterator[None]:
        """The module runs what is timed, and nothing else."""
        if self.timed == "given":
            assert self.given is not None
            with with_selection(self.module, self.part, self.given):
                yield
        else:
            with selecting_only(self.module, self.part) if self.timed == "selection" else nullcontext():
                yield

    def gate(self, shape: Shape, dtype: torch.dtype, device: str, strategies: Strategies = DEFAULT) -> list[Row]:
        """What is timed against the oracle: outputs, gradients, the selection; chosen blocks that are given stay."""
        inputs = verification.random_inputs(self.truth, shape, dtype, device, 0)
        self.given = self._random_selection(shape, device)
        if self.timed == "selection":
            results = self.forward(inputs, strategies)
            error = verification.selection_error(self.truth, inputs, results["block_indices"], results["block_counts"])
            return [Row("selection", shape, str(dtype).removeprefix("torch."), error, TOLERANCE[dtype][2])]
        if self.is_dense(inputs):
            return verification.compare_dense(self.module, self.truth, inputs, shape)
        with self.stage():
            rows = verification.compare(self.module, self.truth, inputs, shape, strategies)
        return [r for r in rows if r.quantity != "selection" or self.timed == "op"]

    def is_dense(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the op takes torch's dense attention for the inputs."""
        return self.part.dense is not None and bool(self.module.takes_dense(inputs[self.part.inputs[0].name]))

    def forward(self, inputs: Mapping[str, Tensor], strategies: Strategies = DEFAULT) -> dict[str, Tensor]:
        """Everything that the module's forward returns, by name."""
        arguments = [inputs[a.name] for a in self.part.inputs]
        if self.part.dense and self.is_dense(inputs):
            return dict(zip(self.part.dense.made, self.module.dense_forward(*arguments), strict=True))
        with self.stage():
            found = self.module.forward({**self.module.schedules_for(arguments[0]), **strategies}, *arguments)
        return dict(zip([a.name for a in (*self.part.outputs, *self.part.saved)], found, strict=True))

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """O as a model gets it: by the registered op, which checks its inputs and keeps what backward needs."""
        names = [a.name for a in self.part.inputs]
        rest = {n: inputs[n] for n in names[3:]}
        found: Tensor = getattr(self.module, self.spec.name)(*(inputs[n] for n in names[:3]), **rest)
        return found

    def backward(
        self, inputs: Mapping[str, Tensor], results: Mapping[str, Tensor], strategies: Strategies = DEFAULT
    ) -> Sequence[Tensor]:
        """Gradients of the inputs from what forward returned."""
        arguments = [inputs[a.name] for a in self.part.inputs]
        cotangents = [inputs[a.name] for a in self.part.cotangents]
        found: Sequence[Tensor]
        if self.part.dense and self.is_dense(inputs):
            found = self.module.dense_backward(*arguments, *(results[n] for n in self.part.dense.saved), *cotangents)
            return found
        kept = [results[a.name] for a in self.part.residuals]
        chosen = {**self.module.schedules_for(arguments[0]), **strategies}
        found = self.module.backward(chosen, *arguments, *kept, *cotangents)
        return found


@dataclass
class Recurrence:
    """An op of an SSESpec, on one sequence that starts from no state and whose last state nobody asks for."""

    module: ModuleType
    truth: SSEOracle

    def gate_shape(self, heads: int) -> Shape:
        """Several groups of chunks, and a chunk that is not full."""
        return 1, heads, 1072

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Normal rows and cotangent by name, on the device."""
        _, heads, length = shape
        short = sequence_verification.random_inputs(self.truth, [16], heads, dtype, device, 0)
        draw = torch.Generator(device).manual_seed(0)
        for name in (*self.truth.names, "do"):
            x = short[name]
            short[name] = torch.randn(length, *x.shape[1:], generator=draw, device=device, dtype=x.dtype)
        short["cu_seqlens"] = torch.tensor([0, length], dtype=torch.int32, device=device)
        return short | {n: torch.zeros_like(short[n]) for n in ("state", "dfinal")}

    def gate(self, shape: Shape, dtype: torch.dtype, device: str, strategies: Strategies = DEFAULT) -> list[Row]:
        """Outputs, final states and gradients against the oracle, from a state, on packed sequences too."""
        return list(
            sequence_verification.verify(
                self.module, self.truth, shapes=[shape], dtypes=[dtype], device=device, schedules=strategies
            ).rows
        )

    def forward(self, inputs: Mapping[str, Tensor], strategies: Strategies = DEFAULT) -> dict[str, Tensor]:
        """O and the final states."""
        names = (*self.truth.names, "state", "cu_seqlens")
        chosen = {**self.module.schedules_for(inputs["v"]), **strategies}
        return dict(zip(("o", "final"), self.module.forward(chosen, *(inputs[n] for n in names)), strict=True))

    def backward(
        self, inputs: Mapping[str, Tensor], results: Mapping[str, Tensor], strategies: Strategies = DEFAULT
    ) -> Sequence[Tensor]:
        """Gradients of the rows and of the initial state; it forms everything again."""
        names = (*self.truth.names, "state", "cu_seqlens", "do", "dfinal")
        chosen = {**self.module.schedules_for(inputs["v"]), **strategies}
        found: Sequence[Tensor] = self.module.backward(chosen, *(inputs[n] for n in names))
        return found


Op: TypeAlias = BlockSparse | Recurrence


def op_of(spec: Spec, timed: Timed, folder: Path = BUILD) -> Op:
    """The op of a spec, generated into a folder."""
    module, truth = pipeline.generate(spec, folder).module, oracle(to_toml(spec))
    return BlockSparse(spec, timed, module, truth) if isinstance(spec, SPLASpec) else Recurrence(module, truth)
