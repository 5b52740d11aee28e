"""A few tokens per sequence: the Program of a decoding step, from the definition of the whole sequence.

A token of a step is the definition at one query, the last of a sequence that ends with it: axis T has extent 1 and
counts from the length less one (`evaluate` takes that as an offset).  What the passes leave of it still sums over every
earlier block, where a linear branch allows for less: `carry` finds those sums and keeps them from step to step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import sympy as sp

from splagen.errors import ProgramError, SpecError
from splagen.expression import symbol
from splagen.ir.assumptions import fold_constants
from splagen.ir.build import Builder
from splagen.ir.frontend_spla import LENGTH, spla_program
from splagen.ir.partitions import unroll
from splagen.ir.passes import LOWERING, copy_prop, run, share
from splagen.ir.program import Contract, Equation, Iota, Lse, Map, Program, Softmax, Var, placeholder, rename_arguments
from splagen.spec import SPLASpec

FIRST = symbol("first")  # position of the first token of the step
SETTLED = symbol("settled")  # position of the first token of the step before; 0 if there is none


def step_program(spec: SPLASpec) -> Program:
    """The Program of one token of a step: inputs q (one row), k, v of the whole sequence, states; outputs o and states.

    Beside L it reads the scalars `first` and `settled`: where this step starts, and where the one before did.

    Law: with the states that the step before left (zero, and settled = 0, before the first), the token at length L
    gives the last row of the definition at length L.  The states after depend on no token from `first` on: all of a
    step's tokens leave the same, and those that are rejected leave no trace in it.

    Raises:
        SpecError: a query of this spec depends on later ones.
    """
    if not spec.causal:
        raise SpecError("causal is False: a query depends on later keys", "decoding takes specs with causal=True")
    if spec.select and spec.select.tile != 1:
        what = f"select.granularity is {spec.select.granularity!r}: a query chooses together with later ones"
        raise SpecError(what, 'decoding takes specs with granularity="token"')
    return run(_by_query(spla_program(spec)), (*LOWERING, *WRITTEN_OUT, carry, share))


def state_pairs(program: Program) -> list[tuple[Var, Var]]:
    """The states of a step: (before, after)."""
    definitions = program.definitions
    return [(definitions[after].args[0], after) for after in program.outputs[1:]]


def keep_normalisers(program: Program) -> Program:
    """f = softmax(x over features) of a key  ->  l = lse(x);  f = exp(x - l).

    Features of keys are formed anew in every step; the number l is kept with the key.  Law: value unchanged.
    """
    b = Builder.beside(program)
    for eq in program.equations:
        if not isinstance(eq.op, Softmax) or "n" not in eq.out.axes or {"J", "C", "n"} & set(eq.op.axes):
            b.equations.append(eq)
            continue
        lse = b.add(f"{eq.out.name}_lse", Lse(eq.op.axes), *eq.args)
        b.equations.append(Equation(eq.out, Map(sp.exp(placeholder(0) - placeholder(1))), (eq.args[0], lse)))
    return program.with_equations(b.equations)


WRITTEN_OUT = (partial(unroll, axis="s"), fold_constants, copy_prop, keep_normalisers)
"""Features of either sign of x are rows of their own, and nothing is summed to form those of a key."""


def _by_query(program: Program) -> Program:
    """The definition with tiles of one query: where nothing is selected, a tile of any size means the same."""
    return replace(program, axes=tuple((a, 1 if a == "m" else e) for a, e in program.axes))


def carry(program: Program) -> Program:
    """Sums over far blocks of what belongs to blocks alone, s = sum_n x y, that a row of the query reads, are carried.

        a[T] = sum_J far[T J] s[J]              after = before + sum_J (far[first J] and not far[settled J]) s[J]
        o[T] = sum r[T] a[T]               ->   late  = sum_J,n (far[T J] and not far[first J]) (sum r[T] x[J n]) y[J n]
                                                o[T]  = sum r[T] after + late

    Law: if `before` is the sum at query `settled` and settled <= first <= T = L - 1, o is unchanged, and `after`, an
    output, is the sum at query `first`: it is `before` of a step for which settled is this one's first.  Every block in
    it lies before `first`: a sequence may be cut back to any length from `first` on.  The mask may only grow from query
    to query, and must follow from positions; ProgramError quotes one that does not.
    """
    program = replace(program, scalars=(*program.scalars, FIRST.name, SETTLED.name))
    b = Builder.beside(program)
    states: list[Var] = []
    reads: dict[Equation, tuple[Equation, Var]] = {}
    for eq in program.equations:
        if eq in reads:
            total, state = reads[eq]
            _read(b, program, eq, total, state)
        elif (mask := _carried_mask(eq)) is None:
            b.equations.append(eq)
        else:
            states.append(_advance(b, program, eq, mask))
            reads[_reader(program, eq.out)] = (eq, states[-1])
    return replace(
        program, inputs=(*program.inputs, *b.inputs), equations=tuple(b.equations), outputs=(*program.outputs, *states)
    )  # fmt: skip


def carried_name(total: Var) -> str:
    """The stem of the names of a carried sum: rest_kv_all_prefix_s0 is carried as rest_kv_s0."""
    return re.sub(r"_(all|prefix)(?=_|$)", "", total.name)


def _advance(b: Builder, program: Program, total: Equation, mask: Var) -> Var:
    """The state after the step: a block enters it once, when it is far for the first token of a step."""
    name = carried_name(total.out)
    axes = tuple(a for a in total.out.axes if a != "T")
    before = b.input(f"{name}_state", axes)
    eq = program.definitions[mask]
    of_blocks = tuple(v for v in eq.args if "T" not in v.axes)
    entered = sp.And(_far_at(program, mask, FIRST), sp.Not(_far_at(program, mask, SETTLED)))
    fresh = b.map("fresh", rename_arguments(entered, *_kept(eq.args, of_blocks)), *of_blocks)
    new = b.contract(f"{name}_new", axes, *(fresh if v == mask else v for v in total.args))
    return b.map(f"{name}_settled", placeholder(0) + placeholder(1), before, new)


def _kept(old: Sequence[Var], kept: Sequence[Var]) -> tuple[tuple[Var, ...], tuple[Var, ...]]:
    """Arguments of `rename_arguments` where the old ones that are not kept do not occur: they go behind."""
    return tuple(old), (*kept, *(v for v in old if v not in kept))


def _read(b: Builder, program: Program, eq: Equation, total: Equation, state: Var) -> None:
    """What a query reads: the state, and keys of blocks that became far since the first token, in score form."""
    definitions, name = program.definitions, eq.out.name
    (row,) = [v for v in eq.args if v != total.out]
    mask = _carried_mask(total)
    assert mask is not None
    (blocks,) = [v for v in total.args if v != mask]
    settled = b.contract(f"{name}_settled", eq.out.axes, row, state)
    far = definitions[mask]
    assert isinstance(far.op, Map)
    late = b.map("late", sp.And(far.op.expr, sp.Not(_far_at(program, mask, FIRST))), *far.args)
    keys = definitions[blocks].args
    summed = {*row.axes} & {*blocks.axes} - {*eq.out.axes}
    left = [v for v in keys if v.kind == "real" and summed & {*v.axes}]
    axes = {a for v in (row, *left) for a in v.axes} - summed
    scores = b.contract(f"{name}_scores", axes, row, *left)
    added = b.contract(f"{name}_late", eq.out.axes, late, scores, *(v for v in keys if v not in left))
    b.equations.append(Equation(eq.out, Map(placeholder(0) + placeholder(1)), (settled, added)))


def _reader(program: Program, total: Var) -> Equation:
    found = [eq for eq in program.equations if total in eq.args]
    if len(found) != 1 or not isinstance(found[0].op, Contract) or len(found[0].args) != 2:
        quoted = "; ".join(map(str, found))
        raise ProgramError(f"{total} is not read by one product of two: {quoted}", hint="only such sums are carried")
    return found[0]


def _carried_mask(eq: Equation) -> Var | None:
    """The mask over (tile, block) of a sum over blocks of what belongs to blocks alone; None for other equations."""
    if not isinstance(eq.op, Contract) or "J" in eq.out.axes or "T" not in eq.out.axes:
        return None
    masks = [v for v in eq.args if v.kind == "bool"]
    rest = [v for v in eq.args if v.kind != "bool"]
    if len(masks) != 1 or set(masks[0].axes) != {"T", "J"} or any({"T", "m", "n"} & set(v.axes) for v in rest):
        return None
    return masks[0]


def _far_at(program: Program, mask: Var, query: sp.Expr) -> sp.Basic:
    """The mask for the query at that position, at the end of a sequence that ends with it."""
    definitions = program.definitions
    eq = definitions[mask]
    positions = [definitions[v].op for v in eq.args if v in definitions]
    if not isinstance(eq.op, Map) or len(positions) < len(eq.args) or not all(isinstance(p, Iota) for p in positions):
        raise ProgramError(f"{mask} does not follow from positions", hint="only such sums are carried")
    tiles = [placeholder(i) for i, p in enumerate(positions) if p == Iota(("T",))]
    now = eq.op.expr

    def at(query: sp.Expr) -> sp.Basic:
        where: dict[sp.Basic, sp.Basic] = dict.fromkeys(tiles, query)
        return now.xreplace({**where, LENGTH: query + 1})

    if not _grows(at(FIRST), at(FIRST - 1)):
        raise ProgramError(f"{mask} = {now} may stop to hold", hint="a sum is carried where its mask only grows")
    return at(query)


def _grows(now: sp.Basic, earlier: sp.Basic) -> bool:
    """True if every comparison only gets easier: then so does what And and Or make of them."""
    match now:
        case sp.And() | sp.Or():
            before = earlier.args if isinstance(earlier, type(now)) else ()
            return len(before) == len(now.args) and all(any(_grows(x, y) for y in before) for x in now.args)
        case sp.GreaterThan() | sp.StrictGreaterThan() | sp.LessThan() | sp.StrictLessThan():
            if not isinstance(earlier, type(now)):
                return False
            slack = sp.expand(now.gts - now.lts - earlier.gts + earlier.lts)
            return bool(slack.is_number and slack >= 0)
    return False
