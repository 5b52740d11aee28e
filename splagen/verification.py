"""A generated op against the oracle: forward, every gradient, the selection, over shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from splagen.errors import InputError, WrongResult
from splagen.ops import Oracle
from splagen.spec import SPLASpec

Shape: TypeAlias = tuple[int, int, int]
"""B sequences, H heads of queries (SSE: of values), L positions."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as Schedules and commands name them

# Limits on the relative RMS error, by dtype: (outputs, gradients, selection margin).  float32 follows from its rounding
# over sums of thousands of terms; the 16-bit ones from the rounding of operands.  The margin is how far below the best
# block left out, relative to the largest score of its row, a chosen block's score may lie.
TOLERANCE: Mapping[torch.dtype, tuple[float, float, float]] = {
    torch.float32: (1e-5, 1e-5, 1e-5),
    torch.float16: (2e-3, 4e-3, 4e-3),
    torch.bfloat16: (5e-3, 1e-2, 3e-2),
}


@dataclass(frozen=True)
class Row:
    """One comparison: `quantity` at `shape` (B, H, L) in `dtype`."""

    quantity: str
    shape: Shape
    dtype: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Report:
    """Every comparison of a verification."""

    name: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True if every row is."""
        return all(r.ok for r in self.rows)

    def raise_if_wrong(self) -> None:
        """Raise WrongResult that names the first quantity beyond its limit."""
        for r in self.rows:
            if not r.ok:
                raise WrongResult(
                    f"{self.name}: {r.quantity} at (B, H, L) = {r.shape}, {r.dtype}: "
                    f"error {r.error:.2e} > {r.limit:.0e}",
                    hint="report it with the spec, the GPU and the versions that `splagen doctor` prints",
                )


def verify(
    module: ModuleType,
    oracle: Oracle,
    *,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | torch.device = "cpu",
    seed: int = 0,
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> Report:
    """Compare the kernels of a generated module with the oracle at shapes (B, Hq, L).

    The oracle evaluates in float64 the same rounded inputs, with the blocks that the kernels chose; that choice is
    compared on its own.  `schedules` replaces the Schedules of some kernels; without any, what is compared are the
    kernels that the op takes for the shape.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        for shape in shapes:
            inputs = random_inputs(oracle, shape, dtype, device, seed)
            rows += compare(module, oracle, inputs, shape, schedules)
    return Report(module.__name__, tuple(rows))


INTERPRETED = 512  # tokens that Triton's interpreter takes in a minute or so


def default_shapes(spec: SPLASpec, device: str, few: int = 0) -> list[Shape]:
    """Lengths off the block grid, with more than a `few` blocks, which have kernels of their own, and with fewer.

    Few and short where kernels are interpreted: longer ones only where `few` blocks are at most INTERPRETED tokens.
    """
    block = spec.select.block_size if spec.select else 64
    if device == "cpu":
        lengths = [6 * block + 3, *([few * block + 3] if 6 < few <= INTERPRETED // block else [])]
        return [(1, spec.group_size, length) for length in lengths]
    lengths = [*([few * block - 5] if 0 < few * block < 1000 else []), 1000]
    return [*((1, 2 * spec.group_size, x) for x in lengths), (2, spec.group_size, max(64, few + 1) * block - 1)]


def random_inputs(
    oracle: Oracle, shape: Shape, dtype: torch.dtype, device: str | torch.device, seed: int
) -> dict[str, Tensor]:
    """Normal inputs and cotangents of an op by name; a drift tells blocks of keys apart, for the selection."""
    batch, heads, length = shape
    part, definition = oracle.partition, oracle.definition
    sizes = {a: e for a, e in definition.axes if isinstance(e, int)}
    group = sizes["g"]
    if heads % group:
        raise InputError(f"Hq = {heads} is not a multiple of group_size {group}", hint=f"try Hq = {group}")
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for a in (*part.inputs, *part.cotangents):
        v = definition.var(a.name)
        features = [sizes[x] for x in v.axes if x in ("d", "e")]
        match a.layout:
            case "head_rows":
                x = 1 + 0.3 * torch.randn(heads, *features, generator=draw)
            case "kv_head_scalars":
                x = 0.3 * torch.randn(heads // group, generator=draw)
            case _:
                x = torch.randn(batch, length, heads if "g" in v.axes else heads // group, *features, generator=draw)
        if a.name in ("k", "k_m"):
            blocks = -(-length // 16)
            drift = torch.randn(batch, blocks, heads // group, *features, generator=draw)
            x = x + 0.7 * drift.repeat_interleave(16, dim=1)[:, :length]
        found[a.name] = x.to(device=device, dtype=torch.float32 if a.layout == "kv_head_scalars" else dtype)
    return found


def compare(
    module: ModuleType,
    oracle: Oracle,
    inputs: Mapping[str, Tensor],
    shape: Shape,
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Row]:
    """Run forward and backward kernels on the inputs and compare everything with the oracle.

    Where no `schedules` are given and the op takes the kernels for few blocks, it is those.  Where the op takes torch's
    dense attention for the inputs, that is compared as well: `compare_dense`.
    """
    part = oracle.partition
    dtype = inputs[part.inputs[0].name].dtype
    arguments = [inputs[a.name] for a in part.inputs]
    compute = functions_of(module, arguments[0], schedules)
    results = compute.forward(compute.schedules, *arguments)
    results = results if isinstance(results, tuple) else (results,)
    outputs = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
    label = str(dtype).removeprefix("torch.")
    indices = outputs.get("block_indices")
    rows = _output_rows(oracle, inputs, shape, outputs, indices)
    if {"o_r", "n_unsel"} <= {a.name for a in part.saved}:
        none = outputs["n_unsel"] == 0
        residue = outputs["o_r"][none].abs().max().item() if none.any() else 0.0
        rows.append(Row("o_r where nothing is unselected", shape, label, residue, 0.0))
    if indices is not None:
        error = selection_error(oracle, inputs, indices, outputs["block_counts"])
        rows.append(Row("selection", shape, label, error, TOLERANCE[dtype][2]))
    residuals = [outputs[a.name] for a in part.residuals]

    def backward(cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = compute.backward(compute.schedules, *arguments, *residuals, *cotangents)
        return found

    rows += _gradient_rows(oracle, inputs, shape, indices, backward)
    if part.dense and module.takes_dense(arguments[0]):
        rows += compare_dense(module, oracle, inputs, shape)
    return rows


@dataclass(frozen=True)
class Functions:
    """What launches forward and backward of a module, and the Schedules for it."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    schedules: Mapping[str, Mapping[str, int]]


def functions_of(
    module: ModuleType, sizes: object, schedules: Mapping[str, Mapping[str, int]] | None = None
) -> Functions:
    """What the op takes for q, or the sizes of packed rows; with `schedules` in the place of some, always the same."""
    if schedules is None and hasattr(module, "takes_direct") and module.takes_direct(sizes):
        return Functions(module.direct_forward, module.direct_backward, module.own_schedules(sizes))
    return Functions(module.forward, module.backward, {**module.schedules_for(sizes), **(schedules or {})})


def compare_dense(module: ModuleType, oracle: Oracle, inputs: Mapping[str, Tensor], shape: Shape) -> list[Row]:
    """Compare what short sequences take, torch's attention and kernels beside it: quantities "dense ..."."""
    part = oracle.partition
    assert part.dense is not None
    arguments = [inputs[a.name] for a in part.inputs]
    results = module.dense_forward(*arguments)
    saved = [x for name, x in zip(part.dense.made, results, strict=True) if name in part.dense.saved]
    outputs = {a.name: x for a, x in zip(part.outputs, results, strict=False)}

    def backward(cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = module.dense_backward(*arguments, *saved, *cotangents)
        return found

    rows = _output_rows(oracle, inputs, shape, outputs, None, "dense ")
    return rows + _gradient_rows(oracle, inputs, shape, None, backward, "dense ")


def _output_rows(
    oracle: Oracle,
    inputs: Mapping[str, Tensor],
    shape: Shape,
    outputs: Mapping[str, Tensor],
    indices: Tensor | None,
    kind: str = "",
) -> list[Row]:
    part = oracle.partition
    dtype = inputs[part.inputs[0].name].dtype
    names = [a.name for a in part.outputs]
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    wanted = zip(names, oracle.values(exact, names, indices), strict=True)
    label, limit = str(dtype).removeprefix("torch."), TOLERANCE[dtype][0]
    return [Row(f"{kind}{n}", shape, label, relative_error(outputs[n], want), limit) for n, want in wanted]


def _gradient_rows(
    oracle: Oracle,
    inputs: Mapping[str, Tensor],
    shape: Shape,
    indices: Tensor | None,
    backward: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    kind: str = "",
) -> list[Row]:
    part = oracle.partition
    dtype = inputs[part.inputs[0].name].dtype
    truth, scales = oracle.gradients_and_scales(inputs, indices)
    largest = max(want.norm().item() for want in truth.values())
    factor = loss_scale(truth, dtype)
    label, limit, rows = str(dtype).removeprefix("torch."), TOLERANCE[dtype][1], []
    gradients = backward([factor * inputs[a.name] for a in part.cotangents])
    for (name, want), scaled in zip(truth.items(), gradients, strict=True):
        got = scaled.double() / factor
        scale = max(float(want.norm()), scales.get(name, 0.0))
        scale = scale if scale > 1e-9 * largest else largest
        rows.append(Row(f"{kind}d{name}", shape, label, relative_error(got, want, scale), limit))
    return rows


def loss_scale(truth: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """The factor of float16 cotangents, as dynamic loss scaling finds it: a power of two; 1 for other dtypes.

    The largest up to 2^10 that keeps every gradient below 2^14.  float16 loses digits below 6e-5, where cotangents of
    quotients by a long sum lie, and ends at 65504, which the gradients of unbounded feature maps can pass.
    """
    if dtype != torch.float16:
        return 1.0
    top = max(float(g.abs().max()) for g in truth.values())
    return 2.0 ** min(10, math.floor(14 - math.log2(top))) if top > 0 else 1.0


def relative_error(got: Tensor, want: Tensor, scale: float | None = None) -> float:
    """Relative RMS error |got - want| / |want| in float64; infinite where got is not finite.

    `scale` stands for |want| where the truth cancels: a parameter's gradient is a sum over all rows, and dq of a row
    that sees one key is exactly 0; their error is a share of the terms that cancel.
    """
    got, want = got.detach().double(), want.detach().double()
    if not bool(torch.isfinite(got).all()):
        return math.inf
    size = float(want.norm()) if scale is None else scale
    return float((got - want).norm()) / (size or 1.0)


def selection_error(oracle: Oracle, inputs: Mapping[str, Tensor], indices: Tensor, counts: Tensor) -> float:
    """How far the kernels' choice is from a best one: 0 if equal, small where scores tie, infinite if not a choice.

    For each row the best score left out minus the worst chosen, relative to the row's largest score.
    """
    ordered = (indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] < 0)
    if not bool(ordered.all()) or not torch.equal((indices >= 0).sum(-1).to(counts.dtype), counts):
        return math.inf
    score, far, free = oracle.selection(inputs)
    chosen = oracle.mask(inputs, indices)
    if bool((chosen & ~far).any()) or not torch.equal(chosen.sum(-1), free.sum(-1)):
        return math.inf
    worst = score.masked_fill(~chosen, math.inf).amin(-1)
    best = score.masked_fill(chosen | ~far, -math.inf).amax(-1)
    top = score.masked_fill(~far, 0).amax(-1).clamp(min=1e-300)
    gap = ((best - worst) / top).clamp(min=0)
    return float(gap.nan_to_num(0.0, posinf=0.0, neginf=0.0).max()) if gap.numel() else 0.0
