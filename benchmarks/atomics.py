"""What a backward by key would pay to add gradients of queries with atomics, beside the kernel that forms them again.

python -m benchmarks.atomics [--out DIR]

By key, a block gives something to the gradient of every row that chose it.  A kernel by row sums that without atomics
and in a fixed order, but forms scores a second time.  With atomics the kernel by key would add float32 rows in place:
timed is this adding alone, for the works' numbers of rows and blocks, once as a reduction of every element and once as
TMA's of a whole tile.  `by_row_ms` is all of the kernel by row, from the record of the work.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.record import write
from benchmarks.timing import time_ms

KERNEL = "block_sparse_dq"  # by row
COLUMNS = 128  # of a row of dq
TILES = 16  # that a program adds to, one after the other


@dataclass(frozen=True)
class Case:
    """Tiles of rows that share a list and blocks that each chooses, of a size in the record of a work."""

    work: str
    length: int
    kv_heads: int
    rows: int
    tiles: int
    chosen: int


CASES = (
    Case("tile", 32_768, 32, rows=64, tiles=32 * 512, chosen=16),
    Case("whole", 65_536, 2, rows=16, tiles=2 * 65_536, chosen=13),
)


@triton.jit
def add_elements(at_ptr, sums_ptr, total, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add to the rows of each of N listed tiles, element by element."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    value = (row + column).to(tl.float32)
    for i in range(N):
        tile = tl.load(at_ptr + tl.program_id(0) * N + i).to(tl.int64)
        tl.atomic_add(sums_ptr + (tile * ROWS + row) * COLUMNS + column, value, sem="relaxed")


@triton.jit
def add_tiles(at_ptr, sums_ptr, total, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same by TMA, a tile at once."""
    sums = tl.make_tensor_descriptor(sums_ptr, [total, COLUMNS], [COLUMNS, 1], [ROWS, COLUMNS])
    value = (tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :]).to(tl.float32)
    for i in range(N):
        tile = tl.load(at_ptr + tl.program_id(0) * N + i)
        sums.atomic_add([tile * ROWS, 0], value)


def measured(case: Case, results: Path) -> dict[str, Any]:
    """Times of one case, after both kernels were seen to add the same."""
    draw = torch.Generator("cuda").manual_seed(0)
    at = torch.randint(case.tiles, (case.tiles * case.chosen,), generator=draw, device="cuda", dtype=torch.int32)
    total, programs = case.tiles * case.rows, case.tiles * case.chosen // TILES

    def add(kernel: Any, sums: Tensor) -> Tensor:
        kernel[(programs,)](at, sums, total, TILES, case.rows, COLUMNS, num_warps=4)
        return sums

    seen = torch.bincount(at, minlength=case.tiles)[:, None, None]
    value = torch.arange(case.rows, device="cuda")[:, None] + torch.arange(COLUMNS, device="cuda")
    want = (seen * value).reshape(total, COLUMNS).float()
    row: dict[str, Any] = {"work": case.work, "length": case.length, "kv_heads": case.kv_heads}
    row["added_gb"] = case.tiles * case.chosen * case.rows * COLUMNS * 4 / 1e9
    for name, kernel in (("elements_ms", add_elements), ("tma_ms", add_tiles)):
        sums = torch.zeros(total, COLUMNS, device="cuda")
        if not torch.equal(add(kernel, sums), want):
            raise SystemExit(f"{kernel.fn.__name__} added something else for {case}")
        row[name] = time_ms(partial(add, kernel, sums), 10, 1).median
    return row | {"by_row_ms": by_row_ms(case, results)}


def by_row_ms(case: Case, results: Path) -> float:
    """Milliseconds of the kernel by row in the record of the work."""
    rows = json.loads((results / f"{case.work}.json").read_text(encoding="utf-8"))["figures"]["rows"]
    sizes = {"system": "splagen", "length": case.length, "kv_heads": case.kv_heads}
    found = next(r for r in rows if sizes.items() <= r.items() and "strategy" not in r)
    return float(found["kernels_ms"][KERNEL])


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    rows = [measured(case, Path("benchmarks/results")) for case in CASES]
    write("atomics", {"rows": rows}, given.out)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
