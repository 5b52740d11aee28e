"""The kernels of packed sequences against the oracle, which evaluates one sequence after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from splagen.kinds import oracle
from splagen.ops import Oracle
from splagen.packed_ops import ROWS, PackedOracle, Part
from splagen.verification import (
    TOLERANCE,
    Report,
    Row,
    Shape,
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
    `schedules` replaces the Schedules of some kernels.
    """
    truth = oracle(module.SPEC)
    rows: list[Row] = []
    for dtype in dtypes:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) + MARGIN
        tokens = int(bounds[-1]) + MARGIN
        inputs = random_inputs(truth, (1, heads, tokens), dtype, device, seed)
        rows += _compare(module, truth, inputs, bounds.to(device), max(1, *lengths), schedules or {})
    return Report(module.__name__, tuple(rows))


def _compare(
    module: ModuleType,
    truth: Oracle,
    inputs: Mapping[str, Tensor],
    bounds: Tensor,
    longest: int,
    schedules: Mapping[str, Mapping[str, int]],
) -> list[Row]:
    part, packed = truth.partition, PackedOracle(truth)
    arguments = [inputs[a.name] for a in part.inputs]
    q = arguments[0]
    shape: Shape = (bounds.shape[0] - 1, q.shape[2], q.shape[1])
    chosen = {**module.schedules_for(module.sizes_of(q, bounds, longest)), **schedules}
    results = module.forward(chosen, *arguments, bounds, longest)
    results = results if isinstance(results, tuple) else (results,)
    made = [*part.outputs, *part.saved]
    found = dict(zip([a.name for a in made], results, strict=True))
    sequences = list(packed.parts(bounds, longest))
    choices = {a.layout: a for a in part.saved}

    def alone(sequence: Part) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        own = {a.name: sequence.of(a, inputs[a.name]) for a in (*part.inputs, *part.cotangents)}
        picked = [
            sequence.of(choices[x], found[choices[x].name]) if x in choices else None for x in ("indices", "counts")
        ]
        return own, picked[0], picked[1]

    outputs = {a.name: torch.zeros_like(found[a.name], dtype=torch.float64) for a in part.outputs}
    gradients = {a.name: torch.zeros_like(inputs[a.name], dtype=torch.float64) for a in part.inputs}
    scales = dict.fromkeys(gradients, 0.0)
    worst = 0.0
    for sequence in sequences:
        own, indices, counts = alone(sequence)
        exact = {n: x.double() for n, x in own.items()}
        for a, x in zip(part.outputs, truth.values(exact, list(outputs), indices), strict=True):
            sequence.of(a, outputs[a.name]).copy_(x)
        right, sizes = truth.gradients_and_scales(own, indices)
        for a in part.inputs:
            sequence.of(a, gradients[a.name]).add_(right[a.name])
            scales[a.name] = (scales[a.name] ** 2 + sizes.get(a.name, 0.0) ** 2) ** 0.5
        if indices is not None and counts is not None:
            worst = max(worst, selection_error(truth, own, indices, counts))
    label, (limit, gradient_limit, margin) = str(q.dtype).removeprefix("torch."), TOLERANCE[q.dtype]
    rows = [Row(n, shape, label, relative_error(found[n], want), limit) for n, want in outputs.items()]
    if "indices" in choices:
        rows.append(Row("selection", shape, label, worst, margin))
    factor = loss_scale(gradients, q.dtype)
    residuals = [found[a.name] for a in part.residuals]
    cotangents = [factor * inputs[a.name] for a in part.cotangents]
    results = module.backward(chosen, *arguments, bounds, *residuals, *cotangents, longest)
    largest = max(float(want.norm()) for want in gradients.values())
    for (name, want), got in zip(gradients.items(), results, strict=True):
        scale = max(float(want.norm()), scales[name])
        scale = scale if scale > 1e-9 * largest else largest
        rows.append(Row(f"d{name}", shape, label, relative_error(got.double() / factor, want, scale), gradient_limit))
    whole = [found[a.name] for a in part.outputs]
    whole += [g for a, g in zip(part.inputs, results, strict=True) if a.layout in ROWS]
    left = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
    for sequence in sequences:
        left[sequence.first : sequence.first + sequence.length] = False
    outside = max(float(x[:, left].abs().max()) for x in whole)
    return [*rows, Row("tokens of no sequence", shape, label, outside, 0.0)]
