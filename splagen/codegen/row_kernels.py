"""Kernels over rows alone: feature maps of keys, and the row equations before the backward's tile kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.geometry import Geometry, features_of, is_parameter
from splagen.codegen.kernel import BATCH, Array, Kernel
from splagen.codegen.row_code import RowCode
from splagen.ir.program import Program, Var


def rows_kernel(
    name: str, program: Program, side: str, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]]
) -> Kernel:
    """A kernel that computes row variables, and sums over rows to a parameter's shape, from rows in memory.

    One program takes BLOCK_M positions of one head.  A sum over rows leaves one partial sum per program.
    """
    geometry = Geometry.of(program)
    code = RowCode(program, geometry, side, "BLOCK_M", available)
    piece = code.compute([v for v, _ in outputs], {})
    lines = list(piece.lines)
    if side == "query":
        lines[:0] = ["h = query_head // GROUP", "head = query_head + tl.zeros((BLOCK_M,), tl.int64)"]
    for v, array in outputs:
        lines += code.store(array, piece.names[v])
    holes = {
        "heads": "(Hkv * GROUP)" if side == "query" else "Hkv",
        "head": "query_head" if side == "query" else "h",
        "position": "qpos" if side == "query" else "kpos",
        "row_ok": "row_ok" if side == "query" else "key_ok",
        "body": "\n".join(lines),
    }
    heads = "Hq" if side == "query" else "Hkv"
    return Kernel(
        name,
        "rows",
        piece.equations,
        piece.arrays,
        tuple(a for _, a in outputs),
        holes,
        f"(cdiv(L, BLOCK_M), B * {heads})",
        tunable=("BLOCK_M",),
        batch=BATCH.format(heads=holes["heads"]),
    )


def partial_array(v: Var, geometry: Geometry, per_query_head: bool) -> Array:
    """Where programs leave their parts of a sum over rows: [programs, heads, width] float32."""
    features = features_of(v)
    assert is_parameter(v)
    width = geometry.width(features, pad=True) if features else 1
    # features end with the head that the programs run over, so that the launcher knows what to sum
    return Array(v.name, "partials", (*features, "Hq" if per_query_head else "Hkv"), (width,), "float32", True)
