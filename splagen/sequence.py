"""SSE on CPU tensors and as a reference: the definition, evaluated sequence by sequence and chunk by chunk.

A recurrence equals itself under composition, so a chunk is the same Program at a shorter length, from the state that
the chunks before it reached; its derived gradient runs the chunks backwards, from the cotangent of the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splagen.ir.frontend_sse import State, recurrence_program, router_program, states
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import drop_unused, share
from splagen.ir.program import Program, Var
from splagen.ir.reference import evaluate
from splagen.sse_spec import SSESpec

CHUNK = 32  # rows evaluated at once: pairs of rows times features stay small


class SSEOracle:
    """Outputs and gradients of a spec in float64.

    Tensors are those of the generated op: rows q, k [T, H, D], v and o [T, HV, E], decays [T, HV] or [T, H, D] or [HV],
    beta [T, HV], logits [T, N] or [T, H, N], state [S, parts, HV, D, E], cu_seqlens [S + 1].
    """

    def __init__(self, spec: SSESpec) -> None:
        """Programs of the spec, each with its derived gradient."""
        self.spec = spec
        self.programs: dict[State, Program] = {
            kind: drop_unused(share(derive_gradient(recurrence_program(spec, kind)))) for kind in states(spec)
        }
        self.router = share(derive_gradient(router_program(spec))) if spec.router else None
        self.names = input_names(spec)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """o, the final states and, with a router, the balance loss, of the op's arguments."""
        given = dict(zip((*self.names, "state", "cu_seqlens"), tensors, strict=True))
        found = self.values(given)
        return tuple(x.to(given["v"].dtype if n == "o" else torch.float32).contiguous() for n, x in found.items())

    def backward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the rows and of the initial states."""
        outputs = ["o", "final", *(["balance"] if self.router else [])]
        names = (*self.names, "state", "cu_seqlens", *(f"d{n}" for n in outputs))
        given = dict(zip(names, tensors, strict=True))
        found = self.gradients(given)
        return tuple(found[n].to(given[n].dtype).contiguous() for n in (*self.names, "state"))

    def values(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """o, final and balance by name."""
        x = _doubles(given)
        routed = self._routed(x)
        o = torch.zeros(x["v"].shape, dtype=torch.float64, device=x["v"].device)
        final = x["state"].clone()
        for kind, sample, rows in self._segments(x):
            state = self._state(x["state"][sample], kind)
            for chunk in _chunks(rows):
                out, state = self._chunk(kind, x, routed, chunk, state)
                o[chunk] += out
            self._state(final[sample], kind).copy_(state)
        return {"o": o, "final": final, **({"balance": routed["balance"]} if self.router else {})}

    def gradients(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of every row input and of state by name, from cotangents do, dfinal, dbalance."""
        x = _doubles(given)
        routed = self._routed(x)
        total = {n: torch.zeros_like(x[n]) for n in (*self.names, "state")}
        deta = torch.zeros_like(routed["eta"]) if self.router else None
        for kind, sample, rows in self._segments(x):
            state, before = self._state(x["state"][sample], kind), []
            for chunk in _chunks(rows):
                before.append(state)
                state = self._chunk(kind, x, routed, chunk, state)[1]
            dstate = self._state(x["dfinal"][sample], kind)
            for chunk, state in zip(reversed(_chunks(rows)), reversed(before), strict=True):
                found = self._chunk_gradients(kind, x, routed, chunk, state, dstate)
                for name, g in found.items():
                    if name == "eta":
                        assert deta is not None
                        deta[chunk] += g
                    elif name.startswith("state"):
                        dstate = g
                    elif total[name].ndim == 1:
                        total[name] += g
                    else:
                        total[name][chunk] += g
            self._state(total["state"][sample], kind).copy_(dstate)
        if self.router:
            assert deta is not None
            total["logits"] = self._router_gradient(x["logits"], deta, x["dbalance"])
        return total

    # -- parts -----------------------------------------------------------------------------------------------------

    def _routed(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates and masks of all tokens [T, (H,) N], and the balance loss."""
        p = self.router
        if p is None:
            return {}
        eta, balance = p.outputs
        wanted = [eta, balance, p.var("write"), *([p.var("read")] if "read" in p.names() else [])]
        if not x["v"].shape[0]:
            empty = torch.zeros_like(x["logits"])
            return {"eta": empty, "write": empty > 0, "read": empty > 0, "balance": empty.sum()}
        found = evaluate(
            p, {"logits": _to_axes(x["logits"], p.inputs[0], 1)}, scalars={"L": x["v"].shape[0]}, wanted=wanted
        )
        routed = {"eta": _from_axes(found[eta.name], eta), "balance": found[balance.name]}
        return routed | {n: _from_axes(found[n], p.var(n)) for n in ("write", "read") if n in found}

    def _router_gradient(self, logits: Tensor, deta: Tensor, dbalance: Tensor) -> Tensor:
        p = self.router
        assert p is not None
        if not logits.shape[0]:
            return torch.zeros_like(logits)
        (_, de), (_, dl) = p.cotangents
        given = {"logits": _to_axes(logits, p.inputs[0], 1), de.name: _to_axes(deta, de, 1), dl.name: dbalance}
        ((x, g),) = p.gradients
        found = evaluate(p, given, scalars={"L": logits.shape[0]}, wanted=[g])
        return _from_axes(found[g.name], x)

    def _segments(self, x: Mapping[str, Tensor]) -> list[tuple[State, int, slice]]:
        ends = x["cu_seqlens"].tolist()
        samples = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        return [(kind, n, rows) for kind in self.programs for n, rows in enumerate(samples)]

    def _state(self, table: Tensor, kind: State) -> Tensor:
        """States of one kind of a sample: [HV, D, E] or [parts, HV, D, E], a view."""
        if kind == "shared":
            return table[0]
        return table[1:] if self.spec.shared else table

    def _arguments(
        self, kind: State, x: Mapping[str, Tensor], routed: Mapping[str, Tensor], chunk: slice, state: Tensor
    ) -> dict[str, Tensor]:
        program, group = self.programs[kind], self.spec.group_size
        given = {}
        for v in program.inputs:
            if v.name.startswith("state"):
                given[v.name] = _state_to_axes(state, v, group)
            elif v.name in ("eta", "write", "read"):
                given[v.name] = _to_axes(routed[v.name][chunk], v, group)
            elif v.name in x:
                rows = x[v.name] if not {"i", "j"} & set(v.axes) else x[v.name][chunk]
                given[v.name] = _to_axes(rows, v, group)
        return given

    def _chunk(
        self, kind: State, x: Mapping[str, Tensor], routed: Mapping[str, Tensor], chunk: slice, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        program = self.programs[kind]
        o, final = program.outputs
        given = self._arguments(kind, x, routed, chunk, state)
        found = self._evaluate(program, given, chunk, [o, final])
        return _from_axes(found[o.name], o), _state_from_axes(found[final.name], final)

    def _chunk_gradients(
        self,
        kind: State,
        x: Mapping[str, Tensor],
        routed: Mapping[str, Tensor],
        chunk: slice,
        state: Tensor,
        dstate: Tensor,
    ) -> dict[str, Tensor]:
        program, group = self.programs[kind], self.spec.group_size
        (_, do), (_, dfinal) = program.cotangents
        given = self._arguments(kind, x, routed, chunk, state)
        given[do.name] = _to_axes(x["do"][chunk], do, group)
        given[dfinal.name] = _state_to_axes(dstate, dfinal, group)
        found = self._evaluate(program, given, chunk, [g for _, g in program.gradients])
        back = {}
        for v, g in program.gradients:
            is_state = v.name.startswith("state")
            back[v.name] = _state_from_axes(found[g.name], v) if is_state else _from_axes(found[g.name], v)
        return back

    def _evaluate(
        self, program: Program, given: Mapping[str, Tensor], chunk: slice, wanted: Sequence[Var]
    ) -> dict[str, Tensor]:
        length = chunk.stop - chunk.start
        sizes = {"i": length, "j": length, "l": length}
        return evaluate(program, given, scalars={"L": length}, sizes=sizes, wanted=list(dict.fromkeys(wanted)))


def input_names(spec: SSESpec) -> tuple[str, ...]:
    """The op's tensors of rows, in order."""
    names = []
    for kind in states(spec):
        n = "1" if kind == "shared" else "2"
        names += [f"q{n}", f"k{n}"]
        names += [f"g{n}"] if spec.backbone != "none" else []
        names += [f"beta{n}"] if spec.backbone == "delta" else []
    return (*names, *(["logits"] if spec.router else []), "v")


def _doubles(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.double() if x.is_floating_point() else x for n, x in given.items()}


def _chunks(rows: slice) -> list[slice]:
    return [slice(a, min(a + CHUNK, rows.stop)) for a in range(rows.start, rows.stop, CHUNK)]


def _to_axes(x: Tensor, v: Var, group: int) -> Tensor:
    """Rows [T, heads, ...] as [1, h(, g), T(, features)]; a constant [HV] as [h, g]."""
    if not {"i", "j"} & set(v.axes):
        return x.reshape(-1, group)
    if "g" in v.axes:
        x = x.reshape(x.shape[0], -1, group, *x.shape[2:]).permute(1, 2, 0, *range(3, x.ndim + 1))
    elif "h" in v.axes:
        x = x.transpose(0, 1)
    return x.unsqueeze(0)


def _from_axes(x: Tensor, v: Var) -> Tensor:
    """The inverse."""
    if not {"i", "j"} & set(v.axes):
        return x.reshape(-1)
    x = x[0]
    if "g" in v.axes:
        return x.permute(2, 0, 1, *range(3, x.ndim)).flatten(1, 2)
    return x.transpose(0, 1) if "h" in v.axes else x


def _state_to_axes(state: Tensor, v: Var, group: int) -> Tensor:
    """[HV, D, E] or [parts, HV, D, E] as [1, h, g(, p), d, e]."""
    if "p" not in v.axes:
        return state.reshape(1, -1, group, *state.shape[1:])
    return state.reshape(state.shape[0], -1, group, *state.shape[2:]).permute(1, 2, 0, 3, 4).unsqueeze(0)


def _state_from_axes(x: Tensor, v: Var) -> Tensor:
    x = x[0].flatten(0, 1)
    return x.transpose(0, 1) if "p" in v.axes else x
