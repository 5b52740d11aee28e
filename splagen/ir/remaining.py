"""Sums over what a list of blocks leaves over, as one state less the states in the list."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from splagen.ir.build import Builder
from splagen.ir.program import Equation, Program, Var, ancestors, placeholder
from splagen.ir.totals import outside, taken_from_total

QUERIES, KEYS, FEATURES = frozenset({"T", "m"}), frozenset({"J", "C", "n"}), ("s", "d", "e")
ROWS = 32  # of a list, so that a tile of them is full
PRODUCTS = 64  # multiplications of a pair's tile that take as long as one number of a state that is read


def remaining_states(program: Program) -> Program:
    """Σ_J rest(T, J) x(T) Σ_n y(J, n) z(J, n)  ->  x(T) (Σ_J S(J) - Σ_J not rest(T, J) S(J)), S(J) = Σ_n y z.

    Applies where `take_from_total` does and a list of blocks serves so many rows that reading the blocks' states takes
    less time than their rows' products: one product for a tile then, instead of two for each block of its list.  The
    difference is the same for all sums of a direction that have the same states: forward and dφ(q) share it, and so do
    dφ(k) and dv, with the roles of queries and keys exchanged.  Exact for any masks.
    """
    sums = {s.equation: s for s in _worthwhile(program)}
    b = Builder.beside(program)
    rests = {s.rest: s.masks for s in sums.values()}
    listed: dict[Var, Var] = {}
    known: dict[tuple[Var, frozenset[Var]], Var] = {}
    for eq in program.equations:
        one = sums.get(eq)
        if one is None:
            b.equations.append(eq)
            if eq.out in rests:
                listed[eq.out] = outside(b, *rests[eq.out])
            continue
        key = one.rest, frozenset(one.summed)
        if key not in known:
            known[key] = one.remaining(b, listed[one.rest])
        b.equations.append(Equation(eq.out, eq.op, (*one.rows, known[key])))
    return program.with_equations(b.equations)


def forward_reads_states(program: Program) -> bool:
    """Whether `remaining_states` takes the sums of a definition, which has no gradient yet."""
    return any(s.direction == "forward" for s in _worthwhile(program))


@dataclass(frozen=True)
class _Sum:
    """A contraction of `rest`, factors of the rows that are summed, and factors of the rows that stay."""

    equation: Equation
    masks: tuple[Var, Var, Var]  # rest = whole and not chosen
    summed: tuple[Var, ...]
    rows: tuple[Var, ...]
    direction: str

    @classmethod
    def of(cls, program: Program, eq: Equation) -> _Sum | None:
        """The parts of a sum over what is left over, if it is one and every factor is of one side."""
        masks = taken_from_total(program, eq)
        if not masks:
            return None
        to_queries = bool(QUERIES & set(eq.out.axes))
        theirs = KEYS if to_queries else QUERIES
        others = [v for v in eq.args if v != masks[0]]
        summed = tuple(v for v in others if theirs & set(v.axes))
        rows = tuple(v for v in others if v not in summed)
        ours = QUERIES if to_queries else KEYS
        if any(ours & set(v.axes) for v in summed) or not {"T", "J"} <= set(masks[0].axes) <= {"b", "h", "T", "J"}:
            return None
        forward = eq.out in ancestors(program, program.outputs)
        return cls(eq, masks, summed, rows, "forward" if forward else "to queries" if to_queries else "to keys")

    @property
    def rest(self) -> Var:
        """The mask of what is left over."""
        return self.masks[0]

    @property
    def features(self) -> tuple[str, ...]:
        """Axes of a state."""
        return tuple(a for a in FEATURES if any(a in v.axes for v in self.summed))

    def remaining(self, b: Builder, listed: Var) -> Var:
        """The equations of the states, their total, the sum of those `listed`, and the difference."""
        place, other = ("J", "T") if self.direction != "to keys" else ("T", "J")
        name, features = self.equation.out.name, set(self.features)
        states = b.contract(f"{name}_states", {"b", "h", place} | features, *self.summed)
        total = b.contract(f"{name}_total", {"b", "h"} | features, states)
        taken = b.contract(f"{name}_listed", {"b", "h", other} | features, listed, states)
        return b.map(f"{name}_remaining", placeholder(0) - placeholder(1), total, taken)


def _worthwhile(program: Program) -> list[_Sum]:
    """The sums of directions in which reading states takes less time than multiplying pairs, for a tile and a block."""
    found = [s for eq in program.equations if (s := _Sum.of(program, eq))]
    sizes = {a: e for a, e in program.axes if isinstance(e, int)}
    if not found or sizes["m"] * sizes["g"] < ROWS:
        return []
    products: dict[str, int] = defaultdict(int)
    states: dict[str, dict[frozenset[Var], int]] = defaultdict(dict)
    for s in found:
        if "e" not in s.features:  # numbers beside the others: their products are there already
            continue
        left = math.prod(sizes[a] for a in s.features if a != "e")
        products[s.direction] += math.prod(sizes[a] for a in ("m", "g", "C", "n")) * (left + sizes["e"])
        states[s.direction][frozenset(s.summed)] = left * sizes["e"]
    chosen = {d for d, cost in products.items() if cost >= PRODUCTS * sum(states[d].values())}
    if "forward" in chosen:
        chosen.add("to queries")  # they have the states of forward
    return [s for s in found if s.direction in chosen]
