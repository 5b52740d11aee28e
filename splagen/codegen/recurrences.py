"""A recurrence to compile, and the arrays that its kernels hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from splagen.codegen.chunk_code import ROWS, decay_of, tile_axes, too_large
from splagen.codegen.kernel import Array
from splagen.codegen.region import padded_extent
from splagen.ir.partitions import copied
from splagen.ir.program import Program, Var
from splagen.ir.recurrence import carried

PLAN = ("SEGMENTS", "SLOTS", "LENGTH", "S", "HV")


@dataclass(frozen=True)
class Recurrence:
    """One recurrence to compile: its lowered program with gradient, and how its rows lie.

    `gathered` rows are slots of routed tokens, else tokens; a token has `choices` of them.  `by_head`: every key head
    has its own routing.  `part` is the first of its states in the table of states, `parts` how many states that has.
    Slots have the state of their partition; where partitions are unrolled, tokens have all the `states` together.
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
    def states(self) -> tuple[Var, ...]:
        """The states before, one for each partition that is carried."""
        return tuple(v for v in self.program.inputs if v.name.startswith("state"))

    @property
    def values(self) -> Var:
        """The rows of v, which all recurrences of a spec read."""
        return self.program.var("v")

    @property
    def outputs(self) -> tuple[Var, ...]:
        """Rows o, and the states after."""
        return self.program.outputs

    @property
    def gradients(self) -> dict[Var, Var]:
        """Input to its gradient."""
        return dict(self.program.gradients)

    @property
    def cotangents(self) -> dict[Var, Var]:
        """Output to the input that carries its cotangent."""
        return dict(self.program.cotangents)

    @cached_property
    def factors(self) -> tuple[tuple[sp.Expr, tuple[Var, ...]], ...]:
        """By what a chunk multiplies each state; none where it is a matrix."""
        pairs = zip(self.outputs[1:], self.states, strict=True)
        found = [carried(self.program, after, before) for after, before in pairs]
        return tuple(f for f in found if f is not None) if None not in found else ()

    @property
    def decays(self) -> bool:
        """True where a chunk multiplies its state by something else than 1."""
        return any(expr != 1 for expr, _ in self.factors)

    @property
    def plan_by_head(self) -> bool:
        """True where every key head has rows of its own."""
        return self.by_head and self.gathered

    def partition(self, v: Var) -> int:
        """The partition of an input, or of the gradient of one, where partitions are unrolled."""
        owner = next((x for x, g in self.gradients.items() if g == v), v)
        return copied(owner.name, "p")[1]

    @cached_property
    def decay(self) -> Var | None:
        """The decay whose differences stand inside a sum over features."""
        large = [eq.out for eq in self.program.equations if too_large(eq.out)]
        return decay_of(self.program, large[0]) if large else None

    @property
    def mildness(self) -> tuple[bool, ...]:
        """The kinds of group that have a kernel of their own: mild decay and strong, where that makes a difference."""
        return (True, False) if self.decay else (True,)

    @property
    def spans(self) -> Array:
        """By how much that decay changes in a chunk at most, per group and value head: its steps' absolute sum."""
        return Array(f"spans{self.name}", "group_states", (), (1,), "float32")

    @property
    def plan(self) -> Array:
        """Where the rows lie."""
        return Array(f"plan{self.name}", "plan")

    @property
    def pieces(self) -> Array:
        """The same rows in short groups, for kernels that carry nothing from group to group."""
        return self.plan if self.factors else Array(f"pieces{self.name}", "plan")

    @property
    def sizes(self) -> tuple[int, int]:
        """Key and value features of a state."""
        return int(str(self.program.extents["d"])), int(str(self.program.extents["e"]))

    @property
    def tiles(self) -> tuple[int, int]:
        """The same, padded to what tiles hold."""
        d, e = self.sizes
        return padded_extent(d), padded_extent(e)

    def direct(self, v: Var) -> bool:
        """True where every token's row of an output is written once: by one slot and one value head."""
        return self.choices == 1 and ("g" in v.axes or self.group_size == 1)


def token_array(r: Recurrence, v: Var, dtype: str = "input", name: str = "") -> Array:
    """Rows as tokens have them: [T, heads(, features)]; heads are value heads where the variable has the axis g."""
    features = tuple(a for a in tile_axes(v) if a not in ROWS)
    if not set(tile_axes(v)) & set(ROWS):
        return Array(name or v.name, "head_scalars", (), (), dtype)  # type: ignore[arg-type]
    width = tuple(int(str(r.program.extents[a])) for a in features)
    layout = "value_rows" if "g" in v.axes else "token_rows"
    return Array(name or v.name, layout, features, width, dtype)  # type: ignore[arg-type]


def slot_array(r: Recurrence, v: Var) -> Array:
    """Rows as slots have them: one per slot and value head, to be summed per token."""
    features = tuple(a for a in tile_axes(v) if a not in ROWS)
    width = tuple(int(str(r.program.extents[a])) for a in features)
    if not set(tile_axes(v)) & set(ROWS):
        return Array(f"{v.name}_parts", "group_totals", (), (), "float32")
    return Array(f"{v.name}_parts", "slot_rows", features, width, "input" if features else "float32")


def routing_input(v: Var) -> str:
    """What of the router an input is, eta, write or read, of any partition; "" if it is rows or a state."""
    stem, _ = copied(v.name, "p")
    return stem if stem in ("eta", "write", "read") else ""


def is_exact(v: Var) -> bool:
    """True of decays and beta, whose gradients are float32 until they get the type of the input; False of rows."""
    return v.name[0] in "gb"


def state_table(name: str) -> Array:
    """States as the op's caller has them: [samples, parts, value heads, D, E] float32."""
    return Array(name, "state_table", ("d", "e"), (), "float32")


def group_states(r: Recurrence, name: str) -> Array:
    """The states of a group per value head, padded, float32."""
    return Array(f"{name}{r.name}", "group_states", ("d", "e"), r.tiles, "float32", True, partitions=len(r.states))


def group_factors(r: Recurrence) -> Array:
    """The factor of a group per value head: a number, or one per key feature."""
    wide = any("d" in v.axes for _, args in r.factors for v in args)
    features, width = (("d",), r.tiles[:1]) if wide else ((), (1,))
    return Array(f"factors{r.name}", "group_states", features, width, "float32", partitions=len(r.states))


def chunk_states(r: Recurrence, name: str = "states") -> Array:
    """The states before each chunk (or the cotangents of those after it), in the input dtype."""
    return Array(f"{name}{r.name}", "chunk_states", ("d", "e"), r.tiles, "input", True, partitions=len(r.states))


PLAN_TENSORS = ("offsets", "tokens", "places", "gates", "writes", "reads")


def plan_tensors(holes: Mapping[str, object], always: Sequence[str] = ("offsets",)) -> tuple[str, ...]:
    """The tensors of a plan that a kernel with these holes reads."""
    text = " ".join(map(str, holes.values()))
    return tuple(t for t in PLAN_TENSORS if t in always or f"{t}_ptr" in text)
