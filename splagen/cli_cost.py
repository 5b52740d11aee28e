"""The table of `splagen show SPEC.toml --after cost`: what each kernel moves and multiplies, and its predicted time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from splagen.cli_cache import device_called
from splagen.terminal import emit, read_shape, table

if TYPE_CHECKING:
    from splagen.autotune.device import Device
    from splagen.codegen.compile import Module
    from splagen.codegen.decoding import Decoding
    from splagen.spec import Spec
    from splagen.verification import Shape

HEADS, LENGTH = 32, 65536  # of the shape that is taken if none is given


@dataclass(frozen=True)
class Row:
    """One kernel: its formulas as text, their values at a shape, and the predicted time.

    `alternative`: it takes the groups that another kernel leaves, strong decay, and is costed as if these were all.
    """

    kernel: str
    launched_in: list[str]
    alternative: bool
    bytes_formula: str
    flops_formula: str
    bytes: float
    flops: float
    programs: float
    ms: float
    bound: str


def show_cost(
    spec: Spec, shape: str | None, dtype: str | None, gpu: str | None, pages: str | None, as_json: bool
) -> None:
    """Print the table, or one JSON document; `pages`: of decoding, where B are sequences and L the tokens of each."""
    from splagen import pipeline
    from splagen.codegen.decoding import Decoding

    device, chosen = device_called(gpu or "H200"), dtype or "bf16"
    at = read_shape(shape) if shape else (1, max(HEADS // spec.group_size, 1) * spec.group_size, LENGTH)
    part = pipeline.module_kernels(spec, pages)
    found = rows(spec, part, at, chosen, device)
    listing = table("kernel", "bytes", "FLOPs", "MB", "GFLOP", "ms", "bound by")
    listing.title = f"B, H, L = {', '.join(map(str, at))}; {chosen}; {device.name}"
    for r in found:
        ms = f"({r.ms:.3f})" if r.alternative else f"{r.ms:.3f}"
        figures = [f"{r.bytes / 1e6:.1f}", f"{r.flops / 1e9:.1f}", ms]
        listing.add_row(r.kernel, r.bytes_formula, r.flops_formula, *figures, r.bound)
    totals = {}
    for name in ("step",) if pages else ("forward", "backward"):
        totals[name] = sum(r.ms for r in found if name in r.launched_in and not r.alternative)
        listing.add_row(f"all of {name}", "", "", "", "", f"{totals[name]:.3f}", "")
    document: dict[str, Any] = {
        "name": spec.name,
        "shape": at,
        "dtype": chosen,
        "gpu": device.name,
        "kernels": [asdict(r) for r in found],
        "total_ms": totals,
    }
    if isinstance(part, Decoding):
        formula, moved = floor(spec, part, at, chosen)
        least = 1e3 * moved / device.bandwidth
        listing.add_row("floor", formula, "", f"{moved / 1e6:.1f}", "", f"{least:.3f}", "bytes")
        document["floor"] = {"bytes_formula": formula, "bytes": moved, "ms": least}
    emit(document, as_json, listing)


def floor(spec: Spec, part: Decoding, shape: Shape, dtype: str) -> tuple[str, float]:
    """The bytes that a step has to move: the formula as text, and its value."""
    from splagen.autotune.cost import evaluate, run_sizes
    from splagen.autotune.step_cost import Step

    formula = Step.of(part, dtype).floor()
    return str(formula), evaluate(formula, run_sizes(spec, part, shape), "a step")


def rows(spec: Spec, part: Module, shape: Shape, dtype: str, device: Device) -> list[Row]:
    """A row for every kernel with its default Schedule, in the order of launches."""
    from splagen.autotune.cost import costs, default_schedules, evaluate, predict, run_sizes
    from splagen.codegen.decoding import Decoding

    sizes = run_sizes(spec, part, shape)
    made = costs(spec, part, default_schedules(spec, part, device.arch, dtype), dtype)
    passes = (
        {"step": part.kernels}
        if isinstance(part, Decoding)
        else {"forward": part.forward, "backward": part.backward, "step": getattr(part, "step", ())}
    )
    found = []
    for k in part.kernels:
        cost, predicted = made[k.name], predict(made[k.name], sizes, device)
        moved, flops, programs = (evaluate(x, sizes, k.name) for x in (cost.bytes, cost.flops, cost.programs))
        row = Row(
            kernel=k.name,
            launched_in=[p for p, steps in passes.items() if any(getattr(s, "name", "") == k.name for s in steps)],
            alternative=k.template == "chunk_loop" and not k.outputs,
            bytes_formula=str(cost.bytes),
            flops_formula=str(cost.flops),
            bytes=moved,
            flops=flops,
            programs=programs,
            ms=predicted.ms,
            bound=predicted.bound,
        )
        found.append(row)
    return found
