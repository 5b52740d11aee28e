"""Rows where the kernels of prefill want them: cached keys out of pages, queries in whole tiles, outputs back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splagen.codegen.geometry import Geometry, Rows, column_name
from splagen.codegen.kernel import BATCH, Array, Kernel
from splagen.codegen.step_rows import PAGES, PagedRows, scale_array

SLOTS = Array("slots", "table", dtype="int64")  # [sequences]: their rows of the page table


class TokenRows(Rows):
    """Rows of the tokens that have a query, one sequence behind the other."""

    @property
    def mask(self) -> str:
        """The vector that says which positions have one."""
        return "is_token"

    def _place(self, array: Array) -> str:
        place = f"token * {array.name}_t + {self.head} * {array.name}_h"
        return f"({place})[:, None]" if array.features else place


def token_array(a: Array) -> Array:
    """The array of what a caller gives or gets for each query, [tokens, Hq(, width)]."""
    return replace(a, name=f"{a.name}_tokens", layout="token_rows")


def pages_of(a: Array) -> Array:
    """The pages of key rows."""
    return replace(a, name=f"{a.name}_pages", layout="pages")


def placed_queries(arrays: Sequence[Array], geometry: Geometry) -> Kernel:
    """Rows of tokens -> rows by position from the origin of the queries, zeros before the first."""
    given, rows = TokenRows(geometry, "query", False), Rows(geometry, "query", False)
    tokens = [(token_array(a), a) for a in arrays]
    lines = [rows.store(a, given.load(x)) for x, a in tokens]
    return _by_query("placed_queries", geometry, [x for x, _ in tokens], list(arrays), lines)


def taken_output(output: Array, geometry: Geometry) -> Kernel:
    """Rows by position -> rows of tokens; the others are as they were."""
    taken, rows = TokenRows(geometry, "query", False), Rows(geometry, "query", False)
    made = token_array(output)
    line = taken.store(made, rows.load(output))
    return _by_query("taken_output", geometry, [output], [made], [line])


def cached_rows(keys: Sequence[Array], geometry: Geometry) -> Kernel:
    """Pages -> the rows of all keys of the sequences, one sequence behind the other, times their scales."""
    pages, rows = PagedRows(geometry, "key", False), Rows(geometry, "key", False)
    pools = [pages_of(a) for a in keys]
    scales = [scale_array(a) for a in pools]
    lines = [
        "slot = tl.load(slots_ptr + sequence)",
        "page = tl.load(page_table_ptr + slot * MAX_PAGES + kpos // PAGE, mask=key_ok, other=0).to(tl.int64)",
        "place = (page * Hkv + h) * PAGE + kpos % PAGE  # [BLOCK_M]",
        *_columns(keys, geometry),
    ]
    for a, pool, scale in zip(keys, pools, scales, strict=True):
        lines.append(f"{scale.name} = tl.load({scale.name}_ptr + h)")
        lines.append(f"{a.name} = {pages.load(pool)}.to({scale.name}.dtype) * {scale.name}  # [BLOCK_M, columns]")
        lines.append(rows.store(a, a.name))
    return Kernel(
        "cached_rows",
        "rows",
        (),
        (*pools, *scales, PAGES, SLOTS),
        tuple(keys),
        {
            "doc": "Keys and what belongs to them, out of pages, as steps read them.",
            "heads": "Hkv",
            "head": "h",
            "position": "kpos",
            "row_ok": "key_ok",
            "body": "\n".join(lines),
        },
        "(cdiv(L, BLOCK_M), B * Hkv)",
        scalars=("L", "Hkv", "PAGE", "MAX_PAGES"),
        tunable=("BLOCK_M",),
    )


def _by_query(
    name: str, geometry: Geometry, inputs: Sequence[Array], outputs: Sequence[Array], lines: Sequence[str]
) -> Kernel:
    body = [
        "head = query_head + tl.zeros((BLOCK_M,), tl.int64)",
        "is_token = row_ok & (qpos >= first_query)",
        "token = first_query_token + qpos - first_query  # [BLOCK_M]",
        *_columns(inputs, geometry),
        *lines,
    ]
    heads = "(Hkv * GROUP)"
    return Kernel(
        name,
        "rows",
        (),
        tuple(inputs),
        tuple(outputs),
        {
            "doc": "Rows of tokens and rows by position.",
            "heads": heads,
            "head": "query_head",
            "position": "qpos",
            "row_ok": "row_ok",
            "body": "\n".join(body),
        },
        "(cdiv(L, BLOCK_M), B * Hq)",
        tunable=("BLOCK_M",),
        batch=BATCH.format(heads=heads),
    )


def _columns(arrays: Sequence[Array], geometry: Geometry) -> list[str]:
    """Lines that define the columns of rows, each once."""
    features = {column_name(a.features): a.features for a in arrays if a.features}
    return [line for f in features.values() for line in geometry.columns(f)]
