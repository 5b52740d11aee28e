"""The partition of a spec for the last queries of packed sequences, and what a cache takes up of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from splagen.codegen.decoding import Decoding, key_numbers
from splagen.codegen.geometry import Geometry, array_of
from splagen.codegen.kernel import Array, Choice, Kernel
from splagen.codegen.module_kernels import ProgramKernels
from splagen.codegen.packed_index import packed_index_kernels
from splagen.codegen.partition import Partition
from splagen.codegen.prefill_packing import PrefillPacking
from splagen.codegen.prefill_rows import (
    FIND_PLACES,
    cached_rows,
    kept_numbers,
    kept_statistics,
    new_rows,
    pages_of,
    placed_queries,
    taken_output,
    token_array,
)
from splagen.codegen.row_kernels import rows_kernel
from splagen.codegen.state_kernels import StateChain, carried_kernel, resumed, state_chains
from splagen.codegen.tile_code import Walk
from splagen.errors import PartitionError
from splagen.ir.partitions import copy_name
from splagen.ir.program import Program, slice_back

FORWARD = "forward_strategy"
_OF_NEW = ("new_rows", "key_numbers", "kept_numbers")  # kernels of the keys at positions of queries


@dataclass(frozen=True, kw_only=True)
class PrefillPartition(ProgramKernels):
    """Forward kernels for the last queries of packed sequences, in launch order.

    `paged` are kernels of a cache, by name: new keys into pages, all keys out of them before the others, and behind
    them into pages what steps read of new keys.
    `statistics` and `numbers` are arrays by cell and by key that pages of a cache hold, under the name of the pages
    but for `_pages`; `states` the sums that a cache carries, with the names of their parts, one for each sign of a
    feature map; `before` those of an earlier query, with the same parts, from which states go on.  `batch` has the
    kernels of a batch, by whose arrays Schedules are chosen.
    """

    program: Program
    forward: tuple[Kernel, ...]
    paged: Mapping[str, Kernel]
    strategies: tuple[Choice, ...]
    inputs: tuple[Array, ...]
    output: Array
    statistics: tuple[Array, ...]
    numbers: tuple[Array, ...]
    states: tuple[tuple[Array, tuple[str, ...]], ...]
    before: tuple[tuple[Array, tuple[str, ...]], ...]
    index: tuple[Kernel, ...]
    batch: tuple[Kernel, ...]

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel once, by name."""
        return list({k.name: k for k in (*super().kernels, *self.paged.values())}.values())

    @property
    def key_rows(self) -> tuple[str, ...]:
        """Names of the rows that a new token has for each KV head; all others are of query heads."""
        return tuple(token_array(a).name for a in self.inputs if a.layout == "key_rows")

    @property
    def kept(self) -> tuple[Array, ...]:
        """What a cache takes up, in the order in which the module returns it behind the output."""
        return (*self.statistics, *self.numbers, *(a for a, _ in self.states))


def scaled_pools(part: PrefillPartition) -> list[Array]:
    """Pages of keys, of what belongs to them and of statistics: those that a cache may have in 8 bits."""
    return [pages_of(a) for a in (*(a for a in part.inputs if a.layout == "key_rows"), *part.statistics)]


def pools_of(part: PrefillPartition) -> list[Array]:
    """All pages that a chunk is written to."""
    return [*scaled_pools(part), *(pages_of(a) for a in part.numbers)]


def prefill_partition(part: Partition, step: Decoding) -> PrefillPartition:
    """The kernels of a partition for the last queries of packed sequences; `step` is the spec's decoding.

    Raises:
        PartitionError: prefill computes no state, statistic or number that a step reads.
    """
    program = part.program
    walk, geometry = Walk.of(program), Geometry.of(program)
    packing = PrefillPacking(geometry, walk.budget)
    within = set(slice_back(program, program.outputs, program.inputs))
    chains = [c for c in state_chains(program) if within & set(c.reads)]
    summed = [next(eq for eq in c.summed if eq in within) for c in chains]
    carried = [carried_kernel(c, eq, walk) for c, eq in zip(chains, summed, strict=True)]
    states = tuple((k.outputs[0], _parts(c, k.outputs[0], geometry)) for c, k in zip(chains, carried, strict=True))
    numbers = _numbers_kernel(step)
    statistics = [a for k in part.forward if k.template == "statistics" for a in k.outputs]
    extra = [*carried, *([numbers] if numbers else [])]
    strategies = [c for c in part.strategies if c.name == FORWARD]
    first = strategies[0].options[0][0] if strategies else part.forward[-1]
    at = part.forward.index(first)
    forward = [*part.forward[:at], *extra, *part.forward[at:]]
    by_query = [a for a in part.inputs if a.layout in ("query_rows", "query_scalars")]
    forward = [placed_queries(by_query, geometry), *forward, taken_output(part.outputs[0], geometry)]
    paged = _paged_kernels(part, statistics, numbers, step)
    batch = {k.name: k for k in (*paged, *forward, *(k for c in strategies for k in c.kernels))}
    made = {name: packing.kernel(k) for name, k in batch.items()}
    made |= {n: packing.kernel(batch[n], of_queries=True) for n in _OF_NEW if n in batch}
    before = []
    for chain, eq, (_, names) in zip(chains, summed, states, strict=True):
        stem = chain.states.out.name
        if going_on := resumed(chain, eq, batch[f"states_{stem}"], batch[f"scan_{stem}"], walk):
            before.append((going_on.given, names))
            own = replace(packing, begin=going_on.begin)
            made |= {k.name: own.kernel(k) for k in (going_on.states, going_on.scan)}
    found = PrefillPartition(
        program=program,
        forward=tuple(made[k.name] for k in forward),
        paged={k.name: made[k.name] for k in paged},
        strategies=tuple(c.between(made) for c in strategies),
        inputs=tuple(part.inputs),
        output=part.outputs[0],
        statistics=tuple(statistics),
        numbers=numbers.outputs if numbers else (),
        states=states,
        before=tuple(before),
        index=(*packed_index_kernels(walk, packing), FIND_PLACES),
        batch=tuple(batch.values()),
    )
    _check_complete(found, step)
    return found


def _paged_kernels(part: Partition, statistics: list[Array], numbers: Kernel | None, step: Decoding) -> list[Kernel]:
    """New keys into pages, all keys out of them; behind the others, what steps read of new keys into pages."""
    geometry = Geometry.of(part.program)
    keys = [a for a in part.inputs if a.layout == "key_rows"]
    found = [new_rows(keys, geometry), cached_rows(keys, geometry)]
    if numbers:
        found.append(kept_numbers(numbers.outputs, geometry))
    if statistics:
        found.append(kept_statistics(statistics, geometry, geometry.cell + step.overhang))
    return found


def _parts(chain: StateChain, array: Array, geometry: Geometry) -> tuple[str, ...]:
    """The states of a step, by name, of which a sum of prefill consists: features of either sign have their own."""
    base = array.name.removesuffix("_carried")
    if "s" not in chain.states.out.axes:
        return (f"{base}_state",)
    return tuple(f"{copy_name(base, 's', sign)}_state" for sign in range(geometry.signs))


def _numbers_kernel(step: Decoding) -> Kernel | None:
    """What is kept of each key so that its features follow from it alone, by the equations of a step."""
    program, geometry = step.program, step.geometry
    wanted = key_numbers(program)
    given = {v: array_of(v, geometry, internal=False) for v in program.inputs if not v.name.endswith("_state")}
    outputs = [(v, array_of(v, geometry, internal=True)) for v in wanted]
    return rows_kernel("key_numbers", program, "key", given, outputs) if wanted else None


def _check_complete(part: PrefillPartition, step: Decoding) -> None:
    pages = {a.name.removesuffix("_pages") for a in step.pages}
    made = {a.name for a in (*part.inputs, *part.statistics, *part.numbers)}
    made |= {name for _, names in part.states for name in names}
    missing = sorted((pages | {a.name for a in step.states}) - made)
    if missing:
        raise PartitionError(f"prefill of {part.program.name} leaves no {', '.join(missing)} to a step")
