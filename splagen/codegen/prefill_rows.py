"""Rows where the kernels of prefill want them, and what a cache keeps of a chunk.

Queries go into whole tiles and outputs back to their tokens; new keys go into pages, all keys of the sequences come out
of them, and what steps read of new keys goes there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splagen.codegen.geometry import Geometry, Rows, column_name
from splagen.codegen.kernel import BATCH, Array, Kernel
from splagen.codegen.packing import BOUNDS
from splagen.codegen.prefill_packing import ALIGNED, FIELDS, QUERIES
from splagen.codegen.region import padded_extent
from splagen.codegen.row_kernels import QUERY_HEAD, row_holes
from splagen.codegen.step_rows import PAGES, SEQLENS, SETTLED, PagedRows, scale_array

SLOTS = Array("slots", "table", dtype="int64")  # [sequences]: their rows of the page table
BOUNDS_OF_TOKENS = Array("cu_seqlens", "table", dtype="int32")  # [sequences + 1]
AFTER = Array("after", "index", dtype="int32")  # [sequences]: lengths with the new tokens, 0 where none is taken

FIND_PLACES = Kernel(
    name="places",
    template="prefill_places",
    covers=(),
    inputs=(BOUNDS_OF_TOKENS, SLOTS, SEQLENS, SETTLED, PAGES),
    outputs=(BOUNDS, QUERIES, AFTER),
    holes={
        "doc": "Where the keys and queries of each sequence lie; one without pages for its new tokens has neither.",
        "aligned": ALIGNED,
        "aligned_less_1": ALIGNED - 1,
        "fields": len(FIELDS),
    },
    grid="",  # prefill_module.jinja launches it
    scalars=("SEQUENCES", "TOKENS", "MOST", "LONGEST", "PAGES", "PAGE", "MAX_PAGES"),
    tunable=("WIDTH",),
    batch="",
)


class TokenRows(Rows):
    """Rows of the tokens that have a query, one sequence behind the other."""

    @property
    def mask(self) -> str:
        """The vector that says which positions have one."""
        return "is_token"

    def _place(self, array: Array) -> str:
        place = f"token * {array.name}_t + {self.head} * {array.name}_h"
        return f"({place})[:, None]" if array.features else place


class KeptRows(PagedRows):
    """Rows of pages that are written: those of new tokens, or of cells that they complete."""

    @property
    def mask(self) -> str:
        """The vector that says which."""
        return "is_new"


def token_array(a: Array) -> Array:
    """The array of what a caller gives or gets for each token, [tokens, heads(, width)]."""
    return replace(a, name=f"{a.name}_tokens", layout="token_rows")


def pages_of(a: Array) -> Array:
    """The pages of rows of keys or cells."""
    return replace(a, name=f"{a.name}_pages", layout="pages")


def placed_queries(arrays: Sequence[Array], geometry: Geometry) -> Kernel:
    """Rows of tokens -> rows by position from the origin of the queries, zeros before the first."""
    given, rows = TokenRows(geometry, "query"), Rows(geometry, "query")
    tokens = [(token_array(a), a) for a in arrays]
    lines = [
        "is_token = row_ok & (qpos >= first_query)",
        "token = first_token_of_query + qpos - first_query  # [BLOCK_M]",
        *_columns(arrays, geometry),
        *[rows.store(a, given.load(x)) for x, a in tokens],
    ]
    doc = "Queries by token -> queries by position."
    return _by_query("placed_queries", doc, [x for x, _ in tokens], list(arrays), "qpos", lines)


def taken_output(output: Array, geometry: Geometry) -> Kernel:
    """Rows by position -> rows of tokens, NaN where the sequence has no pages for them; others are as they were."""
    taken, rows = TokenRows(geometry, "query"), Rows(geometry, "query")
    made = token_array(output)
    lines = [
        "is_token = number < query_count",
        "token = first_token_of_query + number",
        "qpos = first_query + number",
        "refused = query_refused + number * 0 != 0  # [BLOCK_M]",
        "row_ok = is_token & ~refused",
        *_columns([output], geometry),
        f"{output.name} = {rows.load(output)}  # [BLOCK_M, columns]",
        f'{output.name} = tl.where(refused[:, None], float("nan"), {output.name})',
        taken.store(made, output.name),
    ]
    doc = "Outputs by position -> outputs by token."
    found = _by_query("taken_output", doc, [output], [made], "number", lines)
    return replace(found, grid="(cdiv(n.M, BLOCK_M), B * Hq)")


def new_rows(keys: Sequence[Array], geometry: Geometry) -> Kernel:
    """What new tokens bring for each KV head -> pages, in place."""
    given, kept = TokenRows(geometry, "key"), KeptRows(geometry, "key")
    tokens, pools = [token_array(a) for a in keys], [pages_of(a) for a in keys]
    lines = [
        "is_token = key_ok & (kpos >= first_query)",
        "is_new = is_token",
        "token = first_token_of_query + kpos - first_query  # [BLOCK_M]",
        *_page("kpos", "is_new", "PAGE"),
        *_columns(keys, geometry),
    ]
    for x, pool in zip(tokens, pools, strict=True):
        lines += _store(kept, pool, given.load(x))
    scales = [scale_array(a) for a in pools]
    doc = "Keys of new tokens, and what belongs to them, into pages."
    return _by_key("new_rows", doc, (*tokens, *pools, *scales), (), "kpos", lines)


def cached_rows(keys: Sequence[Array], geometry: Geometry) -> Kernel:
    """Pages -> the rows of all keys of the sequences, one sequence behind the other, times their scales."""
    pages, rows = PagedRows(geometry, "key"), Rows(geometry, "key")
    pools = [pages_of(a) for a in keys]
    scales = [scale_array(a) for a in pools]
    lines = [*_page("kpos", "key_ok", "PAGE"), *_columns(keys, geometry)]
    for a, pool, scale in zip(keys, pools, scales, strict=True):
        lines.append(f"{scale.name} = tl.load({scale.name}_ptr + h)")
        lines.append(f"{a.name} = {pages.load(pool)}.to({scale.name}.dtype) * {scale.name}  # [BLOCK_M, columns]")
        lines.append(rows.store(a, a.name))
    doc = "Keys of the sequences and what belongs to them, out of pages, as steps read them."
    return _by_key("cached_rows", doc, (*pools, *scales), tuple(keys), "kpos", lines)


def kept_numbers(numbers: Sequence[Array], geometry: Geometry) -> Kernel:
    """Numbers of new keys -> pages, in place."""
    rows, kept = Rows(geometry, "key"), KeptRows(geometry, "key")
    lines = ["is_new = key_ok & (kpos >= first_query)", *_page("kpos", "is_new", "PAGE")]
    lines += [kept.store(pages_of(a), rows.load(a)) for a in numbers]
    pools = [pages_of(a) for a in numbers]
    return _by_key("kept_numbers", "Numbers of new keys into pages.", (*numbers, *pools), (), "kpos", lines)


def kept_statistics(statistics: Sequence[Array], geometry: Geometry, window: int) -> Kernel:
    """Statistics of cells, of `window` keys, whose last key is new -> pages, in place."""
    cell = geometry.cell
    lines = [
        f"end = cell * {cell} + {window}",
        "is_new = (end <= L) & (end > first_query)",
        *_page(f"(cell * {cell})", "is_new", f"(PAGE // {cell})", cell),
    ]
    pools = [pages_of(a) for a in statistics]
    scales = [scale_array(a) for a in pools]
    for a, pool, scale in zip(statistics, pools, scales, strict=True):
        lines += [
            f"column = tl.arange(0, {padded_extent(a.width[0])})[None, :]",
            f"stored = is_new[:, None] & (column < {a.width[0]})  # [BLOCK_M, columns]",
            f"at = {a.name}_ptr + (cell * {a.name}_l + h * {a.name}_h)[:, None] + column",
            "x = tl.load(at, mask=stored, other=0.0)",
            f"scale = tl.load({scale.name}_ptr + h)",
            f"at = {pool.name}_ptr + (place * {a.width[0]})[:, None] + column",
            f"tl.store(at, as_paged(x, scale, {pool.name}_ptr), mask=stored)",
        ]
    doc = "Statistics of cells whose last key is new into pages."
    found = _by_key("kept_statistics", doc, (*statistics, *pools, *scales), (), "cell", lines)
    return replace(found, grid="(cdiv(nC, BLOCK_M), B * Hkv)")


def _page(position: str, mask: str, rows: str, span: int = 1) -> list[str]:
    """Lines that find the rows of pages, of so many positions each, in which positions lie."""
    within = f"{position} % PAGE" if span == 1 else f"{position} % PAGE // {span}"
    return [
        "slot = tl.load(slots_ptr + sequence)",
        f"page = tl.load(page_table_ptr + slot * MAX_PAGES + {position} // PAGE, mask={mask}, other=0).to(tl.int64)",
        f"place = (page * Hkv + h) * {rows} + {within}  # [BLOCK_M]",
    ]


def _store(kept: KeptRows, pool: Array, value: str) -> list[str]:
    scale = scale_array(pool).name
    return [f"{scale} = tl.load({scale}_ptr + h)", kept.store(pool, f"as_paged({value}, {scale}, {pool.name}_ptr)")]


def _by_query(
    name: str, doc: str, inputs: Sequence[Array], outputs: Sequence[Array], position: str, lines: Sequence[str]
) -> Kernel:
    holes = {"doc": doc, **row_holes("query", position, [QUERY_HEAD], lines)}
    grid, batch = "(cdiv(L, BLOCK_M), B * Hq)", BATCH.format(heads=holes["heads"])
    return Kernel(name, "rows", (), tuple(inputs), tuple(outputs), holes, grid, tunable=("BLOCK_M",), batch=batch)


def _by_key(
    name: str, doc: str, inputs: Sequence[Array], outputs: tuple[Array, ...], position: str, lines: Sequence[str]
) -> Kernel:
    return Kernel(
        name,
        "rows",
        (),
        (*inputs, PAGES, SLOTS),
        outputs,
        {"doc": doc, **row_holes("key", position, [], lines)},
        "(cdiv(L, BLOCK_M), B * Hkv)",
        scalars=("L", "Hkv", "PAGE", "MAX_PAGES"),
        tunable=("BLOCK_M",),
    )


def _columns(arrays: Sequence[Array], geometry: Geometry) -> list[str]:
    """Lines that define the columns of rows, each once."""
    features = {column_name(a.features): a.features for a in arrays if a.features}
    return [line for f in features.values() for line in geometry.columns(f)]
