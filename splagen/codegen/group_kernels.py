"""Kernels between chunk loops: the scan over groups of chunks, and the sum of slots into tokens."""

from __future__ import annotations

from dataclasses import replace

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.recurrences import PLAN, Recurrence, group_factors, plan_tensors
from splagen.codegen.region import padded_extent


def scan_kernel(
    r: Recurrence, name: str, states: Array, start: Array, final: Array, *, reverse: bool, made: bool = False
) -> Kernel:
    """What every group adds -> the state before it, in place; the last state of every segment goes to `final`.

    Law: state after = factor * state before + what the group adds; `reverse` for the cotangent, from the last group.
    `made`: the table `final` was made before, by the scan of another recurrence.
    """
    factors = [group_factors(r)] if r.decays else []
    d, e = r.sizes
    wide_d, wide_e = r.tiles
    many = len(r.states)
    item = "group.to(tl.int64)"
    holes = {
        "doc": f"{states.name}: what a group adds to a state -> the state before it; {final.name}: the last ones.\n\n"
        f"    state after = {' * '.join([*(a.name for a in factors), 'state before'])} + what the group adds\n    ",
        "states": states.name,
        "start": start.name,
        "final": final.name,
        "router": (f"head // {r.group_size}" if r.group_size > 1 else "head") if r.plan_by_head else "0",
        "rows": "segment" if many == 1 else "segment % S",
        "base": f"{item} * HV + head" if many == 1 else f"({item} * {many} + segment // S) * HV + head",
        "order": "last - 1 - number" if reverse else "first + number",
        "factor": _factor(factors[0]) if factors else "1.0",
        "part": r.part,
        "parts": r.parts,
        "d_size": d,
        "e_size": e,
        "size": d * e,
        "d_extent": wide_d,
        "e_extent": wide_e,
    }
    return Kernel(
        f"{name}{r.name}",
        "group_scan",
        (),
        (replace(r.plan, features=("offsets",)), states, *factors, start, *([final] if made else [])),
        () if made else (final,),
        holes,
        f"(plan{r.name}.segments{f' * {many}' if many > 1 else ''}, HV, cdiv({wide_d * wide_e}, BLOCK_M))",
        scalars=PLAN,
        tunable=("BLOCK_M",),
    )


def _factor(factors: Array) -> str:
    """Source of the factor of a group: a number, or one for each key feature."""
    if factors.features:
        return f"tl.load({factors.name}_ptr + base * {factors.width[0]} + row, mask=more, other=0.0)"
    return f"tl.load({factors.name}_ptr + base, mask=number < count, other=0.0)"


def sum_kernel(r: Recurrence, parts: Array, output: Array, base: Array | None) -> Kernel:
    """Rows of slots -> rows of tokens: the sum over a token's slots and its group's value heads."""
    over_group = output.layout == "token_rows"
    head = "head" if over_group or r.group_size == 1 else f"head // {r.group_size}"
    at = "(router * T + token).to(tl.int64) * CHOICES + choice"
    slot = f"tl.load(places_ptr + {at}, mask=row_ok, other=0)" if r.gathered else "token"
    holes = {
        "doc": f"{output.name}: the sum of {parts.name} over a token's slots and the value heads of a group.",
        "parts": parts.name,
        "width": parts.width[0] if parts.width else 1,
        "columns": padded_extent(parts.width[0]) if parts.width else 1,
        "choices": r.choices,
        "heads": r.group_size if over_group else 1,
        "router": head if r.plan_by_head else "0",
        "slot": slot,
        "base": f"total += tl.load({base.name}_ptr + {_row(base)}, mask=keep, other=0.0).to(tl.float32)"
        if base
        else "",
        "at": f"{output.name}_ptr + {_row(output)}",
    }
    return Kernel(
        f"sum_{output.name}",
        "sum_slots",
        (),
        (replace(r.plan, features=plan_tensors(holes, ())), parts, *([base] if base else [])),
        (output,),
        holes,
        f"(cdiv(T, BLOCK_M), {'H' if over_group else 'HV'})",
        scalars=("HV", "T"),
        tunable=("BLOCK_M",),
    )


def _row(a: Array) -> str:
    inner = " + column[None, :]" if a.features else " + column[None, :] * 0"
    return f"(token.to(tl.int64) * {a.name}_t + head * {a.name}_h)[:, None]{inner}"
