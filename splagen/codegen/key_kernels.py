"""The tile kernels that give each program the keys of one block: dk with dv, and the merge of their partial sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.geometry import Rows, features_of
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.region import slice_back
from splagen.codegen.row_code import RowCode
from splagen.codegen.tile_code import (
    WORK,
    TileCode,
    Walk,
    accumulators,
    operands,
    row_scalars,
    sums_of_tiles,
)
from splagen.ir.program import Equation, Var


def dkv_kernel(walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var]) -> tuple[Kernel, dict[Var, Array]]:
    """Gradients of key rows from tiles, as partial sums per segment of the inverse index."""
    program, geometry = walk.program, walk.geometry
    backward = slice_back(program, wanted, [*program.inputs, *available])
    sums = sums_of_tiles(program, backward, to_keys=True)
    key_rows = RowCode(program, geometry, "key", "BLOCK_N", available)
    arrays: dict[str, Array] = {"work": WORK}
    covers: dict[Equation, None] = {}
    loops, keys_used = [], {}
    setup, count, forced_tile = walk.forced("T", {"J": "j", "L": "L"}, "nT", "i")
    kinds = [
        ("queries that see the block by position", walk.forced_facts, forced_tile, "start", "tl.minimum(stop, forced)")
    ]
    chosen = {"setup": "", "count": "0"}
    if walk.chosen:
        first = "tl.load(work_offsets_ptr + bh * (nJ + 1) + j)"
        chosen["setup"] = (
            f"chosen_first = {first}\nchosen = tl.load(work_offsets_ptr + bh * (nJ + 1) + j + 1) - chosen_first"
        )
        chosen["count"] = "chosen"
        at = "work_entries_ptr + bh * nT * BUDGET + chosen_first + i - forced"
        load = f"tl.load({at}, mask=row < last, other=0).to(tl.int64) // BUDGET"
        kinds.append(("queries that chose the block", walk.chosen_facts, load, "tl.maximum(start, forced)", "stop"))
    lines: list[str] = []
    for title, facts, tile_source, start, stop in kinds:
        code = TileCode(walk, facts, to_keys=True)
        active = [s for s in sums if s.in_loop(facts)]
        tile = code.body(code.wanted(active))
        query_rows = RowCode(program, geometry, "query", "BLOCK_M", available)
        query_rows.defined_columns = key_rows.defined_columns
        used = operands(tile.products, active, of_queries=True)
        scalars = row_scalars([tile], active)
        keys_used.update(dict.fromkeys(operands(tile.products, [], of_queries=False)))
        lines += key_rows.columns_of([*used, *keys_used])
        piece = query_rows.operands([*used, *scalars])
        arrays.update({a.name: a for a in piece.arrays})
        loops.append({
            "title": title,
            "first": start,
            "last": stop,
            "tile": tile_source,
            "prologue": "\n".join(piece.lines),
            "tiles": "\n".join([*(code.product_line(eq) for eq in tile.products), *tile.lines]),
            "sums": "\n".join(code.sum_line(s, tile.names) for s in active),
        })  # fmt: skip
        covers.update(dict.fromkeys([*piece.equations, *tile.products, *tile.equations, *(s.equation for s in active)]))
    key_side = Rows(geometry, "key", False)
    for v in keys_used:
        array = available[v]
        arrays[array.name] = array
        lines.append(f"{v.name} = {key_side.load(array)}  # [BLOCK_N, {array.width[0]}]")
    outputs: dict[Var, Array] = {}
    stores = ["at = (bh * SEGMENTS + segment) * BLOCK + tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)"]
    totals = accumulators(sums)
    covers.update(dict.fromkeys(eq for eq in backward if eq.out in totals))
    for v in totals:
        features = features_of(v)
        width = geometry.width(features, pad=True) if features else 1
        outputs[v] = Array(f"{v.name}_parts", "segments", features, (width,), "float32", True)
        stores += key_rows.columns(features)
        column = "".join(features)
        stores.append(f"tl.store({v.name}_parts_ptr + at[:, None] * {width} + {column}[None, :], {v.name})")
    order = {eq.out: i for i, eq in enumerate(program.equations)}
    holes = {
        "forced": {"setup": "\n".join(setup), "count": count},
        "chosen": chosen,
        "loads": "\n".join(lines),
        "accumulators": [{"name": v.name, "shape": f"(BLOCK_N, {outputs[v].width[0]})"} for v in totals],
        "loops": loops,
        "stores": "\n".join(stores),
    }
    kernel = Kernel(
        "block_sparse_dkv",
        "block_sparse_dkv",
        tuple(sorted(covers, key=lambda eq: order[eq.out])),
        tuple(arrays.values()),
        tuple(outputs.values()),
        holes,
        "(work.segments, B * Hkv, BLOCK // BLOCK_N)",
        ("L", "Hkv", "SEGMENTS", "SEGMENT"),
    )
    return kernel, outputs


def merge_kernel(
    walk: Walk,
    available: Mapping[Var, Array],
    parts: Mapping[Var, Array],
    outputs: Sequence[tuple[Var, Array]],
) -> Kernel:
    """Sum the segments of every key block in order, then the key rows' remaining equations."""
    program, geometry = walk.program, walk.geometry
    rows = RowCode(program, geometry, "key", "BLOCK_N", available)
    columns: list[str] = []
    for array in parts.values():
        for f in (array.features, array.features[-1:]):
            columns += rows.columns(f)
    piece = rows.compute([v for v, _ in outputs], {v: v.name for v in parts})
    epilogue = list(piece.lines)
    for v, array in outputs:
        epilogue += rows.store(array, piece.names[v])
    accumulators = [
        {
            "name": v.name,
            "shape": f"(BLOCK_N, {a.width[0]})",
            "source": f"{a.name}_ptr + (at + key[:, None]) * {a.width[0]} + {''.join(a.features)}[None, :]",
        }
        for v, a in parts.items()
    ]
    holes = {"columns": "\n".join(columns), "accumulators": accumulators, "epilogue": "\n".join(epilogue)}
    inputs = {a.name: a for a in (WORK, *parts.values(), *piece.arrays)}
    return Kernel(
        "merge_segments",
        "merge_segments",
        (*(program.definitions[v] for v in parts), *piece.equations),
        tuple(inputs.values()),
        tuple(a for _, a in outputs),
        holes,
        "(nJ * (BLOCK // BLOCK_N), B * Hkv)",
        ("L", "Hkv", "SEGMENTS"),
        ("BLOCK_N",),
    )
