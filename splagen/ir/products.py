"""Passes on sums of products: factors that leave a sum, sums whose terms no tile holds, products that are known."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy as sp

from splagen.ir.build import Builder
from splagen.ir.program import Contract, Equation, Map, Program, Reduce, Var, ordered, placeholder


def largest_rank(rank: int, axes: Sequence[str]) -> Callable[[Var], bool]:
    """Arrays over more than `rank` of the axes."""
    return lambda v: len(ordered(set(v.axes) & set(axes), {a: n for n, a in enumerate(axes)})) > rank


@dataclass(frozen=True)
class _Product:
    factor: sp.Expr
    args: tuple[Var, ...]


def fold_products(too_large: Callable[[Var], bool]) -> Callable[[Program], Program]:
    """Sums of products through an array that is too large  ->  one contraction, factors outside of the sum pulled out.

        x[i d] = sum_j y[i j d],  y = q[i d] k[j d] a[i j] w[i j d]   ->   x = q * contract_j(k, a, w)

    so that only w itself, which no product gives, is ever as large.  Law: value unchanged.
    """

    def apply(program: Program) -> Program:
        definitions = program.definitions
        b = Builder.beside(program)

        def product(v: Var) -> _Product:
            eq = definitions.get(v)
            inner = _as_product(eq) if eq is not None and too_large(v) else None
            if inner is None:
                return _Product(sp.S.One, (v,))
            parts = [product(x) for x in inner.args]
            return _Product(
                inner.factor * sp.Mul(*(p.factor for p in parts)), tuple(itertools.chain(*(p.args for p in parts)))
            )

        for eq in program.equations:
            if too_large(eq.out) or eq.out.kind != "real" or not any(too_large(v) for v in eq.args):
                b.equations.append(eq)
                continue
            whole = _summed(eq)
            if whole is None:
                b.equations.append(eq)
                continue
            parts = [product(v) for v in whole.args]
            factor = whole.factor * sp.Mul(*(p.factor for p in parts))
            args = [v for p in parts for v in p.args]
            kept = set(eq.out.axes)
            inside = [v for v in args if not set(v.axes) <= kept]
            outside = [v for v in args if v not in inside]
            if not outside and factor == 1:
                b.equations.append(Equation(eq.out, Contract(eq.out.axes), tuple(inside)))
                continue
            total = b.contract(f"{eq.out.name}_sum", kept & {a for v in inside for a in v.axes}, *inside)
            names = list(dict.fromkeys(outside))
            expr = factor * sp.Mul(placeholder(0), *(placeholder(1 + names.index(v)) for v in outside))
            b.equations.append(Equation(eq.out, Map(expr), (total, *names)))
        return program.with_equations(b.equations)

    return apply


def _as_product(eq: Equation) -> _Product | None:
    """A Map or contraction that only multiplies its arguments."""
    if isinstance(eq.op, Contract):
        every = {a for v in eq.args for a in v.axes}
        return _Product(sp.S.One, eq.args) if set(eq.op.keep) == every else None
    if not isinstance(eq.op, Map):
        return None
    every = sp.Mul.make_args(eq.op.expr)
    factor = sp.Mul(*(f for f in every if f.is_number))
    factors = [f for f in every if not f.is_number]
    where = {placeholder(i): v for i, v in enumerate(eq.args)}
    if all(f in where for f in factors) and len(factors) == len(eq.args):
        return _Product(factor, tuple(where[f] for f in factors))
    return None


def _summed(eq: Equation) -> _Product | None:
    match eq.op:
        case Contract():
            return _Product(sp.S.One, eq.args)
        case Reduce("sum", _) if len(eq.args) == 1:
            return _Product(sp.S.One, eq.args)
    return None


def pull_factors(program: Program, last: Sequence[str] = ()) -> Program:
    """contract(c f x, y)  ->  c f contract(x, y)  for factors f that carry no summed axis.

    A gate or a decay of rows leaves a product of tiles, whose operands are then what lies in memory.  The axes `last`
    are summed behind the others, so that a factor may carry them.  A sum of a product that is written as a Map becomes
    a contraction where it has such a factor.  Law: value unchanged.
    """
    b = Builder.beside(program)
    definitions: dict[Var, Equation] = {}

    def factors(v: Var, summed: set[str]) -> _Product:
        """v as numbers and variables without a summed axis, times the rest."""
        eq = definitions.get(v)
        inner = _as_product(eq) if eq is not None else None
        if inner is None or not any(set(x.axes) & summed for x in inner.args):
            return _Product(sp.S.One, (v,))
        if inner.factor == 1 and all(set(x.axes) & summed for x in inner.args):
            return _Product(sp.S.One, (v,))
        inside = [x for x in inner.args if set(x.axes) & summed]
        if len(inside) != 1:
            return _Product(sp.S.One, (v,))
        deeper = factors(inside[0], summed)
        outside = tuple(x for x in inner.args if x is not inside[0])
        return _Product(inner.factor * deeper.factor, (*outside, *deeper.args))

    def terms(eq: Equation) -> _Product | None:
        """What an equation sums, as one product."""
        if isinstance(eq.op, Contract):
            return _Product(sp.S.One, eq.args)
        if isinstance(eq.op, Reduce) and eq.op.how == "sum" and len(eq.args) == 1 and eq.args[0] in definitions:
            return _as_product(definitions[eq.args[0]])
        return None

    for eq in program.equations:
        new = eq
        whole = terms(eq)
        if whole is not None:
            every = {a for v in whole.args for a in v.axes}
            behind = every - set(eq.out.axes) & set(last)
            summed = every - set(eq.out.axes) - behind
            parts = [factors(v, summed) for v in whole.args]
            factor = whole.factor * sp.Mul(*(p.factor for p in parts))
            args = [v for p in parts for v in p.args]
            inside = [v for v in args if set(v.axes) & summed]
            outside = [v for v in args if v not in inside]
            if summed and inside and (outside or (factor != 1 and isinstance(eq.op, Contract))):
                total = b.contract(f"{eq.out.name}_sum", {a for v in inside for a in v.axes} - summed, *inside)
                definitions[total] = b.equations[-1]
                names = list(dict.fromkeys(outside))
                expr = factor * sp.Mul(placeholder(0), *(placeholder(1 + names.index(v)) for v in outside))
                if behind:
                    scaled = b.map(f"{eq.out.name}_term", expr, total, *names)
                    definitions[scaled] = b.equations[-1]
                    new = Equation(eq.out, Reduce("sum", ordered(behind, b.order)), (scaled,))
                else:
                    new = Equation(eq.out, Map(expr), (total, *names))
        b.equations.append(new)
        definitions[eq.out] = new
    return program.with_equations(b.equations)


def reuse(program: Program) -> Program:
    """contract(A, contract(B, C)) -> contract(contract(A, B), C) where contract(A, B) is known, or asked for as well.

    It turns delta = sum p dp, with dp = do . v and o = p . v, into delta = sum do . o, which needs no scores.  The sum
    that is left has fewer axes, or as many and contract(B, C) has no other reader.  Law: value unchanged, idempotent.
    """
    plain = [eq for eq in program.equations if isinstance(eq.op, Contract) and all(v.kind == "real" for v in eq.args)]
    now = {eq.out: eq for eq in program.equations}
    for eq in plain:
        readers = Counter(v for other in now.values() for v in set(other.args))
        asked = {*program.outputs, *(g for _, g in program.gradients)}
        alone = {v for v, n in readers.items() if n == 1 and v not in asked}
        known = [now[old.out] for old in plain if old is not eq and eq.out not in _needs(now, old.out)]
        now[eq.out] = _reassociated(now[eq.out], now, known, alone) or now[eq.out]
    return program.with_equations(_sorted(program, now))


def _needs(definitions: Mapping[Var, Equation], v: Var) -> set[Var]:
    """A variable and all that it is computed from."""
    found, todo = {v}, [v]
    while todo:
        eq = definitions.get(todo.pop())
        fresh = set(eq.args) - found if eq else set()
        found |= fresh
        todo += fresh
    return found


def _sorted(program: Program, definitions: Mapping[Var, Equation]) -> list[Equation]:
    """The equations in their order, except that what one reads comes before it."""
    out: dict[Var, Equation] = {}

    def put(v: Var) -> None:
        if v in definitions and v not in out:
            for x in definitions[v].args:
                put(x)
            out[v] = definitions[v]

    for eq in program.equations:
        put(eq.out)
    return list(out.values())


def _reassociated(
    eq: Equation, definitions: Mapping[Var, Equation], known: Sequence[Equation], alone: Collection[Var]
) -> Equation | None:
    assert isinstance(eq.op, Contract)
    keep = set(eq.op.keep)
    for i, inner in enumerate(eq.args):
        made = definitions.get(inner)
        if made is None or not isinstance(made.op, Contract):
            continue
        others = [*eq.args[:i], *eq.args[i + 1 :]]
        hidden = {a for v in made.args for a in v.axes} - set(made.op.keep)
        if hidden & ({a for v in others for a in v.axes} | keep):
            continue
        flat = [*others, *made.args]
        for old in known:
            assert isinstance(old.op, Contract)
            rest = _without(flat, old.args)
            if rest is None or not rest or set(old.args) <= set(made.args) or old is made:
                continue
            outside = keep.union(*(v.axes for v in rest))
            carried = {a for v in old.args for a in v.axes}
            wide = len({a for v in (*rest, old.out) for a in v.axes})
            before = len({a for v in eq.args for a in v.axes})
            if set(old.op.keep) == carried & outside and (wide < before or (wide == before and inner in alone)):
                return Equation(eq.out, eq.op, (*rest, old.out))
    return None


def _without(items: Sequence[Var], taken: Sequence[Var]) -> list[Var] | None:
    rest = list(items)
    for v in taken:
        if v not in rest:
            return None
        rest.remove(v)
    return rest


def reuse_sums(program: Program) -> Program:
    """f x + f y + z  ->  f s + z  where s = x + y is known, x and y products; likewise a product that holds another.

    Of the gradient of a decay, the sum of q dq's terms becomes q dq, and that of k dk's k dk; of one sum with the terms
    of both, the first is found alone.  Law: value unchanged.
    """
    now = {eq.out: eq for eq in program.equations}
    asked = {*program.outputs, *(g for _, g in program.gradients)}
    known = {eq.out: terms for eq in program.equations if (terms := _polynomial(eq.out, now)) is not None}
    for eq in program.equations:
        if eq.out not in known or not isinstance(eq.op, Map):
            continue
        found = None
        readers = Counter(v for other in now.values() for v in set(other.args))
        alone = {v for v in eq.args if v in now and readers[v] == 1 and v not in asked}
        for s in known:
            if len(known[s]) + sum(map(len, known[s])) > 2 and eq.out not in _needs(now, s):
                new = _by_sum(eq, s, known, alone - {s})
                if new is not None and (found is None or len(known[s]) > len(known[found[0]])):
                    found = s, new
        if found is not None:
            now[eq.out] = found[1]
    return program.with_equations(_sorted(program, now))


Terms: TypeAlias = dict[tuple[Var, ...], sp.Expr]  # products of variables, sorted by name, to their coefficients
MOST_TERMS = 16


def _polynomial(v: Var, definitions: Mapping[Var, Equation]) -> Terms | None:
    """A Map of sums and products over variables that are none; None for another equation."""
    eq = definitions.get(v)
    if eq is None or not isinstance(eq.op, Map) or v.kind != "real" or any(x.kind != "real" for x in eq.args):
        return None
    expr = sp.sympify(eq.op.expr)
    holes = [placeholder(i) for i in range(len(eq.args))]
    if expr.is_number or not expr.is_polynomial(*holes):
        return None
    inner = [_polynomial(x, definitions) or {(x,): sp.S.One} for x in eq.args]
    total: Terms = {}
    for powers, coefficient in sp.Poly(expr, *holes).terms():
        factors = [terms for terms, n in zip(inner, powers, strict=True) for _ in range(n)]
        for product in itertools.product(*(f.items() for f in factors)):
            key = _product_key(v for names, _ in product for v in names)
            total[key] = total.get(key, sp.S.Zero) + coefficient * sp.Mul(*(c for _, c in product))
    return {k: c for k, c in total.items() if c != 0} if len(total) <= MOST_TERMS else None


def _product_key(factors: Iterable[Var]) -> tuple[Var, ...]:
    return tuple(sorted(factors, key=lambda v: v.name))


def _by_sum(eq: Equation, s: Var, known: Mapping[Var, Terms], alone: Collection[Var]) -> Equation | None:
    """An equation written with the known sum `s`; None where it does not hold a multiple of it, or gains nothing.

    `alone` are arguments that nothing else reads: without them there is an equation less.
    """
    addends = _addends(eq)
    values: list[Terms] = [known.get(v, {(v,): sp.S.One}) for v, _ in addends] if addends else [known[eq.out]]
    signs = [c for _, c in addends] if addends else [sp.S.One]
    (least, weight), *_ = sorted(known[s].items(), key=lambda term: (-len(term[0]), str(term[0])))
    for terms, sign in zip(values, signs, strict=True):
        for key, coefficient in terms.items():
            rest = _without(key, least)
            if rest is None or len(rest) > 1:
                continue
            factor = sign * coefficient / weight
            wanted = {_product_key((*k, *rest)): factor * c for k, c in known[s].items()}
            taken = [i for i, x in enumerate(values) if x.keys() <= wanted.keys()]
            held: Terms = {}
            for i in taken:
                for k, c in values[i].items():
                    held[k] = held.get(k, sp.S.Zero) + signs[i] * c
            left = [a for i, a in enumerate(addends or []) if i not in taken]
            args = [s, *rest, *(v for v, _ in left)]
            fewer = len(args) - len(set(alone) - set(args)) < len(eq.args)
            if held != wanted or not fewer or {a for v in args for a in v.axes} != set(eq.out.axes):
                continue
            expr = factor * sp.Mul(*(placeholder(args.index(v)) for v in (s, *rest)))
            expr += sp.Add(*(c * placeholder(args.index(v)) for v, c in left))
            return Equation(eq.out, Map(expr), tuple(args))
    return None


def _addends(eq: Equation) -> list[tuple[Var, sp.Expr]] | None:
    """The terms of a linear Map with their coefficients; None for another."""
    assert isinstance(eq.op, Map)
    parts = sp.Add.make_args(eq.op.expr)
    found = []
    for part in parts:
        coefficient, rest = part.as_coeff_Mul()
        if len(parts) == 1 or rest not in [placeholder(i) for i in range(len(eq.args))]:
            return None
        found.append((eq.args[[placeholder(i) for i in range(len(eq.args))].index(rest)], coefficient))
    return found
