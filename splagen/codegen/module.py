"""One importable module per spec: kernels, launchers, Schedules and the registration of the op."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy as sp

from splagen.codegen.dense import Dense
from splagen.codegen.geometry import Geometry, is_parameter
from splagen.codegen.head_rounds import bytes_by_strategy, heads_are_alike, parts_text, rounds_text
from splagen.codegen.index_kernels import LEAST, chunks, index_kernels, schedule_of
from splagen.codegen.kernel import Array, Choice, Kernel
from splagen.codegen.launchers import launcher_text
from splagen.codegen.module_holes import (
    computed,
    content_of,
    equations_text,
    head,
    launch_line,
    op_holes,
    parameters,
    schedule_text,
    sources,
)
from splagen.codegen.partition import Partition
from splagen.codegen.render import kernel_text, render, unique
from splagen.codegen.schedule import default_schedules
from splagen.codegen.tile_code import Walk
from splagen.codegen.triton_expr import interval_text
from splagen.codegen.unions import union_shape
from splagen.errors import PartitionError
from splagen.ir.program import Map, Program, Var

# device functions that kernels call; a template each
FUNCTIONS = (
    "log1p", "tanh", "dot_split", "merge_topk", "union_of", "leading_factor", "one_of", "load_both"
)  # fmt: skip
_HEADS = {"query_rows": "Hq", "query_scalars": "Hq", "key_rows": "Hkv", "cell_rows": "Hkv"}
_SIZES = {"LONGEST": "L"}  # names of sizes in kernels that have another on the host


def module_text(part: Partition, *, name: str, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    program = part.program
    geometry, walk = Geometry.of(program), Walk.of(program)
    constants = constants_of(geometry, walk)
    inputs, residuals, cotangents = ([a.name for a in x] for x in (part.inputs, part.residuals, part.cotangents))
    gradients = [x for x, _ in part.gradients]
    kernels = sources(part.op_kernels, lambda k: _launcher(k, constants))
    host_lines, host_total = _host_count(walk)
    schedules = default_schedules(part.all_kernels, geometry, part.strategies)
    index = index_kernels(program, part.kernels)
    beside = [kernel_text(k) for k in part.dense.kernels] if part.dense else []
    op = f"{name}_{digest}_{content_of(kernels, schedules, *beside)}"
    registration = render(
        "registration",
        {
            **op_holes(part, geometry),
            "computed": computed(part, inputs[0], ", ".join(inputs), ", ".join([*inputs, *residuals, *cotangents])),
            "op": op,
            "name": name,
            "constants": constants,
            "schedules": schedule_text(schedules),
            "fakes": [_allocation(a, constants) for a in (*part.outputs, *part.saved)],
            "returned": _returned("backward_op", inputs, gradients, cotangents[0]),
            "parameters": parameters(part.inputs, geometry, queries="n.B, n.L", keys="n.B, n.L"),
            "dense": _dense_text(part, part.dense, op, constants) if part.dense else "",
            "chosen_op": f"op_for({inputs[0]})" if part.dense else "forward_op",
        },
    )
    return render(
        "module",
        {
            **head(f"{name}_{digest}", "", equations_text(program.equations), spec_text, kernels, FUNCTIONS),
            "constants": constants,
            "cells": geometry.cells,
            "parts": parts_text(constants, "n.B * n.nT", by_heads=heads_are_alike(program)),
            "inverse_index": render(
                "inverse_index",
                {
                    "constants": constants,
                    "host_count": host_lines,
                    "host_total": host_total,
                    "kernels": [kernel_text(k) for k in index],
                    "schedules": {k.name: schedule_of(k) for k in index},
                    "chunks": chunks(walk),
                    "least": LEAST,
                },
            ),
            "first": inputs[0],
            "passes": passes(part, part.inputs),
            "registration": registration,
        },
    )


def launcher(kernel: Kernel, constants: dict[str, int], allocation: Callable[[Array], str]) -> str:
    """The launcher of a kernel; `allocation` gives the host source that allocates what it fills."""
    grid = kernel.grid
    for name, value in constants.items():
        grid = re.sub(rf"\b{name}\b", str(value), grid)
    grid = re.sub(r"\b(B|L|Hq|Hkv|nT|nJ|nC)\b", r"n.\1", grid)
    scalars = [f"work.{s.lower()}" if s.startswith("SEGMENT") else f"n.{_SIZES.get(s, s)}" for s in kernel.scalars]
    return launcher_text(kernel, grid, allocation, scalars)


def _launcher(kernel: Kernel, constants: dict[str, int]) -> str:
    return launcher(kernel, constants, lambda a: _allocation(a, constants))


def _allocation(a: Array, constants: dict[str, int]) -> str:
    dtype = "n.dtype" if a.dtype == "input" else f"torch.{a.dtype}"
    match a.layout:
        case "query_rows" | "key_rows" | "query_scalars" | "cell_rows":
            length = "n.nC" if a.layout == "cell_rows" else "n.L"
            shape = ["n.B", length, f"n.{_HEADS[a.layout]}", *map(str, a.width)]
        case "states":
            shape = ["n.B", "n.Hkv", f"cdiv(n.L, {a.chunk}) + 1", *map(str, a.width)]
        case "sequences":
            shape = ["n.B", "n.Hkv", *map(str, a.width)]
        case "segments":
            shape = ["n.B", "n.Hkv", "work.segments", str(constants["BLOCK"]), *map(str, a.width)]
        case "parts":
            shape = ["n.B", "n.Hkv", "n.nT", str(constants["BUDGET"]), str(constants["TILE"] * constants["GROUP"])]
            shape += map(str, a.width)
        case "partials":
            shape = ["n.B * grid[0]", f"n.{a.features[-1]}", *map(str, a.width)]
        case "indices":
            shape = ["n.B", "n.Hkv", "n.nT", str(constants["BUDGET"])]
        case "counts":
            shape = ["n.B", "n.Hkv", "n.nT"]
        case "unions":
            shape = union_shape(constants["TILE"] * constants["GROUP"], constants["BUDGET"])
        case _:
            raise PartitionError(f"{a.name}: nobody allocates {a.layout}")
    return f"torch.empty({', '.join(shape)}, dtype={dtype}, device=n.device)"


def constants_of(geometry: Geometry, walk: Walk) -> dict[str, int]:
    """What kernels and host know as constants of the spec."""
    constants = {
        "GROUP": geometry.group,
        "TILE": geometry.tile,
        "BLOCK": geometry.block,
        "CHUNK": geometry.chunk,
    }
    if walk.chosen:
        constants["BUDGET"] = walk.budget
    return constants


def _host_count(walk: Walk) -> tuple[str, str]:
    """Python that counts the tiles that see block j by position."""
    found = walk.intervals("T")
    lines: list[str] = []
    names = {"J": "j", "L": "L"}
    for k, interval in enumerate(found):
        low, high = interval_text(interval, names, "nT", host=True)
        lines += [f"low_{k} = {low}", f"high_{k} = {high}"]
    return "\n".join(lines), " + ".join(f"max(high_{k} - low_{k}, 0)" for k in range(len(found)))


def chosen_calls(kernels: list[Kernel], choices: Sequence[Choice], keep: set[str], last: str) -> str:
    """Launches in order; those in which the options of a choice differ stand under its Schedule."""
    names = {k.name for k in kernels}
    for c in choices:
        if {k.name for k in c.options[0]} <= names:
            return _branches(c, kernels, keep, last)
    return "\n".join(_calls(kernels, keep, last))


def _branches(choice: Choice, kernels: list[Kernel], keep: set[str], last: str) -> str:
    first = {k.name for k in choice.options[0]}
    at = next(i for i, k in enumerate(kernels) if k.name in first)
    others = [k for k in kernels if k.name not in first]
    texts = [_calls([*others[:at], *option, *others[at:]], keep, last) for option in choice.options]
    same = 0
    while len({text[same] for text in texts}) == 1:
        same += 1
    end = 1
    while len({text[-end - 1] for text in texts}) == 1:
        end += 1
    given = f'schedules["{choice.name}"]["strategy"]'
    lines = [*texts[0][:same], f"strategy = fitting(n, {given}, {bytes_by_strategy(choice)})"]
    for i, text in enumerate(texts):
        lines.append(f"{'if' if i == 0 else 'elif'} strategy == {i}:")
        lines += [f"    {line}" for line in text[same:-end]]
    lines += [
        "else:",
        f'    raise ValueError(f"{choice.name} has strategies 0 to {len(texts) - 1}, not {{strategy}}")',
    ]
    return "\n".join([*lines, *texts[0][-end:]])


def _calls(kernels: list[Kernel], keep: set[str], last: str) -> list[str]:
    """Launches in order; an array is released after its last reader."""
    lines: list[str] = []
    for i, k in enumerate(kernels):
        later = {a.name for other in kernels[i + 1 :] for a in other.inputs} | keep
        if any(a.layout == "work" for a in k.inputs):
            indices = "block_indices" if "block_indices" in keep else "None"
            given = ", ".join(["n", *(a.name for a in k.inputs if a.layout == "bounds"), indices])
            index = f"work = inverse_index({given})"
            if index not in lines:
                lines.append(index)
        lines.append(launch_line(k.name, k.inputs, k.outputs))
        dead = [a.name for a in unique(k.inputs, k.outputs) if a.name not in later]
        if dead and i + 1 < len(kernels):
            lines.append(f"del {', '.join(dead)}")
    return [*lines, *last.splitlines()]


def passes(part: Partition, given: Sequence[Array], *numbers: str) -> list[dict[str, str]]:
    """The holes of the functions that launch forward and backward, and those for few blocks.

    `given` are what forward takes, and `numbers` what both take behind their tensors.
    """
    behind = [*given, *part.residuals, *part.cotangents]
    tensors, later = ([a.name for a in x] for x in (given, behind))
    results = [a.name for a in (*part.outputs, *part.saved)]
    gradients = ", ".join(x for x, _ in part.gradients)
    found = []
    ways = [("", "", part), *([("direct_", " for few blocks", part.direct.part)] if part.direct else [])]
    for prefix, among, one in ways:
        calls = _forward_calls(one, {*tensors, *results}), _backward_calls(one, set(later))
        for direction, names, arrays, made, text in (
            ("forward", tensors, given, ", ".join(results), calls[0]),
            ("backward", later, behind, f"the gradients of {gradients}", calls[1]),
        ):
            hole = {
                "name": f"{prefix}{direction}",
                "tensors": ", ".join(names),
                "doc": f"Launch the {direction} kernels{among}: returns {made}.",
                "rounds": rounds_text(one, direction, arrays, *numbers),
                "calls": text,
            }
            found.append(hole)
    return found


def _forward_calls(part: Partition, keep: set[str]) -> str:
    """Launches of forward, and outputs and saved rows."""
    last = f"return {', '.join(a.name for a in (*part.outputs, *part.saved))}"
    return chosen_calls(part.forward, part.strategies, keep, last)


def _backward_calls(part: Partition, given: set[str]) -> str:
    """Launches of backward, what makes gradients of partial sums, and the gradients in the order of the inputs."""
    geometry = Geometry.of(part.program)
    partials = _partials(part.backward)
    finish, results = _finished(part.gradients, part.inputs, part.program, partials, geometry)
    keep = given | set(partials) | {v.name for _, v in part.gradients}
    last = "\n".join([*finish, f"return {', '.join(results)}"])
    return chosen_calls(part.backward, part.strategies, keep, last)


def _partials(kernels: Sequence[Kernel]) -> dict[str, Array]:
    return {a.name: a for k in kernels for a in k.outputs if a.layout == "partials"}


def _finished(
    gradients: Sequence[tuple[str, Var]],
    inputs: Sequence[Array],
    program: Program,
    partials: dict[str, Array],
    geometry: Geometry,
) -> tuple[list[str], list[str]]:
    """Lines that make gradients of what kernels left, parts of sums over rows among it; what stands for each."""
    finish, results = [], []
    read: list[str] = []
    definitions = program.definitions

    def total(v: Var) -> str:
        if v.name in partials:
            a: Array = partials[v.name]
            read.append(a.name)
            data = [f for f in a.features if f not in ("Hq", "Hkv")]
            if not data:
                return f"{a.name}.sum(0).reshape(n.Hkv, -1).sum(1)"
            width = geometry.size(data[-1])
            return f"{a.name}.sum(0)" if a.width[-1] == width else f"{a.name}[..., :{width}].sum(0)"
        eq = definitions[v]
        assert isinstance(eq.op, Map)
        assert isinstance(eq.op.expr, sp.Add)
        return " + ".join(total(x) for x in eq.args)

    for name, v in gradients:
        if v.name in partials or is_parameter(v):
            read.clear()
            summed = total(v)
            arguments = ", ".join([*dict.fromkeys(read), name])
            finish.append(f"d_{name} = host(n, lambda {arguments}: ({summed}).to({name}.dtype), {arguments})")
            results.append(f"d_{name}")
        elif any(a.name == name and a.layout == "query_scalars" for a in inputs):
            cast = f"lambda {v.name}, {name}: {v.name}.to({name}.dtype)"
            finish.append(f"{v.name} = host(n, {cast}, {v.name}, {name})")
            results.append(v.name)
        else:
            results.append(v.name)
    return finish, results


def _dense_text(part: Partition, dense: Dense, op: str, constants: dict[str, int]) -> str:
    """What short sequences take: torch's attention, and kernels of the rows behind it."""
    attention, geometry = dense.attention, Geometry.of(dense.rows)
    inputs = [a.name for a in part.inputs]
    (output,), (cotangent,) = part.outputs, part.cotangents
    made = dense.made
    arrays = [output, replace(output, name=attention.o.name)] if dense.forward else [output]
    o_cotangent = f"d{attention.o.name}" if dense.backward else cotangent.name
    partials = _partials(dense.backward)
    finish, results = _finished(list(dense.gradients.items()), part.inputs, dense.rows, partials, geometry)
    found = {attention.q.name: "dq", attention.k.name: "dk", attention.v.name: "dv"}
    found |= dict(zip(dense.gradients, results, strict=True))
    differentiable = [n for n, _ in part.gradients]
    zero = "torch.zeros_like({}, memory_format=torch.contiguous_format)"
    gradients = [found.get(x, zero.format(x)) for x in differentiable]
    return render(
        "dense",
        {
            "op": op,
            "below": dense.below,
            "scale": repr(attention.scale),
            "earlier": attention.causal,
            "kernels": sources(dense.kernels, lambda k: _launcher(k, constants)),
            "inputs": inputs,
            "made": made,
            "saved": dense.saved,
            "kept": [made.index(x) for x in dense.saved],
            "cotangent": cotangent.name,
            "o": attention.o.name,
            "o_cotangent": o_cotangent,
            "forward": [launch_line(k.name, k.inputs, k.outputs) for k in dense.forward],
            "backward": [*(launch_line(k.name, k.inputs, k.outputs) for k in dense.backward), *finish],
            "rows_cotangents": [o_cotangent, *results],
            "differentiable": differentiable,
            "gradients": gradients,
            "returned": _returned("dense_backward_op", inputs, differentiable, cotangent.name),
            "fakes": [_allocation(a, constants) for a in arrays],
        },
    )


def _returned(op: str, inputs: Sequence[str], gradients: Sequence[str], cotangent: str) -> str:
    """Lines that return what autograd wants of an op's backward: None in the place of an input without a gradient."""
    call = f"apply({op}, *ctx.saved_tensors, {cotangent})"
    if len(gradients) == len(inputs):
        return f"return {call}"
    placed = ", ".join(f"d_{x}" if x in gradients else "None" for x in inputs)
    return f"{', '.join(f'd_{x}' for x in gradients)} = {call}\nreturn {placed}"
