"""The kernels of packed sequences against the oracle, which evaluates one sequence after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from splagen.kinds import oracle
from splagen.ops import Oracle
from splagen.packed_ops import ROWS, TILES, PackedOracle, Part
from splagen.verification import (
    TOLERANCE,
    Report,
    Row,
    Shape,
    functions_of,
    loss_scale,
    random_inputs,
    relative_error,
    selection_error,
)

MARGIN = 3  # tokens of no sequence at either end


def verify(
    module: ModuleType,
    *,
    lengths: Sequence[int],
    heads: int,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | torch.device = "cpu",
    seed: int = 0,
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> Report:
    """Compare outputs, gradients and selections of sequences of these lengths, packed, with the oracle.

    As `verification.verify`: in float64, from the same rounded inputs, with the blocks that the kernels chose.
    `schedules` replaces the Schedules of some kernels; without any, the kernels are those that the op takes.
    """
    truth = oracle(module.SPEC)
    rows: list[Row] = []
    for dtype in dtypes:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) + MARGIN
        tokens = int(bounds[-1]) + MARGIN
        inputs = random_inputs(truth, (1, heads, tokens), dtype, device, seed)
        rows += _compare(module, truth, inputs, bounds.to(device), max(1, *lengths), schedules)
    return Report(module.__name__, tuple(rows))


@dataclass(frozen=True)
class _Truth:
    """What the oracle says of all sequences, packed; how far the chosen blocks are from a best choice."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    scales: dict[str, float]  # of gradients that are sums over rows: the root sum of squares of their terms
    selection: float


def _compare(
    module: ModuleType,
    truth: Oracle,
    inputs: Mapping[str, Tensor],
    bounds: Tensor,
    longest: int,
    schedules: Mapping[str, Mapping[str, int]] | None,
) -> list[Row]:
    part = truth.partition
    arguments = [inputs[a.name] for a in part.inputs]
    q = arguments[0]
    compute = functions_of(module, module.sizes_of(q, bounds, longest), schedules)
    results = compute.forward(compute.schedules, *arguments, bounds, longest)
    results = results if isinstance(results, tuple) else (results,)
    found = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
    sequences = list(PackedOracle(truth).parts(bounds, longest))
    right = _truth(truth, sequences, inputs, found)
    factor = loss_scale(right.gradients, q.dtype)
    residuals = [found[a.name] for a in part.residuals]
    cotangents = [factor * inputs[a.name] for a in part.cotangents]
    gradients = compute.backward(compute.schedules, *arguments, bounds, *residuals, *cotangents, longest)
    shape: Shape = (bounds.shape[0] - 1, q.shape[2], q.shape[1])
    label, (limit, gradient_limit, margin) = str(q.dtype).removeprefix("torch."), TOLERANCE[q.dtype]
    rows = [Row(n, shape, label, relative_error(found[n], want), limit) for n, want in right.outputs.items()]
    if "block_indices" in found:
        rows.append(Row("selection", shape, label, right.selection, margin))
    largest = max(float(want.norm()) for want in right.gradients.values())
    for (name, want), got in zip(right.gradients.items(), gradients, strict=True):
        scale = max(float(want.norm()), right.scales[name])
        scale = scale if scale > 1e-9 * largest else largest
        rows.append(Row(f"d{name}", shape, label, relative_error(got.double() / factor, want, scale), gradient_limit))
    whole = [found[a.name] for a in part.outputs]
    layouts = {a.name: a.layout for a in part.inputs}
    whole += [g for (name, _), g in zip(part.gradients, gradients, strict=True) if layouts[name] in ROWS]
    left = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
    for sequence in sequences:
        left[sequence.first : sequence.first + sequence.length] = False
    outside = max(float(x[:, left].abs().max()) for x in whole)
    return [*rows, Row("tokens of no sequence", shape, label, outside, 0.0)]


def _truth(
    truth: Oracle, sequences: Sequence[Part], inputs: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> _Truth:
    part = truth.partition
    outputs = {a.name: torch.zeros_like(found[a.name], dtype=torch.float64) for a in part.outputs}
    differentiable = {name for name, _ in part.gradients}
    gradients = {
        a.name: torch.zeros_like(inputs[a.name], dtype=torch.float64) for a in part.inputs if a.name in differentiable
    }
    squares, worst = dict.fromkeys(gradients, 0.0), 0.0
    for sequence in sequences:
        own = {a.name: sequence.of(a, inputs[a.name]) for a in (*part.inputs, *part.cotangents)}
        choice = {a.layout: sequence.of(a, found[a.name]) for a in part.saved if a.layout in TILES}
        indices = choice.get("indices")
        exact = {n: x.double() for n, x in own.items()}
        for a, x in zip(part.outputs, truth.values(exact, list(outputs), indices), strict=True):
            sequence.of(a, outputs[a.name]).copy_(x)
        right, terms = truth.gradients_and_scales(own, indices)
        for a in (a for a in part.inputs if a.name in differentiable):
            sequence.of(a, gradients[a.name]).add_(right[a.name])
            squares[a.name] += terms.get(a.name, 0.0) ** 2
        if indices is not None:
            worst = max(worst, selection_error(truth, own, indices, choice["counts"]))
    return _Truth(outputs, gradients, {n: x**0.5 for n, x in squares.items()}, worst)
