"""From equations to kernels.

A lowered Program with its gradient is cut where rows leave a kernel: values per (query row, key) never do, and block
states only as prefixes.  Matchers look at operations and axes, never at a spec.  Every equation must be covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from splagen.codegen.dense import Dense
from splagen.codegen.geometry import (
    Geometry,
    array_of,
    features_of,
    is_key_row,
    is_parameter,
    is_query_row,
    is_row_local,
    is_state,
    is_tile_value,
)
from splagen.codegen.index_kernels import choices_kernel
from splagen.codegen.kernel import Array, Choice, Kernel
from splagen.codegen.key_kernels import key_groups, key_kernels, merge_kernel
from splagen.codegen.module_kernels import ProgramKernels
from splagen.codegen.part_kernels import parts_kernels
from splagen.codegen.query_kernels import dq_kernel, dq_kernels, forward_kernel, forward_kernels
from splagen.codegen.remaining_kernels import Remaining, differences, remaining_kernel
from splagen.codegen.render import kernel_text
from splagen.codegen.row_kernels import partial_array, rows_kernel
from splagen.codegen.selection import Selection
from splagen.codegen.selection_kernels import selection_kernels
from splagen.codegen.state_kernels import (
    StateChain,
    read_kernel,
    scan_kernel,
    state_chains,
    states_kernel,
    total_kernel,
)
from splagen.codegen.tile_code import COUNTS, INDICES, Walk, is_sum_of_tiles
from splagen.codegen.unions import has_unions
from splagen.errors import PartitionError
from splagen.ir.check import check
from splagen.ir.passes import join_sums, settle_names
from splagen.ir.program import Contract, Equation, Iota, Lse, Map, Program, TopK, Var, descendants, slice_back
from splagen.ir.text import equation_text

Results: TypeAlias = list[tuple[Var, Array]]


@dataclass
class Partition(ProgramKernels):
    """The kernels of a spec in launch order, and the arrays between forward and backward.

    Where there is a choice, `forward` and `backward` list the kernels of its first option.  `direct` are those of the
    same in sequences of few blocks, and `dense` is what runs in the place of all of them in short sequences, if there
    are such things.
    """

    program: Program
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    strategies: list[Choice] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    saved: list[Array] = field(default_factory=list)
    cotangents: list[Array] = field(default_factory=list)
    gradients: list[tuple[str, Var]] = field(default_factory=list)
    direct: Direct | None = None
    dense: Dense | None = None

    @property
    def residuals(self) -> list[Array]:
        """What backward is given beside inputs and cotangents: outputs that it reads, then what forward saved."""
        read = {a.name for k in self.backward for a in k.inputs}
        return [*(a for a in self.outputs if a.name in read), *self.saved]

    @property
    def all_kernels(self) -> list[Kernel]:
        """Those too that run in short sequences: their equations are those of `direct.part` and of `dense.rows`."""
        return [*self.op_kernels, *(self.dense.kernels if self.dense else [])]

    @property
    def op_kernels(self) -> list[Kernel]:
        """Those of all lengths, but for those beside torch's attention."""
        return list({k.name: k for k in (*self.kernels, *(self.direct.kernels if self.direct else []))}.values())


@dataclass(frozen=True)
class Direct:
    """What runs in sequences of at most `blocks` blocks: what is left over is summed block by block.

    A difference of sums has the rounding of both, and what is left over may be far less than what was chosen.  `part`
    holds the kernels, which take and return the same arrays as those of longer sequences.
    """

    blocks: int
    part: Partition

    @property
    def kernels(self) -> list[Kernel]:
        """All of them; some run in longer sequences too."""
        return self.part.kernels


def partition(program: Program) -> Partition:
    """Cut a lowered forward-and-gradient Program into kernels; PartitionError prints equations that no family takes."""
    return _Partitioner(program).run()


def direct_partition(program: Program, longer: Partition) -> Direct:
    """The kernels of a Program that was lowered without subtraction, beside those of `longer` sequences.

    A kernel with the text of one of those is that one; others have names of their own.
    """
    found = _DirectPartitioner(program).run()
    known = {k.name: k for k in longer.kernels}

    def own(k: Kernel) -> Kernel:
        if k.name not in known:
            return k
        return known[k.name] if kernel_text(k) == kernel_text(known[k.name]) else replace(k, name=f"{k.name}_direct")

    found.forward, found.backward = [own(k) for k in found.forward], [own(k) for k in found.backward]
    return Direct(Walk.of(found.program).few_blocks, found)


class _Partitioner:
    def __init__(self, program: Program) -> None:
        program = check(settle_names(join_sums(is_sum_of_tiles)(program)))
        self.program = program
        self.geometry = Geometry.of(program)
        self.walk = Walk.of(program)
        self.remaining = differences(program)
        self.result = Partition(program)
        cotangents = {dy for _, dy in program.cotangents}
        self.arrays = {v: array_of(v, self.geometry, internal=False) for v in program.inputs}
        self.result.inputs = [a for v, a in self.arrays.items() if v not in cotangents]
        self.result.cotangents = [a for v, a in self.arrays.items() if v in cotangents]
        self.forward_equations = slice_back(program, program.outputs, program.inputs)
        forward = set(self.forward_equations)
        self.backward_equations = [eq for eq in program.equations if eq not in forward]

    def run(self) -> Partition:
        """All kernels, then the check that every equation is covered."""
        self._forward()
        if self.program.gradients:
            self._backward()
        self._check_coverage()
        return self.result

    # -- forward --------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        kernels = self.result.forward
        available = dict(self.arrays)
        if selection := Selection.of(self.program):
            kernels += selection_kernels(selection, available)
            self.result.saved += [INDICES, COUNTS]
        self._key_features(kernels, available, self.forward_equations)
        self._query_features(kernels, available, self.forward_equations)
        self._states(kernels, available, self.forward_equations)
        outputs = [(v, array_of(v, self.geometry, internal=False)) for v in self.program.outputs]
        wanted = [v for v in self._saved() if v not in self.program.outputs]
        saved = [(v, available.get(v) or self._saved_array(v)) for v in wanted]
        self._tiles(kernels, available, [*outputs, *((v, a) for v, a in saved if v not in available)])
        self.result.outputs = [a for _, a in outputs]
        self.result.saved += [a for _, a in saved]
        self.arrays.update(saved)
        self.arrays.update(outputs)

    def _tiles(self, kernels: list[Kernel], available: dict[Var, Array], results: Results) -> None:
        """Outputs and saved rows: by query tile or, as a choice, with what is chosen by key block or by union."""
        by_row = forward_kernels(self.walk, available, results)
        kernels += by_row
        if self.walk.chosen:
            by_key, parts = parts_kernels(self.walk, available, [v for v, _ in results])
            merging = forward_kernel(self.walk, available, results, parts, chosen="parts")
            options: list[tuple[Kernel, ...]] = [by_row, (*by_key, merging)]
            if has_unions(self.geometry):
                options.append((forward_kernel(self.walk, available, results, chosen="union"),))
            self.result.strategies.append(Choice("forward_strategy", tuple(options)))

    def _saved_array(self, v: Var) -> Array:
        array = array_of(v, self.geometry, internal=True)
        is_lse = isinstance(self.program.definitions[v].op, Lse)
        return replace(array, missing='float("inf")') if is_lse else array

    def _saved(self) -> list[Var]:
        """Row variables that backward reads and cannot form again from inputs and other saved rows, and differences.

        Backward forms tile values again, so what forward's tiles read of a row (lse) counts as read.  What lies in
        memory anyway is saved in the place of what follows from it.
        """
        backward = set(self.backward_equations)
        readers = [eq for eq in self.program.equations if eq in backward or is_tile_value(eq.out)]
        read = {v for eq in readers for v in eq.args}
        kept = [r.difference.out for r in self.remaining]
        products = [eq.out for r in self.remaining if (eq := r.product())]
        saved: list[Var] = []
        for eq in self.forward_equations:
            v = eq.out
            if v not in read or not is_query_row(v) or v.kind == "bool" or (is_state(v) and v not in kept):
                continue
            if self._again(v, saved):
                continue
            behind = slice_back(self.program, [v], [*self.program.inputs, *saved, *products])
            first = [x for x in products if x not in saved and any(x in e.args for e in behind)]
            saved += first if first and self._again(v, [*saved, *first]) else [v]
        return saved

    def _again(self, v: Var, saved: Sequence[Var]) -> bool:
        """True if v follows from inputs and saved rows by row equations alone."""
        try:
            equations = slice_back(self.program, [v], [*self.program.inputs, *saved])
        except PartitionError:
            return False
        return all(is_row_local(eq) for eq in equations)

    # -- backward -------------------------------------------------------------------------------------------------

    def _backward(self) -> None:
        kernels = self.result.backward
        available = dict(self.arrays)
        self._key_features(kernels, available, self.backward_equations)
        self._query_features(kernels, available, self.backward_equations)
        self._row_cotangents(kernels, available)
        self._states(kernels, available, self.backward_equations)
        self._tile_gradients(kernels, available)
        for x, g in self.program.gradients:
            self.result.gradients.append((x.name, g))

    def _key_features(self, kernels: list[Kernel], available: dict[Var, Array], within: Sequence[Equation]) -> None:
        """Feature maps of keys are formed once: a tile of keys is read by many query tiles."""
        wanted = []
        for eq in self.program.equations:
            if isinstance(eq.op, Contract) and not is_row_local(eq):
                for v in eq.args:
                    if is_key_row(v) and features_of(v) and v not in available and self._again(v, []):
                        wanted.append(v)
        wanted = [v for v in wanted if not self._formed_there(v, within)]
        outputs = [(v, array_of(v, self.geometry, internal=True)) for v in dict.fromkeys(wanted)]
        if outputs:
            kernels.append(rows_kernel("key_features", self.program, "key", available, outputs))
            available.update(outputs)

    def _query_features(self, kernels: list[Kernel], available: dict[Var, Array], within: Sequence[Equation]) -> None:
        """Feature maps of queries are formed once: a row is read with its state and by every block that it chose."""
        wanted: dict[Var, None] = {}
        for eq in self.forward_equations:
            if isinstance(eq.op, Contract) and (is_tile_value(eq.out) or any(is_state(v) for v in eq.args)):
                wanted.update(dict.fromkeys(v for v in eq.args if is_query_row(v) and not is_state(v)))
        rows = [v for v in wanted if features_of(v) and v not in available and self._again(v, [])]
        rows = [v for v in rows if not self._formed_there(v, within)]
        outputs = [(v, array_of(v, self.geometry, internal=True)) for v in rows]
        if outputs:
            kernels.append(rows_kernel("query_features", self.program, "query", available, outputs))
            available.update(outputs)

    def _formed_there(self, v: Var, within: Sequence[Equation]) -> bool:
        """Features that one kernel alone reads, and each row once: for states of a difference, or with one.

        Those of x and of -x take so many registers at once that they are formed before.
        """
        once = [eq for r in self.remaining for eq in (r.states, *r.reads)]
        readers = [eq for eq in within if v in eq.args]
        return len(readers) == 1 and readers[0] in once and "s" not in v.axes and self._again(v, [])

    def _states(self, kernels: list[Kernel], available: dict[Var, Array], equations: Sequence[Equation]) -> None:
        """States, scan and read-outs whose result is among `equations`."""
        within = set(equations)
        for chain in state_chains(self.program):
            reads = [eq for eq in chain.reads if eq in within]
            if not reads:
                continue
            kernels.append(states_kernel(chain, self.program, available))
            available[chain.states.out] = chain.array(self.geometry)
            kernels.append(scan_kernel(chain, self.program, self.walk))
            self._reads(kernels, available, chain, reads)
        for remaining in self.remaining:
            self._remaining(kernels, available, remaining, [eq for eq in remaining.reads if eq in within])

    def _remaining(
        self, kernels: list[Kernel], available: dict[Var, Array], chain: Remaining, reads: Sequence[Equation]
    ) -> None:
        """What lists leave of states, for reads of one direction; forward keeps it for those of backward."""
        difference = chain.difference.out
        if reads and difference not in available:
            states, total = chain.array(self.geometry), chain.total_array(self.geometry)
            kernels += [states_kernel(chain, self.program, available), total_kernel(chain.total_of, states, total)]
            product = next((eq for eq in reads if eq == chain.product()), None)
            array = array_of(product.out, self.geometry, internal=True) if product else None
            others = len(chain.reads) > bool(product)
            kernels.append(remaining_kernel(chain, self.walk, available, array, kept=others))
            if product and array:
                available[product.out] = array
            available[difference] = chain.read_array(self.geometry)
            reads = [eq for eq in reads if eq != product]
        self._reads(kernels, available, chain, reads)

    def _reads(
        self, kernels: list[Kernel], available: dict[Var, Array], chain: StateChain, reads: Sequence[Equation]
    ) -> None:
        """Rows times states that lie in memory."""
        for eq in reads:
            output = array_of(eq.out, self.geometry, internal=True, dtype="float32")
            kernels.append(read_kernel(chain, eq, self.walk, available, output))
            available[eq.out] = output

    def _row_cotangents(self, kernels: list[Kernel], available: dict[Var, Array]) -> None:
        """Rows that backward's tiles and states read and that follow from rows in memory.

        These are the cotangents of the branches.
        """
        cross = self._cross_row(self.backward_equations)
        wanted: dict[Var, None] = {}
        for eq in self.backward_equations:
            if eq in cross or is_tile_value(eq.out) or is_state(eq.out):
                wanted.update(dict.fromkeys(v for v in eq.args if is_query_row(v) and v not in available))
        late = descendants(self.program, [eq.out for eq in cross])
        rows = [v for v in wanted if v not in late and not is_state(v) and v.kind == "real"]
        rows = [v for v in rows if not self._formed_there(v, self.backward_equations)]
        outputs = [(v, array_of(v, self.geometry, internal=True)) for v in rows]
        for x, g in self.program.gradients:
            if g in late or g in available:
                continue
            if is_parameter(x):
                outputs.append((g, partial_array(g, self.geometry, per_query_head=True)))
            elif is_query_row(x):
                outputs.append((g, array_of(g, self.geometry, internal=False)))
        if outputs:
            kernels.append(rows_kernel("row_cotangents", self.program, "query", available, outputs))
            available.update(outputs)

    def _cross_row(self, equations: Iterable[Equation]) -> set[Equation]:
        """Equations of kernels that go beyond a row: sums of tiles, states, read-outs."""
        return {eq for eq in equations if isinstance(eq.op, Contract) and not is_row_local(eq)}

    def _tile_gradients(self, kernels: list[Kernel], available: dict[Var, Array]) -> None:
        """Gradients of query rows by query tile and of key rows by key block; or, as a choice, both by key block."""
        rows, keys = self._gradient_rows(available)
        by_row = dq_kernels(self.walk, available, rows)
        wanted, asked = [v for v, _ in keys], [v for v, _ in rows]
        alone = key_groups(self.walk, available, wanted)
        with_rows = key_groups(self.walk, available, wanted, asked) if self.walk.chosen else alone
        whole = len(alone) == len(with_rows) == 1 and all(a.layout == "key_rows" for _, a in keys)
        finished = keys if whole else []
        by_key = key_kernels(self.walk, available, alone, wanted, finished)
        merging_keys = merge_kernel(self.walk, available, by_key.sums, keys, finished=whole)
        kernels += [*by_row, *by_key.kernels, merging_keys]
        if self.walk.chosen:
            both = key_kernels(self.walk, available, with_rows, wanted, finished)
            merging = dq_kernel(self.walk, available, rows, both.parts, chosen="parts")
            options: list[tuple[Kernel, ...]] = [(*by_row, *by_key.kernels), (*both.kernels, merging)]
            if has_unions(self.geometry):
                options.append((dq_kernel(self.walk, available, rows, chosen="union"), *by_key.kernels))
            self.result.strategies.append(Choice("backward_strategy", tuple(options)))

    def _gradient_rows(self, available: dict[Var, Array]) -> tuple[Results, Results]:
        """Gradients that tiles give to query rows and to key rows, with those of parameters that follow from them."""
        rows = [(g, array_of(g, self.geometry, internal=False)) for x, g in self.program.gradients if is_query_row(x)]
        rows = [(g, a) for g, a in rows if g not in available] + self._late_parameters(available, "query")
        keys = [(g, array_of(g, self.geometry, internal=False)) for x, g in self.program.gradients if is_key_row(x)]
        return rows, keys + self._late_parameters(dict([*available.items(), *rows]), "key")

    def _late_parameters(self, available: dict[Var, Array], side: str) -> list[tuple[Var, Array]]:
        """Sums over rows of one side that reach a parameter's gradient only after the tiles."""
        found = []
        axes = {"T", "m"} if side == "query" else {"J", "n"}
        wanted = {g for x, g in self.program.gradients if is_parameter(x) and g not in available}
        for eq in slice_back(self.program, wanted, [*self.program.inputs, *available]):
            if is_parameter(eq.out) and not isinstance(eq.op, Map) and axes & {a for v in eq.args for a in v.axes}:
                found.append((eq.out, partial_array(eq.out, self.geometry, per_query_head=False)))
        return found

    # -- coverage -------------------------------------------------------------------------------------------------

    def _check_coverage(self) -> None:
        covered = {eq for k in self.result.kernels for eq in k.covers}
        loose = [eq for eq in self.program.equations if eq not in covered and not self._is_free(eq)]
        if loose:
            lines = "\n  ".join(equation_text(eq) for eq in loose)
            raise PartitionError(f"no kernel family takes these equations of {self.program.name}:\n  {lines}")

    def _is_free(self, eq: Equation) -> bool:
        """Positions and masks that follow from them are printed where they are read."""
        if isinstance(eq.op, Iota) or (eq.out.kind == "bool" and not isinstance(eq.op, TopK)):
            return True
        return is_parameter(eq.out) and isinstance(eq.op, Map)


class _DirectPartitioner(_Partitioner):
    """Where what is left over is summed directly, a loop over all blocks serves every sum, and there are no states."""

    def _tiles(self, kernels: list[Kernel], available: dict[Var, Array], results: Results) -> None:
        kernels.append(choices_kernel(self.walk.budget))
        kernels += forward_kernels(self.walk, available, results, "direct")

    def _tile_gradients(self, kernels: list[Kernel], available: dict[Var, Array]) -> None:
        rows, keys = self._gradient_rows(available)
        wanted = [v for v, _ in keys]
        kernels.append(choices_kernel(self.walk.budget))
        kernels += dq_kernels(self.walk, available, rows, "direct")
        groups = key_groups(self.walk, available, wanted, direct=True)
        by_key = key_kernels(self.walk, available, groups, wanted, direct=True)
        kernels += by_key.kernels
        kernels.append(rows_kernel("key_gradients", self.program, "key", {**available, **by_key.sums}, keys))
