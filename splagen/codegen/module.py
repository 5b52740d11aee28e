"""One importable module per spec: kernels, launchers, Schedules and the registration of the op."""

from __future__ import annotations

import sympy as sp

from splagen.codegen.affine import Interval
from splagen.codegen.attention_kernels import Walk
from splagen.codegen.geometry import Geometry
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.partition import Partition
from splagen.codegen.predicates import T
from splagen.codegen.render import _allocation, kernel_text, launcher_text, render, unique
from splagen.codegen.schedule import default_schedules
from splagen.codegen.triton_expr import interval_text
from splagen.ir.program import Map, Var
from splagen.ir.text import equation_text

GENERATOR = 1  # bumped when the text or the numbers of kernels change on purpose


def module_text(part: Partition, *, title: str, name: str, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    program = part.program
    geometry = Geometry.of(program)
    walk = Walk.of(program)
    constants = _constants(geometry, walk)
    inputs = [a.name for a in part.inputs]
    cotangents = [a.name for a in part.cotangents]
    saved = [a.name for a in part.saved]
    kernels = [{"device": kernel_text(k), "host": launcher_text(k, constants)} for k in part.kernels]
    host_lines, host_total = _host_count(walk)
    gradients = [n for n, _ in part.gradients]
    forward_out = [a.name for a in (*part.outputs, *part.saved)]
    schedules = default_schedules(part.kernels, geometry)
    registration = render(
        "registration",
        {
            "op": f"{name}_{digest}",
            "name": name,
            "inputs": inputs,
            "saved": saved,
            "outputs": [a.name for a in part.outputs],
            "cotangents": cotangents,
            "gradients": gradients,
            "schedules": _schedule_text(schedules),
            "fakes": [{"name": a.name, "value": _allocation(a, constants)} for a in (*part.outputs, *part.saved)],
            "group": geometry.group,
            "head_dim": geometry.head_dim,
            "value_dim": geometry.value_dim,
            "parameters": [_parameter(a, geometry) for a in part.inputs[3:]],
        },
    )
    return render(
        "module",
        {
            "title": title,
            "equations": "\n".join(equation_text(eq) for eq in program.equations),
            "generator": GENERATOR,
            "spec": spec_text,
            "constants": constants,
            "cells": geometry.cells,
            "host_count": host_lines,
            "host_total": host_total,
            "kernels": kernels,
            "inputs": ", ".join(inputs),
            "forward_doc": f"Launch the forward kernels: returns {', '.join(forward_out)}.",
            "first": inputs[0],
            "forward": _calls(part.forward, {*inputs, *forward_out}, f"return {', '.join(forward_out)}"),
            "backward_inputs": ", ".join([*inputs, *saved, *cotangents]),
            "backward_doc": f"Launch the backward kernels: returns the gradients of {', '.join(gradients)}.",
            "backward": _backward(part, geometry, {*inputs, *saved, *cotangents}),
            "registration": registration,
        },
    )


def _constants(geometry: Geometry, walk: Walk) -> dict[str, int]:
    constants = {
        "GROUP": geometry.group,
        "TILE": geometry.tile,
        "BLOCK": geometry.block,
        "CHUNK": geometry.chunk,
    }
    if walk.chosen:
        constants["BUDGET"] = walk.program.definitions[walk.chosen].op.k  # type: ignore[union-attr]
    return constants


def _host_count(walk: Walk) -> tuple[str, str]:
    """Python that counts the tiles that see block j by position."""
    facts = {walk.chosen: False} if walk.chosen else {}
    found: list[Interval] = walk.predicates.intervals(walk.seen, T, facts)
    lines, names = [], {"J": "j", "L": "L"}
    for k, interval in enumerate(found):
        low, high = interval_text(interval, names, "nT", host=True)
        lines += [f"low_{k} = {low}", f"high_{k} = {high}"]
    return "\n".join(lines), " + ".join(f"high_{k} - low_{k}" for k in range(len(found)))


def _calls(kernels: list[Kernel], keep: set[str], last: str) -> str:
    """Launches in order; an array is released after its last reader."""
    lines = []
    for i, k in enumerate(kernels):
        later = {a.name for other in kernels[i + 1 :] for a in other.inputs} | keep
        arguments = ", ".join(["n", f'schedules["{k.name}"]', *(a.name for a in k.inputs)])
        call = f"launch_{k.name}({arguments})"
        if any(a.layout == "work" for a in k.inputs) and not any("work =" in line for line in lines):
            indices = "block_indices" if "block_indices" in keep else "None"
            lines.append(f"work = inverse_index(n, {indices})")
        outputs = ", ".join(a.name for a in k.outputs)
        lines.append(f"{outputs} = {call}" if outputs else call)
        dead = [a.name for a in unique(k.inputs, k.outputs) if a.name not in later]
        if dead and i + 1 < len(kernels):
            lines.append(f"del {', '.join(dead)}")
    return "\n".join([*lines, last])


def _backward(part: Partition, geometry: Geometry, given: set[str]) -> str:
    finish, results = [], []
    definitions = part.program.definitions
    partials = {a.name: a for k in part.backward for a in k.outputs if a.layout == "partials"}

    def total(v: Var) -> str:
        if v.name in partials:
            a: Array = partials[v.name]
            data = [f for f in a.features if f not in ("Hq", "Hkv")]
            if not data:
                return f"{a.name}.sum(0).reshape(n.Hkv, -1).sum(1)"
            return f"{a.name}.sum(0)[:, : {geometry.size(data[-1])}]"
        eq = definitions[v]
        assert isinstance(eq.op, Map) and isinstance(eq.op.expr, sp.Add)
        return " + ".join(total(x) for x in eq.args)

    for name, v in part.gradients:
        if v.name in partials or isinstance(definitions.get(v) and definitions[v].op, Map) and not v.axes[:1] == ("b",):
            finish.append(f"d_{name} = ({total(v)}).to({name}.dtype)")
            results.append(f"d_{name}")
        else:
            results.append(v.name)
    keep = given | set(partials) | {v.name for _, v in part.gradients}
    return _calls(part.backward, keep, "\n".join([*finish, f"return {', '.join(results)}"]))


def _schedule_text(schedules: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    lines = ["SCHEDULES = {"]
    for arch, by_dtype in schedules.items():
        lines.append(f'    "{arch}": {{')
        for dtype, by_kernel in by_dtype.items():
            lines.append(f'        "{dtype}": {{')
            for kernel, schedule in by_kernel.items():
                fields = ", ".join(f'"{k}": {v}' for k, v in schedule.items())
                lines.append(f'            "{kernel}": {{{fields}}},')
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def _parameter(a: Array, geometry: Geometry) -> dict[str, str]:
    """Name and shape of an input beside q, k, v, as the op's check wants it."""
    shapes = {
        "head_rows": f"(n.Hq, {geometry.value_dim})",
        "kv_head_scalars": "(n.Hkv,)",
        "query_scalars": "(n.B, n.L, n.Hq)",
    }
    return {"name": a.name, "shape": shapes[a.layout]}
