"""Kernels of a recurrence: loops over chunks of rows that carry its state, and what joins groups of chunks.

A segment is the rows that share a state: the tokens of a sample, or those of them routed to one partition.  Its rows
are cut into groups that run side by side.  Where a state enters the next one by an elementwise factor, each group first
finds what it adds to a state (from zero) and by what it multiplies one; a scan over groups gives the state before each;
then all groups run again from there.  Where the step is a matrix (delta rule) a segment is one group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy as sp

from splagen.codegen.chunk_code import ROWS, ChunkCode, tile_axes, too_large
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.region import padded_extent, slice_back
from splagen.codegen.triton_expr import triton_text
from splagen.errors import PartitionError
from splagen.ir.program import Equation, Program, Var, placeholder
from splagen.ir.recurrence import carried

PLAN = ("GROUPS", "SEGMENTS", "SLOTS", "LENGTH", "S", "HV")


@dataclass(frozen=True)
class Recurrence:
    """One recurrence to compile: its lowered program with gradient, and how its rows lie.

    `gathered` rows are slots of routed tokens, else tokens; a token has `choices` of them.  `by_head`: every key head
    has its own routing.  `part` is the first of its states in the table of states, `parts` how many states that has.
    """

    name: str
    program: Program
    gathered: bool
    choices: int
    by_head: bool
    part: int
    parts: int

    @property
    def group_size(self) -> int:
        """Value heads of a key head."""
        return int(str(self.program.extents["g"]))

    @property
    def state(self) -> Var:
        """The state before."""
        return next(v for v in self.program.inputs if v.name.startswith("state"))

    @property
    def outputs(self) -> tuple[Var, Var]:
        """Rows o, and the state after."""
        o, final = self.program.outputs
        return o, final

    @property
    def gradients(self) -> dict[Var, Var]:
        """Input to its gradient."""
        return dict(self.program.gradients)

    @property
    def cotangents(self) -> dict[Var, Var]:
        """Output to the input that carries its cotangent."""
        return dict(self.program.cotangents)

    @property
    def factor(self) -> tuple[sp.Expr, tuple[Var, ...]] | None:
        """By what a chunk multiplies the state; None where it is a matrix."""
        return carried(self.program, self.outputs[1], self.state)

    @property
    def plan(self) -> Array:
        """Where the rows lie."""
        return Array(f"plan{self.name}", "plan")

    @property
    def sizes(self) -> tuple[int, int]:
        """Key and value features of a state."""
        return int(str(self.program.extents["d"])), int(str(self.program.extents["e"]))

    @property
    def tiles(self) -> tuple[int, int]:
        """The same, padded to what tiles hold."""
        d, e = self.sizes
        return padded_extent(d), padded_extent(e)

    def direct(self, v: Var, block_e: int) -> bool:
        """True where every token's row of an output is written once: by one slot, one value head, one slice of e."""
        summed_e = "e" not in v.axes and block_e < self.tiles[1]
        summed_g = "g" not in v.axes and self.group_size > 1
        return self.choices == 1 and not summed_e and not summed_g


def token_array(r: Recurrence, v: Var, dtype: str = "input", name: str = "") -> Array:
    """Rows as tokens have them: [T, heads(, features)]; heads are value heads where the variable has the axis g."""
    features = tuple(a for a in tile_axes(v) if a not in ROWS)
    if not set(tile_axes(v)) & set(ROWS):
        return Array(name or v.name, "head_scalars", (), (), dtype)  # type: ignore[arg-type]
    width = tuple(int(str(r.program.extents[a])) for a in features)
    layout = "value_rows" if "g" in v.axes else "token_rows"
    return Array(name or v.name, layout, features, width, dtype)  # type: ignore[arg-type]


def slot_array(r: Recurrence, v: Var) -> Array:
    """Rows as slots have them: one per slot, value head and slice of e, to be summed per token."""
    features = tuple(a for a in tile_axes(v) if a not in ROWS)
    width = tuple(int(str(r.program.extents[a])) for a in features)
    if not set(tile_axes(v)) & set(ROWS):
        return Array(f"{v.name}_parts", "group_totals", (), (), "float32")
    return Array(f"{v.name}_parts", "slot_rows", features, width, "input" if features else "float32")


def state_table(name: str) -> Array:
    """States as the op's caller has them: [samples, parts, value heads, D, E] float32."""
    return Array(name, "state_table", ("d", "e"), (), "float32")


def group_states(r: Recurrence, name: str) -> Array:
    """A state per group and value head, padded, float32."""
    return Array(f"{name}{r.name}", "group_states", ("d", "e"), r.tiles, "float32", True)


def group_factors(r: Recurrence) -> Array:
    """The factor of a group per value head: a number, or one per key feature."""
    assert r.factor is not None
    wide = any("d" in v.axes for v in r.factor[1])
    return Array(f"factors{r.name}", "group_states", ("d",) if wide else (), (r.tiles[0] if wide else 1,), "float32")


def chunk_states(r: Recurrence, name: str = "states") -> Array:
    """The state before each chunk (or the cotangent of the state after it), in the input dtype."""
    return Array(f"{name}{r.name}", "chunk_states", ("d", "e"), r.tiles, "input", True)


class Loop:
    """Builds one loop over chunks."""

    def __init__(self, r: Recurrence, name: str, *, reverse: bool) -> None:
        """`reverse` walks from the last chunk of a group to the first and carries the cotangent of the state."""
        self.r, self.name, self.reverse = r, f"{name}{r.name}", reverse
        program = r.program
        if reverse:
            self.before, self.after = r.cotangents[r.outputs[1]], r.gradients[r.state]
        else:
            self.before, self.after = r.state, r.outputs[1]
        self.code = ChunkCode(program, scalars={"L": "CHUNK"})
        self.arrays: dict[str, Array] = {r.plan.name: r.plan}
        self.outputs: dict[str, Array] = {}
        self.once: list[str] = []
        self.equations: list[Equation] = []

    @property
    def key_head(self) -> str:
        """Source of the key head."""
        return "head" if self.r.group_size == 1 else "key_head"

    def kernel(
        self,
        rows: Sequence[tuple[Var, Array, Array | None]],
        *,
        start: Array | None = None,
        into: tuple[Array, Array | None] | None = None,
        final: Array | None = None,
        keep: Array | None = None,
        read: Array | None = None,
        read_after: Array | None = None,
    ) -> Kernel:
        """The kernel that stores `rows` (variable, where to, what is added) for every chunk.

        `start`: the state that a group begins with (of groups or the table; None is zero).  `into`: where a group's
        state and factor go.  `final`: the table that takes a segment's last state.  `keep`: where the state before
        each chunk goes.  `read`: where the state before each chunk is read from, in a reverse loop;
        `read_after`: where the cotangent of the state after it is, so that nothing is carried.
        """
        r, code = self.r, self.code
        factor = r.factor
        wanted = [v for v, _, _ in rows]
        if read_after is None:
            wanted.append(self.after)
        if into and into[1]:
            assert factor is not None
            wanted += factor[1]
        self.equations = slice_back(r.program, wanted, r.program.inputs)
        needed = {v for eq in self.equations for v in eq.args} | set(wanted)
        loads: dict[Var, list[str]] = {}
        if read_after is None:
            code.bind(self.before, "carried")
        else:
            loads[self.before] = self._load_state(self.before, read_after)
        for v in r.program.inputs:
            if v in needed and v != self.before:
                loads[v] = self._load(v, read)
        finish: list[str] = []
        targets = {v: (array, base) for v, array, base in rows}
        for node in in_order(self.equations, loads, targets, wanted):
            if isinstance(node, Equation):
                code.emit([node])
                if node.out in targets:
                    lines, last = self._store(node.out, *targets[node.out])
                    code.lines += lines
                    finish += last
            else:
                code.lines += loads[node]
        for v in targets.keys() - {eq.out for eq in self.equations}:
            raise PartitionError(f"{self.name} would store {v}, which no equation defines")
        advance = [f"carried = {code.names[self.after]}"] if read_after is None else []
        if keep:
            self.outputs[keep.name] = keep
            code.lines.insert(0, f"tl.store({self._chunk_state(keep)}, carried.to({keep.name}_ptr.dtype.element_ty))")
        begin = self._begin(start) if read_after is None else []
        if into:
            finish += self._group_store(into[0], "carried")
        if into and into[1]:
            assert factor is not None
            begin.append("factor = tl.full((D,), 1.0, tl.float32)" if into[1].features else "factor = 1.0")
            names = {placeholder(i).name: code.names[v] for i, v in enumerate(factor[1])}
            advance.append(f"factor = factor * {triton_text(sp.Mul(factor[0], 1), names)}")
            finish += self._group_store(into[1], "factor")
        if final:
            self.arrays[final.name] = final
            finish.append(f"tl.store({self._table(final)}, carried, mask={self._table_mask()})")
        holes = {
            "head_lines": self._head_lines(),
            "columns": "\n".join(self._columns()),
            "begin": "\n".join([*self.once, *begin]),
            "order": "chunks - 1 - step" if self.reverse else "step",
            "token": "token = tl.load(tokens_ptr + slots + slot, mask=row_ok, other=0).to(tl.int64)"
            if r.gathered
            else "token = slot.to(tl.int64)",
            "body": "\n".join(code.lines),
            "advance": "\n".join(advance),
            "finish": "\n".join(finish) or "pass",
            "d_extent": r.tiles[0],
            "e_extent": r.tiles[1],
            "dtype": f"{self._rows_of_input_type()}_ptr.dtype.element_ty",
        }
        self.arrays[r.plan.name] = replace(r.plan, features=plan_tensors(holes))
        return Kernel(
            self.name,
            "chunk_loop",
            tuple(self.equations),
            tuple(self.arrays.values()),
            tuple(self.outputs.values()),
            holes,
            f"(plan{r.name}.groups, HV, cdiv({r.tiles[1]}, BLOCK_E))",
            scalars=PLAN,
            tunable=("CHUNK", "BLOCK_E"),
        )

    def _rows_of_input_type(self) -> str:
        layouts = ("token_rows", "value_rows")
        return next(a.name for a in self.arrays.values() if a.layout in layouts and a.features and a.dtype == "input")

    # -- addresses -----------------------------------------------------------------------------------------------------

    def _head_lines(self) -> str:
        lines = []
        if self.r.group_size > 1:
            lines.append(f"key_head = head // {self.r.group_size}")
        lines.append(f"router = {self.key_head}" if self.r.by_head else "router = 0")
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        (d, e), (wide_d, wide_e) = self.r.sizes, self.r.tiles
        lines = ["d = tl.arange(0, D)", "e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)"]
        lines += [f"d_ok = d < {d}"] if wide_d != d else []
        lines += [f"e_ok = e < {e}"] if wide_e != e else []
        return lines

    def _load(self, v: Var, read: Array | None) -> list[str]:
        r, code, name = self.r, self.code, v.name
        if v == r.state:
            if read is None:
                raise PartitionError(f"{self.name} needs the state before each chunk")
            return self._load_state(v, read)
        rows = set(tile_axes(v)) & set(ROWS)
        if name in ("eta", "write", "read"):
            code.bind(v, name)
            test = "" if v.kind == "real" else " != 0"
            source = {"eta": "gates", "write": "writes", "read": "reads"}[name]
            return [f"{name} = tl.load({source}_ptr + slots + slot, mask=row_ok, other=0){test}"]
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

    def _load_state(self, v: Var, array: Array) -> list[str]:
        self.arrays[array.name] = array
        self.code.bind(v, f"{v.name}.to(tl.float32)", v.name)
        return [f"{v.name} = tl.load({self._chunk_state(array)})"]

    def _row_mask(self, feature: str) -> str:
        return f"row_ok[:, None] & {feature}_ok[None, :]" if self.code.padding(feature) else "row_ok[:, None]"

    def _store(self, v: Var, array: Array, base: Array | None) -> tuple[list[str], list[str]]:
        """Lines in the loop and lines behind it that store an output."""
        code = self.code
        self.outputs[array.name] = array
        source = code.names[v]
        if array.layout == "group_totals":
            self.once.append(f"{array.name}_total = 0.0")
            at = f"{array.name}_ptr + (tl.program_id(2) * GROUPS + group) * HV + head"
            return [f"{array.name}_total += {source}"], [f"tl.store({at}, {array.name}_total)"]
        if array.layout == "slot_rows":
            row = "((tl.program_id(2) * SLOTS + slot).to(tl.int64) * HV + head)"
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

    def _chunk_state(self, array: Array) -> str:
        state = "((chunk_base + chunk).to(tl.int64) * HV + head) * (D * E)"
        return f"{array.name}_ptr + {state} + d[:, None] * E + e[None, :]"

    def _group(self, array: Array) -> str:
        size = {2: "D * E", 1: "D", 0: "1"}[len(array.features)]
        inner = {2: " + d[:, None] * E + e[None, :]", 1: " + d", 0: ""}[len(array.features)]
        return f"{array.name}_ptr + (group.to(tl.int64) * HV + head) * ({size}){inner}"

    def _table(self, array: Array) -> str:
        d, e = self.r.sizes
        state = f"((segment % S) * {self.r.parts} + {self.r.part} + segment // S).to(tl.int64) * HV + head"
        return f"{array.name}_ptr + ({state}) * {d * e} + d[:, None] * {e} + e[None, :]"

    def _table_mask(self) -> str:
        masks = [f"{a}_ok[{view}]" for a, view in (("d", ":, None"), ("e", "None, :")) if self.code.padding(a)]
        return " & ".join(masks) or "None"

    def _begin(self, start: Array | None) -> list[str]:
        if start is None:
            return ["carried = tl.zeros((D, BLOCK_E), tl.float32)"]
        self.arrays[start.name] = start
        if start.layout == "state_table":
            mask = self._table_mask()
            options = "" if mask == "None" else f", mask={mask}, other=0.0"
            return [f"carried = tl.load({self._table(start)}{options})"]
        return [f"carried = tl.load({self._group(start)})"]

    def _group_store(self, array: Array, value: str) -> list[str]:
        self.outputs[array.name] = array
        return [f"tl.store({self._group(array)}, {value})"]


def scan_kernel(r: Recurrence, name: str, states: Array, start: Array, final: Array, *, reverse: bool) -> Kernel:
    """What every group adds -> the state before it, in place; the last state of every segment goes to `final`.

    Law: state after = factor * state before + what the group adds; `reverse` for the cotangent, from the last group.
    """
    factors = group_factors(r)
    d, e = r.sizes
    wide_d, wide_e = r.tiles
    holes = {
        "doc": f"{states.name}: what a group adds to a state -> the state before it; {final.name}: the last ones.\n\n"
        f"    state after = {factors.name} * state before + what the group adds\n    ",
        "states": states.name,
        "factors": factors.name,
        "start": start.name,
        "final": final.name,
        "router": (f"head // {r.group_size}" if r.group_size > 1 else "head") if r.by_head else "0",
        "order": "last - 1 - number" if reverse else "first + number",
        "factor_width": factors.width[0],
        "factor_place": "row" if factors.features else "row * 0",
        "part": r.part,
        "parts": r.parts,
        "d_size": d,
        "e_size": e,
        "d_extent": wide_d,
        "e_extent": wide_e,
    }
    return Kernel(
        f"{name}{r.name}",
        "group_scan",
        (),
        (replace(r.plan, features=("firsts",)), states, factors, start, final),
        (),
        holes,
        f"(plan{r.name}.segments, HV, cdiv({wide_d * wide_e}, BLOCK_M))",
        scalars=PLAN,
        tunable=("BLOCK_M",),
    )


def sum_kernel(r: Recurrence, parts: Array, output: Array, base: Array | None) -> Kernel:
    """Rows of slots -> rows of tokens: the sum over a token's slots, its group's value heads, and slices of e."""
    over_group = output.layout == "token_rows"
    head = "head" if over_group or r.group_size == 1 else f"head // {r.group_size}"
    slot = (
        "tl.load(places_ptr + (router * T + token) * CHOICES + choice, mask=row_ok, other=0)" if r.gathered else "token"
    )
    holes = {
        "doc": f"{output.name}: the sum of {parts.name} over a token's slots, value heads of a group, and slices.",
        "parts": parts.name,
        "width": parts.width[0] if parts.width else 1,
        "columns": padded_extent(parts.width[0]) if parts.width else 1,
        "choices": r.choices,
        "heads": r.group_size if over_group else 1,
        "router": head if r.by_head else "0",
        "slot": slot,
        "base": f"total += tl.load({base.name}_ptr + {_row(base)}, mask=keep, other=0.0).to(tl.float32)"
        if base
        else "",
        "at": f"{output.name}_ptr + {_row(output)}",
    }
    return Kernel(
        f"sum_{output.name}",
        "sum_slots",
        (),
        (replace(r.plan, features=plan_tensors(holes, ())), parts, *([base] if base else [])),
        (output,),
        holes,
        f"(cdiv(T, BLOCK_M), {'H' if over_group else 'HV'})",
        scalars=("SLOTS", "HV", "T", "SLICES"),
        tunable=("BLOCK_M",),
    )


def _row(a: Array) -> str:
    inner = " + column[None, :]" if a.features else " + column[None, :] * 0"
    return f"(token.to(tl.int64) * {a.name}_t + head * {a.name}_h)[:, None]{inner}"


def in_order(
    equations: Sequence[Equation],
    loads: Mapping[Var, Sequence[str]],
    stored: Collection[Var],
    kept: Collection[Var],
) -> list[Var | Equation]:
    """Loads and equations in an order that keeps few tiles alive: the next is the one after which least is live.

    A stored variable dies when nothing else reads it; a kept one that is not stored lives on.
    """
    inside = {eq.out for eq in equations}
    readers: dict[Var, set[Var]] = {}
    for eq in equations:
        for v in eq.args:
            readers.setdefault(v, set()).add(eq.out)
    todo: list[Var | Equation] = [*loads, *equations]
    done: set[Var] = set()
    ordered: list[Var | Equation] = []

    def ready(node: Var | Equation) -> bool:
        return not isinstance(node, Equation) or all(
            v in done or (v not in inside and v not in loads) for v in node.args
        )

    def growth(node: Var | Equation) -> int:
        out = node.out if isinstance(node, Equation) else node
        lives = readers.get(out) or (out in kept and out not in stored)
        grown = tile_bytes(out, loaded=not isinstance(node, Equation)) if lives else 0
        if isinstance(node, Equation):
            for v in set(node.args):
                if readers[v] == {node.out} and not (v in kept and v not in stored):
                    grown -= tile_bytes(v, loaded=v in loads)
        return grown

    while todo:
        best = min((n for n in todo if ready(n)), key=growth)
        todo.remove(best)
        ordered.append(best)
        done.add(best.out if isinstance(best, Equation) else best)
        if isinstance(best, Equation):
            for v in set(best.args):
                readers[v].discard(best.out)
    return ordered


def tile_bytes(v: Var, *, loaded: bool) -> int:
    """What a tile takes, at typical extents: rows 64, features 128."""
    if too_large(v) or v.kind == "int":
        return 0
    size = 2 if loaded else 4
    for a in tile_axes(v):
        size *= 64 if a in ROWS else 128
    return size


PLAN_TENSORS = ("offsets", "firsts", "owners", "tokens", "places", "gates", "writes", "reads")


def plan_tensors(
    holes: Mapping[str, object], always: Sequence[str] = ("offsets", "firsts", "owners")
) -> tuple[str, ...]:
    """The tensors of a plan that a kernel with these holes reads."""
    text = " ".join(map(str, holes.values()))
    return tuple(t for t in PLAN_TENSORS if t in always or f"{t}_ptr" in text)
