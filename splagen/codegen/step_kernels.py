"""One token per sequence on a table of states, in place: the recurrences at extent 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splagen.codegen.chunk_code import ChunkCode, tile_axes
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.recurrences import Recurrence, token_array
from splagen.codegen.region import padded_extent
from splagen.codegen.route_kernels import Router, routing
from splagen.ir.frontend_sse import SUFFIX, State, held_masks, recurrence_program, states
from splagen.ir.passes import copy_prop, drop_unused, run, share
from splagen.ir.products import pull_factors
from splagen.ir.program import Program, Var, slice_back
from splagen.ir.recurrence import restrict, single
from splagen.sse_spec import SSESpec


@dataclass(frozen=True)
class _Part:
    """What one kind of state does with a token."""

    program: Program
    loads: tuple[str, ...]
    state: str
    body: tuple[str, ...]
    out: str
    final: str
    arrays: tuple[Array, ...]


def step_program(spec: SSESpec, kind: State) -> Program:
    """The recurrence for one token."""
    program = recurrence_program(spec, kind)
    if kind == "sparse":
        program = restrict(program, "p", held_masks(spec))
    return run(single(program, ("i", "j", "l")), (share, copy_prop, share, pull_factors, share, copy_prop, drop_unused))


def step_kernel(spec: SSESpec, found: Sequence[Recurrence], router: Router | None, parts: int) -> Kernel:
    """The kernel of one step."""
    pieces = {kind: _part(spec, kind, r) for kind, r in zip(states(spec), found, strict=True)}
    value = next(v for v in pieces[states(spec)[0]].program.inputs if v.name == "v")
    v = token_array(found[0], _as_rows(value), name="v")
    arrays = {a.name: a for piece in pieces.values() for a in piece.arrays}
    masks = (
        [n for n in ("write", "read") if any(v.name == n for v in pieces["sparse"].program.inputs)] if router else []
    )
    routes = [routing("eta"), *(routing(f"{n}s") for n in masks), routing("chosen")] if router else []
    wide_d, wide_e = found[0].tiles
    d, e = found[0].sizes
    columns = [f"d_ok = d < {d}"] if wide_d != d else []
    columns += [f"e_ok = e < {e}"] if wide_e != e else []
    checks = [
        f"{a}_ok[{view}]" for a, view, n, w in (("d", ":, None", d, wide_d), ("e", "None, :", e, wide_e)) if n != w
    ]
    state_mask, other = " & ".join(checks) or "None", "0.0" if checks else "None"
    shared = pieces.get("shared")
    shared_loads: list[str] = []
    if shared:
        state = f"{shared.state} = tl.load(place_of_shared, mask={state_mask}, other={other})  # [D, BLOCK_E]"
        shared_loads = [*shared.loads, state]
    route = "key_head" if router and router.by_head else "0"
    holes = {
        "columns": "\n".join(columns),
        "e_mask": "e_ok" if wide_e != e else "e < " + str(e),
        "state_mask": state_mask,
        "other": other,
        "shared_loads": "\n".join(shared_loads),
        "group_lines": f"key_head = head // {spec.group_size}" if spec.group_size > 1 else "key_head = head",
        "router": route,
        "partition": "choice" if masks else f"tl.load(chosen_ptr + route * {router.choices if router else 0} + choice)",
        "parts": parts,
        "shared": shared,
        "sparse": pieces.get("sparse"),
        "first": int(spec.shared),
        "choices": router.choices if router else 0,
        "partitions": router.partitions if router else 1,
        "masks": "\n".join(
            f"{n} = tl.load({n}s_ptr + ({route} * {router.partitions if router else 1} + partition) * T + b) != 0"
            for n in masks
        ),
        "d_extent": wide_d,
        "e_size": e,
        "size": d * e,
    }
    return Kernel(
        "step",
        "step",
        tuple(eq for piece in pieces.values() for eq in piece.program.equations),
        (
            v,
            *(a for a in arrays.values() if a.name != "v"),
            *routes,
            Array("table", "state_table", dtype="float32"),
            routing("slots"),
        ),
        (Array("o", "value_rows", ("e",), (e,)),),
        holes,
        f"(S, HV, cdiv({wide_e}, BLOCK_E))",
        scalars=("T", "HV", "TABLE"),
        tunable=("BLOCK_E",),
    )


def _part(spec: SSESpec, kind: State, r: Recurrence) -> _Part:
    program = step_program(spec, kind)
    code = ChunkCode(program, scalars={"L": "1"})
    o, final = program.outputs
    equations = slice_back(program, [o, final], program.inputs)
    read = {v for eq in equations for v in eq.args}
    loads, arrays = [], []
    state = next(v for v in program.inputs if v.name == f"state{SUFFIX[kind]}")
    for v in program.inputs:
        if v == state or v.name in ("eta", "write", "read"):
            code.bind(v, v.name)
        elif v in read:
            array = token_array(r, _as_rows(v), name=v.name) if "b" in v.axes else token_array(r, v)
            arrays.append(array)
            code.bind(v, v.name)
            if v.name != "v":
                loads.append(f"{v.name} = {_load(array, v)}.to(tl.float32)")
    code.emit(equations)
    return _Part(program, tuple(loads), state.name, tuple(code.lines), code.names[o], code.names[final], tuple(arrays))


def _as_rows(v: Var) -> Var:
    """The variable as it lies in memory, with a row per sequence."""
    features = tile_axes(v)
    return Var(v.name, (*(a for a in v.axes if a not in features), "i", *features), v.kind)


def _load(array: Array, v: Var) -> str:
    if array.layout == "head_scalars":
        return f"tl.load({array.name}_ptr + head)"
    head = "head" if "g" in v.axes else "key_head"
    place = f"{array.name}_ptr + b.to(tl.int64) * {array.name}_t + {head} * {array.name}_h"
    if not array.features:
        return f"tl.load({place})"
    (f,) = array.features
    padded = padded_extent(array.width[0]) != array.width[0]
    return f"tl.load({place} + {f}, mask={f}_ok, other=0.0)" if padded else f"tl.load({place} + {f})"
