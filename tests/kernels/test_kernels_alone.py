"""Every kernel alone: its inputs from the oracle, its outputs against the equations that it covers."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen import library as lib
from splagen.codegen.geometry import is_total
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.module import FUNCTIONS
from splagen.codegen.partition import Partition
from splagen.ir.program import Contract, Program, TopK, Var
from splagen.ir.reference import evaluate
from splagen.kinds import oracle
from splagen.layout import Blocked
from splagen.ops import Oracle
from splagen.pipeline import generate
from splagen.spec import Residual, Select, SPLASpec, Statistics, to_toml, windows
from splagen.sse_spec import Router, SSESpec
from splagen.verification import TOLERANCE, random_inputs, relative_error, selection_error
from tests.kernels.arrays import Memory
from tests.kernels.cases import REAL_SPECS, Shape
from tests.kernels.embedding import fill_empty_with_nan

pytestmark = pytest.mark.usefixtures("fast_sort")

TOKEN = Select(block_size=16, budget=1, sinks=1, local=1, metric=lib.taylor(covariance="diag"))
TILE = Select(
    budget=2,
    block_size=16,
    granularity="tile",
    tile=32,
    statistics=Statistics(cell=16),
    metric=lib.taylor(covariance="diag"),
)
WINDOWS = Select(32, budget=1, sinks=0, local=0, granularity="tile", tile=16, statistics=windows())
DENSE = SPLASpec(head_dim=24, group_size=2, select=None, linear=None, score=lib.softcap(5.0))
BOTH = Residual(temperature=True, normaliser=True)

SPECS: dict[str, tuple[SPLASpec, Shape]] = {
    "dense": (DENSE, (1, 2, 150)),
    "token": (
        SPLASpec(head_dim=16, group_size=3, select=TOKEN, linear=Residual(temperature=True)),
        (1, 3, 85),
    ),
    "tile": (
        SPLASpec(head_dim=24, value_dim=40, select=TILE, linear=BOTH, combine="add"),
        (2, 2, 110),
    ),
    "non-causal windows": (
        SPLASpec(head_dim=16, causal=False, select=WINDOWS, linear=Residual(lib.elu1), combine="gate"),
        (1, 2, 150),
    ),
    "states of tiles": (
        SPLASpec(head_dim=24, value_dim=40, group_size=2, causal=False, select=TILE, linear=BOTH, combine="add"),
        (1, 4, 110),
    ),
    "rank 3": (
        SPLASpec(head_dim=24, group_size=2, select=replace(TILE, metric=lib.taylor(covariance="rank3")), linear=None),
        (1, 2, 110),
    ),
    "sums apart": (SPLASpec(head_dim=80, group_size=2, select=replace(TILE, tile=16), combine="add"), (1, 2, 110)),
}
STATES = SPLASpec(
    head_dim=64,
    causal=False,
    select=Select(budget=3, sinks=1, local=0, granularity="tile", tile=64, metric=lib.taylor(covariance="diag")),
    linear=BOTH,
    combine="add",  # behind a norm the gradient of a normaliser vanishes: it would be compared with rounding
)
REAL = {
    "token": (REAL_SPECS["token"], (2, 8, 1000)),
    "tile": (REAL_SPECS["tile"], (1, 8, 1000)),
    "states of tiles": (STATES, (1, 8, 1000)),
    "no residual": (replace(REAL_SPECS["tile"], linear=None, combine="none"), (1, 8, 1000)),
}


class Call:
    """One call of a spec's kernels, with the oracle's value of every array."""

    def __init__(self, spec: SPLASpec, shape: Shape, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
        self.truth: Oracle = oracle(to_toml(spec))
        self.part: Partition = self.truth.partition
        self.program: Program = self.part.program
        self.module = generate(spec, folder).module
        self.dtype = dtype
        self.inputs = random_inputs(self.truth, shape, dtype, device, seed=0)
        batch, heads, length = shape
        self.blocked = Blocked(self.program, batch, length, heads // spec.group_size)
        self.memory = Memory(self.part, self.module, self.blocked, dtype)
        self.n = self.module.sizes_of(self.inputs["q"])
        self.schedules = self.module.schedules_for(self.inputs["q"])
        self.axes = {v.name: self.blocked.to_axes(v, self.inputs[v.name].double()) for v in self.program.inputs}
        chosen = [eq for eq in self.program.equations if isinstance(eq.op, TopK)]
        self.given: dict[str, Tensor] = {}
        self.indices: Tensor | None = None
        if chosen:
            self.given = self.values([chosen[0].out], {})
            self.indices, self.counts = self.blocked.indices(self.given[chosen[0].out.name], chosen[0].op.k)
        self.work = self.module.inverse_index(self.n, self.indices)

    def values(self, wanted: list[Var], given: dict[str, Tensor]) -> dict[str, Tensor]:
        scalars = {"L": self.blocked.length, "Hkv": self.blocked.sizes["h"]}
        known = self.axes | {k: x for k, x in given.items() if k in self.axes}
        return evaluate(
            self.program,
            known,
            scalars=scalars,
            sizes=self.blocked.sizes,
            given=given | self.given,
            wanted=wanted,
        )

    def variable(self, a: Array) -> Var:
        return self.program.var(a.name.removesuffix("_parts"))

    def arguments(self, kernel: Kernel) -> tuple[list[object], dict[str, Tensor]]:
        """What the launcher takes, and the rounded values that the oracle is to go on from."""
        passed: list[object] = []
        given: dict[str, Tensor] = {}
        in_place = self.in_place(kernel)
        for a in kernel.inputs:
            if a.layout in ("indices", "counts"):
                passed.append(self.indices if a.layout == "indices" else self.counts)
                continue
            if a.layout == "work":
                passed.append(self.work)
                continue
            v = self.variable(a)
            value = self.axes[v.name] if v.name in self.axes else self.values([v], {})[v.name]
            if a.layout == "segments":
                given[v.name] = value
                passed.append(self.memory.segments(a, v, value, self.work))
            elif a.layout == "sequences":
                given[v.name] = value
                passed.append(self.memory.chunk_states(a, v, value).to(torch.float32))
            elif a.layout == "states":
                given[v.name] = value.to(self.dtype).double() if a.dtype == "input" else value
                if a.dtype == "input" or kernel.template == "state_scan":
                    passed.append(self.memory.unscanned(a, v, value))
                elif kernel.template == "state_total":
                    passed.append(self.memory.parts_of_total(a, v, value))
                else:
                    passed.append(self.states(a, v, value))
            elif a in in_place:
                lone = self.lone()[..., None]  # their gradients are there
                passed.append(self.memory.store(a, v, value).masked_fill(~lone, float("nan")))
            else:
                stored = self.memory.store(a, v, value)
                given[v.name] = self.memory.given(a, v, stored)
                passed.append(stored)
        return passed, given

    def in_place(self, kernel: Kernel) -> list[Array]:
        """Gradients of key rows that a merge of segments completes."""
        gradients = {g for _, g in self.program.gradients}
        completes = kernel.template == "merge_segments" and not kernel.outputs
        return [a for a in kernel.inputs if completes and a.layout == "key_rows" and self.variable(a) in gradients]

    def lone(self) -> Tensor:
        """[B, L, Hkv]: True for keys of blocks that have one segment."""
        sizes = self.blocked.sizes
        lone = (self.work.firsts.diff(dim=1) == 1).reshape(sizes["b"], sizes["h"], -1)
        return lone.repeat_interleave(self.blocked.block, 2)[..., : self.blocked.length].transpose(1, 2)

    def states(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array of states as a read-out finds it."""
        if is_total(v):
            return self.memory.store_total(a, v, value)
        scans = [k for k in self.part.kernels if k.template == "state_scan" and self.variable(k.inputs[0]) == v]
        return self.memory.store_states(a, v, value, int(str(scans[0].holes["origin"])))

    def errors(self, kernel: Kernel) -> dict[str, float]:
        """Relative RMS error of every output of one kernel, launched alone."""
        passed, given = self.arguments(kernel)
        launch = getattr(self.module, f"launch_{kernel.name}")
        assert len(inspect.signature(launch).parameters) == len(passed) + 2
        found = launch(self.n, self.schedules[kernel.name], *passed)
        if kernel.template == "state_scan":
            ((a, v),) = ((a, self.variable(a)) for a in kernel.inputs)
            return {v.name: relative_error(passed[0], self.states(a, v, given[v.name]))}  # type: ignore[arg-type]
        if kernel.template == "state_total" and not kernel.outputs:
            ((a, v),) = ((a, self.variable(a)) for a in kernel.inputs)
            got = self.memory.states_of(a, passed[0])[:, :1]  # type: ignore[arg-type]
            return {v.name: relative_error(got, self.memory.chunk_states(a, v, given[v.name]))}
        in_place = self.in_place(kernel)
        results = found if isinstance(found, tuple) else (found,) if kernel.outputs else ()
        arrays = [*kernel.outputs, *in_place]
        results = (*results, *(x for a, x in zip(kernel.inputs, passed, strict=True) if a in in_place))
        outputs = dict(zip([a.name for a in arrays], results, strict=True))
        if kernel.template == "score_topk":
            inputs = self.inputs | {n: x for n, x in outputs.items() if n in self.inputs}
            indices, counts = outputs["block_indices"], outputs["block_counts"]
            return {"selection": selection_error(self.truth, inputs, indices, counts)}
        variables = [self.variable(a) for a in arrays]
        truth = self.values(variables, given)
        return {
            a.name: self.error(kernel, a, v, outputs[a.name], truth[v.name])
            for a, v in zip(arrays, variables, strict=True)
        }

    def error(self, kernel: Kernel, a: Array, v: Var, got: Tensor, value: Tensor) -> float:
        memory, length = self.memory, self.blocked.length
        # gradients where a block has one segment, parts of sums where it has several
        finishes = {x.layout for x in kernel.outputs} >= {"segments", "key_rows"}
        match a.layout:
            case "sequences":
                return relative_error(got.flatten(0, 1)[:, None], memory.chunk_states(a, v, value))
            case "states":
                got = memory.states_of(a, got)[:, 1:]
                got = got.sum(1, keepdim=True) if is_total(v) else got
                return relative_error(got, memory.chunk_states(a, v, value))
            case "segments":
                inside = torch.arange(self.blocked.blocks * self.blocked.block, device=got.device) < length
                got = memory.merged(a, got, self.work).flatten(1, 2)[:, inside]
                want = memory.key_blocks(v, value).flatten(1, 2)[:, inside]
                if finishes:
                    several = ~self.lone().transpose(1, 2).flatten(0, 1)
                    got, want = got[several], want[several]
                return relative_error(got, want)
            case "partials":
                return relative_error(memory.partials(a, got, v), value)
            case "cell_rows":
                seen = memory.usable_cells()
                want = memory.load(a, memory.store(a, v, value).double())
                return relative_error(memory.load(a, got)[:, seen], want[:, seen])
        want = memory.load(a, memory.store_exactly(a, v, value).double())
        got = memory.load(a, got)
        if finishes and a.layout == "key_rows":
            got, want = got[self.lone()], want[self.lone()]
        empty = torch.isneginf(want)  # the log-sum-exp of nothing
        if not torch.equal(torch.isneginf(got), empty):
            return float("inf")
        got, want = got.masked_fill(empty, 0), want.masked_fill(empty, 0)
        terms, size = self.terms(v).norm().item(), want.norm().item()
        return relative_error(got, want, terms if size < 1e-3 * terms else None)

    def terms(self, v: Var) -> Tensor:
        """What cancels in a sum of products: the sum of their absolute values; 0 for other equations.

        The gradient of an RMS norm is orthogonal to its argument, so that delta all but vanishes there.
        """
        eq = self.program.definitions[v]
        if not isinstance(eq.op, Contract) or any("n" in a.axes for a in eq.args):
            return torch.zeros(())
        values = self.values(list(eq.args), {})
        scalars = {"L": self.blocked.length, "Hkv": self.blocked.sizes["h"]}
        sizes, given = self.blocked.sizes, {name: x.abs() for name, x in values.items()}
        known = self.axes | {k: x for k, x in given.items() if k in self.axes}
        return evaluate(self.program, known, scalars=scalars, sizes=sizes, given=given, wanted=[v])[v.name]


def check(call: Call) -> None:
    """Every kernel within the tolerance, all failures in one message."""
    limit = TOLERANCE[call.dtype]
    wrong = []
    for kernel in call.part.kernels:
        if any(a.layout == "parts" for a in (*kernel.inputs, *kernel.outputs)):
            continue  # a part is no variable of the oracle: test_parts.py compares what they are merged to
        for name, error in call.errors(kernel).items():
            bound = limit[2] if name == "selection" else limit[1]
            if not error <= bound:
                wrong.append(f"{kernel.name}: {name} is off by {error:.2e} > {bound:.0e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SPECS)
def test_each_kernel_computes_its_equations_in_the_interpreter(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(*SPECS[name], torch.float32, device, tmp_path)
    fill_empty_with_nan(call.module, monkeypatch)
    check(call)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REAL)
def test_each_kernel_computes_its_equations_on_the_gpu(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(*REAL[name], dtype, device, tmp_path)
    fill_empty_with_nan(call.module, monkeypatch)
    check(call)


@pytest.mark.parametrize("name", ["dense", "rank 3"])
def test_blocks_have_one_segment_and_several(name: str, device: torch.device, tmp_path: Path) -> None:
    """What a kernel stores itself and what is merged are both met."""
    call = Call(*SPECS[name], torch.float32, device, tmp_path)
    assert any(call.in_place(k) for k in call.part.kernels)
    assert call.lone().any()
    assert not call.lone().all()


def test_the_specs_have_sums_apart_and_together() -> None:
    found = [{k.name for k in oracle(to_toml(spec)).partition.kernels} for spec, _ in SPECS.values()]
    assert {"linear_forward", "linear_dq"} <= found[list(SPECS).index("sums apart")]
    assert not any("linear_forward" in names for name, names in zip(SPECS, found, strict=True) if name != "sums apart")


def test_the_specs_have_every_kernel_family() -> None:
    """A family that no spec of the tests has is a family that nobody tests."""
    from splagen.codegen import decode_module, sequence_module
    from splagen.codegen.decoding import decoding
    from splagen.codegen.render import template_directory
    from splagen.codegen.sequence_partition import sequence_partition

    routed = SSESpec(head_dim=16, router=Router(writers=2))  # the families of recurrences are in one spec
    sequence = {k.template for k in sequence_partition(routed).kernels}
    step = decoding(SPLASpec(head_dim=16)).kernels
    steps = {k.template for kernel in step for k in (kernel, *kernel.calls)}
    others = {
        "module",
        "decode_module",
        "head_rounds",
        "dense",
        "registration",
        "sequence_module",
        "device_choice",
        "op_library",
        "launches",
        "repetition",
        "inverse_index",
        *("index", "index_tally", "index_starts", "index_entries"),
        *("packed_module", "packed_index", "segment_lengths", "prefill_module", "prefill_places"),
        *("packed_sizes", "packed_bounds", "packed_bucket"),
        *("carried_state", "as_paged", "key_visits", "key_segment", "takes_direct", "step_length"),
        *FUNCTIONS,
        *decode_module.FUNCTIONS,
        *sequence_module.FUNCTIONS,
    }
    families = {p.stem for p in template_directory().glob("*.jinja")} - others
    for table in (SPECS, REAL):
        found = {k.template for spec, _ in table.values() for k in oracle(to_toml(spec)).partition.op_kernels}
        assert found | sequence | steps == families
        assert not found & (sequence | steps)
