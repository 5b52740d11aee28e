"""A recurrence to compile, and the arrays that its kernels hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy as sp

from splagen.codegen.chunk_code import ROWS, decay_of, tile_axes, too_large
from splagen.codegen.kernel import Array
from splagen.codegen.region import padded_extent
from splagen.ir.program import Program, Var
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
    def decay(self) -> Var | None:
        """The decay whose differences stand inside a sum over features."""
        large = [eq.out for eq in self.program.equations if too_large(eq.out)]
        return decay_of(self.program, large[0]) if large else None

    @property
    def spans(self) -> Array:
        """By how much that decay changes in a chunk at most, per group and value head: its steps' absolute sum."""
        return Array(f"spans{self.name}", "group_states", (), (1,), "float32")

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


PLAN_TENSORS = ("offsets", "firsts", "owners", "tokens", "places", "gates", "writes", "reads")


def plan_tensors(
    holes: Mapping[str, object], always: Sequence[str] = ("offsets", "firsts", "owners")
) -> tuple[str, ...]:
    """The tensors of a plan that a kernel with these holes reads."""
    text = " ".join(map(str, holes.values()))
    return tuple(t for t in PLAN_TENSORS if t in always or f"{t}_ptr" in text)
