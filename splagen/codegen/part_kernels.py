"""The tile kernel that visits chosen blocks by key: each row's softmax and sums over one block, to be merged.

A block of keys is read once for many query tiles that chose it.  Worth it where few query rows share a list of blocks:
by query, each of them would fill a part of a tile only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.geometry import features_of, is_parameter
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.query_kernels import QuerySide
from splagen.codegen.region import slice_back
from splagen.codegen.tile_code import WORK, TileCode, Walk, operands, part_address, row_scalars, sums_of_tiles
from splagen.ir.linear import linear_with
from splagen.ir.program import Equation, Lse, Var


def parts_kernel(walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var]) -> tuple[Kernel, dict[Var, Array]]:
    """Softmax and sums of each row over each block that it chose; returns the parts by variable.

    `wanted` are the outputs of the kernel that merges them.
    """
    program, geometry = walk.program, walk.geometry
    side = QuerySide(walk, available)
    side.use([WORK])
    (lse,) = [eq for eq in program.equations if isinstance(eq.op, Lse) and "n" in eq.op.axes]
    forward = slice_back(program, wanted, [*program.inputs, *available])
    sums = sums_of_tiles(program, forward, to_keys=False)
    softmax = [
        s for s in sums if any(lse.out in program.definitions[v].args for v in s.factors if v in program.definitions)
    ]
    code = TileCode(walk, walk.chosen_facts, to_keys=False)
    linear = [s for s in sums if s not in softmax and s.in_loop(code.facts)]
    tile = code.body([*lse.args, *code.wanted(linear)])
    keys = operands(tile.products, [*softmax, *linear], of_queries=False)
    rows = operands(tile.products, [], of_queries=True)
    score, mask = (tile.names[v] for v in lse.args)
    scores = [*(code.product_line(eq) for eq in tile.products), *tile.lines]
    if mask != "True":
        scores.append(f'{lse.args[0].name} = tl.where({mask}, {score}, -float("inf"))')
        score = lse.args[0].name
    columns = side.rows.columns_of([*rows, *keys, *(s.into for s in sums)])
    prologue = side.prologue([*rows, *row_scalars([tile], linear)], [])
    parts: dict[Var, Array] = {lse.out: Array(f"{lse.out.name}_parts", "parts", dtype="float32")}
    stores = [f"tl.store({part_address(parts[lse.out])}, row_max + tl.log(row_sum), mask=row_ok)"]
    for v in dict.fromkeys(s.into for s in (*softmax, *linear)):
        features = features_of(v)
        width = (geometry.width(features, pad=True),) if features else ()
        parts[v] = Array(
            f"{v.name}_parts", "parts", features, width, "input" if features else "float32", bool(features)
        )
        mask = "row_ok[:, None]" if features else "row_ok"
        stores.append(f"tl.store({part_address(parts[v])}, {v.name}, mask={mask})")
    covers: dict[Equation, None] = dict.fromkeys([*side.covers, *tile.products, *tile.equations])
    holes = {
        "loads": "\n".join([*columns, *side.key_loads(code, keys)]),
        "prologue": "\n".join(prologue),
        "tiles": "\n".join(scores),
        "score": score,
        "softmax": [{"name": s.into.name, "operand": s.operand.name} for s in softmax if s.operand],
        "linear": [{"name": s.into.name, "shape": side.shape(s.into)} for s in linear],
        "sums": "\n".join(code.sum_line(s, tile.names) for s in linear),
        "epilogue": "",
        "stores": "\n".join(stores),
    }
    return _kernel("block_sparse_parts", side, covers, parts, holes), parts


def dq_parts_kernel(
    walk: Walk, available: Mapping[Var, Array], wanted: Sequence[Var]
) -> tuple[Kernel, dict[Var, Array]] | None:
    """What each chosen block gives to the gradients of query rows; None where these are not linear in their sums.

    The rows' equations behind the sums are applied to each part: what is added is as wide as the gradient.
    """
    program, geometry = walk.program, walk.geometry
    side = QuerySide(walk, available)
    backward = slice_back(program, wanted, [*program.inputs, *available])
    sums = sums_of_tiles(program, backward, to_keys=False)
    code = TileCode(walk, walk.chosen_facts, to_keys=False)
    active = [s for s in sums if s.in_loop(code.facts)]
    totals = list(dict.fromkeys(s.into for s in sums))
    behind = slice_back(program, wanted, [*program.inputs, *available, *totals])
    terms = linear_with(behind, totals)
    if terms is None or any(is_parameter(v) for v in wanted):
        return None
    side.use([WORK])
    tile = code.body(code.wanted(active))
    keys = operands(tile.products, active, of_queries=False)
    rows = operands(tile.products, [], of_queries=True)
    columns = side.rows.columns_of([*rows, *keys, *totals, *wanted])
    prologue = side.prologue([*rows, *row_scalars([tile], active)], [])
    here = list(dict.fromkeys(s.into for s in active))
    held = {v: v.name for v in here}
    zeros = [v for v in (*terms, *totals) if v not in here and any(v in eq.args for eq in behind)]
    held |= {v: f"tl.zeros({side.shape(v)}, tl.float32)" for v in zeros}
    piece = side.rows.compute(wanted, held)
    side.use(piece.arrays)
    parts: dict[Var, Array] = {}
    stores = []
    for v in wanted:
        features = features_of(v)
        parts[v] = Array(f"{v.name}_parts", "parts", features, (geometry.width(features, pad=True),), padded=True)
        stores.append(f"tl.store({part_address(parts[v])}, {piece.names[v]}, mask=row_ok[:, None])")
    covers = dict.fromkeys([*side.covers, *tile.products, *tile.equations])
    holes = {
        "loads": "\n".join([*columns, *side.key_loads(code, keys)]),
        "prologue": "\n".join(prologue),
        "tiles": "\n".join([*(code.product_line(eq) for eq in tile.products), *tile.lines]),
        "score": "",
        "softmax": [],
        "linear": [{"name": v.name, "shape": side.shape(v)} for v in here],
        "sums": "\n".join(code.sum_line(s, tile.names) for s in active),
        "epilogue": "\n".join(piece.lines),
        "stores": "\n".join(stores),
    }
    return _kernel("block_sparse_dq_parts", side, covers, parts, holes), parts


def _kernel(
    name: str, side: QuerySide, covers: Mapping[Equation, None], parts: Mapping[Var, Array], holes: Mapping[str, object]
) -> Kernel:
    order = {eq.out: i for i, eq in enumerate(side.program.equations)}
    return Kernel(
        name,
        "block_sparse_parts",
        tuple(sorted(covers, key=lambda eq: order[eq.out])),
        tuple(side.arrays.values()),
        tuple(parts.values()),
        holes,
        "(work.segments, B * Hkv)",
        ("L", "Hkv", "SEGMENTS", "SEGMENT"),
        ("BLOCK_M",),
    )
