"""A sum over nearly everything as the total less the little that is left out."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from splagen.expression import symbol
from splagen.ir.build import Builder
from splagen.ir.program import Contract, Equation, Iota, Map, Program, TopK, Var, placeholder

BLOCKS = 1024  # of the sequence in which blocks outside a mask are counted
FEW = 1024  # query rows x keys outside, per row of a block: as scores they take less time than a state in memory


def take_from_total(program: Program) -> Program:
    """Sum over (P and not F) of X  ->  (sum of X) - (sum over (not P or F) of X), F a top-k among P.

    Only where P, a mask of positions, leaves out few blocks of a long sequence: without causality.  The total is one
    state for all queries, where the sum over P is a prefix for each; what P leaves out is seen by the softmax anyway.
    Exact for any masks.  Counts stay as they are: they take no states.
    """
    b = Builder.beside(program)
    for eq in program.equations:
        found = taken_from_total(program, eq)
        if not found or not isinstance(eq.op, Contract):
            b.equations.append(eq)
            continue
        rest, whole, chosen = found
        others = [v for v in eq.args if v != rest]
        seen = outside(b, rest, whole, chosen)
        total = _total(b, f"{eq.out.name}_all", set(eq.op.keep), others)
        taken = b.add(f"{eq.out.name}_chosen", eq.op, seen, *others)
        b.equations.append(Equation(eq.out, Map(placeholder(0) - placeholder(1)), (total, taken)))
    return program.with_equations(b.equations)


def outside(b: Builder, rest: Var, whole: Var, chosen: Var) -> Var:
    """The mask of what `rest`, P and not F, leaves out: not P or F, once for all that read it."""
    expr, name = sp.Or(sp.Not(placeholder(0)), placeholder(1)), f"not_{rest.name}"
    known = (
        eq.out for eq in b.equations if eq.args == (whole, chosen) and isinstance(eq.op, Map) and eq.op.expr == expr
    )
    return next(known, None) or b.map(name, expr, whole, chosen)


def _total(b: Builder, name: str, keep: set[str], factors: list[Var]) -> Var:
    """The sum of the factors' products; rows that only a mask carries are all alike, and masked at last."""
    reals = [v for v in factors if v.kind == "real"]
    masks = [v for v in factors if v not in reals]
    carried = {a for v in reals for a in v.axes}
    if masks and keep - carried and all(set(v.axes) <= keep for v in masks):
        return b.contract(name, keep, *masks, b.contract(f"{name}_states", keep & carried, *reals))
    return b.contract(name, keep, *factors)


def complement(eq: Equation | None) -> tuple[Var, Var, Var] | None:
    """(rest, P, F) for an equation rest = P and not F."""
    if eq is None or not isinstance(eq.op, Map) or len(eq.args) != 2:
        return None
    for whole, chosen in ((0, 1), (1, 0)):
        if eq.op.expr == sp.And(placeholder(whole), sp.Not(placeholder(chosen))):
            return eq.out, eq.args[whole], eq.args[chosen]
    return None


def taken_from_total(program: Program, eq: Equation) -> tuple[Var, Var, Var] | None:
    """(rest, P, F) of a sum over rest = P and not F, F a top-k among P, where P leaves out few blocks; else None."""
    found = next((c for v in eq.args if (c := complement(program.definitions.get(v)))), None)
    if not found or not isinstance(eq.op, Contract):
        return None
    rest, whole, chosen = found
    chooser = program.definitions.get(chosen)
    carried = {a for v in eq.args if v != rest for a in v.axes}
    if not (chooser and isinstance(chooser.op, TopK) and chooser.args[1:] == (whole,) and set(rest.axes) <= carried):
        return None
    sizes = {a: e for a, e in program.axes if isinstance(e, int)}
    if not {"g", "m", "C", "n"} <= sizes.keys():
        return None
    keys = sizes["C"] * sizes["n"]
    few, more = (_outside(program, whole, blocks, keys, sizes) for blocks in (BLOCKS, 2 * BLOCKS))
    return found if few is not None and few == more and few * keys * sizes["g"] <= FEW else None


def _outside(program: Program, mask: Var, blocks: int, keys: int, sizes: Mapping[str, int]) -> int | None:
    """Blocks of a sequence for which a mask of (tile, block) does not hold, for a tile in its middle."""
    eq = program.definitions.get(mask)
    if eq is None or not isinstance(eq.op, Map):
        return None
    tile, block = symbol("T"), symbol("J")
    places = {}
    for i, v in enumerate(eq.args):
        position = program.definitions.get(v)
        if position is None or not isinstance(position.op, Iota) or position.op.axes not in (("T",), ("J",)):
            return None
        places[placeholder(i)] = tile if position.op.axes == ("T",) else block
    length = blocks * keys
    expr = eq.op.expr.xreplace(places).xreplace({symbol("L"): sp.Integer(length)})
    if expr.free_symbols - {tile, block}:
        return None
    holds = sp.lambdify((tile, block), expr, modules="math")
    middle = length // 2 // sizes["m"]
    return sum(not holds(middle, j) for j in range(blocks))
