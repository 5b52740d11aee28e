"""The tile kernel that visits chosen blocks by key: each row's softmax and sums over one block, to be merged.

A block of keys is read once for many query tiles that chose it.  Worth it where few query rows share a list of blocks:
by query, each of them would fill a part of a tile only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.base_two import LN_2
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.query_kernels import QuerySide
from splagen.codegen.tile_code import (
    WORK,
    Sum,
    TileCode,
    Walk,
    apart,
    entries_ahead,
    follows_softmax,
    operands,
    part_array,
    row_scalars,
    store_part,
    sums_of_tiles,
)
from splagen.ir.program import Equation, Var, slice_back


def parts_kernels(
    walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var]
) -> tuple[list[Kernel], dict[Var, Array]]:
    """Softmax and sums of each row over each block that it chose; returns the parts by variable.

    `wanted` are the outputs of the kernel that merges them.  Sums that read no query row in common have kernels of
    their own: less is held at once, and more of them run side by side.
    """
    program, lse = walk.program, walk.lse
    code = TileCode(walk, walk.chosen_facts, to_keys=False)
    sums = sums_of_tiles(program, slice_back(program, wanted, [*program.inputs, *available]), to_keys=False)
    kernels: list[Kernel] = []
    parts: dict[Var, Array] = {}
    for group in apart(code, [], [s for s in sums if s.in_loop(walk.chosen_facts)]):
        softmax = [s for s in group.to_rows if follows_softmax(program, s)]
        name = "block_sparse_parts" if softmax else "linear_parts"
        name += f"_{len(kernels)}" if any(k.name == name for k in kernels) else ""
        kernel, made = _parts_kernel(name, walk, code, available, lse if softmax else None, group.to_rows)
        kernels.append(kernel)
        parts |= made
    return kernels, parts


def _parts_kernel(
    name: str, walk: Walk, code: TileCode, available: Mapping[Var, Array], lse: Equation | None, sums: Sequence[Sum]
) -> tuple[Kernel, dict[Var, Array]]:
    """`lse`: the log-sum-exp of the softmax where some of the sums are weighted by it."""
    program, geometry = walk.program, walk.geometry
    side = QuerySide(walk, available)
    side.use([WORK])
    softmax = [s for s in sums if lse and follows_softmax(program, s)]
    linear = [s for s in sums if s not in softmax]
    wanted_here = code.wanted(linear)
    tile, scores = code.scores(lse, wanted_here) if lse else (code.body(wanted_here), None)
    keys = operands(tile.products, [*softmax, *linear], of_queries=False)
    rows = operands(tile.products, [], of_queries=True)
    lines = scores.lines if scores else (*(code.product_line(eq) for eq in tile.products), *tile.lines)
    columns = side.rows.columns_of([*rows, *keys, *(s.into for s in sums)])
    prologue = side.prologue([*rows, *row_scalars([tile], linear)], [])
    results = [*([lse.out] if lse else []), *(s.into for s in (*softmax, *linear))]
    parts = {v: part_array(v, geometry) for v in results}
    held = {v: v.name for v in parts} | ({lse.out: f"(row_max + tl.log2(row_sum)) * {LN_2}"} if lse else {})
    covers = [*side.covers, *tile.products, *tile.equations]
    setup, count, _ = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    first = "tl.maximum(first, 0)"
    ahead, entry = entries_ahead(first)
    holes = {
        "forced": {"setup": "\n".join(setup), "count": count},
        "first": first,
        "ahead": ahead,
        "tile": entry,
        "loads": "\n".join([*columns, *side.key_loads(code, keys)]),
        "prologue": "\n".join(prologue),
        "tiles": "\n".join(lines),
        "score": scores.source if scores else "",
        "scale": scores.scale if scores else "",
        "softmax": [{"name": s.into.name, "operand": s.operand.name} for s in softmax if s.operand],
        "linear": [{"name": s.into.name, "shape": side.rows.tile_shape(s.into)} for s in linear],
        "sums": "\n".join(code.sum_line(s, tile.names) for s in linear),
        "stores": "\n".join(store_part(array, held[v]) for v, array in parts.items()),
    }
    kernel = Kernel(
        name,
        "block_sparse_parts",
        program.in_order(covers),
        tuple(side.arrays.values()),
        tuple(parts.values()),
        holes,
        "(work.segments, B * Hkv)",
        ("L", "Hkv", "SEGMENTS", "SEGMENT"),
        ("BLOCK_M",),
    )
    return kernel, parts
