"""The kernels of a decoding step, and the arrays of a cache: from the same definition as prefill."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from splagen.codegen.decode_kernels import DecodeCode
from splagen.codegen.decode_selection import reach, selection_kernels, statistics_code
from splagen.codegen.decode_states import State
from splagen.codegen.geometry import Geometry, array_of, features_of, is_key_row, is_query_row, is_state, is_tile_value
from splagen.codegen.kernel import Array, Kernel, Splitting
from splagen.codegen.module_kernels import ModuleKernels
from splagen.codegen.schedule import DTYPES, TARGETS, Schedule, check_fields
from splagen.codegen.selection import Selection
from splagen.codegen.selection_kernels import kept
from splagen.codegen.step_rows import PageType, paged_array, scale_array, scaled, step_array
from splagen.codegen.tile_code import Walk
from splagen.errors import PartitionError, ScheduleError
from splagen.ir.check import check
from splagen.ir.decoding import state_pairs, step_program
from splagen.ir.program import Contract, Equation, Iota, Lse, Program, Var
from splagen.ir.text import equation_text
from splagen.spec import SPLASpec


@dataclass(frozen=True)
class Decoding(ModuleKernels):
    """The kernels of a step in launch order, and every array by its part.

    `tokens` are what a caller gives for each step, `keys` the pages with a row for each token, `pages` those and the
    statistics, `states` what is carried, `scratch` what one kernel hands to the next, `output` o.  `scales` are those
    of pages in e4m3, in their order; `degrees` says by the name of pages with which power of the keys' scale theirs
    goes, 0 for a scale of its own.
    """

    program: Program
    kernels: tuple[Kernel, ...]
    tokens: tuple[Array, ...]
    keys: tuple[Array, ...]
    pages: tuple[Array, ...]
    states: tuple[Array, ...]
    scratch: tuple[Array, ...]
    output: Array
    overhang: int
    kept: int
    budget: int
    reach: int = 0
    scales: tuple[Array, ...] = ()
    degrees: Mapping[str, int] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        """The sizes of the program."""
        return Geometry.of(self.program)

    @property
    def page_type(self) -> PageType:
        """What pages hold: numbers of the type of q, or of e4m3."""
        return "e4m3" if self.scales else "input"

    @property
    def default_page_size(self) -> int:
        """Tokens of a page, where a cache says nothing else: 256, or a block where that is larger."""
        return max(256, self.geometry.block)

    @property
    def fixed(self) -> dict[str, int]:
        """Machine code that is made ahead of time is for pages of the default size and blocks that one program has."""
        return {"PAGE": self.default_page_size, "CHUNK": 2 * self.default_splitting["chunk"]}

    def chunk(self, wanted: int) -> int:
        """Blocks that a program chooses from where `wanted` are: two lists at least, half of what it counts at most."""
        return max(2 * self.kept, min(wanted, MOST_COUNTED // 2))

    @property
    def default_splitting(self) -> dict[str, int]:
        """The splitting before tuning: a chunk has as many blocks as threads have room for their scores."""
        heads = 1 << (self.group_size - 1).bit_length()
        room = MOST_SCORES // (heads * self.geometry.cells)
        return SPLITTING | {"chunk": self.chunk(min(SPLITTING["chunk"], room))}

    @property
    def splitting(self) -> Splitting:
        """In how many programs a step scores, selects and attends."""
        return Splitting("splitting", self.kernels, tuple(SPLITTING))

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.geometry.group

    @property
    def key_rows(self) -> tuple[str, ...]:
        """Names of the rows that a token has for each KV head, keys first; all others are of query heads."""
        paged = {a.name for a in self.pages}
        return tuple(a.name for a in self.tokens if f"{a.name}_pages" in paged)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of what a step is given that is no row of a token: float32, or as q."""
        return frozenset(a.name for a in self.tokens if a.layout != "token_rows")


@functools.lru_cache(maxsize=32)
def decoding(spec: SPLASpec, page_type: PageType = "input") -> Decoding:
    """Cut the step of a spec into kernels, for pages in the type of q or in e4m3.

    Raises:
        SpecError: a query depends on later tokens.
        PartitionError: no kernel computes an equation.
    """
    program = check(step_program(spec))
    geometry, walk = Geometry.of(program), Walk.of(program)
    pairs = state_pairs(program)
    given = [v for v in program.inputs if v not in [before for before, _ in pairs]]
    tokens = {v: step_array(v, geometry) for v in given}
    keys = [v for v in given if is_key_row(v)]
    pages = {v: paged_array(v, geometry, padded=False, dtype=page_type) for v in keys}
    states = tuple(State.of(program, *pair) for pair in pairs)
    numbers = {v: paged_array(v, geometry, padded=False) for v in key_numbers(program)}
    features = _features(program, tokens)
    available = {**tokens, **pages, **numbers, **features}
    code = DecodeCode(walk, available, states)
    selection = Selection.of(program)
    statistics = statistics_code(selection, tokens, pages) if selection else None
    append = code.append(tokens, pages, numbers, features, statistics)
    kernels = [append]
    if selection and statistics:
        kernels = selection_kernels(selection, {**tokens, **statistics.arrays}, scaled(append), code.columns)
    output = replace(array_of(code.output, geometry, internal=False), layout="token_rows", name="o")
    kernels += [code.attend(), code.merge(tokens, output)]
    _check_coverage(program, kernels)
    rows = (*pages.values(), *numbers.values())
    paged = (*rows, *(statistics.arrays.values() if statistics else ()))
    kernels = [scaled(k) for k in kernels]
    scales = tuple(scale_array(a) for a in paged if a.dtype == "e4m3")
    degrees = {a.name: 1 if a is pages[keys[0]] else 0 for a in pages.values()}
    degrees |= statistics.degrees if statistics else {}
    carried = tuple(s.array(geometry) for s in states)
    known = {a.name for a in (*tokens.values(), *paged, *carried, *scales, output)}
    known |= {"seqlens", "settled", "page_table"}
    scratch = {a.name: a for k in kernels for a in k.arrays if a.name not in known}
    if selection and 4 * kept(selection) > MOST_COUNTED:
        raise PartitionError(f"a budget of {walk.budget} blocks: a step counts {MOST_COUNTED // 4} at the most")
    window = int(str(statistics.holes["width"])) if statistics else geometry.cell
    return Decoding(
        program,
        tuple(kernels),
        tuple(tokens.values()),
        rows,
        paged,
        carried,
        tuple(scratch.values()),
        output,
        window - geometry.cell,
        kept(selection) if selection else 0,
        walk.budget,
        reach(selection) if selection else 0,
        scales,
        degrees,
    )


def key_numbers(program: Program) -> list[Var]:
    """What is kept of each key so that its features follow from it alone: see `keep_normalisers`."""
    return [eq.out for eq in program.equations if isinstance(eq.op, Lse) and is_key_row(eq.out)]


def _features(program: Program, tokens: Mapping[Var, Array]) -> dict[Var, Array]:
    """Rows of features of queries that products read: formed once per token."""
    geometry = Geometry.of(program)
    found: dict[Var, Array] = {}
    for eq in program.equations:
        if isinstance(eq.op, Contract) and (is_tile_value(eq.out) or any(is_state(v) for v in eq.args)):
            for v in eq.args:
                if is_query_row(v) and not is_state(v) and features_of(v) and v not in tokens and v.kind == "real":
                    found[v] = step_array(v, geometry, internal=True)
    return found


def _check_coverage(program: Program, kernels: list[Kernel]) -> None:
    covered: set[Equation] = {eq for k in kernels for eq in k.covers}
    left = [
        eq for eq in program.equations if eq not in covered and eq.out.kind == "real" and not isinstance(eq.op, Iota)
    ]
    if left:
        raise PartitionError("no kernel of a step computes " + "; ".join(map(equation_text, left)))


OVERLAPS = ("launch_pdl", "next_pdl")
"""Programmatic dependent launch, from Hopper on: may a kernel begin while the one before runs, does it let the next.

What the kernels of a step do before they need each other's results overlaps.  The first one begins when everything
before the step has ended, whatever that is.
"""


def decode_schedule(kernel: Kernel, geometry: Geometry, arch: str, dtype: str) -> dict[str, int]:
    """The Schedule of one kernel of a step."""
    overlaps = dict.fromkeys({*OVERLAPS} & {*kernel.tunable}, int(arch in ("sm_90", "sm_100")))
    return _tiles(kernel, geometry, arch, dtype) | overlaps


def _tiles(kernel: Kernel, geometry: Geometry, arch: str, dtype: str) -> dict[str, int]:
    """How a kernel runs alone."""
    wide = DTYPES[dtype] == 4
    widest = max(geometry.width(("d",), pad=True), geometry.width(("e",), pad=True))
    match kernel.template:
        case "decode_append":
            columns = [a.width[1] for a in kernel.outputs if a.layout == "sequences" and len(a.width) > 1]
            large = arch in ("sm_90", "sm_100") and widest <= 128 and not wide and not geometry.rank
            block_e = min(max(columns, default=16), 64 if large else 32)
            warps = 8 if wide or geometry.rank else 4  # the keys of a cell stay in registers from factor to factor
            folds = {"BLOCK_N": min(geometry.block, 64) if large else 16, "BLOCK_E": block_e}
            tiles = folds if kernel.holes["states"] else {}
            return {**tiles, "num_warps": warps, "num_stages": 1 if large else 2}
        case "decode_score":
            block_c = 64 if widest <= 128 and not wide and arch != "gfx942" else 32
            stages = 2
            read = sum(a.width[-1] for a in kernel.inputs if a.layout == "pages")
            while geometry.rank and DTYPES[dtype] * max(stages - 1, 1) * block_c * read > _half_shared(arch):
                if block_c > 16:
                    block_c //= 2
                elif stages > 1:
                    stages -= 1
                else:
                    break
            folds = {"BLOCK_N": 16, "BLOCK_E": 16} if kernel.holes["states"] else {}
            return {"BLOCK_C": block_c, **folds, "num_warps": 4, "num_stages": stages}
        case "decode_select":
            return {"BLOCK_S": 128, "num_warps": 8, "num_stages": 1}
        case "decode_attend":
            # tiles of 64 keys are what a group of 4 warps multiplies; two programs fit a multiprocessor
            block_n = min(geometry.block, 16 if wide else 64 if widest <= 128 else 32)
            much = widest <= 128 and not wide and arch != "gfx942"  # of registers and shared memory for what is read
            left_size = kernel.number_of("left_size")
            rows = {"BLOCK_D": min(left_size, 32 if much else 16)} if left_size else {}
            return {"BLOCK_N": block_n, **rows, "num_warps": 4, "num_stages": 3 if much else 2}
        case "decode_merge":
            return {"BLOCK_S": 64, "num_warps": 4, "num_stages": 1}
    raise PartitionError(f"{kernel.name} has no Schedule", hint=f"give the template {kernel.template} one")


def check_decode_schedule(kernel: Kernel, geometry: Geometry, schedule: Schedule) -> None:
    """Raise ScheduleError if a Schedule is not legal for a kernel of a step."""
    check_fields(kernel, schedule)
    divided = {"BLOCK_N": ("block", geometry.block)} if "BLOCK_N" in kernel.tunable else {}
    if "BLOCK_D" in kernel.tunable:
        divided["BLOCK_D"] = ("rows of a state", kernel.number_of("left_size"))
    for k in (kernel, *kernel.calls):
        if k.holes.get("right_size"):
            divided["BLOCK_E"] = ("columns of a state", k.number_of("right_size"))
    for name, (what, size) in divided.items():
        if size % schedule[name]:
            raise ScheduleError(f"{name}={schedule[name]} of {kernel.name} does not divide the {size} of {what}")


def _half_shared(arch: str) -> int:
    """Bytes that two programs on a multiprocessor have each."""
    return TARGETS[arch].shared_bytes // 2


SPLITTING = {"score": 396, "attend": 264, "chunk": 1024}
"""Programs that score and attend have at the most over all sequences and KV heads; blocks that one chooses
from, or from twice as many if those are all.

264 is 2 for each of 132 multiprocessors, as many as fit at a time: none waits for a second wave.  Of score 4 fit: 3
beside those that append and fold.
"""
LEAST_SPLIT = 32  # cells that a program scores, where there are as many
MOST_SCORES = 16384  # of a chunk: 128 for each thread of 8 warps that take two
MOST_COUNTED = 32768  # keys of `largest_in_order`, which counts in 16 bits


def decode_schedules(part: Decoding) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Schedules by architecture and dtype, and how work is split."""
    return {
        arch: {
            d: {k.name: decode_schedule(k, part.geometry, arch, d) for k in part.kernels}
            | {"splitting": part.default_splitting}
            for d in DTYPES
        }
        for arch in TARGETS
    }
