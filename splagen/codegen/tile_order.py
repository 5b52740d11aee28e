"""The order in which a chunk's loads and equations are printed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from splagen.codegen.chunk_code import ROWS, tile_axes, too_large
from splagen.ir.program import Equation, Var


def in_order(
    equations: Sequence[Equation],
    loads: Mapping[Var, Sequence[str]],
    stored: Collection[Var],
    kept: Collection[Var],
) -> list[Var | Equation]:
    """Loads and equations in an order that keeps few tiles alive: the next is the one after which least is live.

    A stored variable dies when nothing else reads it; a kept one that is not stored lives on.
    """
    inside = {eq.out for eq in equations}
    readers: dict[Var, set[Var]] = {}
    for eq in equations:
        for v in eq.args:
            readers.setdefault(v, set()).add(eq.out)
    todo: list[Var | Equation] = [*loads, *equations]
    done: set[Var] = set()
    ordered: list[Var | Equation] = []

    def ready(node: Var | Equation) -> bool:
        return not isinstance(node, Equation) or all(
            v in done or (v not in inside and v not in loads) for v in node.args
        )

    def growth(node: Var | Equation) -> int:
        out = node.out if isinstance(node, Equation) else node
        lives = readers.get(out) or (out in kept and out not in stored)
        grown = tile_bytes(out, loaded=not isinstance(node, Equation)) if lives else 0
        if isinstance(node, Equation):
            for v in set(node.args):
                if readers[v] == {node.out} and not (v in kept and v not in stored):
                    grown -= tile_bytes(v, loaded=v in loads)
        return grown

    while todo:
        best = min((n for n in todo if ready(n)), key=growth)
        todo.remove(best)
        ordered.append(best)
        done.add(best.out if isinstance(best, Equation) else best)
        if isinstance(best, Equation):
            for v in set(best.args):
                readers[v].discard(best.out)
    return ordered


def tile_bytes(v: Var, *, loaded: bool) -> int:
    """What a tile takes, at typical extents: rows 64, features 128."""
    if too_large(v) or v.kind == "int":
        return 0
    size = 2 if loaded else 4
    for a in tile_axes(v):
        size *= 64 if a in ROWS else 128
    return size
