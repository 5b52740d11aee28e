"""What a kernel needs at the least: Schedules that cannot run, or that must spill, are not even compiled.

The compiler alone knows what a kernel takes.  These are floors that it was not seen to go below for sm_80 and sm_90:
buffers of a loop's loads, which `num_stages` multiplies, and the sums that a program carries through its loop.
"""

from __future__ import annotations

from collections.abc import Iterable

from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.schedule import DTYPES, Schedule

FLOAT = 4  # bytes


def shared_floor(kernel: Kernel, schedule: Schedule, dtype: str) -> int:
    """Bytes of shared memory that the buffers of a kernel's main loop take at the least."""
    size, ahead = DTYPES[dtype], schedule["num_stages"] - 1
    if any(a.dtype == "e4m3" for a in kernel.inputs):
        size = 1
    match kernel.template:
        case "block_sparse_forward" | "block_sparse_dq":
            rows = schedule["BLOCK_N"] * _columns(a for a in kernel.inputs if a.layout == "key_rows" and not a.padded)
        case "decode_attend":
            rows = schedule["BLOCK_N"] * _columns(a for a in kernel.inputs if a.layout == "pages")
        case "decode_score":
            rows = schedule["BLOCK_C"] * _columns(a for a in kernel.inputs if a.layout == "pages")
        case "block_sparse_dkv":
            rows = schedule["BLOCK_M"] * _columns(a for a in kernel.inputs if a.layout == "query_rows" and not a.padded)
        case "score_lse" | "score_topk":
            rows = schedule["BLOCK_C"] * _columns(a for a in kernel.inputs if a.layout == "cell_rows")
        case "read_out" if kernel.holes["held"]:  # the states at one end of an interval
            size, rows = FLOAT, schedule["BLOCK_E"] * kernel.number_of("summed_size")
        case "read_out":
            rows = schedule["BLOCK_M"] * _columns(a for a in kernel.inputs if a.layout in ("query_rows", "key_rows"))
        case "block_states":
            steps = -(-kernel.number_of("chunk") // schedule["BLOCK_M"])  # times the heads of a group
            ahead = min(ahead, steps - 1)
            rows = schedule["BLOCK_M"] * (kernel.number_of("left_size") + schedule["BLOCK_E"])
        case _:  # loads that are short, or that the compiler does not buffer
            return 0
    return size * ahead * rows


def carried(kernel: Kernel, schedule: Schedule) -> int:
    """Numbers of 32 bits that a program holds in registers all through its loop, at the least."""
    match kernel.template:
        case "block_sparse_forward" | "block_sparse_dq":
            return schedule["BLOCK_M"] * max((a.width[-1] for a in kernel.outputs if a.width), default=0)
        case "block_sparse_dkv":
            return schedule["BLOCK_N"] * _columns(a for a in kernel.outputs if a.layout == "segments")
        case "decode_append" if kernel.holes["states"]:
            return schedule["BLOCK_E"] * kernel.number_of("left_size")
        case "decode_score":
            return max(carried(k, schedule) for k in kernel.calls)
        case "decode_attend":
            few = schedule.get("BLOCK_D") == kernel.number_of("least_rows")
            return kernel.number_of("few_heads" if few else "heads") * _columns(kernel.outputs)
        case "block_states" | "remaining_state":
            return schedule["BLOCK_E"] * kernel.number_of("left_size")
        case "chunk_loop" if "carried" in str(kernel.holes["begin"]):
            return schedule["BLOCK_E"] * kernel.number_of("d_extent")
    return 0


def _columns(arrays: Iterable[Array]) -> int:
    return sum(a.width[-1] for a in arrays if a.width)
