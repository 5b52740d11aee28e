"""The kernels of an SSE spec's programs, in the order of their launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from splagen.codegen.chunk_code import too_large
from splagen.codegen.chunk_kernels import (
    Loop,
    Recurrence,
    chunk_states,
    group_factors,
    group_states,
    scan_kernel,
    slot_array,
    state_table,
    sum_kernel,
    token_array,
)
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.route_kernels import Router
from splagen.ir.frontend_sse import SUFFIX, State, recurrence_program, router_program, states
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import Pass, copy_prop, drop_unused, run, settle_names, share
from splagen.ir.program import Program
from splagen.ir.recurrence import fold_products, restrict, share_exponentials
from splagen.sse_spec import SSESpec

SEQUENCE_LOWERING: tuple[Pass, ...] = (
    share,
    share_exponentials,
    fold_products(too_large),
    copy_prop,
    share,
    drop_unused,
    settle_names,
)
STATE_TILE = 128 * 128  # elements of a state that one program carries


@dataclass(frozen=True)
class Host:
    """Lines of the host between launches; `makes` are the names that they define."""

    lines: tuple[str, ...]
    makes: tuple[str, ...] = ()


Step: TypeAlias = Kernel | Host


@dataclass(frozen=True)
class SequencePartition:
    """Launches of forward and backward, and the rows that the op takes, in order."""

    programs: Mapping[str, Program]
    inputs: tuple[Array, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    parts: int
    choices: int
    by_head: bool
    balanced: bool

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel once."""
        return list({k.name: k for k in (*self.forward, *self.backward) if isinstance(k, Kernel)}.values())


def recurrence(spec: SSESpec, kind: State) -> Recurrence:
    """One recurrence, lowered: with its partition axis gone where its rows are routed."""
    program = recurrence_program(spec, kind)
    router = spec.router if kind == "sparse" else None
    if router:
        masks = ["write"] if spec.form == "sorted" else []
        program = restrict(program, "p", masks)
    choices = 1 if not router else router.writers if spec.form == "sorted" else router.partitions
    part = 1 if kind == "sparse" and spec.shared else 0
    by_head = router is not None and router.scope == "head"
    lowered = run(derive_gradient(program), SEQUENCE_LOWERING)
    return Recurrence(SUFFIX[kind], lowered, router is not None, choices, by_head, part, parts_of(spec))


def parts_of(spec: SSESpec) -> int:
    """States of a sample: the shared one, then the partitions."""
    return int(spec.shared) + (spec.router.partitions if spec.router else 0)


def sequence_partition(spec: SSESpec) -> SequencePartition:
    """Kernels and launches of a spec."""
    found = [recurrence(spec, kind) for kind in states(spec)]
    router = None
    if spec.router:
        program = run(derive_gradient(router_program(spec)), (share, copy_prop, share))
        choices = spec.router.writers if spec.form == "sorted" else spec.router.partitions
        router = Router(program, choices, spec.router.scope == "head", spec.group_size)
    builder = _Launches(spec, found, router)
    rows: dict[str, Array] = {}
    for r in found:
        for v in r.program.inputs:
            if v not in (r.state, *r.cotangents.values()) and v.name not in ("eta", "write", "read", "v"):
                rows[v.name] = token_array(r, v)
    if router:
        rows["logits"] = router.array
    v = next(x for x in found[0].program.inputs if x.name == "v")
    rows["v"] = token_array(found[0], v)
    programs = {f"recurrence {r.name}": r.program for r in found} | ({"router": router.program} if router else {})
    return SequencePartition(
        programs,
        tuple(rows.values()),
        tuple(builder.forward()),
        tuple(builder.backward()),
        parts_of(spec),
        router.choices if router else 1,
        router.by_head if router else False,
        router is not None,
    )


class _Launches:
    def __init__(self, spec: SSESpec, found: list[Recurrence], router: Router | None) -> None:
        self.spec, self.found, self.router = spec, found, router

    def forward(self) -> list[Step]:
        steps: list[Step] = [*self.plans(), Host(("final = state.clone()",), ("final",))]
        o: Array | None = None
        for r in self.found:
            steps += self.states_before_groups(r, "final")
            out, _ = r.outputs
            last = r is self.found[-1]
            target = token_array(r, out, name="o" if last else f"o{r.name}")
            loop = Loop(r, "output", reverse=False, block_e=r.tiles[1])
            direct = r.direct(out, r.tiles[1])
            array, base = (target, o) if direct else (slot_array(r, out), None)
            steps.append(loop.kernel([(out, array, base)], **self.ends(r, "added", "state", "final")))
            if not direct:
                steps.append(sum_kernel(r, array, target, o))
            o = target
        return steps

    def backward(self) -> list[Step]:
        steps: list[Step] = [
            *self.plans(),
            Host(("final = state.clone()", "dstate = dfinal.clone()"), ("final", "dstate")),
        ]
        dv: Array | None = None
        for r in self.found:
            steps += self.states_before_groups(r, "final")
            start = group_states(r, "added") if r.factor else state_table("state")
            steps.append(Loop(r, "states", reverse=False, block_e=0).kernel([], start=start, keep=chunk_states(r)))
            read = chunk_states(r)
            if r.factor:
                cotangents = group_states(r, "dadded")
                steps.append(
                    Loop(r, "dadd", reverse=True, block_e=0).kernel([], start=None, into=(cotangents, None), read=read)
                )
                steps.append(
                    scan_kernel(r, "dscan", cotangents, state_table("dfinal"), state_table("dstate"), reverse=True)
                )
            rows, sums = [], []
            block_e = gradient_tile(r)
            last = r is self.found[-1]
            for x, g in r.gradients.items():
                if x == r.state:
                    continue
                target = token_array(r, x, name=f"d{x.name}" if x.name != "v" or last else f"dv{r.name}")
                base = dv if x.name == "v" else None
                if x.name == "eta" or target.layout == "head_scalars" or not r.direct(x, block_e):
                    parts = replace(slot_array(r, x), name=f"d{x.name}{r.name if x.name == 'v' else ''}_parts")
                    rows.append((g, parts, None))
                    if target.layout == "head_scalars":
                        sums.append(Host((f"{target.name} = {parts.name}.sum((0, 1))",), (target.name,)))
                    elif x.name != "eta":
                        sums.append(sum_kernel(r, parts, target, base))
                else:
                    rows.append((g, target, base))
                if x.name == "v":
                    dv = target
            loop = Loop(r, "gradient", reverse=True, block_e=block_e)
            steps.append(loop.kernel(rows, read=read, **self.ends(r, "dadded", "dfinal", "dstate")))
            steps += sums
        if self.router:
            steps += self.router_gradient()
        return steps

    def plans(self) -> list[Step]:
        """Where rows lie: tokens for the shared state, slots for the partitions."""
        steps: list[Step] = []
        for r in self.found:
            whole = "True" if r.factor is None else "False"
            if not r.gathered:
                steps.append(Host((f"plan{r.name} = token_plan(n, cu_seqlens, {whole})",), (f"plan{r.name}",)))
                continue
            assert self.router is not None
            route = self.router.forward()
            steps += [route, self.router.totals_kernel()]
            masks = ["writes", "reads" if any(a.name == "reads" for a in route.outputs) else "writes"]
            form = "routed_plan" if self.spec.form == "sorted" else "masked_plan"
            arguments = ", ".join(["n", "cu_seqlens", "eta", *masks, "chosen", whole])
            steps.append(Host((f"plan{r.name} = {form}({arguments})",), (f"plan{r.name}",)))
        return steps

    def states_before_groups(self, r: Recurrence, final: str) -> list[Step]:
        if not r.factor:
            return []
        added = group_states(r, "added")
        loop = Loop(r, "add", reverse=False, block_e=r.tiles[1])
        return [
            loop.kernel([], start=None, into=(added, group_factors(r))),
            scan_kernel(r, "scan", added, state_table("state"), state_table(final), reverse=False),
        ]

    def ends(self, r: Recurrence, groups: str, start: str, final: str) -> dict[str, Array]:
        if r.factor:
            return {"start": group_states(r, groups)}
        return {"start": state_table(start), "final": state_table(final)}

    def router_gradient(self) -> list[Step]:
        assert self.router is not None
        r = self.found[-1]
        eta = next((x for x in r.gradients if x.name == "eta"), None)
        parts = Array("deta_parts", "slot_rows", (), (), "float32")
        steps: list[Step] = []
        if eta is None:
            empty = f"deta_parts = torch.empty(0, plan{r.name}.slots, n.HV, device=n.device)"
            steps.append(Host((empty,), ("deta_parts",)))
        return [*steps, self.router.gradient(r.plan, parts)]


def gradient_tile(r: Recurrence) -> int:
    """Columns of v that one program of a gradient takes: all of them where the state then fits."""
    d, e = r.tiles
    while d * e > STATE_TILE and e > 16:
        e //= 2
    return e
