"""The kernels of the global part of linear attention: block states, their prefix over blocks, and the read-out.

A sum over the far blocks of a query, `contract(far, S)` with S the states of blocks, is never formed per query: far is
a union of intervals, so it is a difference of prefixes.  A sum over the whole sequence is one state for all queries.
The same holds with the roles of queries and keys exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from splagen.codegen.geometry import ChunkRows, Geometry, features_of, is_key_row, is_query_row, is_state, is_total
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.predicates import J, T
from splagen.codegen.region import padded_extent
from splagen.codegen.row_code import RowCode
from splagen.codegen.tile_code import Walk
from splagen.codegen.triton_expr import interval_text
from splagen.errors import PartitionError
from splagen.ir.decoding import carried_name
from splagen.ir.program import Contract, Equation, Map, Program, Var
from splagen.ir.text import equation_text

VECTOR = padded_extent(1)  # columns that a state without a value feature takes; only the first holds data
SPAN = 1024  # positions that one part of a total sums: many programs, and little to add up
BOTH = "bh = tl.program_id(1).to(tl.int64)"  # a batch and a KV head by one number
READERS = 1024  # positions whose rows read a total together
FEW = 128  # rows that read the same state and are held


@dataclass(frozen=True)
class StateChain:
    """states[chunk] = sum over the chunk's rows of left (x) right;  read[x] = sum over x's interval of states.

    A total has one state, of the whole sequence, and no intervals.
    """

    states: Equation
    summed: tuple[Equation, ...]  # contract(mask, states): never formed
    reads: tuple[Equation, ...]  # contract(row, summed)
    from_queries: bool

    @property
    def total(self) -> bool:
        """True if every row reads the sum over the whole sequence."""
        return is_total(self.states.out)

    def chunk(self, geometry: Geometry) -> int:
        """Positions that one state in memory sums."""
        return SPAN if self.total else geometry.chunk if self.from_queries else geometry.block

    def array(self, geometry: Geometry) -> Array:
        """The prefix states, or a total and its parts: [B, Hkv, chunks + 1, left, right] float32."""
        return states_of(self.states.out, geometry, self.chunk(geometry), "float32")

    def read_array(self, geometry: Geometry) -> Array:
        """What its reads are given."""
        return self.array(geometry)

    def readers(self, geometry: Geometry, *, to_queries: bool) -> int:
        """Positions whose rows read the same states."""
        return READERS if self.total else geometry.chunk if to_queries else geometry.block

    def ends(self, walk: Walk, state: Var, *, to_queries: bool) -> tuple[list[str], list[dict[str, str]]]:
        """Lines that define the ends of the intervals that a chunk reads, and the names of the ends."""
        if self.total:
            return ["# entry 0 of the states is their sum"], [{"low": "", "high": "0"}]
        begin = origin(self, walk)
        summed = next(e for e in self.summed if e.out == state)
        lines, intervals = _bounds(walk, _mask(summed), to_queries, begin)
        tile = ["tile = chunk * CHUNK // TILE"] if to_queries else []
        return [*tile, *lines, f"# entry c of the states sums the chunks from {begin} to before c"], intervals


def state_chains(program: Program) -> list[StateChain]:
    """Every block state that is read in intervals or in all, with what reads it."""
    chains, equations = [], program.equations
    for eq in equations:
        if not (isinstance(eq.op, Contract) and is_state(eq.out)) or any(is_state(v) for v in eq.args):
            continue
        summed = tuple(e for e in equations if isinstance(e.op, Contract) and eq.out in e.args and is_state(e.out))
        outs = {e.out for e in summed} or {eq.out}
        reads = tuple(e for e in equations if outs & set(e.args))
        if any(isinstance(e.op, Map) for e in reads):  # a difference of states: see remaining_kernels.py
            continue
        for e in reads:
            if not isinstance(e.op, Contract):
                raise PartitionError(f"no kernel reads a state as `{equation_text(e)}`")
        chains.append(StateChain(eq, summed, reads, any(is_query_row(v) for v in eq.args)))
    return chains


def states_of(v: Var, geometry: Geometry, chunk: int, dtype: Literal["input", "float32"]) -> Array:
    """An array of states by chunk: [B, Hkv, chunks + 1, left, right]."""
    return Array(v.name, "states", features_of(v), state_widths(v, geometry), dtype, True, chunk)


def state_widths(v: Var, geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of a state: features of the left factor, padded, and of the right one."""
    features = features_of(v)
    left = geometry.width([a for a in features if a != "e"], pad=True)
    return left, geometry.width(["e"], pad=True) if "e" in features else VECTOR


@dataclass(frozen=True)
class RowIndex:
    """Rows of a chunk of positions, on either side."""

    chunk: int
    per_position: str
    lines: str
    side: str


def row_index(chunk: int, of_queries: bool) -> RowIndex:
    """Those of queries, of all heads of a group, or of keys."""
    if of_queries:
        lines = [
            "place, member = row // GROUP, row % GROUP  # [BLOCK_M]",
            "qpos = chunk * CHUNK + place",
            "head = h * GROUP + member",
            "row_ok = row < rows",
        ]
        return RowIndex(chunk, "GROUP", "\n".join(lines), "query")
    lines = [
        "place = row  # [BLOCK_M]",
        "kpos = chunk * CHUNK + place",
        "key_ok = row < rows",
    ]
    return RowIndex(chunk, "1", "\n".join(lines), "key")


def as_columns(vector: str | None, mask: str) -> str:
    """A number per row (or 1) as a matrix whose first column holds it."""
    value = f"{vector}[:, None]" if vector else f"{mask}[:, None].to(tl.float32)"
    return f"tl.where(tl.arange(0, {VECTOR})[None, :] == 0, {value}, 0.0)"


def states_kernel(chain: StateChain, program: Program, available: Mapping[Var, Array]) -> Kernel:
    """The states of all chunks."""
    geometry = Geometry.of(program)
    eq = chain.states
    index = row_index(chain.chunk(geometry), chain.from_queries)
    code = RowCode(program, geometry, index.side, "BLOCK_M", available, row_type=ChunkRows)
    rows = [v for v in eq.args if v.kind == "real"]
    left = [v for v in rows if "d" in features_of(v)]
    right = [v for v in rows if v not in left]
    if len(left) != 1 or len(right) > 1:
        raise PartitionError(f"`{equation_text(eq)}` is not one outer product of rows")
    array = chain.array(geometry)
    loaded = [left[0], *(v for v in right if not features_of(v))]
    piece = code.operands(loaded)
    lines = list(piece.lines)
    inputs = {a.name: a for a in piece.arrays}
    if right and features_of(right[0]):
        source = available[right[0]]
        inputs[source.name] = source
        load = ChunkRows(geometry, index.side).load(source, column="right")
        lines.append(f"{right[0].name} = {load}  # [BLOCK_M, BLOCK_E]")
        right_name = right[0].name
    else:
        mask = "row_ok" if chain.from_queries else "key_ok"
        vector = piece.names[right[0]] if right else None
        lines.append(f"column = {as_columns(vector, mask)}.to({left[0].name}.dtype)  # [BLOCK_M, {VECTOR}]")
        right_name = "column"
    holes = {
        "chunk": index.chunk,
        "rows_per_position": index.per_position,
        "stop": "rows" if chain.total else "ROWS",
        "row_index": index.lines,
        "prologue": "\n".join(lines),
        "left": left[0].name,
        "right": right_name,
        "left_size": array.width[0],
        "right_size": array.width[1],
        "state": array.name,
    }
    return Kernel(
        f"states_{eq.out.name}",
        "block_states",
        (*piece.equations, eq),
        tuple(inputs.values()),
        (array,),
        holes,
        f"(cdiv(L, {index.chunk}), B * Hkv, {array.width[1]} // BLOCK_E)",
        tunable=("BLOCK_M", "BLOCK_E"),
    )


def origin(chain: StateChain, walk: Walk) -> int:
    """The chunk at which every interval of the reads begins; 0 where they begin at several or move with the row.

    Prefixes that count from there are 0 at the lower end of an interval, which is not read then.
    """
    begins = set()
    for eq in chain.summed:
        found = walk.predicates.intervals(_mask(eq), J, {}) if not chain.from_queries else []
        for interval in found:
            begins.add(tuple((b.numerator, b.divisor) for b in interval.lows))
        if len(found) != 1 or len(begins) != 1:
            return 0
    lows = begins.pop() if begins else ()
    if len(lows) != 1:
        return 0
    ((numerator, divisor),) = lows
    return int(numerator) if numerator.is_Integer and divisor == 1 else 0


def _mask(summed: Equation) -> Var:
    return next(v for v in summed.args if v.kind == "bool")


def scan_kernel(chain: StateChain, program: Program, walk: Walk) -> Kernel:
    """States -> prefix sums over chunks, in place: entry c is the sum of the chunks from the origin to before c.

    Of a total, entry 0 becomes the sum of all.
    """
    geometry = Geometry.of(program)
    array = chain.array(geometry)
    size, chunk = array.width[0] * array.width[1], chain.chunk(geometry)
    if chain.total:
        return total_kernel(chain.states, array)
    return Kernel(
        f"scan_{chain.states.out.name}",
        "state_scan",
        chain.summed,
        (array,),
        (),
        {
            "state": array.name,
            "size": size,
            "chunk": chunk,
            "origin": origin(chain, walk),
            "total": "tl.zeros((BLOCK_E,), tl.float32)",
            "begin_entry": "at",
            "first": "1",
        },
        f"(cdiv({size}, BLOCK_E), B * Hkv)",
        tunable=("BLOCK_M", "BLOCK_E"),
        batch=BOTH,
    )


def total_kernel(covered: Equation, states: Array, total: Array | None = None) -> Kernel:
    """The sum of all states of a sequence, as they are stored: into `total`, or in place into entry 0."""
    size = states.width[0] * states.width[1]
    return Kernel(
        f"total_{states.name}",
        "state_total",
        (covered,),
        (states,),
        (total,) if total else (),
        {
            "state": states.name,
            "size": size,
            "chunk": states.chunk,
            "into": f"{total.name}_ptr + bh * SIZE" if total else "at",
        },
        f"(cdiv({size}, BLOCK_E), B * Hkv)",
        tunable=("BLOCK_M", "BLOCK_E"),
        batch=BOTH,
    )


@dataclass(frozen=True)
class Resumed:
    """States and their scan from chunk `begin` on, where `given` is the sum of those before: a prefix sum composes.

        prefix[c] = given + sum of states[c'] for begin <= c' < c

    `begin` is the line that finds that chunk, from the position `settled` of the query whose sum is given.
    """

    given: Array
    begin: str
    states: Kernel
    scan: Kernel


def resumed(chain: StateChain, summed: Equation, states: Kernel, scan: Kernel, walk: Walk) -> Resumed | None:
    """The kernels that go on from the sum that an earlier query reads; None where that is no prefix.

    It is one where the far blocks of a query are those from the origin to before one that no later query's precede.
    """
    geometry, array = walk.geometry, chain.array(walk.geometry)
    found = [] if chain.from_queries or chain.total else walk.predicates.intervals(_mask(summed), J, {})
    if len(found) != 1:
        return None
    tile = "settled" if geometry.tile == 1 else f"(settled // {geometry.tile})"
    extent = f"((L + {geometry.block - 1}) // {geometry.block})"
    low, high = interval_text(found[0], {"T": tile, "L": "(settled + 1)"}, extent)
    if not origin(chain, walk) and low != "0":
        return None
    given = Array(f"{carried_name(summed.out)}_before", "sequences", array.features, array.width, "float32", True)
    holes = {
        "total": f"tl.load({given.name}_ptr + bh * SIZE + cell, mask=cell < SIZE, other=0.0)",
        "begin_entry": "at + begin.to(tl.int64) * SIZE",
        "first": "begin // BLOCK_M * BLOCK_M + 1",  # the steps are those from 1 on: so are the bits
        "origin": "begin",
    }
    return Resumed(
        given,
        f"begin = tl.maximum({high}, {low})",
        replace(states, number="(tl.program_id(0) + begin)"),
        replace(scan, inputs=(*scan.inputs, given), holes={**scan.holes, **holes}),
    )


def carried_kernel(chain: StateChain, summed: Equation, walk: Walk) -> Kernel:
    """The sum that the last query reads: what a step that begins with that query's position carries on."""
    array = chain.array(walk.geometry)
    name = f"{carried_name(summed.out)}_carried"
    bounds, intervals = _bounds(walk, _mask(summed), True, origin(chain, walk))
    size = array.width[0] * array.width[1]
    holes = {
        "state": array.name,
        "carried": name,
        "size": size,
        "chunk": array.chunk,
        "bounds": "\n".join(bounds),
        "intervals": intervals,
    }
    return Kernel(
        f"carried_{chain.states.out.name}",
        "carried_state",
        (summed,),
        (array,),
        (Array(name, "sequences", array.features, array.width, "float32", True),),
        holes,
        f"(cdiv({size}, BLOCK_E), B * Hkv)",
        tunable=("BLOCK_E",),
    )


def read_kernel(chain: StateChain, eq: Equation, walk: Walk, available: Mapping[Var, Array], output: Array) -> Kernel:
    """One read-out: rows times the difference of prefixes that their far interval asks for.

    What it costs to bring a slice of a state into shared memory, as halves, is shared by the rows that read it.  Few
    rows are held there while slices pass by; of many, rows pass by a slice that is held.
    """
    program, geometry = walk.program, walk.geometry
    to_queries = is_query_row(eq.out)
    chunk = chain.readers(geometry, to_queries=to_queries)
    index = row_index(chunk, to_queries)
    code = RowCode(program, geometry, index.side, "BLOCK_M", available, row_type=ChunkRows)
    (state,) = [v for v in eq.args if is_state(v)]
    array = chain.read_array(geometry)
    left, right = array.width
    rows = [v for v in eq.args if v.kind == "real" and not is_state(v) and (is_query_row(v) or is_key_row(v))]
    piece = code.operands(rows)
    lines = list(piece.lines)
    features = features_of(rows[0]) if rows else ()
    over_left = "d" in features
    if rows and features:
        operand = rows[0].name
    else:
        mask = "row_ok" if to_queries else "key_ok"
        lines.append(f"column = {as_columns(piece.names[rows[0]] if rows else None, mask)}  # [BLOCK_M, {VECTOR}]")
        operand = "column"
    product = f"out = dot_split({operand}, state)  # [BLOCK_M, BLOCK_E]"
    if array.dtype == "input":
        product = f'out = tl.dot({operand}, state.to({operand}.dtype), input_precision="ieee")  # [BLOCK_M, BLOCK_E]'
    store = read_store(output, ChunkRows(geometry, index.side), "kept")
    bounds, intervals = chain.ends(walk, state, to_queries=to_queries)
    address = "kept[None, :] + summed[:, None] * RIGHT" if over_left else "summed[:, None] + kept[None, :] * RIGHT"
    kept = right if over_left else left
    held = chunk * (geometry.group if to_queries else 1) <= FEW
    span, slices = ("BLOCK_M", "1") if held else ("BLOCK_R", f"{kept} // BLOCK_E")
    parts = f"cdiv(L, {index.chunk}) * cdiv({index.chunk} * {index.per_position}, {span})"
    holes = {
        "chunk": index.chunk,
        "source_chunk": array.chunk,
        "rows_per_position": index.per_position,
        "row_index": index.lines,
        "extent": "(L + BLOCK - 1) // BLOCK" if to_queries else "(L + TILE - 1) // TILE",
        "prologue": "\n".join(lines),
        "bounds": "\n".join(bounds),
        "state": array.name,
        "left_size": left,
        "right_size": right,
        "summed_size": left if over_left else right,
        "kept_size": kept,
        "held": held,
        "span": span,
        "slices": slices,
        "address": address,
        "intervals": intervals,
        "product": product,
        "store": "\n".join(store),
    }
    inputs = {a.name: a for a in (*piece.arrays, array)}
    return Kernel(
        f"read_{eq.out.name}",
        "read_out",
        (*piece.equations, *chain.summed, eq),
        tuple(inputs.values()),
        (output,),
        holes,
        f"({parts}, B * Hkv)" if held else f"({parts} * ({slices}), B * Hkv)",
        tunable=("BLOCK_M", "BLOCK_E") if held else ("BLOCK_R", "BLOCK_M", "BLOCK_E"),
    )


def _bounds(walk: Walk, mask: Var, to_queries: bool, origin: int) -> tuple[list[str], list[dict[str, str]]]:
    """Lines that define the ends of every interval in units of state chunks, from `tile`; the names of the ends.

    A lower end where prefixes are 0 has no name: the origin, where they count from one.
    """
    variable, names = (J, {"T": "tile", "L": "L"}) if to_queries else (T, {"J": "chunk", "L": "L"})
    lines: list[str] = []
    ends = []
    for k, interval in enumerate(walk.predicates.intervals(mask, variable, {})):
        low, high = interval_text(interval, names, "extent")
        if not to_queries:
            low, high = (f"(({x}) * TILE + SOURCE_CHUNK - 1) // SOURCE_CHUNK" for x in (low, high))
        lines += [f"low_{k} = {low}", f"high_{k} = tl.maximum({high}, low_{k})"]
        ends.append({"low": "" if origin or low == "0" else f"low_{k}", "high": f"high_{k}"})
    return lines, ends


def read_store(output: Array, rows: ChunkRows, column: str) -> list[str]:
    """Lines that store one slice of columns, or the one column that a read-out of a vector state has."""
    if output.features:
        return [rows.store(output, "out", column=column)]
    return [f"value = tl.sum(tl.where({column}[None, :] == 0, out, 0.0), axis=1)", rows.store(output, "value")]
