"""One importable module per SSE spec: kernels, launchers, plans of rows, Schedules and the registration of the op."""

from __future__ import annotations

import re
from collections.abc import Sequence

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.launchers import launcher_text
from splagen.codegen.module_holes import content_of, equations_text, head, launch_line, schedule_text, sources
from splagen.codegen.render import render, unique
from splagen.codegen.sequence_partition import Host, SequencePartition, Step
from splagen.codegen.sequence_schedule import default_schedules
from splagen.errors import PartitionError
from splagen.sse_spec import SSESpec

FUNCTIONS = (
    "log1p", "tanh", "largest", "unit_inverse", "dot_fine",
    "decay_reach", "decayed_scores", "decayed_rows", "decayed_columns",
)  # fmt: skip
SCALARS = {
    "SEGMENTS": "{plan}.segments",
    "SLOTS": "{plan}.slots",
    "LENGTH": "{plan}.length",
    "ROWS": "sums.shape[0]",
    "HEADS": "n.routers",
    "TABLE": "table.shape[0]",
}


def sequence_module_text(part: SequencePartition, spec: SSESpec, *, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    kernels = sources(part.kernels, _launcher)
    schedules = default_schedules(part.kernels, spec)
    stem = f"{spec.name}_{digest}"
    inputs = [a.name for a in part.inputs]
    outputs = ["o", "final", *(["balance"] if part.balanced else [])]
    equations = "\n\n".join(f"{title}\n{equations_text(x.equations)}" for title, x in part.programs.items())
    return render(
        "sequence_module",
        {
            **head(stem, ": linear, with expanded states", equations, spec_text, kernels, FUNCTIONS),
            "name": spec.name,
            "op": f"{stem}_{content_of(kernels, schedules)}",
            "inputs": inputs,
            "outputs": outputs,
            "rows": [_row(a, spec) for a in part.inputs],
            "gradients": [f"d{x}" for x in inputs],
            "forward": _calls(part.forward, {*inputs, *outputs, "state"}),
            "backward": _calls(part.backward, {*inputs, "state", "dstate", *(f"d{x}" for x in (*inputs, *outputs))}),
            "step": _calls(part.step, {*inputs, "table", "slots", "o"}),
            "schedules": schedule_text(schedules),
            "head_dim": spec.head_dim,
            "value_dim": spec.value_dim,
            "group_size": spec.group_size,
            "parts": part.parts,
            "choices": part.choices,
            "partitions": spec.router.partitions if spec.router else 1,
            "by_head": part.by_head,
            "router": part.balanced,
            "first_key": next(a.name for a in part.inputs if a.name.startswith("k")),
        },
    )


def _launcher(kernel: Kernel) -> str:
    plan = next((a.name for a in kernel.inputs if a.layout == "plan"), "")
    grid = re.sub(r"\b(T|HV|H|S)\b", r"n.\1", kernel.grid)
    scalars = [SCALARS.get(s, f"n.{s}").format(plan=plan) for s in kernel.scalars]
    return launcher_text(kernel, grid, lambda a: _allocation(a, kernel, plan), scalars)


def _allocation(a: Array, kernel: Kernel, plan: str) -> str:
    width = list(map(str, a.width))
    several = [str(a.partitions)] if a.partitions > 1 else []
    dtype = "n.dtype" if a.dtype == "input" else f"torch.{a.dtype}"
    match a.layout:
        case "token_rows":
            if a.name == "dlogits":
                return "torch.empty(logits.shape, dtype=torch.float32, device=n.device)"
            shape = ["n.T", "n.H", *width]
        case "value_rows":
            shape = ["n.T", "n.HV", *width]
        case "group_states":
            shape = [f"{plan}.groups", *several, "n.HV", *width]
        case "chunk_states":
            shape = [f"cdiv({plan}.slots, CHUNK) + {plan}.segments + 1", *several, "n.HV", *width]
        case "slot_rows":
            shape = [*several, f"{plan}.slots", "n.HV", *width]
        case "state_table":  # the scan over groups writes all of it
            start = next(x.name for x in kernel.inputs if x.layout == "state_table")
            return f"torch.empty({start}.shape, dtype={dtype}, device=n.device)"
        case "group_totals":
            return f"zeros(n, {plan}.groups, n.HV)"
        case "routing":
            return _routing(a, kernel)
        case _:
            raise PartitionError(f"{a.name}: nobody allocates {a.layout}")
    return f"torch.empty({', '.join(shape)}, dtype={dtype}, device=n.device)"


def _routing(a: Array, kernel: Kernel) -> str:
    holes = kernel.holes
    match a.name:
        case "eta":
            shape, dtype = f"grid[1], n.T, {holes['partitions']}", "float32"
        case "writes" | "reads":
            shape, dtype = f"grid[1], {holes['partitions']}, n.T", "int32"
        case "chosen":
            shape, dtype = f"grid[1], n.T, {holes['choices']}", "int32"
        case "sums":
            shape, dtype = f"grid[0] * grid[1], {holes['sums']}", "float32"
        case "totals":
            shape, dtype = f"{len(holes['kinds'])}, {holes['padded']}", "float32"  # type: ignore[arg-type]
        case "balance":
            shape, dtype = "()", "float32"
        case _:
            raise PartitionError(f"nobody allocates {a.name}")
    return f"torch.empty({shape}, dtype=torch.{dtype}, device=n.device)"


def _calls(steps: Sequence[Step], keep: set[str]) -> str:
    """Launches in order; an array is released after its last reader."""
    lines: list[str] = []
    for i, step in enumerate(steps):
        if isinstance(step, Host):
            lines += step.lines
            continue
        lines.append(launch_line(step.name, step.inputs, step.outputs))
        text = " ".join(
            [line for s in steps[i + 1 :] if isinstance(s, Host) for line in s.lines]
            + [a.name for s in steps[i + 1 :] if isinstance(s, Kernel) for a in s.inputs]
        )
        later = set(re.findall(r"\w+", text)) | keep
        dead = [a.name for a in unique(step.inputs, step.outputs) if a.name not in later and a.layout != "plan"]
        if dead and i + 1 < len(steps):
            lines.append(f"del {', '.join(dead)}")
    return "\n".join(lines)


def _row(a: Array, spec: SSESpec) -> dict[str, object]:
    """Name, heads and width of an input of rows, as the op's check wants it."""
    heads = {"token_rows": "n.H", "value_rows": "n.HV", "head_scalars": "n.HV"}[a.layout]
    width = f", {a.width[0]}" if a.width else ""
    if a.name == "logits" and spec.router and spec.router.scope == "token":
        return {"name": a.name, "shape": f"(n.T{width})", "constant": False, "like": False}
    constant = a.layout == "head_scalars"
    shape = f"({heads},)" if constant else f"(n.T, {heads}{width})"
    return {"name": a.name, "shape": shape, "constant": constant, "like": a.name[0] in "qkv"}
