"""Bytes and FLOPs of the kernels of recurrences, from their equations, arrays and loops over chunks.

Of the axes of rows that an equation has, one counts all rows and every further one those of a chunk: pairs of positions
meet inside a chunk alone.  A program takes one value head; where the grid cuts columns of v into slices, what has no
column is read and formed once per slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from splagen.autotune.formula import Cost, axes_of, is_product, programs, tidy
from splagen.codegen.chunk_code import ROWS
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.recurrences import Recurrence
from splagen.codegen.schedule import DTYPES, Schedule
from splagen.codegen.sequence_partition import SequencePartition, recurrence
from splagen.codegen.step_kernels import step_program
from splagen.expression import symbol
from splagen.ir.frontend_sse import states
from splagen.ir.program import Equation
from splagen.sse_spec import SSESpec

TOKENS, SAMPLES, HEADS = symbol("T"), symbol("S"), symbol("HV")
GROUPS, GROUP_ROWS = 2048, 512  # generated modules cut rows into about as many groups, of no fewer rows


@dataclass(frozen=True)
class Rows:
    """The rows that a kernel walks over: those of a value head, their segments, and the groups these are cut into."""

    count: sp.Expr
    segments: sp.Expr
    groups: sp.Expr


@dataclass(frozen=True)
class Recurrences:
    """The sizes of a spec's kernels, in a dtype."""

    spec: SSESpec
    part: SequencePartition
    dtype: str

    @cached_property
    def found(self) -> dict[str, Recurrence]:
        """Recurrences by the kind of their state."""
        return {kind: recurrence(self.spec, kind, self.part.programs[kind]) for kind in states(self.spec)}

    @cached_property
    def plans(self) -> dict[str, tuple[Recurrence, Rows]]:
        """What the rows of each plan are, by its name."""
        made = {}
        for r in self.found.values():
            for plan in (r.plan, r.pieces):
                segments = SAMPLES * (self.partitions if r.gathered else 1)
                count = TOKENS * r.choices
                whole = not r.factors and plan == r.plan
                groups = segments + (0 if whole else sp.Min(count / GROUP_ROWS, GROUPS / HEADS))
                made[plan.name] = r, Rows(count, segments, groups)
        return made

    @property
    def partitions(self) -> int:
        """Partitions of the router, 1 without one."""
        return self.spec.router.partitions if self.spec.router else 1

    @property
    def routers(self) -> sp.Expr:
        """Routers: one for all heads, or one for each key head."""
        return HEADS / self.spec.group_size if self.part.by_head else sp.S.One

    def cost(self, kernel: Kernel, schedules: Mapping[str, Schedule]) -> Cost:
        """The formulas of one kernel; `schedules` has those of all kernels, by name."""
        return _Kernel(self, kernel, schedules).cost()

    @cached_property
    def producers(self) -> dict[str, Kernel]:
        """The kernel that writes an array, by the array's name."""
        return {a.name: k for k in self.part.kernels for a in k.outputs}

    @cached_property
    def repeated(self) -> frozenset[Equation]:
        """Equations of a step that a token does for each of its slots."""
        return frozenset(step_program(self.spec, "sparse").equations) if "sparse" in self.found else frozenset()


@dataclass(frozen=True)
class _Kernel:
    """One kernel of the spec."""

    whole: Recurrences
    kernel: Kernel
    schedules: Mapping[str, Schedule]

    @property
    def schedule(self) -> Schedule:
        return self.schedules[self.kernel.name]

    @cached_property
    def plan(self) -> tuple[Recurrence, Rows] | None:
        """The recurrence whose rows the kernel walks over, and these rows."""
        return next((self.whole.plans[a.name] for a in self.kernel.inputs if a.layout == "plan"), None)

    @cached_property
    def walked(self) -> sp.Expr:
        """Rows of a value head."""
        match self.kernel.template:
            case "step":
                return SAMPLES
            case "chunk_loop" | "sum_slots" if self.plan:
                return self.plan[1].count
        return TOKENS

    @cached_property
    def slices(self) -> sp.Expr:
        """Parts into which the grid cuts columns of v."""
        if "BLOCK_E" not in self.kernel.grid:
            return sp.S.One
        return programs(self.kernel.grid, self._sizes()) / programs(
            self.kernel.grid, self._sizes() | {"BLOCK_E": 2**30}
        )

    def _sizes(self) -> dict[str, sp.Expr | int]:
        sizes: dict[str, sp.Expr | int] = {"T": TOKENS, "S": SAMPLES, "HV": HEADS}
        sizes["H"] = HEADS / self.whole.spec.group_size
        for name, (_, rows) in self.whole.plans.items():
            sizes |= {f"{name}.groups": rows.groups, f"{name}.segments": rows.segments}
        return {**sizes, **self.schedule}

    def cost(self) -> Cost:
        arrays = {a.name: a for a in (*self.kernel.inputs, *self.kernel.outputs)}
        moved = sp.Add(*(self._size(a) * self._elements(a) for a in arrays.values()))
        flops = sp.Add(*(self._flops(eq) for eq in self.kernel.covers if is_product(eq)))
        count = programs(self.kernel.grid, self._sizes())
        return Cost(self.kernel.name, tidy(moved), tidy(flops), count)

    # -- products -------------------------------------------------------------------------------------------------

    def _flops(self, eq: Equation) -> sp.Expr:
        axes = axes_of(eq)
        rows = len(axes & set(ROWS))
        if self.kernel.template == "chunk_loop":
            chunk = sp.Integer(self.schedule["CHUNK"])
            count = self.walked * chunk ** (rows - 1) * HEADS
        else:  # a token has no other rows
            count = self.walked if rows or "b" in axes else sp.S.One
            count *= self.whole.routers if self._routes else HEADS
        if self.kernel.template == "step" and eq in self.whole.repeated:
            count *= self.whole.part.choices
        extents = next(iter(self.whole.part.programs.values())).extents
        features = sp.Mul(*(sp.sympify(extents[a]) for a in axes if a in ("p", "d", "e")))
        return 2 * count * features * (1 if "e" in axes else self.slices)

    @property
    def _routes(self) -> bool:
        return self.kernel.template.startswith("route")

    # -- memory ---------------------------------------------------------------------------------------------------

    def _size(self, a: Array) -> int:
        wide = a.dtype != "input" or a.name in self.whole.part.wide or a.layout in ("plan", "state_table")
        return 4 if wide else DTYPES[self.whole.dtype]

    def _elements(self, a: Array) -> sp.Expr:
        """Numbers of an array that all programs read or write together."""
        width, slices = math.prod(a.width), sp.S.One if "e" in a.features else self.slices
        match a.layout:
            case "token_rows" | "value_rows":
                return self._token_rows(a) * width * slices
            case "head_scalars":
                return HEADS
            case "routing":
                return self._routing(a) * slices
            case "state_table":
                return self._table()
            case "slot_rows":  # without a plan a token has a slot in every partition
                slots = self.plan[1].count if self.plan else TOKENS * self.whole.part.choices
                return a.partitions * slots * HEADS * width * slices
        assert self.plan, f"{self.kernel.name} reads {a.name} without a plan"
        rows = self.plan[1]
        match a.layout:
            case "plan":
                of_rows = sum(t != "offsets" for t in a.features)
                return of_rows * rows.count * slices * (self.whole.routers if self._routes else HEADS)
            case "chunk_states":
                return a.partitions * rows.count / self.schedule["CHUNK"] * HEADS * width
            case "group_states":
                in_place = self.kernel.template == "group_scan" and a.name == self.kernel.holes["states"]
                return a.partitions * rows.groups * HEADS * width * (2 if in_place else 1)
            case "group_totals":
                return rows.groups * HEADS
        raise AssertionError(a.layout)

    def _token_rows(self, a: Array) -> sp.Expr:
        """Rows of tokens: every value head reads its own, also where some share a key head."""
        if self._routes:
            return TOKENS * self.whole.routers
        if self.kernel.template == "sum_slots":
            return TOKENS * (HEADS / self.whole.spec.group_size if a.layout == "token_rows" else HEADS)
        return self.walked * HEADS

    def _routing(self, a: Array) -> sp.Expr:
        """Numbers that the router gives: for each partition, or for each slot, of a token."""
        if a.name in ("sums", "totals"):  # as many as their producer makes
            kernel = self.whole.producers[a.name]
            if a.name == "totals":
                return sp.Integer(len(_items(kernel.holes["kinds"])) * kernel.number_of("padded"))
            sizes = self._sizes() | dict(self.schedules[kernel.name])
            return programs(kernel.grid, sizes) * kernel.number_of("sums")
        if a.name in ("balance", "dbalance"):
            return sp.S.One
        each = {"chosen": self.whole.part.choices, "slots": 1}.get(a.name, self.whole.partitions)
        return each * self.walked * (self.whole.routers if self._routes else HEADS)

    def _table(self) -> sp.Expr:
        """Numbers of the states that a kernel reads or writes; a step does both."""
        d, e = next(iter(self.whole.found.values())).sizes
        if self.kernel.template == "step":
            sparse = self.whole.part.choices if "sparse" in self.whole.found else 0
            return 2 * SAMPLES * HEADS * (int(self.whole.spec.shared) + sparse) * d * e
        assert self.plan, f"{self.kernel.name} has states and no plan"
        r, rows = self.plan
        return rows.segments * len(r.states) * HEADS * d * e


def _items(value: object) -> list[object]:
    assert isinstance(value, Iterable)
    return list(value)
