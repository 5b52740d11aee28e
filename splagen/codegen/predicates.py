"""Masks as predicates over positions: which blocks a loop visits, and which comparisons always hold inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy as sp

from splagen.codegen.affine import Atom, Interval, atom, feasible, implied, intervals, terms
from splagen.codegen.geometry import Geometry
from splagen.codegen.triton_expr import interval_text
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.program import Iota, Map, Program, Var, placeholder

T, J, m, n, LENGTH = (symbol(x) for x in ("T", "J", "m", "n", "L"))


@dataclass(frozen=True)
class Predicates:
    """The positions and masks of one program."""

    program: Program
    geometry: Geometry

    @property
    def inner(self) -> dict[sp.Symbol, int]:
        """Positions inside a tile and inside a block, with their extents."""
        return {m: self.geometry.tile, n: self.geometry.block}

    @property
    def exists(self) -> tuple[Atom, ...]:
        """What holds of every tile and block that a kernel visits: it starts inside the sequence."""
        return (LENGTH - 1 - self.geometry.tile * T, LENGTH - 1 - self.geometry.block * J)

    def expand(self, v: Var, facts: Mapping[Var, bool]) -> sp.Basic:
        """A mask over the symbols T, m, J, n and L, with the masks in `facts` fixed."""
        if v in facts:
            return sp.true if facts[v] else sp.false
        eq = self.program.definitions.get(v)
        if eq is None or not isinstance(eq.op, (Map, Iota)):
            raise PartitionError(f"the mask {v} depends on data", hint="only a top-k may, and it is given as indices")
        if isinstance(eq.op, Iota):
            position = self.geometry.position(eq.op)
            if position is None:
                raise PartitionError(f"{v} is not a sequence position")
            return position
        values = {placeholder(i): self.expand(a, facts) for i, a in enumerate(eq.args)}
        return eq.op.expr.xreplace(values)

    def intervals(self, v: Var, variable: sp.Symbol, facts: Mapping[Var, bool]) -> list[Interval]:
        """Disjoint intervals of blocks J (or tiles T) in which the mask holds somewhere."""
        predicate = self.expand(v, facts)
        found = intervals(predicate, variable, self.inner)
        return [self._without_known(i, variable) for i in found]

    def _without_known(self, interval: Interval, variable: sp.Symbol) -> Interval:
        """Without the upper bounds that only say that the block or tile starts inside the sequence."""
        known = self.exists[1 if variable == J else 0]
        highs = tuple(b for b in interval.highs if sp.expand(b.numerator - b.divisor * (variable + 1) - known) != 0)
        return Interval(interval.lows, highs, interval.guards)

    def known(self, facts: Mapping[Var, bool]) -> list[tuple[Atom, ...]]:
        """The atoms that hold where the masks in `facts` are true: one tuple per case."""
        cases: list[tuple[Atom, ...]] = [self.exists]
        for v, value in facts.items():
            definition = self.program.definitions.get(v)
            if value and definition is not None and isinstance(definition.op, Map):
                alternatives = [feasible(t, {}) for t in terms(self.expand(v, {}))]
                cases = [(*c, *t) for c in cases for t in alternatives]
        return cases

    def simplifier(self, facts: Mapping[Var, bool]) -> Callable[[sp.Basic, tuple[Var, ...]], sp.Basic]:
        """Replaces comparisons of positions that hold for every row and key of the loop by true."""
        cases = self.known(facts)

        def simplify(expr: sp.Basic, args: tuple[Var, ...]) -> sp.Basic:
            places = {}
            for i, v in enumerate(args):
                eq = self.program.definitions.get(v)
                if eq is not None and isinstance(eq.op, Iota) and (place := self.geometry.position(eq.op)) is not None:
                    places[placeholder(i)] = place
            proven = {}
            for part in expr.atoms(sp.core.relational.Relational):
                where = part.xreplace(places)
                symbols = {s.name for s in where.free_symbols}
                if symbols <= {"T", "J", "m", "n", "L"} and all(
                    implied(a, case, self.inner) for a in atom(where) for case in cases
                ):
                    proven[part] = sp.true
            return expr.xreplace(proven) if proven else expr

        return simplify


def visit(
    found: list[Interval], prefix: str, names: Mapping[str, str], extent: str, index: str
) -> tuple[list[str], str, str]:
    """A loop over disjoint intervals in order: set-up lines, the number of visits, and source of the visited one.

    `prefix` names the low ends and the counts; `index` is the loop's counter.
    """
    lines, counts, seen = [], [], ""
    place = ""
    for k, interval in enumerate(found):
        low, high = interval_text(interval, names, extent)
        tag = f"_{k}" if len(found) > 1 else ""
        lines.append(f"{prefix}_low{tag} = {low}")
        lines.append(f"{prefix}_count{tag} = tl.maximum({high} - {prefix}_low{tag}, 0)")
        counts.append(f"{prefix}_count{tag}")
        here = f"{prefix}_low{tag} + {index}" + (f" - ({seen})" if " " in seen else f" - {seen}" if seen else "")
        place = here if not place else f"tl.where({index} < {seen}, {place}, {here})"
        seen = f"{seen} + {counts[-1]}" if seen else counts[-1]
    if not found:
        return [], "0", "0"
    return lines, f"({seen})" if len(found) > 1 else seen, place
