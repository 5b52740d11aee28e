"""A generated SSE op against the oracle: outputs, final states, balance loss and every gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from splagen.codegen.sequence_partition import parts_of
from splagen.errors import InputError
from splagen.ir.program import Var
from splagen.sequence import SSEOracle
from splagen.sse_spec import SSESpec
from splagen.verification import Report, Row, Shape, loss_scale, relative_error

# Limits on the relative RMS error, by dtype: (outputs, gradients).
TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (4e-3, 5e-3),
}
STRONG = -5.0  # a log decay under which a state lives for one token


def verify(
    module: ModuleType,
    oracle: SSEOracle,
    *,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | torch.device = "cpu",
    seed: int = 0,
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> Report:
    """Compare the kernels of a generated module with the oracle at shapes (B, H, L), H heads of v.

    Each shape is compared as B sequences of length L; as as many tokens packed into sequences of uneven lengths, of
    which one is empty and one a single token; and packed with a decay that forgets at once.  The oracle evaluates in
    float64 the same rounded inputs.  `schedules` replaces the Schedules of some kernels.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        for shape in shapes:
            for case, lengths, decay in cases(oracle.spec, shape):
                inputs = random_inputs(oracle, lengths, shape[1], dtype, device, seed, decay)
                rows += compare(module, oracle, inputs, shape, case, schedules)
    return Report(module.__name__, tuple(rows))


def default_shapes(spec: SSESpec, device: str) -> list[Shape]:
    """Lengths off the grid of chunks; on a GPU of more rows than a group has; short where kernels are interpreted."""
    if device == "cpu":
        return [(1, spec.group_size, 67)]
    return [(1, 2 * spec.group_size, 1000), (2, spec.group_size, 2077)]


def cases(spec: SSESpec, shape: Shape) -> list[tuple[str, list[int], float | None]]:
    """Name, lengths and decay (None: random) of every case of a shape."""
    batch, _, length = shape
    last = (batch * length - 1) // 3
    packed = [batch * length - 1 - last, 0, 1, last]
    found: list[tuple[str, list[int], float | None]] = [("", [length] * batch, None), (", packed", packed, None)]
    return found if spec.backbone == "none" else [*found, (", strong decay", packed, STRONG)]


def random_inputs(
    oracle: SSEOracle,
    lengths: Sequence[int],
    heads: int,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int,
    decay: float | None = None,
) -> dict[str, Tensor]:
    """Arguments of the module's `forward` by name, and cotangents of its outputs; `decay` is every log decay.

    Rows are normal, decays at most 0, beta in (0, 1).  The balance loss is a mean: its cotangent is as large as the
    number of tokens, so that its share of the gradient of the logits is seen.
    """
    spec = oracle.spec
    if heads % spec.group_size:
        hint = f"try H = {spec.group_size}"
        raise InputError(f"H = {heads} is not a multiple of group_size {spec.group_size}", hint=hint)
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw)

    found: dict[str, Tensor] = {}
    for name, v in _variables(oracle).items():
        x = normal(*_extents(v, oracle, tokens, heads))
        if name.startswith("g"):
            x = -0.3 * x.abs() if decay is None else torch.full_like(x, decay)
        if name.startswith("beta"):
            x = x.sigmoid()
        found[name] = x.to(dtype) if name[0] in "qkv" else x
    found["state"] = 0.5 * normal(len(lengths), parts_of(spec), heads, spec.head_dim, spec.value_dim)
    found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found["do"] = normal(*found["v"].shape).to(dtype)
    found["dfinal"] = 0.3 * normal(*found["state"].shape)
    if spec.router:
        found["dbalance"] = torch.tensor(0.7 * tokens)
    return {n: x.to(device) for n, x in found.items()}


def _variables(oracle: SSEOracle) -> dict[str, Var]:
    """The variable behind each tensor of rows."""
    programs = [*oracle.programs.values(), *([oracle.router] if oracle.router else [])]
    known = {v.name: v for p in programs for v in p.inputs}
    return {n: known[n] for n in oracle.names}


def _extents(v: Var, oracle: SSEOracle, tokens: int, heads: int) -> list[int]:
    """[T(, heads)(, features)], or [heads] of a decay that is the same for all tokens."""
    spec = oracle.spec
    features = {"d": spec.head_dim, "e": spec.value_dim, "p": spec.router.partitions if spec.router else 1}
    head = [heads if "g" in v.axes else heads // spec.group_size] if "h" in v.axes else []
    rows = [tokens] if {"i", "j"} & set(v.axes) else []
    return [*rows, *head, *(features[a] for a in v.axes if a in features)]


def compare(
    module: ModuleType,
    oracle: SSEOracle,
    inputs: Mapping[str, Tensor],
    shape: Shape,
    case: str = "",
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Row]:
    """Run forward and backward kernels on the inputs and compare everything with the oracle."""
    dtype = inputs["v"].dtype
    limits = TOLERANCE[dtype]
    label = str(dtype).removeprefix("torch.")
    chosen = {**module.schedules_for(inputs["v"]), **(schedules or {})}
    arguments = [inputs[n] for n in (*oracle.names, "state", "cu_seqlens")]
    rows = []

    def add(quantity: str, got: Tensor, want: Tensor, scale: float | None, limit: float) -> None:
        rows.append(Row(quantity + case, shape, label, relative_error(got, want, scale), limit))

    wanted = oracle.values(inputs)
    for (name, want), got in zip(wanted.items(), module.forward(chosen, *arguments), strict=True):
        add(name, got, want, None, limits[0])
    truth = oracle.gradients(inputs)
    factor = loss_scale(truth, dtype)
    cotangents = [factor * inputs[f"d{n}"] for n in wanted]
    scales = gradient_scales(oracle, inputs, truth, limits[1])
    for name, scaled in zip(truth, module.backward(chosen, *arguments, *cotangents), strict=True):
        add(f"d{name}", scaled.double() / factor, truth[name], scales[name], limits[1])
    return rows


def gradient_scales(
    oracle: SSEOracle, inputs: Mapping[str, Tensor], truth: Mapping[str, Tensor], limit: float
) -> dict[str, float]:
    """What the error of each gradient is divided by: its norm, or that of the largest where the truth is nearly 0.

    The gradient of a log decay sums terms like q dq, which cancel to what is left of a state one token later.  Its
    error is a share of itself or, as that of any sum in float32, of its terms.  That of a decay which all tokens have
    in common is a sum over them, as a parameter's: a share of the root sum of squares of what each token gives.
    """
    norms = {n: float(want.norm()) for n, want in truth.items()}
    largest = max(norms.values())
    scales = {n: norm if norm > 1e-9 * largest else largest for n, norm in norms.items()}
    share = TOLERANCE[torch.float32][1] / limit
    for name in scales:
        if name.startswith("g"):
            q = f"q{name.removeprefix('g')}"
            scales[name] = max(scales[name], share * float((inputs[q].double() * truth[q]).norm()))
    if oracle.spec.backbone == "constant":
        for name, of_tokens in gradients_of_tokens(oracle, inputs).items():
            scales[name] = max(scales[name], float(of_tokens.norm()))
    return scales


def gradients_of_tokens(oracle: SSEOracle, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each token gives to the gradient of a decay that all have in common: [T, HV] by the decay's name."""
    apart = SSEOracle(replace(oracle.spec, backbone="scalar"))
    tokens = len(inputs["v"])
    given = {n: x.expand(tokens, -1) if n.startswith("g") else x for n, x in inputs.items()}
    return {n: g for n, g in apart.gradients(given).items() if n.startswith("g")}
