"""Predicates that are affine in integer positions: disjoint intervals of a loop variable, and what implies what.

An atom is an affine expression e with the meaning e >= 0.  A predicate over blocks is put in disjunctive form, its
terms are made disjoint, and each becomes an interval of the loop variable with bounds that a kernel can print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy as sp

from splagen.errors import PartitionError

Atom: TypeAlias = sp.Expr
Term: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True)
class Bound:
    """floor(numerator / divisor), clamped below at 0 by whoever reads it."""

    numerator: sp.Expr
    divisor: int


@dataclass(frozen=True)
class Interval:
    """max(0, lows) <= x < min(highs, extent), and empty unless every guard is >= 0."""

    lows: tuple[Bound, ...]
    highs: tuple[Bound, ...]
    guards: tuple[Atom, ...]

    def count(self, at: Mapping[sp.Symbol, sp.Integer], extent: int) -> int:
        """How many x there are where the other symbols have these values."""
        if any(guard.xreplace(at) < 0 for guard in self.guards):
            return 0
        low, high = ([int(b.numerator.xreplace(at)) // b.divisor for b in some] for some in (self.lows, self.highs))
        return max(0, min([extent, *high]) - max([0, *low]))


def atom(relation: sp.Basic) -> tuple[Atom, ...]:
    """A comparison of integers as expressions that are all >= 0."""
    match relation:
        case sp.StrictLessThan():
            return (sp.expand(relation.rhs - relation.lhs - 1),)
        case sp.LessThan():
            return (sp.expand(relation.rhs - relation.lhs),)
        case sp.StrictGreaterThan():
            return (sp.expand(relation.lhs - relation.rhs - 1),)
        case sp.GreaterThan():
            return (sp.expand(relation.lhs - relation.rhs),)
        case sp.Equality():
            gap = sp.expand(relation.lhs - relation.rhs)
            return (gap, -gap)
    raise PartitionError(f"`{relation}` is not a comparison of positions", hint="use <, <=, >, >= or ==")


def terms(predicate: sp.Basic) -> list[Term]:
    """Disjunctive form: a list of conjunctions of atoms; [] is false and [()] is true."""
    if predicate == sp.true:
        return [()]
    if predicate == sp.false:
        return []
    match predicate:
        case sp.Or():
            return [t for part in predicate.args for t in terms(part)]
        case sp.And():
            product: list[Term] = [()]
            for part in sorted(predicate.args, key=sp.default_sort_key):
                product = [(*a, *b) for a in product for b in terms(part)]
            return product
        case sp.Not():
            return terms(negation(predicate.args[0]))
    return [atom(predicate)]


def negation(predicate: sp.Basic) -> sp.Basic:
    """Not P with the negation pushed to the comparisons."""
    match predicate:
        case sp.Or():
            return sp.And(*(negation(p) for p in predicate.args))
        case sp.And():
            return sp.Or(*(negation(p) for p in predicate.args))
        case sp.Not():
            return predicate.args[0]
    return sp.Not(predicate)


def disjoint(all_terms: Sequence[Term]) -> list[Term]:
    """The same union as terms no two of which hold together: each term minus those before it."""
    out: list[Term] = []
    for i, term in enumerate(all_terms):
        pieces: list[Term] = [term]
        for earlier in all_terms[:i]:
            split: list[Term] = []
            for piece in pieces:
                for n, cut in enumerate(earlier):
                    split.append((*piece, *earlier[:n], sp.expand(-cut - 1)))
            pieces = split
        out += [tidy for p in pieces if (tidy := _tidy(p)) is not None]
    return out


def _tidy(term: Term) -> Term | None:
    """Drop atoms that always hold or that another implies; None if two contradict."""
    kept: list[Atom] = []
    for a in dict.fromkeys(term):
        if a.is_number:
            if a < 0:
                return None
            continue
        kept.append(a)
    for a in kept:
        if any((a + b).is_number and (a + b) < 0 for b in kept):
            return None
    return tuple(a for a in kept if not any(b != a and (a - b).is_number and (a - b) > 0 for b in kept))


def feasible(term: Term, inner: Mapping[sp.Symbol, int]) -> Term:
    """The term with each inner position (of extent e) at the value in 0 .. e-1 that favours it most."""
    out = []
    for a in term:
        for x, extent in inner.items():
            slope = a.coeff(x)
            a = a.subs(x, extent - 1 if slope > 0 else 0)
        out.append(sp.expand(a))
    return tuple(out)


def implied(target: Atom, known: Sequence[Atom], inner: Mapping[sp.Symbol, int]) -> bool:
    """True if target >= 0 follows from known atoms, for every value of the inner positions.

    Proof by at most two known atoms: target - a - b is a number >= 0.  Sound, not complete.
    """
    worst = target
    for x, extent in inner.items():
        worst = worst.subs(x, extent - 1 if worst.coeff(x) < 0 else 0)
    candidates = [sp.Integer(0), *known, *(a + b for i, a in enumerate(known) for b in known[i:])]
    return any((gap := sp.expand(worst - c)).is_number and gap >= 0 for c in candidates)


def intervals(predicate: sp.Basic, variable: sp.Symbol, inner: Mapping[sp.Symbol, int]) -> list[Interval]:
    """Disjoint intervals of `variable` in which the predicate holds for some value of the inner positions."""
    found = []
    for term in disjoint([feasible(t, inner) for t in terms(predicate)]):
        lows, highs, guards = [], [], []
        for a in term:
            slope = a.coeff(variable)
            rest = sp.expand(a - slope * variable)
            if rest.has(variable) or not slope.is_Integer:
                raise PartitionError(f"`{a} >= 0` is not affine in {variable}")
            if slope > 0:  # x >= ceil(-rest / slope)
                lows.append(Bound(sp.expand(-rest + slope - 1), int(slope)))
            elif slope < 0:  # x < floor(rest / -slope) + 1
                highs.append(Bound(sp.expand(rest - slope), int(-slope)))
            else:
                guards.append(a)
        found.append(Interval(tuple(lows), tuple(highs), tuple(guards)))
    return found
