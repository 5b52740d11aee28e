"""The packed op on CPU tensors: the oracle on one sequence after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array
from splagen.codegen.packing import Packing
from splagen.codegen.tile_code import Walk
from splagen.ops import Oracle

ROWS = frozenset({"query_rows", "query_scalars", "key_rows"})
TILES = frozenset({"indices", "counts"})


@dataclass(frozen=True)
class Part:
    """The part of packed arrays that belongs to one sequence of `length` tokens from `first` on."""

    number: int
    first: int
    length: int
    tile: int

    def of(self, a: Array, x: Tensor) -> Tensor:
        """A view of the sequence's part as a batch of one has it; parameters as they are."""
        if a.layout in ROWS:
            return x[:, self.first : self.first + self.length]
        if a.layout not in (*TILES, "states"):
            return x
        unit, extra = (a.chunk, 1) if a.layout == "states" else (self.tile, 0)
        heads, count = x.shape[1], -(-self.length // unit) + extra
        begin = (self.first // unit + (1 + extra) * self.number) * heads
        return x.flatten(0, 1)[begin : begin + heads * count].view(1, heads, count, *x.shape[2:])


class PackedOracle:
    """Forward and backward of packed sequences by an `Oracle` of single ones.

    The arguments and results of `forward` and `backward` are those of the generated module's functions of these names:
    rows [1, T, ...], the choice of tiles where the kernels have it, `bounds` int32 [sequences + 1], the longest length.
    """

    def __init__(self, oracle: Oracle) -> None:
        """`oracle` is that of the spec."""
        self.oracle, self.partition = oracle, oracle.partition
        self.tile = Geometry.of(self.partition.program).tile
        self.packing = Packing.of(Walk.of(self.partition.program))

    def parts(self, bounds: Tensor, longest: int) -> Iterator[Part]:
        """The sequences that have a token."""
        ends = bounds.tolist()
        for number, (first, end) in enumerate(itertools.pairwise(ends)):
            if length := min(end - first, longest):
                yield Part(number, first, length, self.tile)

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        """Outputs, then what backward reads; 0 for tokens of no sequence."""
        *tensors, bounds, longest = given
        part = self.partition
        made = [*part.outputs, *part.saved]
        q, k = tensors[:2]
        whole = [self._whole(a, q, k.shape[2], bounds.shape[0] - 1) for a in made]
        for sequence in self.parts(bounds, longest):
            own = [sequence.of(a, x) for a, x in zip(part.inputs, tensors, strict=True)]
            for a, x, found in zip(made, whole, self.oracle.forward(*own), strict=True):
                sequence.of(a, x).copy_(found)
        return tuple(whole)

    def backward(self, *given: Any) -> tuple[Tensor, ...]:
        """Gradients of the inputs; those of parameters are sums over the sequences, in their order."""
        *tensors, longest = given
        part = self.partition
        count = len(part.inputs)
        bounds = tensors.pop(count)
        arrays = [*part.inputs, *part.residuals, *part.cotangents]
        inputs = dict(zip([a.name for a in part.inputs], zip(part.inputs, tensors[:count], strict=True), strict=True))
        wanted = [inputs[name] for name, _ in part.gradients]
        whole = [torch.zeros_like(x, memory_format=torch.contiguous_format) for _, x in wanted]
        for sequence in self.parts(bounds, longest):
            own = [sequence.of(a, x) for a, x in zip(arrays, tensors, strict=True)]
            for (a, _), x, found in zip(wanted, whole, self.oracle.backward(*own), strict=True):
                sequence.of(a, x).add_(found)
        return tuple(whole)

    def _whole(self, a: Array, q: Tensor, kv_heads: int, sequences: int) -> Tensor:
        """An array of all sequences, 0 where none writes; a tile without a sequence has chosen nothing."""
        tokens, heads = q.shape[1], q.shape[2] if a.layout.startswith("query") else kv_heads
        dtype = q.dtype if a.dtype == "input" else getattr(torch, a.dtype)
        if a.layout in ROWS:
            return torch.zeros(1, tokens, heads, *a.width, dtype=dtype)
        shape = self.packing.room(a).count(tokens, sequences), heads
        if a.layout == "states":
            return torch.zeros(*shape, *a.width, dtype=dtype)
        if a.layout == "counts":
            return torch.zeros(shape, dtype=dtype)
        return torch.full((*shape, self.packing.budget), -1, dtype=dtype)
