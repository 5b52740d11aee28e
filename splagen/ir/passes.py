"""Passes: each takes a valid Program and returns an equal one.

`run` applies a list of them and verifies between them.  The law of each stands in its docstring and in a test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy as sp

from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.products import reuse
from splagen.ir.program import (
    Contract,
    Equation,
    Lse,
    Map,
    Op,
    Program,
    Reduce,
    Softmax,
    TopK,
    Var,
    ancestors,
    placeholder,
    rename_arguments,
)
from splagen.ir.remaining import remaining_states
from splagen.ir.totals import complement, take_from_total

Pass: TypeAlias = Callable[[Program], Program]

LEAST = -(sp.Integer(10) ** 30)  # below every finite score


def run(program: Program, passes: Iterable[Pass]) -> Program:
    """Apply the passes in order; every result is verified."""
    for apply in passes:
        program = check(apply(program))
    return program


def substitute(program: Program, new: Mapping[Var, Var]) -> Program:
    """Read `new[v]` wherever v was read (equations keep their order)."""

    def see(v: Var) -> Var:
        while v in new:
            v = new[v]
        return v

    equations = []
    for eq in program.equations:
        args = tuple(see(v) for v in eq.args)
        op: Op = eq.op
        if isinstance(op, Map):
            merged = tuple(dict.fromkeys(args))
            where = {v: i for i, v in enumerate(merged)}
            swap = {placeholder(i): placeholder(where[v]) for i, v in enumerate(args)}
            op, args = Map(op.expr.xreplace(swap)), merged
        equations.append(Equation(eq.out, op, args))
    return replace(
        program,
        equations=tuple(equations),
        outputs=tuple(see(v) for v in program.outputs),
        gradients=tuple((x, see(g)) for x, g in program.gradients),
    )


def drop_unused(program: Program) -> Program:
    """Remove equations that nothing asked for depends on.  Law: value unchanged, idempotent."""
    return program.with_equations(followed([*program.outputs, *(g for _, g in program.gradients)], program.equations))


def followed(wanted: Iterable[Var], equations: Sequence[Equation]) -> list[Equation]:
    """Those of the equations, in their order, that the wanted variables follow from."""
    read, found = set(wanted), []
    for eq in reversed(equations):
        if eq.out in read:
            read |= set(eq.args)
            found.append(eq)
    return found[::-1]


def copy_prop(program: Program) -> Program:
    """y = x  (a Map of x0, or a contraction of one array over nothing)  ->  x itself.  Value unchanged, idempotent.

    An output keeps its name: a copy that is asked for stays.
    """
    program = substitute(program, {})  # merges repeated arguments, which may leave a copy
    asked = {*program.outputs, *(g for _, g in program.gradients)}
    copies = {}
    for eq in program.equations:
        plain = isinstance(eq.op, Map) and eq.op.expr == placeholder(0)
        plain = plain or (isinstance(eq.op, Contract) and len(eq.args) == 1)
        if plain and eq.out.axes == eq.args[0].axes and eq.out.kind == eq.args[0].kind and eq.out not in asked:
            copies[eq.out] = eq.args[0]
    rest = [eq for eq in program.equations if eq.out not in copies]
    return copy_prop(substitute(program.with_equations(rest), copies)) if copies else program


def share(program: Program) -> Program:
    """Equal equations become one; the order of a product's factors does not matter.  Value unchanged, idempotent."""
    place: dict[Var, int] = {v: i for i, v in enumerate(program.inputs)}
    seen: dict[tuple[Op, tuple[Var, ...]], Var] = {}
    new: dict[Var, Var] = {}
    asked = {*program.outputs, *(g for _, g in program.gradients)}
    kept = []
    for eq in program.equations:
        args = tuple(new.get(v, v) for v in eq.args)
        op = eq.op
        if isinstance(op, Map):
            merged = tuple(sorted(set(args), key=place.__getitem__))
            op, args = Map(rename_arguments(op.expr, args, merged)), merged
        elif isinstance(op, Contract):
            args = tuple(sorted(args, key=place.__getitem__))
        first = seen.setdefault((op, args), eq.out)
        if first != eq.out and eq.out not in asked:
            new[eq.out] = first
            continue
        place[eq.out] = len(place)
        kept.append(Equation(eq.out, op, args))
    return substitute(program.with_equations(kept), new)


def expose_lse(program: Program) -> Program:
    """p = softmax(x over sequence axes)  ->  l = lse(x);  p = exp(x - l) where the mask holds, else 0.

    Only softmaxes over axes of run-time extent: l is what forward keeps for backward.  Where x itself may be -oo (a
    score function that masks), l may be too: p is 0 there.  Law: value unchanged.
    """
    masking = {eq.out for eq in program.equations if isinstance(eq.op, Map) and eq.op.expr.has(-sp.oo)}
    b = Builder.beside(program)
    extents = program.extents
    for eq in program.equations:
        if not isinstance(eq.op, Softmax) or all(isinstance(extents[a], int) for a in eq.op.axes):
            b.equations.append(eq)
            continue
        lse = b.add("lse" if eq.out.name == "p" else f"lse_{eq.out.name}", Lse(eq.op.axes), *eq.args)
        x, ell = placeholder(0), placeholder(1)
        expr = sp.exp(x - ell)
        holds = [placeholder(2)] if len(eq.args) > 1 else []
        if eq.args[0] in masking:
            holds.append(x > LEAST)
        if holds:
            expr = sp.Piecewise((expr, sp.And(*holds)), (0, True))
        b.equations.append(Equation(eq.out, Map(expr), (eq.args[0], lse, *eq.args[1:])))
    return program.with_equations(b.equations)


def split_complement(program: Program) -> Program:
    """Sum over (P and not F) of X  ->  (sum over P of X) - (sum over (P and F) of X).

    Exact for any masks.  P and F is F itself where F is a top-k among P.  Applies to contractions and to counts, so
    after derive_gradient it splits forward, dphi_q, dphi_k and dv at once: SPLA's subtraction (arXiv 2601.22379) is
    found, not written.
    """
    return _split(program, (Contract, Reduce))


def split_counts(program: Program) -> Program:
    """The same for counts alone: sums of rows stay sums over (P and not F)."""
    return _split(program, (Reduce,))


def _split(program: Program, operations: tuple[type[Op], ...]) -> Program:
    definitions = program.definitions
    b = Builder.beside(program)
    for eq in program.equations:
        found = next((c for v in eq.args if (c := complement(definitions.get(v)))), None)
        summed = isinstance(eq.op, Contract) or (isinstance(eq.op, Reduce) and eq.op.how == "sum" and len(eq.args) == 1)
        if not found or not summed or not isinstance(eq.op, operations):
            b.equations.append(eq)
            continue
        rest, whole, chosen = found
        chooser = definitions.get(chosen)
        if not (chooser and isinstance(chooser.op, TopK) and chooser.args[1:] == (whole,)):
            chosen = b.map(f"{chosen.name}_in_{whole.name}", lambda p, f: sp.And(p, f), whole, chosen)
        counted = set(rest.axes) - {a for v in (whole, *eq.args) if v != rest for a in v.axes}
        if isinstance(eq.op, Reduce):
            counted &= set(eq.op.axes)
        if counted:  # an axis that only F carries: P is summed along it too
            along = [b.iota(f"along_{a}", a) for a in sorted(counted, key=b.order.__getitem__)]
            whole = b.map(f"{whole.name}_along", placeholder(0), whole, *along)
        parts = [
            b.add(f"{eq.out.name}_{word}", eq.op, *(mask if v == rest else v for v in eq.args))
            for word, mask in (("all", whole), ("chosen", chosen))
        ]
        b.equations.append(Equation(eq.out, Map(placeholder(0) - placeholder(1)), tuple(parts)))
    return program.with_equations(b.equations)


LONG = 2**20  # the hint for run-time extents: associate for sequences much longer than any feature axis


def associate(program: Program) -> Program:
    """Products of many factors become products of few, the smallest intermediate first.

    Under a mask that depends on data (a top-k) a product stays in score form: only factors that jointly carry every
    axis of the mask may be summed together, so that the pair (query row, key row) is what the mask applies to.
    Elsewhere private axes are summed first, which finds the block states phi_k^T v and the prefix over blocks.
    Law: value unchanged.
    """
    b = Builder.beside(program)
    data = _data_masks(program)
    sizes = {a: e if isinstance(e, int) else LONG for a, e in program.axes}
    for eq in program.equations:
        if not isinstance(eq.op, Contract):
            b.equations.append(eq)
            continue
        todo = list(eq.args)
        while group := _next_group(todo, set(eq.op.keep), data, sizes):
            outside = set(eq.op.keep).union(*(v.axes for v in todo if v not in group))
            keep = {a for v in group for a in v.axes} & outside
            name = f"{eq.out.name}_{_part_name(group, todo, data)}"
            todo = [v for v in todo if v not in group] + [b.contract(name, keep, *group)]
        b.equations.append(Equation(eq.out, eq.op, tuple(todo)))
    return program.with_equations(b.equations)


def _part_name(group: Sequence[Var], todo: Sequence[Var], data: set[Var]) -> str:
    """Scores under a mask that depends on data; a prefix where a mask of positions is summed over; else states."""
    if any(v in data for v in todo):
        return "scores"
    reals = {a for v in group if v.kind == "real" for a in v.axes}
    return "prefix" if any(v.kind == "bool" and not set(v.axes) <= reals for v in group) else "states"


def _data_masks(program: Program) -> set[Var]:
    """Bool variables that depend on a top-k."""
    found: set[Var] = set()
    for eq in program.equations:
        if eq.out.kind == "bool" and (isinstance(eq.op, TopK) or found & set(eq.args)):
            found.add(eq.out)
    return found


def _next_group(todo: Sequence[Var], keep: set[str], data: set[Var], sizes: Mapping[str, int]) -> list[Var] | None:
    """The factors to multiply next: those that carry some summed axis, at the smallest intermediate."""
    masks = [v for v in todo if v in data]
    must = {a for v in masks for a in v.axes}
    factors = [v for v in todo if v not in data]
    barred = {a for v in todo if masks and v.kind == "bool" for a in v.axes}
    best: tuple[float, int, list[Var]] | None = None
    summed = {a for v in todo for a in v.axes} - keep - barred
    for axis in sorted(summed, key=lambda a: list(sizes).index(a)):
        group = [v for v in factors if axis in v.axes]
        carried = {a for v in group for a in v.axes}
        if len(group) < 2 or len(group) == len(todo):
            continue
        if masks and (not must <= carried or any(must <= set(v.axes) for v in group)):
            continue
        others = [v for v in todo if v not in group]
        if all(v.kind == "bool" and set(v.axes) <= keep for v in others) and all(v.kind == "real" for v in group):
            continue  # only a mask of rows is left: one product
        outside = keep.union(*(v.axes for v in others))
        size = 1.0
        for a in carried & outside:
            size *= sizes[a]
        if best is None or (size, len(group)) < best[:2]:
            best = (size, len(group), group)
    return best[2] if best else None


def factor_out(program: Program) -> Program:
    """y = contract(c x, ...)  ->  y = c contract(x, ...), for a number c and an x that has axes which y lacks.

    A tile is then summed as it is, and the sum is scaled once.  Law: value unchanged.
    """
    definitions = program.definitions
    b = Builder.beside(program)
    for eq in program.equations:
        if isinstance(eq.op, Contract):
            scaled = [(v, *found) for v in eq.args if (found := scaling(definitions.get(v)))]
            for v, factor, x in scaled:
                if not set(x.axes) <= set(eq.out.axes):
                    args = tuple(x if a == v else a for a in eq.args)
                    whole = b.add(f"{eq.out.name}_unscaled", eq.op, *args)
                    eq = Equation(eq.out, Map(factor * placeholder(0)), (whole,))
                    break
        b.equations.append(eq)
    return drop_unused(program.with_equations(b.equations))


def scaling(eq: Equation | None) -> tuple[sp.Expr, Var] | None:
    """(c, x) of an equation that is a number c times x; None for any other."""
    if eq is None or not isinstance(eq.op, Map) or len(eq.args) != 1 or eq.out.kind != "real":
        return None
    number, rest = eq.op.expr.as_independent(placeholder(0), as_Add=False)
    return (number, eq.args[0]) if rest == placeholder(0) and number.is_number and number != 1 else None


def join_sums(together: Callable[[Equation], bool]) -> Pass:
    """y = (a - b) + c  ->  y = (a + c) - b  with the terms that belong together added first.

    Chains of +- whose inner results are read once are flattened; `together` says which equations' results belong
    together, so that a kernel can add them in one accumulator.  Law: value unchanged.
    """

    def apply(program: Program) -> Program:
        definitions = program.definitions
        uses: dict[Var, int] = {}
        for v in (
            *(a for eq in program.equations for a in eq.args),
            *program.outputs,
            *(g for _, g in program.gradients),
        ):
            uses[v] = uses.get(v, 0) + 1
        b = Builder.beside(program)
        for eq in program.equations:
            terms = _signed_terms(eq, definitions, uses)
            joined = {v: sign for v, sign in terms.items() if v in definitions and together(definitions[v])}
            rest = {v: sign for v, sign in terms.items() if v not in joined}
            if len(joined) < 2 or not rest:
                b.equations.append(eq)
                continue
            total = b.map(f"{eq.out.name}_joined", _combination(joined), *joined)
            b.equations.append(Equation(eq.out, Map(_combination({total: 1, **rest})), (total, *rest)))
        return drop_unused(program.with_equations(b.equations))

    return apply


def signed_terms(eq: Equation) -> dict[Var, int]:
    """{x: +1, y: -1} for an equation z = x - y; empty for anything but sums and differences of its arguments."""
    if not isinstance(eq.op, Map) or len(eq.args) < 2 or not isinstance(eq.op.expr, sp.Add):
        return {}
    signs = {v: eq.op.expr.coeff(placeholder(i)) for i, v in enumerate(eq.args)}
    plain = all(c in (1, -1) for c in signs.values()) and all(v.axes == eq.out.axes for v in eq.args)
    if not plain or sp.expand(eq.op.expr - _combination({v: int(c) for v, c in signs.items()})) != 0:
        return {}
    return {v: int(c) for v, c in signs.items()}


def _signed_terms(eq: Equation, definitions: Mapping[Var, Equation], uses: Mapping[Var, int]) -> dict[Var, int]:
    flat: dict[Var, int] = {}
    for v, sign in signed_terms(eq).items():
        inner = _signed_terms(definitions[v], definitions, uses) if v in definitions and uses[v] == 1 else {}
        for x, s in (inner or {v: 1}).items():
            if x in flat:
                return {}
            flat[x] = sign * s
    return flat


def _combination(signs: Mapping[Var, int]) -> sp.Expr:
    return sp.Add(*(sign * placeholder(i) for i, sign in enumerate(signs.values())))


def settle_names(program: Program) -> Program:
    """In the gradient, the last of several equations of one stem gets the plain name: dq_4 -> dq, dq -> dq_1, ...

    The total of a sum is defined last, so that it is the total that reads dq.  Forward equations keep their names.
    """
    forward = ancestors(program, program.outputs)
    taken = {v.name for v in program.inputs} | {v.name for v in forward}
    stems: dict[str, list[Var]] = {}
    for eq in program.equations:
        if eq.out not in forward:
            stems.setdefault(re.sub(r"_\d+$", "", eq.out.name), []).append(eq.out)
    new: dict[Var, Var] = {}
    for stem, group in stems.items():
        numbered = (name for i in itertools.count(1) if (name := f"{stem}_{i}") not in taken)
        names = [next(numbered) for _ in group]
        if stem not in taken:
            names[-1] = stem
        new.update({v: replace(v, name=n) for v, n in zip(group, names, strict=True)})
    equations = [
        Equation(new.get(eq.out, eq.out), eq.op, tuple(new.get(v, v) for v in eq.args)) for eq in program.equations
    ]
    gradients = tuple((x, new.get(g, g)) for x, g in program.gradients)
    return replace(program, equations=tuple(equations), gradients=gradients)


def specialise(sizes: Mapping[str, int]) -> Pass:
    """Fix run-time extents: axis name to integer.  Law: value unchanged at those sizes."""

    def apply(program: Program) -> Program:
        fixed = {e: sp.Integer(sizes[a]) for a, e in program.axes if a in sizes and not isinstance(e, int)}
        axes = tuple((a, int(fixed[e]) if e in fixed else e) for a, e in program.axes)
        equations = []
        for eq in program.equations:
            op = Map(eq.op.expr.xreplace(fixed)) if isinstance(eq.op, Map) else eq.op
            equations.append(Equation(eq.out, op, eq.args))
        return replace(program, axes=axes, equations=tuple(equations))

    return apply


_PRODUCTS: tuple[Pass, ...] = (
    associate,
    share,
    reuse,
    expose_lse,
    factor_out,
    copy_prop,
    share,
    drop_unused,
    settle_names,
)

LOWERING: tuple[Pass, ...] = (
    share,
    remaining_states,
    take_from_total,
    split_complement,
    *_PRODUCTS,
)

# without subtraction: sums over what is left over, from the blocks themselves
DIRECT: tuple[Pass, ...] = (share, split_counts, *_PRODUCTS)
