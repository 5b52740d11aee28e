"""Kernels of a recurrence: loops over chunks of rows that carry its state, and what joins groups of chunks.

A segment is the rows that share a state: the tokens of a sample, or those of them routed to one partition.  Its rows
are cut into groups that run side by side.  Where a state enters the next one by an elementwise factor, each group first
finds what it adds to a state (from zero) and by what it multiplies one; a scan over groups gives the state before each;
then all groups run again from there.  Where the step is a matrix (delta rule) a segment is one group.

A row has one state, or those of all partitions together: then everything about a state is there once for each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy as sp

from splagen.codegen.chunk_code import ROWS, ChunkCode, tile_axes, too_large
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.recurrences import PLAN, Recurrence, plan_tensors, routing_input, token_array
from splagen.codegen.route_kernels import routing
from splagen.codegen.tile_order import in_order
from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.ir.program import Equation, Var, placeholder, slice_back

Lines: TypeAlias = Sequence[str]


class Loop:
    """Builds one loop over chunks."""

    def __init__(self, r: Recurrence, name: str, *, reverse: bool, mild: bool = True) -> None:
        """`reverse` walks from the last chunk of a group to the first and carries the cotangent of the state.

        Where a product needs it, a loop takes the groups in which the decay is `mild`, or the others.
        """
        self.r, self.name, self.reverse = r, f"{name}{'' if mild else '_strong'}{r.name}", reverse
        program = r.program
        finals = r.outputs[1:]
        if reverse:
            self.before = tuple(r.cotangents[v] for v in finals)
            self.after = tuple(r.gradients[v] for v in r.states)
        else:
            self.before, self.after = r.states, finals
        self.carried = self.one_each("carried")
        self.code = ChunkCode(program, scalars={"L": "CHUNK"}, mild=mild)
        self.plan = r.plan
        self.arrays: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self.once: list[str] = []
        self.equations: list[Equation] = []

    @property
    def key_head(self) -> str:
        """Source of the key head."""
        return "head" if self.r.group_size == 1 else "key_head"

    def one_each(self, name: str) -> tuple[str, ...]:
        """Names for something that every state has."""
        many = len(self.r.states)
        return (name,) if many == 1 else tuple(f"{name}_{n}" for n in range(many))

    def kernel(
        self,
        rows: Sequence[tuple[Var, Array, Array | None]],
        *,
        start: Array | None = None,
        into: tuple[Array, Array | None] | None = None,
        final: Array | None = None,
        keep: Array | None = None,
        read: Array | None = None,
    ) -> Kernel:
        """The kernel that stores `rows` (variable, where to, what is added) for every chunk.

        `start`: the state that a group begins with (of groups or the table; None is zero).  `into`: where a group's
        state and factor go.  `final`: the table that takes a segment's last state.  `keep`: where the state before
        each chunk goes.  `read`: where the state before each chunk is read from, in a reverse loop.
        """
        r, code = self.r, self.code
        factors = r.factors if into and into[1] else ()
        wanted = [*(v for v, _, _ in rows), *self.after, *(v for _, args in factors for v in args)]
        self.equations = slice_back(r.program, wanted, r.program.inputs)
        needed = {v for eq in self.equations for v in eq.args} | set(wanted)
        for v, x in zip(self.before, self.carried, strict=True):
            code.bind(v, x)
        loads = {v: self._load(v, read) for v in r.program.inputs if v in needed and v not in self.before}
        finish = self._emit(self.equations, loads, {v: (array, base) for v, array, base in rows}, wanted)
        for v in {v for v, _, _ in rows} - {eq.out for eq in self.equations}:
            raise PartitionError(f"{self.name} would store {v}, which no equation defines")
        advance = [f"{x} = {code.names[v]}" for x, v in zip(self.carried, self.after, strict=True)]
        if keep:
            self.outputs[keep.name] = keep
            kept = f"to({keep.name}_ptr.dtype.element_ty)"
            stores = [f"tl.store({self._chunk_state(keep, n)}, {x}.{kept})" for n, x in enumerate(self.carried)]
            code.lines[:0] = stores
        begin = self._begin(start)
        if into:
            finish += self._group_store(into[0], self.carried)
        if into and into[1]:
            one = "tl.full((D,), 1.0, tl.float32)" if into[1].features else "1.0"
            products = self.one_each("factor")
            for x, (expr, args) in zip(products, factors, strict=True):
                begin.append(f"{x} = {one}")
                names = {placeholder(i).name: code.names[v] for i, v in enumerate(args)}
                advance.append(f"{x} = {x} * {triton_text(sp.Mul(expr, 1), names)}")
            finish += self._group_store(into[1], products)
        if final:
            self.arrays[final.name] = final
            for n, x in enumerate(self.carried):
                finish.append(f"tl.store({self._table(final, n)}, {x}, mask={self._table_mask()})")
        return self._built([*self.once, *begin], [], [], [*code.lines, *advance], finish)

    def spans_kernel(self) -> Kernel:
        """The kernel that finds by how much the decay changes in the chunks of each group."""
        r, code = self.r, self.code
        assert r.decay is not None
        (steps,) = r.program.definitions[r.decay].args
        self.equations = slice_back(r.program, [steps], r.program.inputs)
        needed = {steps, *(v for eq in self.equations for v in eq.args)}
        loads = {v: self._load(v, None) for v in r.program.inputs if v in needed}
        self._emit(self.equations, loads, {}, [steps])
        code.lines.append(f"span = tl.maximum(span, tl.sum(tl.abs({code.names[steps]}), axis=0))")
        end = self._group_store(r.spans, ["tl.max(span, axis=0)"])
        return self._built([*self.once, "span = tl.zeros((D,), tl.float32)"], [], [], code.lines, end)

    def _emit(
        self,
        equations: Sequence[Equation],
        loads: Mapping[Var, Sequence[str]],
        targets: Mapping[Var, tuple[Array, Array | None]],
        kept: Collection[Var],
    ) -> list[str]:
        """Append the lines of loads, equations and stores; returns those of stores behind the loop over chunks."""
        behind: list[str] = []
        for node in in_order(equations, loads, targets, kept):
            if isinstance(node, Equation):
                self.code.emit([node])
                if node.out in targets:
                    lines, last = self._store(node.out, *targets[node.out])
                    self.code.lines += lines
                    behind += last
            else:
                self.code.lines += loads[node]
        return behind

    def _built(
        self,
        begin: Sequence[str],
        ahead: Sequence[str],
        columns: Sequence[str],
        body: Sequence[str],
        end: Sequence[str],
    ) -> Kernel:
        """The kernel of these lines; `columns` are those of a loop over slices of e between `ahead` and `body`."""
        r = self.r
        mine = "first < stop"
        if any(too_large(v) for eq in self.equations for v in eq.args):
            self.arrays[r.spans.name] = r.spans
            span = f"tl.load({self._group(r.spans, 0)})"
            mine = f"({mine}) & (is_mild({span}, DTYPE) == {self.code.mild})"
        holes = {
            "mine": mine,
            "head_lines": self._head_lines(),
            "feature": "\n".join(self._feature()),
            "begin": "\n".join(begin),
            "order": "chunks - 1 - step" if self.reverse else "step",
            "token": "token = tl.load(tokens_ptr + slots + slot, mask=row_ok, other=0).to(tl.int64)"
            if r.gathered
            else "token = slot.to(tl.int64)",
            "e_ok": f"e_ok = e < {r.sizes[1]}" if r.tiles[1] != r.sizes[1] else "",
            "ahead": "\n".join(ahead),
            "columns": "\n".join(columns),
            "body": "\n".join(body),
            "end": "\n".join(end) or "pass",
            "d_extent": r.tiles[0],
            "e_extent": r.tiles[1],
            "dtype": self._input_type(),
        }
        found = plan_tensors(holes)
        plan = replace(self.plan, features=tuple(t for t in found if t not in self.arrays))
        return Kernel(
            self.name,
            "chunk_loop",
            tuple(self.equations),
            (plan, *self.arrays.values()),
            tuple(self.outputs.values()),
            holes,
            f"({plan.name}.groups, HV, {1 if columns else f'cdiv({r.tiles[1]}, BLOCK_E)'})",
            scalars=PLAN,
            tunable=("CHUNK", "BLOCK_E"),
        )

    def _input_type(self) -> str:
        """Source of the dtype that products take: that of q, k, v and do."""
        rows = [a.name for a in self.arrays.values() if a.layout in ("token_rows", "value_rows")]
        found = [x for x in rows if x == "do" or x[0] in "qkv"]
        return f"{found[0]}_ptr.dtype.element_ty" if found else "tl.float32"

    # -- addresses -----------------------------------------------------------------------------------------------------

    def _head_lines(self) -> str:
        lines = []
        if self.r.group_size > 1:
            lines.append(f"key_head = head // {self.r.group_size}")
        lines.append(f"router = {self.key_head}" if self.r.plan_by_head else "router = 0")
        return "\n".join(lines)

    def _feature(self) -> list[str]:
        d, wide = self.r.sizes[0], self.r.tiles[0]
        return ["d = tl.arange(0, D)", *([f"d_ok = d < {d}"] if wide != d else [])]

    def _load(self, v: Var, read: Array | None) -> list[str]:
        r, code, name = self.r, self.code, v.name
        if v in r.states:
            if read is None:
                raise PartitionError(f"{self.name} needs the state before each chunk")
            return self._load_state(v, read, r.states.index(v))
        rows = set(tile_axes(v)) & set(ROWS)
        if routing_input(v):
            code.bind(v, name)
            test = "" if v.kind == "real" else " != 0"
            return [f"{name} = tl.load({self._routing(v)}, mask=row_ok, other=0){test}"]
        array = token_array(r, v, name="do" if v == r.cotangents[r.outputs[0]] else "")
        source = array.name
        self.arrays[source] = array
        if not rows:
            code.bind(v, name)
            self.once.append(f"{name} = tl.load({source}_ptr + head).to(tl.float32)")
            return []
        head = "head" if "g" in v.axes else self.key_head
        place = f"{source}_ptr + token * {source}_t + {head} * {source}_h"
        if not array.features:
            code.bind(v, name)
            return [f"{name} = tl.load({place}, mask=row_ok, other=0.0).to(tl.float32)"]
        (f,) = array.features
        code.bind(v, f"{name}.to(tl.float32)", name if name[0] != "g" else None)
        address = f"{source}_ptr + (token * {source}_t + {head} * {source}_h)[:, None] + {f}[None, :]"
        return [f"{name} = tl.load({address}, mask={self._row_mask(f)}, other=0.0)"]

    def _routing(self, v: Var) -> str:
        """Address of what the router says of a row: in the plan if it is a slot, else where the router wrote it."""
        r, what = self.r, routing_input(v)
        if r.gathered:
            source = {"eta": "gates", "write": "writes", "read": "reads"}[what]
            return f"{source}_ptr + slots + slot"
        array = routing("eta" if what == "eta" else f"{what}s")
        self.arrays[array.name] = array
        many, p = len(r.states), str(r.partition(v))
        head = f"{self.key_head}.to(tl.int64)"
        if what == "eta":  # [R, T, N]
            row = f"({head} * SLOTS + token)" if r.by_head else "token"
            return f"{array.name}_ptr + {row} * {many} + {p}"
        plane = f"({head} * {many} + {p})" if r.by_head else p
        return f"{array.name}_ptr + {plane} * SLOTS + token"  # [R, N, T]

    def _load_state(self, v: Var, array: Array, n: int) -> list[str]:
        self.arrays[array.name] = array
        self.code.bind(v, f"{v.name}.to(tl.float32)", v.name)
        return [f"{v.name} = tl.load({self._chunk_state(array, n)})"]

    def _row_mask(self, feature: str) -> str:
        return f"row_ok[:, None] & {feature}_ok[None, :]" if self.code.padding(feature) else "row_ok[:, None]"

    def _store(self, v: Var, array: Array, base: Array | None) -> tuple[list[str], list[str]]:
        """Lines in the loop and lines behind it that store an output."""
        code = self.code
        self.outputs[array.name] = array
        source = code.names[v]
        if array.layout == "group_totals":
            self.once.append(f"{array.name}_total = 0.0")
            at = f"{array.name}_ptr + group * HV + head"
            return [f"{array.name}_total += {source}"], [f"tl.store({at}, {array.name}_total)"]
        if array.layout == "slot_rows":
            partition = self.r.partition(v) if array.partitions > 1 else 0
            here = f"({partition} * SLOTS + slot)" if partition else "slot"
            row = f"({here}.to(tl.int64) * HV + head)"
            at, mask = f"{array.name}_ptr + {row}", "row_ok"
            if array.features:
                (f,) = array.features
                at, mask = f"{array.name}_ptr + ({row} * {array.width[0]})[:, None] + {f}[None, :]", self._row_mask(f)
            return [f"tl.store({at}, {source}, mask={mask})"], []
        head = "head" if "g" in v.axes else self.key_head

        def place(name: str) -> tuple[str, str]:
            row = f"token * {name}_t + {head} * {name}_h"
            if not array.features:
                return f"{name}_ptr + {row}", "row_ok"
            (f,) = array.features
            return f"{name}_ptr + ({row})[:, None] + {f}[None, :]", self._row_mask(f)

        at, mask = place(array.name)
        if base:
            self.arrays[base.name] = base
            other, _ = place(base.name)
            source = f"{source} + tl.load({other}, mask={mask}, other=0.0).to(tl.float32)"
        return [f"tl.store({at}, {source}, mask={mask})"], []

    def _chunk_state(self, array: Array, n: int) -> str:
        state = f"({self._nth(array, '(chunk_base + chunk).to(tl.int64)', n)} * HV + head) * (D * E)"
        return f"{array.name}_ptr + {state} + d[:, None] * E + e[None, :]"

    def _group(self, array: Array, n: int) -> str:
        size = {2: "D * E", 1: "D", 0: "1"}[len(array.features)]
        inner = {2: " + d[:, None] * E + e[None, :]", 1: " + d", 0: ""}[len(array.features)]
        return f"{array.name}_ptr + ({self._nth(array, 'group.to(tl.int64)', n)} * HV + head) * ({size}){inner}"

    def _nth(self, array: Array, item: str, n: int) -> str:
        """Row of partition n of a group or a chunk."""
        return item if array.partitions == 1 else f"({item} * {array.partitions} + {n})"

    def _table(self, array: Array, n: int) -> str:
        d, e = self.r.sizes
        state = f"((segment % S) * {self.r.parts} + {self.r.part + n} + segment // S).to(tl.int64) * HV + head"
        return f"{array.name}_ptr + ({state}) * {d * e} + d[:, None] * {e} + e[None, :]"

    def _table_mask(self) -> str:
        masks = [f"{a}_ok[{view}]" for a, view in (("d", ":, None"), ("e", "None, :")) if self.code.padding(a)]
        return " & ".join(masks) or "None"

    def _begin(self, start: Array | None) -> list[str]:
        if start is None:
            return [f"{x} = tl.zeros((D, BLOCK_E), tl.float32)" for x in self.carried]
        self.arrays[start.name] = start
        if start.layout == "state_table":
            mask = self._table_mask()
            options = "" if mask == "None" else f", mask={mask}, other=0.0"
            return [f"{x} = tl.load({self._table(start, n)}{options})" for n, x in enumerate(self.carried)]
        return [f"{x} = tl.load({self._group(start, n)})" for n, x in enumerate(self.carried)]

    def _group_store(self, array: Array, values: Sequence[str]) -> list[str]:
        self.outputs[array.name] = array
        return [f"tl.store({self._group(array, n)}, {x})" for n, x in enumerate(values)]
