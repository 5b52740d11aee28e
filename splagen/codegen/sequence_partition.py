"""The kernels of an SSE spec's programs, in the order of their launches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from splagen.codegen.chunk_code import too_large
from splagen.codegen.chunk_kernels import Loop
from splagen.codegen.group_kernels import scan_kernel, sum_kernel
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.module_kernels import ModuleKernels
from splagen.codegen.recurrences import (
    Recurrence,
    chunk_states,
    group_factors,
    group_states,
    is_exact,
    routing_input,
    slot_array,
    state_table,
    token_array,
)
from splagen.codegen.region import padded_extent
from splagen.codegen.route_kernels import Router
from splagen.codegen.schedule import Agreement, Constraint, Divides
from splagen.codegen.slice_kernels import SliceLoop
from splagen.codegen.step_kernels import step_kernel
from splagen.errors import PartitionError
from splagen.ir.frontend_sse import SUFFIX, State, held_masks, recurrence_program, router_program, states
from splagen.ir.gradient import derive_gradient
from splagen.ir.partitions import masks_as_factors, unroll
from splagen.ir.passes import Pass, copy_prop, drop_unused, run, settle_names, share
from splagen.ir.products import fold_products, pull_factors
from splagen.ir.program import Program, Var, slice_back
from splagen.ir.recurrence import restrict, share_exponentials
from splagen.sse_spec import SSESpec

FACTORING: tuple[Pass, ...] = (share, pull_factors, share, copy_prop, drop_unused)  # before the gradient is derived
SEQUENCE_LOWERING: tuple[Pass, ...] = (
    share,
    share_exponentials,
    fold_products(too_large),
    copy_prop,
    share,
    partial(pull_factors, last=("b", "h", "g")),  # a program takes one head
    share,
    copy_prop,
    drop_unused,
    settle_names,
)
STATE_TILE = 128 * 128  # elements of states that one program carries
LEAST_COLUMNS = 16  # of a state, for products of tiles


@dataclass(frozen=True)
class Host:
    """Lines of the host between launches; `constraints` are what they check of the Schedules."""

    lines: tuple[str, ...]
    constraints: tuple[Constraint, ...] = ()


Step: TypeAlias = Kernel | Host
Stored: TypeAlias = tuple[Var, Array, Array | None]  # a variable, where it goes, what is added to it


@dataclass(frozen=True)
class SequencePartition(ModuleKernels):
    """Launches of forward and backward, and the rows that the op takes, in order."""

    programs: Mapping[str, Program]
    inputs: tuple[Array, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    step: tuple[Kernel, ...]
    parts: int
    choices: int
    by_head: bool
    balanced: bool

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel once."""
        return list({k.name: k for k in (*self.forward, *self.backward, *self.step) if isinstance(k, Kernel)}.values())

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """What Schedules must agree on."""
        return tuple(c for step in (*self.forward, *self.backward) if isinstance(step, Host) for c in step.constraints)

    @property
    def group_size(self) -> int:
        """Value heads of a key head."""
        return int(str(next(iter(self.programs.values())).extents["g"]))

    @property
    def wide(self) -> frozenset[str]:
        """Rows of the op that are float32 beside 16-bit q, k and v: decays, beta, logits, and the gradient of these."""
        return frozenset(a.name for a in self.inputs if a.name[0] not in "qkv") | {"dlogits"}


def lowerings(spec: SSESpec) -> dict[str, tuple[Program, tuple[Pass, ...]]]:
    """The router's program and that of each kind of state, with the passes that make it ready for kernels.

    Where rows are routed, the first passes take the axis of partitions away: one is left, or all are unrolled.
    """
    found: dict[str, tuple[Program, tuple[Pass, ...]]] = {}
    if spec.router:
        found["router"] = router_program(spec), (derive_gradient, share, copy_prop, share)
    for kind in states(spec):
        passes: tuple[Pass, ...] = (*FACTORING, derive_gradient, *SEQUENCE_LOWERING)
        if kind == "sparse" and spec.form == "routed":
            passes = (masks_as_factors, partial(unroll, axis="p"), *passes)
        elif kind == "sparse":
            passes = (partial(restrict, axis="p", masks=held_masks(spec)), *passes)
        found[kind] = recurrence_program(spec, kind), passes
    return found


def recurrence(spec: SSESpec, kind: State, program: Program) -> Recurrence:
    """One recurrence to compile, from its lowered program."""
    router = spec.router if kind == "sparse" else None
    gathered = router is not None and spec.form != "routed"
    choices = slots_of_token(spec) if gathered else 1
    part = 1 if kind == "sparse" and spec.shared else 0
    by_head = router is not None and router.scope == "head"
    return Recurrence(SUFFIX[kind], program, gathered, choices, by_head, part, parts_of(spec))


def slots_of_token(spec: SSESpec) -> int:
    """Partitions for which a token has gates of its own: those that it was routed to, or all of them."""
    if not spec.router:
        return 1
    return spec.router.writers if spec.form == "sorted" else spec.router.partitions


def parts_of(spec: SSESpec) -> int:
    """States of a sample: the shared one, then the partitions."""
    return int(spec.shared) + (spec.router.partitions if spec.router else 0)


def sequence_partition(spec: SSESpec) -> SequencePartition:
    """Kernels and launches of a spec.  Raises PartitionError where states that stay together are too many."""
    check_states(spec)
    ready = {name: run(program, passes) for name, (program, passes) in lowerings(spec).items()}
    found = [recurrence(spec, kind, ready[kind]) for kind in states(spec)]
    router = None
    if spec.router:
        router = Router(ready["router"], slots_of_token(spec), spec.router.scope == "head", spec.group_size)
    builder = _Launches(spec, found, router)
    rows: dict[str, Array] = {}
    for r in found:
        for v in r.program.inputs:
            if v not in (*r.states, *r.cotangents.values(), r.values) and not routing_input(v):
                rows[v.name] = token_array(r, v)
    if router:
        rows["logits"] = router.array
    rows["v"] = token_array(found[0], found[0].values)
    return SequencePartition(
        ready,
        tuple(rows.values()),
        tuple(builder.forward()),
        tuple(builder.backward()),
        (*([router.forward()] if router else []), step_kernel(spec, found, router, parts_of(spec))),
        parts_of(spec),
        router.choices if router else 1,
        router.by_head if router else False,
        router is not None,
    )


def check_states(spec: SSESpec) -> None:
    """Raise PartitionError where one program cannot carry the states of all partitions in form "routed"."""
    if spec.form != "routed" or not spec.router:
        return
    d, most = spec.head_dim, STATE_TILE // (padded_extent(spec.head_dim) * LEAST_COLUMNS)
    if spec.router.partitions > most:
        other = "sorted" if spec.router.readers == spec.router.writers else "masked"
        what = f'{spec.name}: form "routed" carries all states together: {spec.router.partitions} of {d} key features'
        raise PartitionError(what, f'take form "{other}", whose results are the same, or at most {most} partitions')


class _Launches:
    def __init__(self, spec: SSESpec, found: list[Recurrence], router: Router | None) -> None:
        self.spec, self.found, self.router = spec, found, router

    def forward(self) -> list[Step]:
        steps: list[Step] = [*self.plans(), *self.last_states("final", "state")]
        o: Array | None = None
        for r in self.found:
            steps += self.spans(r, "output", "output_strong")
            steps += self.states_before_groups(r)
            out = r.outputs[0]
            last = r is self.found[-1]
            target = token_array(r, out, name="o" if last else f"o{r.name}")
            direct = r.direct(out)
            array, base = (target, o) if direct else (slot_array(r, out), None)
            begin, end = self.ends(r, "added", "state", "final")
            loops = [Loop(r, "output", reverse=False, mild=mild) for mild in r.mildness]
            steps += either(r, [x.kernel([(out, array, base)], start=begin, final=end) for x in loops])
            if not direct:
                steps.append(sum_kernel(r, array, target, o))
            o = target
        return steps

    def backward(self) -> list[Step]:
        steps: list[Step] = [
            *self.plans(),
            *self.last_states("final", "state"),
            *self.last_states("dstate", "dfinal"),
        ]
        dv: Array | None = None
        for r in self.found:
            if alone := self.one_state_each(r):
                rows, sums, dv = self.gradient_rows(r, dv)
                steps += [*self.gradients_on_the_way(r, rows, alone), *sums]
                continue
            steps += [self.agreement(r), *self.spans(r, "gradient"), *self.states_before_groups(r)]
            kept, cotangents = chunk_states(r), chunk_states(r, "dstates")
            start = group_states(r, "added") if r.factors else state_table("state")
            steps.append(Loop(r, "states", reverse=False).kernel([], start=start, keep=kept))
            if r.factors:
                added = group_states(r, "dadded")
                steps.append(Loop(r, "dadd", reverse=True).kernel([], into=(added, None), read=kept))
                steps.append(self.scan(r, "dscan", added, "dfinal", "dstate", reverse=True))
            begin, end = self.ends(r, "dadded", "dfinal", "dstate")
            loop = Loop(r, "dstates", reverse=True)
            steps.append(loop.kernel([], start=begin, final=end, keep=cotangents, read=kept))
            if r.pieces != r.plan:
                steps.append(Host((f"{r.pieces.name} = in_pieces(n, {r.plan.name})",)))
            rows, sums, dv = self.gradient_rows(r, dv)
            # dv apart from the rest: together their tiles do not fit into registers
            values = [row for row in rows if row[0] == r.gradients[r.values]]
            for name, part in (("dvalues", values), ("gradient", [row for row in rows if row not in values])):
                slices = [SliceLoop(r, name, reverse=True, mild=mild) for mild in r.mildness]
                steps += either(r, [x.rows_kernel(part, kept, cotangents) for x in slices])
            steps += sums
        if self.router:
            steps += self.router_gradient()
        exact = [x.name for r in self.found for x in r.gradients if is_exact(x)]
        exact += ["logits"] if self.router else []
        casts = (f"d{x} = host(n, lambda d{x}, {x}: d{x}.to({x}.dtype), d{x}, {x})" for x in exact)
        return [*steps, Host(tuple(casts))]

    def one_state_each(self, r: Recurrence) -> frozenset[Var]:
        """The gradients of rows that follow from the state before a chunk, if every other follows from its cotangent.

        Then no state is kept per chunk: a loop that carries all columns of a state, or of its cotangent, has what its
        rows read.  Empty where that is not so.
        """
        d, e = r.tiles
        if not r.factors or len(r.states) > 1 or d * e > STATE_TILE:
            return frozenset()
        program, cotangents = r.program, {r.cotangents[v] for v in r.outputs[1:]}
        found = set()
        for x, g in r.gradients.items():
            read = {v for eq in slice_back(program, [g], program.inputs) for v in eq.args}
            before, after = bool(read & set(r.states)), bool(read & cotangents)
            if x not in r.states and before:
                found.add(g)
            if x not in r.states and before == after:
                return frozenset()
        return frozenset(found)

    def gradients_on_the_way(self, r: Recurrence, rows: Sequence[Stored], forward: Collection[Var]) -> list[Step]:
        """Gradients of rows from the loops that carry the state, `forward`, and its cotangent, the others."""
        added = group_states(r, "dadded")
        ahead, behind = ([row for row in rows if (row[0] in forward) == side] for side in (True, False))
        return [
            *self.states_before_groups(r),
            Loop(r, "dreads", reverse=False).kernel(ahead, start=group_states(r, "added")),
            Loop(r, "dadd", reverse=True).kernel([], into=(added, None)),
            self.scan(r, "dscan", added, "dfinal", "dstate", reverse=True),
            Loop(r, "dwrites", reverse=True).kernel(behind, start=added),
        ]

    def agreement(self, r: Recurrence) -> Host:
        """What the Schedules of a backward pass must agree on."""
        strong = ("dvalues_strong", "gradient_strong") if r.decay else ()
        users = tuple(f"{user}{r.name}" for user in ("states", "dstates", "dvalues", "gradient", *strong))
        return Host((f"one_chunk(schedules, {_quoted(users)})",), constraints=(Agreement("CHUNK", users),))

    def spans(self, r: Recurrence, *users: str) -> list[Step]:
        """How much decay changes, over chunks that are no shorter than those of the kernels that rely on it."""
        if not r.decay:
            return []
        measured, *names = (f"{user}{r.name}" for user in ("spans", *users))
        check = f"no_longer_chunk(schedules, {_quoted([measured, *names])})"
        divides = Divides("CHUNK", tuple(names), measured)
        return [Host((check,), constraints=(divides,)), Loop(r, "spans", reverse=False).spans_kernel()]

    def gradient_rows(self, r: Recurrence, dv: Array | None) -> tuple[list[Stored], list[Step], Array | None]:
        """Where the gradients of rows go, what sums them per token, and dv so far: the first recurrence's is added."""
        rows: list[Stored] = []
        sums: list[Step] = []
        last = r is self.found[-1]
        for x, g in r.gradients.items():
            if x in r.states:
                continue
            eta, of_values = routing_input(x) == "eta", x == r.values
            like = "float32" if eta or is_exact(x) else "input"
            target = token_array(r, x, like, name=f"dv{r.name}" if of_values and not last else f"d{x.name}")
            base = dv if of_values else None
            if not eta and target.layout != "head_scalars" and r.direct(x):
                rows.append((g, target, base))
            else:
                stem = "eta" if eta else f"v{r.name}" if of_values else x.name
                parts = replace(slot_array(r, x), name=f"d{stem}_parts", partitions=len(r.states) if eta else 1)
                rows.append((g, parts, None))
                if target.layout == "head_scalars":
                    sums.append(Host((f"{target.name} = host(n, lambda parts: parts.sum(0), {parts.name})",)))
                elif not eta:
                    sums.append(sum_kernel(r, parts, target, base))
            dv = target if of_values else dv
        return rows, sums, dv

    def plans(self) -> list[Step]:
        """Where rows lie: tokens for the shared state and for partitions together, slots for partitions apart."""
        steps: list[Step] = []
        of_tokens: dict[str, str] = {}
        for r in self.found:
            whole = "False" if r.factors else "True"
            if r.name == SUFFIX["sparse"]:
                assert self.router is not None
                route = self.router.forward()
                steps += [route, self.router.totals_kernel()]
            if not r.gathered:
                plan = of_tokens.setdefault(whole, f"cut(n, cu_seqlens, n.T, {whole})")
                steps.append(Host((f"plan{r.name} = {plan}",)))
                of_tokens[whole] = f"plan{r.name}"
                continue
            masks = ["writes", "reads" if any(a.name == "reads" for a in route.outputs) else "writes"]
            form = "routed_plan" if self.spec.form == "sorted" else "masked_plan"
            arguments = ", ".join(["n", form, whole, "cu_seqlens", "eta", *masks, "chosen"])
            steps.append(Host((f"plan{r.name} = plan_of({arguments})",)))
        return steps

    def states_before_groups(self, r: Recurrence) -> list[Step]:
        if not r.factors:
            return []
        added = group_states(r, "added")
        loop = Loop(r, "add", reverse=False)
        return [
            loop.kernel([], start=None, into=(added, group_factors(r) if r.decays else None)),
            self.scan(r, "scan", added, "state", "final", reverse=False),
        ]

    def scan(self, r: Recurrence, name: str, states: Array, start: str, final: str, *, reverse: bool) -> Kernel:
        """The scan over groups; the first of all recurrences makes the table of last states."""
        made = r is not self.found[0] or not all(x.factors for x in self.found)
        return scan_kernel(r, name, states, state_table(start), state_table(final), reverse=reverse, made=made)

    def last_states(self, final: str, start: str) -> list[Step]:
        """A table of last states, where no scan writes all of one: a segment without rows keeps its state."""
        if all(r.factors for r in self.found):
            return []
        return [Host((f"{final} = host(n, torch.clone, {start})",))]

    def ends(self, r: Recurrence, groups: str, start: str, final: str) -> tuple[Array, Array | None]:
        """Where a loop starts from, and where it leaves the last state of a segment if no scan does."""
        if r.factors:
            return group_states(r, groups), None
        return state_table(start), state_table(final)

    def router_gradient(self) -> list[Step]:
        assert self.router is not None
        r = self.found[-1]
        gated = any(routing_input(x) for x in r.gradients)
        parts = Array("deta_parts", "slot_rows", (), (), "float32") if gated else None
        return [self.router.gradient(r.plan if r.gathered else None, parts)]


def either(r: Recurrence, kernels: Sequence[Kernel]) -> list[Kernel]:
    """A kernel for mild decay, and one for the groups where it is strong, which writes to the outputs of the first."""
    mild, *strong = kernels
    if r.spans not in mild.inputs:
        return [mild]
    return [mild, *(replace(k, inputs=(*k.inputs, *k.outputs), outputs=()) for k in strong)]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
