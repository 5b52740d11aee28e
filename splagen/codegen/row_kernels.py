"""Kernels over rows alone: feature maps of keys, and the row equations before the backward's tile kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.codegen.geometry import Geometry, features_of, is_parameter
from splagen.codegen.kernel import BATCH, Array, Kernel
from splagen.codegen.row_code import RowCode
from splagen.errors import PartitionError
from splagen.ir.program import Program, Reduce, Var
from splagen.ir.text import equation_text

TURNS = 8  # tiles of rows that one program sums up
QUERY_HEAD = "head = query_head + tl.zeros((BLOCK_M,), tl.int64)"


def rows_kernel(
    name: str, program: Program, side: str, available: Mapping[Var, Array], outputs: Sequence[tuple[Var, Array]]
) -> Kernel:
    """A kernel that computes row variables, and sums over rows to a parameter's shape, from rows in memory.

    One program takes BLOCK_M positions of one head; where there are sums over rows, TURNS times as many, and it leaves
    one partial sum.
    """
    geometry = Geometry.of(program)
    code = RowCode(program, geometry, side, "BLOCK_M", available)
    summed = {v: _summand(program, v) for v, a in outputs if a.layout == "partials"}
    wanted = [summed.get(v, v) for v, _ in outputs]
    of_head = code.of_head(wanted) if summed else []
    if side == "query":
        of_head[:0] = ["h = query_head // GROUP", QUERY_HEAD]
    piece = code.compute(wanted, {})
    stores, parts = [], []
    for v, array in outputs:
        if v in summed:
            parts += code.store(array, f"tl.sum({v.name}, axis=0, keep_dims=True)")
        else:
            stores += code.store(array, piece.names[v])
    holes = row_holes(side, "qpos" if side == "query" else "kpos", of_head, [*piece.lines, *stores])
    if summed:
        sums = []
        for v, x in summed.items():
            source, features = piece.names[x], features_of(x)
            if features and not features_of(v):  # a number per head: a row gives the sum of its columns
                if geometry.is_padded(features):
                    source = f"tl.where({code.padding(features)}, {source}, 0.0)"
                source = f"tl.sum({source}, axis=1)"
            sums.append({"name": v.name, "shape": code.tile_shape(v), "source": source})
        holes |= {"sums": sums, "turns": TURNS, "parts": "\n".join(parts)}
    heads, rows = "Hq" if side == "query" else "Hkv", f"{TURNS} * BLOCK_M" if summed else "BLOCK_M"
    return Kernel(
        name,
        "rows",
        (*piece.equations, *(program.definitions[v] for v in summed)),
        piece.arrays,
        tuple(a for _, a in outputs),
        holes,
        f"(cdiv(L, {rows}), B * {heads})",
        tunable=("BLOCK_M",),
        batch=BATCH.format(heads=holes["heads"]),
    )


def row_holes(side: str, position: str, of_head: Sequence[str], body: Sequence[str]) -> dict[str, object]:
    """Holes of a kernel of rows that sums up none: `position` names those of a head that a program has."""
    heads, head, row_ok = ("(Hkv * GROUP)", "query_head", "row_ok") if side == "query" else ("Hkv", "h", "key_ok")
    return {
        "heads": heads,
        "head": head,
        "of_head": "\n".join(of_head),
        "position": position,
        "row_ok": row_ok,
        "body": "\n".join(body),
        "sums": [],
        "turns": 1,
        "parts": "",
    }


def _summand(program: Program, v: Var) -> Var:
    """The row variable whose sum over rows a parameter's gradient is."""
    eq = program.definitions[v]
    if not isinstance(eq.op, Reduce) or eq.op.how != "sum" or len(eq.args) != 1:
        raise PartitionError(f"`{equation_text(eq)}` is not a sum of one variable over rows")
    return eq.args[0]


def partial_array(v: Var, geometry: Geometry, per_query_head: bool) -> Array:
    """Where programs leave their parts of a sum over rows: [programs, heads, width] float32."""
    features = features_of(v)
    assert is_parameter(v)
    width = geometry.width(features, pad=True) if features else 1
    # features end with the head that the programs run over, so that the launcher knows what to sum
    return Array(v.name, "partials", (*features, "Hq" if per_query_head else "Hkv"), (width,), "float32", True)
