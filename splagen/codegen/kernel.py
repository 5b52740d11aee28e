"""What a kernel is before it is text: arrays, the equations that it covers, the source that fills its holes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from splagen.ir.program import Equation

Layout: TypeAlias = Literal[
    "query_rows",  # [B, L, Hq, width]
    "query_scalars",  # [B, L, Hq]
    "key_rows",  # [B, L, Hkv, width]
    "cell_rows",  # [B, nJ * C, Hkv, width]
    "head_rows",  # [Hq, width]
    "kv_head_scalars",  # [Hkv]
    "states",  # [B, Hkv, chunks + 1, left width, right width]: prefixes, or a total and its parts
    "indices",  # [B, Hkv, nT, budget]
    "counts",  # [B, Hkv, nT]
    "work",  # the inverse index: which queries chose each key block, cut into segments; `features` names more of it
    "index",  # what the inverse index is made from and consists of, contiguous
    "bounds",  # [sequences + 1]: where each of packed sequences begins
    "segments",  # [B, Hkv, segments, BLOCK, width]: partial sums of key rows
    "parts",  # [B, Hkv, nT, budget, TILE * GROUP(, width)]: what each chosen block gives to a query row
    "partials",  # one partial sum per program, summed over programs by the launcher
    # arrays of recurrences (chunk_kernels.py); T counts the tokens of all samples
    "token_rows",  # [T, H(, width)]
    "value_rows",  # [T, HV(, width)]
    "head_scalars",  # [HV]
    "state_table",  # [samples, parts, HV, D, E]
    "plan",  # where the rows of segments lie: `features` names the tensors that a kernel reads
    "group_states",  # [groups(, partitions), HV(, D(, E))]
    "chunk_states",  # [chunks(, partitions), HV, D, E]
    "slot_rows",  # [(partitions, )slots, HV(, width)]
    "group_totals",  # [groups, HV]: partial sums of a number per head
    "routing",  # tensors of the router, contiguous
    # arrays of decoding (decoding.py): contiguous but for the rows of a token, which are token_rows
    "pages",  # [pages, Hkv, rows of a page, width]: keys, values and statistics of every sequence
    "sequences",  # [B, Hkv, ...]: states, and what one step hands from kernel to kernel
    "table",  # what says where sequences lie and how long they are
    "unions",  # [programs, blocks, 2] int64: room for the union of lists that a program makes (unions.py)
]


BATCH = "b = (tl.program_id(1) // {heads}).to(tl.int64)"
WORK_PARTS = ("entries", "offsets", "blocks", "firsts")  # tensors of the inverse index


@dataclass(frozen=True)
class Array:
    """A tensor that kernels hand on.

    `width` is the extent of the last dimension as it lies in memory (internal arrays are padded to a power of two),
    `features` the axes behind it, `dtype` "input" (that of q), "float32", "int32", "int64", or "e4m3", whose
    numbers count times a scale per KV head (step_rows.py).
    """

    name: str
    layout: Layout
    features: tuple[str, ...] = ()
    width: tuple[int, ...] = ()
    dtype: Literal["input", "float32", "int32", "int64", "e4m3"] = "input"
    padded: bool = False
    chunk: int = 0  # of states: positions that one state sums
    partitions: int = 1  # of recurrences: how many partitions a group, a chunk or a token has all at once
    missing: str = "0.0"  # what a row beyond the sequence reads as: +inf for a log-sum-exp, so that its p is 0

    @property
    def stride_names(self) -> tuple[str, ...]:
        """Kernel arguments that carry this array's strides, in the order batch, position, head."""
        match self.layout:
            case "query_rows" | "query_scalars" | "key_rows" | "cell_rows":
                return tuple(f"{self.name}_{w}" for w in "blh")
            case "head_rows":
                return (f"{self.name}_h",)
            case "token_rows" | "value_rows":
                return tuple(f"{self.name}_{w}" for w in "th")
        return ()

    @property
    def pointers(self) -> tuple[str, ...]:
        """Kernel arguments that point to this array, or to the parts of an index."""
        if self.layout == "work":
            return tuple(f"{self.name}_{part}_ptr" for part in (*WORK_PARTS, *self.features))
        if self.layout == "plan":
            return tuple(f"{part}_ptr" for part in self.features)
        return (f"{self.name}_ptr",)

    @property
    def tensors(self) -> tuple[str, ...]:
        """What a launcher gives for the pointers."""
        if self.layout == "work":
            return tuple(f"{self.name}.{part}" for part in (*WORK_PARTS, *self.features))
        if self.layout == "plan":
            return tuple(f"{self.name}.{part}" for part in self.features)
        return (self.name,)


@dataclass(frozen=True)
class Narrow:
    """Numbers of a Schedule that a launch takes otherwise where it goes over less: the first of `values` that holds it.

    `over` is host source, and held by `number` of the values.  Of a tile for many most would be masked, and cost as
    much as what is there.
    """

    number: str
    over: str
    values: tuple[Mapping[str, int], ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One launch: `template` rendered with `holes` gives its device code.

    `covers` lists the equations it computes, so that it can be tested alone against the oracle.  `grid` is host source
    for the launch grid; `tunable` names the constexpr arguments that a Schedule sets; `scratch` is memory that its
    programs use while they run.  `batch` is the line by which a program finds its sequence in a batch, and `number`
    counts the programs of a sequence from its first position: what changes where sequences are packed (packing.py).
    `narrow` are numbers of its Schedule that go by the sizes of a launch too, `fixed` those of its scalars that it is
    compiled for: it divides by them.  `calls` are kernels that some of its programs are instead: their arrays,
    equations, scalars and tunable numbers are among its own.
    """

    name: str
    template: str
    covers: tuple[Equation, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    holes: Mapping[str, object]
    grid: str
    scalars: tuple[str, ...] = ("L", "Hkv")
    tunable: tuple[str, ...] = ("BLOCK_M", "BLOCK_N")
    scratch: tuple[Array, ...] = ()
    batch: str = BATCH.format(heads="Hkv")
    number: str = "tl.program_id(0)"
    narrow: tuple[Narrow, ...] = ()
    fixed: tuple[str, ...] = ()
    calls: tuple[Kernel, ...] = ()

    @property
    def call(self) -> str:
        """Source by which a program of a kernel that has its arguments becomes one of this."""
        strides = [name for a in self.arrays for name in a.stride_names]
        pointers = [name for a in self.arrays for name in a.pointers]
        return f"{self.name}_kernel({', '.join([*pointers, *strides, *self.scalars, *self.tunable])})"

    def number_of(self, hole: str) -> int:
        """The value of a hole that is a number."""
        return int(str(self.holes[hole]))

    @property
    def unspecialised(self) -> tuple[str, ...]:
        """Scalars of any value with which the same machine code runs."""
        return tuple(s for s in self.scalars if s not in self.fixed)

    def launched(self, schedule: Mapping[str, int]) -> list[dict[str, int]]:
        """Every Schedule with which a launch may run that is given this one."""
        found = [dict(schedule)]
        for n in self.narrow:
            found += [{**s, **x} for s in found for x in n.values if x[n.number] <= s[n.number]]
        return [s for i, s in enumerate(found) if s not in found[:i]]

    @property
    def arrays(self) -> list[Array]:
        """What it reads and writes, each array once."""
        return list({a.name: a for a in (*self.inputs, *self.outputs, *self.scratch)}.values())


@dataclass(frozen=True, eq=False)
class Splitting:
    """How work is cut into programs: `numbers` of the Schedule under this name, by which arrays between kernels go.

    They are no arguments: the shapes of what one of `kernels` hands to the next say how many programs there are.
    """

    name: str
    kernels: tuple[Kernel, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """Several ways to compute the same: `strategy` in the Schedule under this name numbers one of them.

    `options` has the kernels that each way launches and the others do not, in order.
    """

    name: str
    options: tuple[tuple[Kernel, ...], ...]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those of all options."""
        return tuple(k for option in self.options for k in option)

    def between(self, made: Mapping[str, Kernel]) -> Choice:
        """The same choice between other kernels under the same names."""
        return replace(self, options=tuple(tuple(made[k.name] for k in option) for option in self.options))
