"""Where the rows of a decoding step lie: those of the new tokens of each sequence, and those of its past in pages.

In a kernel's source, token counts those of a step, and r = b * tokens + token those of all sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from splagen.codegen.geometry import Geometry, Rows, array_of, features_of, is_parameter
from splagen.codegen.kernel import Array, Kernel
from splagen.ir.program import Var

PageType: TypeAlias = Literal["input", "e4m3"]

LENGTHS = Array("lengths", "table", dtype="int32")  # [B * tokens]: with the token; 0 and below: it is left out
SEQLENS = Array("seqlens", "table", dtype="int32")  # [B]: before the step
SETTLED = Array("settled", "table", dtype="int32")  # [B]: before the step before
PAGES = Array("page_table", "table", dtype="int32")  # [B, MAX_PAGES]


class StepRows(Rows):
    """Rows of the tokens of a step."""

    def _place(self, array: Array) -> str:
        if array.layout == "head_rows":
            return super()._place(array)
        place = f"r * {array.name}_t + {self.head} * {array.name}_h"
        return f"({place})[:, None]" if array.features else place


class PagedRows(Rows):
    """Rows in pages, numbered by `place` over all pages, heads and rows of a page."""

    @property
    def position(self) -> str:
        """The vector of places, wide enough for addresses."""
        return "place"

    def load(self, array: Array, *, mask: bool = True, column: str | None = None) -> str:
        """As `Rows.load`; what pages hold in 8 bits, times its scale."""
        found = super().load(array, mask=mask, column=column)
        return f"({found}.to({scale(array)}.dtype) * {scale(array)})" if array.dtype == "e4m3" else found

    def store(self, array: Array, value: str, column: str | None = None) -> str:
        """As `Rows.store`; what pages hold in 8 bits, rounded in units of its scale."""
        return super().store(array, eight_bits(array, value) if array.dtype == "e4m3" else value, column)

    def _place(self, array: Array) -> str:
        if array.layout != "pages":
            return super()._place(array)
        return f"({self.position} * {array.width[0]})[:, None]" if array.width else self.position


class NewRow(PagedRows):
    """The row of a token that a step takes in: what it is given, and its place in pages."""

    @property
    def mask(self) -> str:
        """The vector that says whether it has a page."""
        return "new_ok"

    @property
    def position(self) -> str:
        """Its place."""
        return "new_place"

    def _place(self, array: Array) -> str:
        if array.layout == "pages":
            return super()._place(array)
        return f"(r * {array.name}_t + (h + tl.arange(0, 1)) * {array.name}_h)[:, None]"


class NewKeys(Rows):
    """Rows of the step's own tokens at `kpos`, in the program of the token at `before`."""

    @property
    def mask(self) -> str:
        """The vector that says which keys are those of the step."""
        return "own_ok"

    def _place(self, array: Array) -> str:
        return f"((r + kpos - before) * {array.name}_t + h * {array.name}_h)[:, None]"


class CompleteRows(PagedRows):
    """Rows in pages that all exist."""

    @property
    def mask(self) -> str:
        """No mask."""
        return "tl.full((BLOCK_N,), True, tl.int1)"

    def load(self, array: Array, *, mask: bool = True, column: str | None = None) -> str:
        """As `Rows.load`, without the mask of rows."""
        return super().load(array, mask=False, column=column)


class PagedCells(PagedRows):
    """Statistics in pages."""

    @property
    def mask(self) -> str:
        """The vector that says which cells exist."""
        return "cell_ok"


def step_array(v: Var, geometry: Geometry, *, internal: bool = False) -> Array:
    """The array of an input or output of a step: [B * tokens, heads(, width)], or a parameter."""
    found = array_of(v, geometry, internal=internal)
    return found if is_parameter(v) else replace(found, layout="token_rows")


def paged_array(v: Var, geometry: Geometry, *, padded: bool, dtype: PageType = "input") -> Array:
    """The pages of key rows or of statistics, in the input type or e4m3; numbers in float32."""
    features = features_of(v)
    width = (geometry.width(features, pad=padded),) if features else ()
    return Array(f"{v.name}_pages", "pages", features, width, dtype if features else "float32", padded)


def scale(pages: Array) -> str:
    """The name of the scale of what pages hold in 8 bits, [Hkv] powers of two in the type of q."""
    return pages.name.removesuffix("_pages") + "_scale"


def scale_array(pages: Array) -> Array:
    """Its array."""
    return Array(scale(pages), "kv_head_scalars")


def eight_bits(pages: Array, value: str) -> str:
    """Source of a value as pages hold it: rounded to e4m3 in units of the scale, in float32."""
    return f"round_e4m3(({value}).to(tl.float32) / {scale(pages)}.to(tl.float32))"


def as_kept(pages: Array, value: str) -> str:
    """Source of a token's row as everything that reads it from pages sees it, in the type of q."""
    if pages.dtype != "e4m3":
        return value
    return f"({eight_bits(pages, value)}.to({scale(pages)}.dtype) * {scale(pages)})"


def scaled(kernel: Kernel) -> Kernel:
    """A kernel with the scales of its pages, which it loads where it defines its columns."""
    scales = [scale_array(a) for a in kernel.arrays if a.dtype == "e4m3"]
    if not scales:
        return kernel
    loads = [f"{a.name} = tl.load({a.name}_ptr + h)" for a in scales]
    holes = {**kernel.holes, "columns": "\n".join([str(kernel.holes["columns"]), *loads])}
    return replace(kernel, inputs=(*kernel.inputs, *scales), holes=holes)


def query_heads(geometry: Geometry, least: int = 1) -> int:
    """Rows of a tile of the query heads of a KV head; products of tiles take 8 at the least, and most rather 16."""
    return max(least, 1 << (geometry.group - 1).bit_length())
