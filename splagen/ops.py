"""The op on CPU tensors: the spec's equations, evaluated by the oracle query chunk by query chunk."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splagen.codegen.kernel import Array
from splagen.codegen.partition import Partition
from splagen.ir.passes import drop_unused, share
from splagen.ir.program import Program, Reduce, TopK, Var
from splagen.ir.reference import evaluate
from splagen.layout import Blocked, chunked

CHUNK_BYTES = 256 << 20  # of one float64 array of scores in a chunk of queries


class Oracle:
    """Forward and backward of one spec by evaluating its definition in float64.

    The arguments and results of `forward` and `backward` are those of the generated module's functions of these names,
    so that a generated op behaves the same on CPU tensors.  Memory is bounded by query chunks: the score arrays of a
    chunk stay below CHUNK_BYTES each.
    """

    def __init__(self, definition: Program, partition: Partition) -> None:
        """`definition` is the program with its gradient, before any pass that changes its form."""
        self.definition = drop_unused(share(definition))
        self.lowered = partition.program
        self.partition = partition
        topk = [eq for eq in self.definition.equations if isinstance(eq.op, TopK)]
        self.chosen = topk[0] if topk else None
        self.terms = {x.name: _terms(self.definition, g) for x, g in self.definition.gradients if "b" not in x.axes}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs, then what backward reads, as [B, L, H, ...]; states, which it forms again here, are zeros."""
        inputs = dict(zip([a.name for a in self.partition.inputs], tensors, strict=True))
        q, k = tensors[:2]

        def zeros(a: Array) -> Tensor:
            return q.new_zeros(q.shape[0], k.shape[2], -(-q.shape[1] // a.chunk) + 1, *a.width)

        made = [*self.partition.outputs, *self.partition.saved]
        rows = iter(self.values(inputs, [a.name for a in made if a.layout != "states"]))
        return tuple(zeros(a) if a.layout == "states" else next(rows) for a in made)

    def values(
        self, inputs: Mapping[str, Tensor], wanted: Sequence[str], block_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Forward variables by name (block_indices and block_counts too), in the inputs' dtype where they are rows."""
        blocked = self._blocked(inputs)
        program = self.lowered
        parts: dict[str, list[Tensor]] = {n: [] for n in wanted}
        names = [n for n in wanted if n not in ("block_indices", "block_counts")]
        variables = [program.var(n) for n in names]
        definition = {v.name for v in (*self.definition.inputs, *(e.out for e in self.definition.equations))}
        plain = [v for v in variables if v.name in definition]
        derived = [v for v in variables if v.name not in definition]
        for start, stop, chunk, given in self._chunks(self.definition, inputs, blocked, block_indices):
            if self.chosen is not None and "free" not in given:
                given = given | self._evaluate(self.definition, chunk, blocked, start, stop, given, [self.chosen.out])
            found = self._evaluate(self.definition, chunk, blocked, start, stop, given, plain)
            found |= self._evaluate(program, chunk, blocked, start, stop, given, derived)
            rows = min(stop * blocked.tile, blocked.length) - start * blocked.tile
            for v in variables:
                parts[v.name].append(blocked.to_tensor(v, found[v.name], rows))
            if self.chosen is not None:
                pair = blocked.indices(given[self.chosen.out.name], self.chosen.op.k)  # type: ignore[union-attr]
                for name, x in zip(("block_indices", "block_counts"), pair, strict=True):
                    if name in parts:
                        parts[name].append(x)
        q = inputs[self.partition.inputs[0].name]
        return tuple(self._joined(n, parts[n], q.dtype) for n in wanted)

    def _joined(self, name: str, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        if name in ("block_indices", "block_counts"):
            return torch.cat(parts, dim=2).contiguous()
        array = next(a for a in (*self.partition.outputs, *self.partition.saved) if a.name == name)
        whole = torch.cat(parts, dim=1)
        if array.padded and array.features:
            whole = torch.nn.functional.pad(whole, (0, array.width[-1] - whole.shape[-1]))
        return whole.to(dtype if array.dtype == "input" else torch.float32).contiguous()

    def backward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs; the selection is the saved one, everything else is formed again."""
        part = self.partition
        names = [a.name for a in (*part.inputs, *part.residuals, *part.cotangents)]
        given = dict(zip(names, tensors, strict=True))
        inputs = {a.name: given[a.name] for a in (*part.inputs, *part.cotangents)}
        results = self.gradients(inputs, given.get("block_indices"))
        return tuple(g.to(given[n].dtype).contiguous() for n, g in results.items())

    def gradients(self, inputs: Mapping[str, Tensor], block_indices: Tensor | None) -> dict[str, Tensor]:
        """Gradients in float64 by the name of the input: rows of queries per chunk, the rest summed over chunks."""
        return self._gradients(inputs, block_indices, {})[0]

    def gradients_and_scales(
        self, inputs: Mapping[str, Tensor], block_indices: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradients, and for a parameter the root sum of squares of the terms that its gradient sums over all rows.

        Such a sum can cancel to any small number; rounding moves it by a share of its terms, not of itself.
        """
        return self._gradients(inputs, block_indices, self.terms)

    def _gradients(
        self, inputs: Mapping[str, Tensor], block_indices: Tensor | None, terms: Mapping[str, list[Var]]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        blocked = self._blocked(inputs)
        program = self.definition
        totals: dict[str, list[Tensor]] = {x.name: [] for x, _ in program.gradients}
        squares = dict.fromkeys(terms, 0.0)
        for start, stop, chunk, given in self._chunks(program, inputs, blocked, block_indices):
            wanted = [*(g for _, g in program.gradients), *(v for summed in terms.values() for v in summed)]
            found = self._evaluate(program, chunk, blocked, start, stop, given, list(dict.fromkeys(wanted)))
            rows = min(stop * blocked.tile, blocked.length) - start * blocked.tile
            for x, g in program.gradients:
                totals[x.name].append(blocked.to_tensor(x, found[g.name], rows))
            for name, summed in terms.items():
                squares[name] += sum(float(found[v.name].square().sum()) for v in summed)
        by_chunk = {x.name for x, _ in program.gradients if "T" in x.axes}
        gradients = {
            n: torch.cat(p, dim=1) if n in by_chunk else functools.reduce(torch.add, p) for n, p in totals.items()
        }
        return gradients, {n: s**0.5 for n, s in squares.items()}

    def at_tile(
        self, inputs: Mapping[str, Tensor], row: int, block_indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output at one query, and the gradients from the cotangent of its tile: for sequences too long for all.

        Only for token selection (tiles of one query).  Gradients of rows of keys and of parameters are those of this
        query's part alone.
        """
        blocked = self._blocked(inputs)
        known = {v.name: v for v in self.definition.inputs}
        here = {n: x[:, row : row + 1] if "T" in known[n].axes else x for n, x in inputs.items()}
        chunk = {}
        for n, x in here.items():
            v = known[n]
            chunk[n] = (
                Blocked(self.definition, x.shape[0], 1, blocked.sizes["h"]).to_axes(v, x)
                if "T" in v.axes
                else blocked.to_axes(v, x)
            )
        assert self.chosen is not None
        given = {self.chosen.out.name: blocked.mask(block_indices[:, :, row : row + 1])}
        outputs = list(self.definition.outputs)
        wanted = [*outputs, *(g for _, g in self.definition.gradients)]
        found = self._evaluate(self.definition, chunk, blocked, row, row + 1, given, wanted)
        o = blocked.to_tensor(outputs[0], found[outputs[0].name], 1)
        return o, {x.name: blocked.to_tensor(x, found[g.name], 1) for x, g in self.definition.gradients}

    def selection(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The score of every block, the blocks that may be chosen, and the choice: [B, Hkv, T, J] each."""
        assert self.chosen is not None
        score, far = self.chosen.args
        blocked = self._blocked(inputs)
        parts: list[list[Tensor]] = [[], [], []]
        for start, stop, chunk, _ in self._chunks(self.definition, inputs, blocked, None):
            wanted = [score, far, self.chosen.out]
            found = self._evaluate(self.definition, chunk, blocked, start, stop, {}, wanted)
            for part, v in zip(parts, wanted, strict=True):
                x = found[v.name]
                part.append(x if "b" in v.axes else x.expand(blocked.sizes["b"], blocked.sizes["h"], *x.shape))
        whole = [torch.cat(p, dim=2) for p in parts]
        return whole[0], whole[1], whole[2]

    def mask(self, inputs: Mapping[str, Tensor], block_indices: Tensor) -> Tensor:
        """block_indices as a mask [B, Hkv, T, J]."""
        return self._blocked(inputs).mask(block_indices)

    def _blocked(self, inputs: Mapping[str, Tensor]) -> Blocked:
        q, k = (inputs[a.name] for a in self.partition.inputs[:2])
        return Blocked(self.definition, q.shape[0], q.shape[1], k.shape[2])

    def _chunks(
        self, program: Program, inputs: Mapping[str, Tensor], blocked: Blocked, block_indices: Tensor | None
    ) -> list[tuple[int, int, dict[str, Tensor], dict[str, Tensor]]]:
        known = {v.name: v for v in program.inputs}
        arranged = {n: blocked.to_axes(known[n], x) for n, x in inputs.items()}
        where = {n: known[n].axes.index("T") for n in arranged if "T" in known[n].axes}
        free = blocked.mask(block_indices) if block_indices is not None and self.chosen is not None else None
        sizes = blocked.sizes
        row = 8 * sizes["b"] * sizes["h"] * sizes["g"] * blocked.tile * blocked.blocks * blocked.block
        step = max(1, CHUNK_BYTES // row)
        chunks = []
        for start in range(0, blocked.tiles, step):
            stop = min(start + step, blocked.tiles)
            given = {self.chosen.out.name: free[:, :, start:stop]} if free is not None and self.chosen else {}
            chunks.append((start, stop, chunked(arranged, where, start, stop), given))
        return chunks

    def _evaluate(
        self,
        program: Program,
        chunk: Mapping[str, Tensor],
        blocked: Blocked,
        start: int,
        stop: int,
        given: Mapping[str, Tensor],
        wanted: Sequence[Var],
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        sizes = blocked.sizes | {"T": stop - start}
        scalars = {"L": blocked.length, "Hkv": sizes["h"]}
        return evaluate(program, chunk, scalars=scalars, sizes=sizes, offsets={"T": start}, given=given, wanted=wanted)


def _terms(program: Program, gradient: Var) -> list[Var]:
    """What a parameter's gradient sums over rows: the arguments of the reductions behind its additions."""
    eq = program.definitions[gradient]
    if isinstance(eq.op, Reduce):
        return [eq.args[0]]
    return [v for x in eq.args for v in _terms(program, x)]
