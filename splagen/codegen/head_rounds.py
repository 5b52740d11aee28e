"""Parts of rows that do not fit in memory: a call goes over shares of the KV heads, one after the other.

Heads are independent, but for a score function that reads the number of a head: such a spec takes the strategy without
parts instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from splagen.codegen.kernel import Array, Choice, Layout
from splagen.codegen.partition import Partition
from splagen.codegen.render import render
from splagen.errors import PartitionError
from splagen.ir.program import Iota, Program

_DIMENSIONS: Mapping[Layout, int | None] = {
    "query_rows": 2,
    "query_scalars": 2,
    "key_rows": 2,
    "cell_rows": 2,
    "states": 1,
    "indices": 1,
    "counts": 1,
    "head_rows": 0,
    "kv_head_scalars": 0,
    "bounds": None,
}
"""Which dimension of an array counts heads."""


def heads_are_alike(program: Program) -> bool:
    """Whether no equation reads the number of a head."""
    return not any(isinstance(eq.op, Iota) and "h" in eq.op.axes for eq in program.equations)


def parts_text(constants: Mapping[str, int], places: str, *, by_heads: bool = False) -> str:
    """Functions of a module that weigh its parts, and of rounds `by_heads`; "" where nothing is chosen.

    `places` is host source for the tiles of queries.
    """
    if "BUDGET" not in constants:
        return ""
    return render("head_rounds", {"constants": dict(constants), "places": places, "by_heads": by_heads})


def bytes_by_strategy(choice: Choice) -> str:
    """Host source for what a query row's parts take, one chosen block of it, by the strategies that have parts."""
    found = []
    for i, option in enumerate(choice.options):
        parts = {a.name: a for k in option for a in k.outputs if a.layout == "parts"}.values()
        columns = {dtype: sum(math.prod(a.width) for a in parts if a.dtype == dtype) for dtype in ("input", "float32")}
        if parts:
            found.append(f"{i}: {columns['input']} * n.dtype.itemsize + {4 * columns['float32']}")
    return f"{{{', '.join(found)}}}"


def rounds_text(part: Partition, direction: str, tensors: Sequence[Array], *numbers: str) -> str:
    """Lines that go over shares of heads if they have to.

    `direction` is "forward" or "backward", the name of the host function too; `tensors` are what that takes, and
    `numbers` what it takes behind them.
    """
    choice = next((c for c in part.strategies if c.name == f"{direction}_strategy"), None)
    if choice is None or not heads_are_alike(part.program) or bytes_by_strategy(choice) == "{}":
        return ""
    by_name = {a.name: a for a in part.inputs}
    made = [*part.outputs, *part.saved] if direction == "forward" else [by_name[x] for x, _ in part.gradients]
    names, behind = ", ".join(a.name for a in tensors), "".join(f", {x}" for x in numbers)
    heads, results = ([_dimension(a) for a in x] for x in (tensors, made))
    return "\n".join([
        f'rounds = rounds_of(n, schedules["{choice.name}"]["strategy"], {bytes_by_strategy(choice)})',
        "if rounds > 1:",
        f"    call = lambda *shares: {direction}(schedules, *shares{behind})",
        f"    return in_rounds(call, rounds, [{names}], {heads}, {results})",
    ])  # fmt: skip


def _dimension(a: Array) -> int | None:
    if a.layout not in _DIMENSIONS:
        raise PartitionError(f"{a.name}: which dimension of {a.layout} counts heads is not known")
    return _DIMENSIONS[a.layout]
