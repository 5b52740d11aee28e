"""One token per sequence: the Program of a decoding step, from the definition of the whole sequence.

A step is the definition at one query, the last: axis T has extent 1 and counts from the sequence's length less one
(`evaluate` takes that as an offset).  What the passes leave of it still sums over every earlier block, where a linear
branch allows for less: `carry` finds those sums and keeps them from step to step.
"""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from splagen.errors import ProgramError, SpecError
from splagen.ir.build import Builder
from splagen.ir.frontend_spla import LENGTH, spla_program
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Contract, Equation, Iota, Map, Program, Var, placeholder
from splagen.spec import SPLASpec


def step_program(spec: SPLASpec) -> Program:
    """The Program of one token: inputs q (one row), k, v of the whole sequence, states; outputs o and states after.

    Law: with the states that the step before left (zero before the first), the step at length L gives the last row of
    the definition at length L.

    Raises:
        SpecError: a query of this spec depends on later ones.
    """
    if not spec.causal:
        raise SpecError("causal is False: a query depends on later keys", "decoding takes specs with causal=True")
    if spec.select and spec.select.tile != 1:
        what = f"select.granularity is {spec.select.granularity!r}: a query chooses together with later ones"
        raise SpecError(what, 'decoding takes specs with granularity="token"')
    return run(_by_query(spla_program(spec)), (*LOWERING, carry))


def state_pairs(program: Program) -> list[tuple[Var, Var]]:
    """The states of a step: (before, after)."""
    definitions = program.definitions
    return [(definitions[after].args[0], after) for after in program.outputs[1:]]


def _by_query(program: Program) -> Program:
    """The definition with tiles of one query: where nothing is selected, a tile of any size means the same."""
    return replace(program, axes=tuple((a, 1 if a == "m" else e) for a, e in program.axes))


def carry(program: Program) -> Program:
    """sum_J far[T J] s[J]  ->  before + sum_J (far[T J] and not far[T-1 J]) s[J], for s that no query changes.

    Law: if `before` is the sum at the query before (T-1, and L-1 of the length), the value is unchanged.  The sum
    becomes an output: it is the next query's `before`.  The mask may only grow from query to query, and must follow
    from positions; ProgramError quotes one that does not.
    """
    b = Builder.resume(program)
    b.equations = []
    states: list[Var] = []
    definitions = program.definitions
    for eq in program.equations:
        mask = _carried_mask(eq)
        if mask is None:
            b.equations.append(eq)
            continue
        name = eq.out.name.removesuffix("_prefix").removesuffix("_all")
        before = b.input(f"{name}_state", tuple(a for a in eq.out.axes if a != "T"))
        fresh = b.map("fresh", _fresh(mask, definitions), *definitions[mask].args)
        args = tuple(fresh if v == mask else v for v in eq.args)
        new = b.contract(f"{name}_new", eq.out.axes, *args)
        b.equations.append(Equation(eq.out, Map(placeholder(0) + placeholder(1)), (before, new)))
        states.append(eq.out)
    return replace(
        program, inputs=tuple(b.inputs), equations=tuple(b.equations), outputs=(*program.outputs, *states)
    )  # fmt: skip


def _carried_mask(eq: Equation) -> Var | None:
    """The mask over (tile, block) of a sum over blocks of what belongs to blocks alone; None for other equations."""
    if not isinstance(eq.op, Contract) or "J" in eq.out.axes or "T" not in eq.out.axes:
        return None
    masks = [v for v in eq.args if v.kind == "bool"]
    rest = [v for v in eq.args if v.kind != "bool"]
    if len(masks) != 1 or set(masks[0].axes) != {"T", "J"} or any({"T", "m", "n"} & set(v.axes) for v in rest):
        return None
    return masks[0]


def _fresh(mask: Var, definitions: dict[Var, Equation]) -> sp.Basic:
    """What the mask admits and did not one query earlier."""
    eq = definitions[mask]
    positions = [definitions[v].op for v in eq.args if v in definitions]
    if not isinstance(eq.op, Map) or len(positions) < len(eq.args) or not all(isinstance(p, Iota) for p in positions):
        raise ProgramError(f"{mask} does not follow from positions", hint="only such sums are carried")
    back = {placeholder(i): placeholder(i) - 1 for i, p in enumerate(positions) if p == Iota(("T",))}
    now = eq.op.expr
    earlier = now.xreplace({**back, LENGTH: LENGTH - 1})
    if not _grows(now, earlier):
        raise ProgramError(f"{mask} = {now} may stop to hold", hint="a sum is carried where its mask only grows")
    return sp.And(now, sp.Not(earlier))


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
