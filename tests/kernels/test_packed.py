"""Packed sequences: each gets what it gets alone, bit for bit, and what the oracle says."""

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splagen import library as lib
from splagen import pipeline, tuning
from splagen.codegen.compile import compile_module, raise_if_failed
from splagen.codegen.geometry import Geometry
from splagen.codegen.packing import Packing
from splagen.codegen.partition import Partition
from splagen.codegen.tile_code import Walk
from splagen.errors import InputError
from splagen.kinds import oracle
from splagen.packed_ops import ROWS, PackedOracle
from splagen.packed_verification import verify
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import random_inputs
from tests.kernels.cases import DIAGONAL, SMALL
from tests.kernels.launched import record_launches
from tests.kernels.repeatable import repeatable
from tests.kernels.shares import allow_a_share

BLOCK = 16
SPARSE = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=BLOCK, budget=1), linear=None)
SPLA = SPLASpec(head_dim=16, group_size=1, select=Select(block_size=BLOCK, budget=1, metric=DIAGONAL))
DENSE = SPLASpec(head_dim=16, group_size=1, select=None, linear=None)
TILES = SPLASpec(
    head_dim=16,
    group_size=1,
    causal=False,
    select=Select(block_size=BLOCK, budget=1, granularity="tile", tile=32, metric=DIAGONAL),
    linear=Residual(lib.elu1, temperature=True, normaliser=True),
    combine="gate",
)
EARLIER = replace(TILES, causal=True)
REAL = SPLASpec(head_dim=64, group_size=4, select=Select(budget=4, metric=DIAGONAL))
REAL_LENGTHS = (1000, 0, 1, 63, 65, 4095, 64)
LENGTHS = (9, 0, 1, 66, BLOCK)  # empty, one token, below the budget, off the grid of blocks, on it
BEFORE, BEHIND = 3, 2  # tokens of no sequence

Strategy: TypeAlias = int | Literal["direct"]

pytestmark = pytest.mark.usefixtures("fast_sort")


@dataclass
class Modules:
    """The modules of a spec, for a batch and for packed sequences, with one strategy or the kernels for few blocks."""

    part: Partition
    alone: ModuleType
    packed: ModuleType
    strategy: Strategy

    def run(self, module: ModuleType, way: str, sizes: object, *given: object) -> tuple[Tensor, ...]:
        if self.strategy == "direct":
            return getattr(module, f"direct_{way}")(module.own_schedules(sizes), *given)  # type: ignore[no-any-return]
        return getattr(module, way)(self.schedules(module.schedules_for(sizes), self.strategy), *given)  # type: ignore[no-any-return]

    def schedules(self, found: dict[str, dict[str, int]], strategy: int) -> dict[str, dict[str, int]]:
        return found | {c.name: {"strategy": min(strategy, len(c.options) - 1)} for c in self.part.strategies}

    def run_alone(self, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        arguments = [given[a.name] for a in self.part.inputs]
        q = arguments[0]
        made = self._named(self.run(self.alone, "forward", q, *arguments))
        behind = [*(made[a.name] for a in self.part.residuals), *(given[a.name] for a in self.part.cotangents)]
        return made, self._gradients(self.run(self.alone, "backward", q, *arguments, *behind))

    def run_packed(
        self, given: dict[str, Tensor], bounds: Tensor, longest: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        arguments = [given[a.name] for a in self.part.inputs]
        sizes = self.packed.sizes_of(arguments[0], bounds, longest)
        made = self._named(self.run(self.packed, "forward", sizes, *arguments, bounds, longest))
        behind = [*(made[a.name] for a in self.part.residuals), *(given[a.name] for a in self.part.cotangents)]
        found = self.run(self.packed, "backward", sizes, *arguments, bounds, *behind, longest)
        return made, self._gradients(found)

    def _named(self, results: tuple[Tensor, ...] | Tensor) -> dict[str, Tensor]:
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip([a.name for a in (*self.part.outputs, *self.part.saved)], results, strict=True))

    def _gradients(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip([name for name, _ in self.part.gradients], results, strict=True))


def modules(spec: SPLASpec, folder: Path, strategy: Strategy) -> Modules:
    alone, packed = pipeline.generate(spec, folder).module, pipeline.generate_packed(spec, folder).module
    return Modules(oracle(to_toml(spec)).partition, alone, packed, strategy)


def bounds_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor([BEFORE, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def check_alone(
    spec: SPLASpec,
    strategy: Strategy,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    device: torch.device,
    folder: Path,
    kv_heads: int = 2,
) -> None:
    """Rows of every sequence, forward and backward, are those of a call of its own; parameters' gradients add up."""
    found = modules(spec, folder, strategy)
    truth = oracle(to_toml(spec))
    bounds, longest = bounds_of(lengths, device), max(lengths)
    tokens = int(bounds[-1]) + BEHIND
    heads = (kv_heads if spec.group_size <= 8 else 1) * spec.group_size
    inputs = random_inputs(truth, (1, heads, tokens), dtype, device, 0)
    made, gradients = found.run_packed(inputs, bounds, longest)
    part = found.part
    sums: dict[str, Tensor] = {}
    sizes: dict[str, Tensor] = {}
    outside = torch.ones(tokens, dtype=torch.bool)
    for sequence in PackedOracle(truth).parts(bounds, longest):
        outside[sequence.first : sequence.first + sequence.length] = False
        own = {a.name: sequence.of(a, inputs[a.name]).clone() for a in (*part.inputs, *part.cotangents)}
        right, right_gradients = found.run_alone(own)
        for a in (*part.outputs, *part.saved):
            pair = sequence.of(a, made[a.name]), right[a.name]
            if a.layout == "states":  # nothing is in entry 0
                pair = pair[0][:, :, 1:], pair[1][:, :, 1:]
            assert torch.equal(*pair), (a.name, sequence)
        for a in (a for a in part.inputs if a.name in right_gradients):
            x = right_gradients[a.name]
            if a.layout in ROWS:
                assert torch.equal(sequence.of(a, gradients[a.name]), x), (f"d{a.name}", sequence)
            else:
                none = torch.zeros_like(x, dtype=torch.float64)
                sums[a.name] = sums.get(a.name, none) + x.double()
                sizes[a.name] = sizes.get(a.name, none) + x.double().abs()
    for name, want in sums.items():  # each sequence's is rounded once, and their sum once more
        got = gradients[name]
        rounding = max(1e-5, torch.finfo(got.dtype).eps / 2)
        excess = (got.double() - want).abs() - rounding * (sizes[name] + got.double().abs())
        assert excess.max() <= 1e-5 * sizes[name].max(), (f"d{name}", excess.max())
    rows = [made[a.name] for a in part.outputs]
    rows += [gradients[a.name] for a in part.inputs if a.layout in ROWS and a.name in gradients]
    assert all(not x[:, outside].any() for x in rows)


def strategies_of(spec: SPLASpec) -> list[Strategy]:
    part = oracle(to_toml(spec)).partition
    return [*range(max([len(c.options) for c in part.strategies] or [1])), *(["direct"] if part.direct else [])]


QUICK = [
    pytest.param(SPLA, 0, torch.float32, LENGTHS, 1, id="residual by row"),
    pytest.param(SPLA, 1, torch.float16, (66, 0, 1), 2, id="residual by key, float16"),
    pytest.param(SPARSE, 2, torch.float32, (1, 50, 0, 17), 2, id="no residual, by union"),
    pytest.param(TILES, 0, torch.float32, (0, 70, 1), 2, id="tiles, not causal, all parameters"),
    pytest.param(DENSE, 0, torch.float32, (1, 70, 0), 2, id="no selection"),
    pytest.param(SPLA, "direct", torch.float32, (66, 0, 1), 1, id="few blocks"),
    pytest.param(EARLIER, "direct", torch.float32, (50, 0, 70), 1, id="few blocks, tiles, all parameters"),
]


@pytest.mark.parametrize(("spec", "strategy", "dtype", "lengths", "kv_heads"), QUICK)
def test_a_sequence_gets_the_bits_that_it_gets_alone(
    spec: SPLASpec,
    strategy: Strategy,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    kv_heads: int,
    device: torch.device,
    tmp_path: Path,
) -> None:
    check_alone(spec, strategy, dtype, lengths, device, tmp_path, kv_heads)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [c for c in SMALL if "own rows" not in c.name], ids=str)
def test_every_spec_and_strategy_packs(case, device: torch.device, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    block = case.spec.select.block_size if case.spec.select else 64
    longest = max(length for _, _, length in case.shapes)
    lengths = (longest // 2 + 3, 0, 1, longest, block)
    for strategy in strategies_of(case.spec):
        for dtype in case.dtypes:
            check_alone(case.spec, strategy, dtype, lengths, device, tmp_path)


@pytest.mark.slow
@settings(max_examples=8)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any), st.sampled_from([0, 1, 2, "direct"]))
def test_any_lengths_pack(lengths: list[int], strategy: Strategy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_alone(SPLA, strategy, torch.float32, tuple(lengths), torch.device("cpu"), Path(folder))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_kernels_agree_with_the_oracle(dtype: torch.dtype, tmp_path: Path) -> None:
    library = pipeline.generate_packed(SPLA, tmp_path)
    pipeline.verify_packed(library, lengths=(66, 0, 1), heads=2, dtypes=(dtype,)).raise_if_wrong()


def test_verify_finds_a_sequence_that_reads_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with every sequence one token later, all but the rows of no sequence are wrong."""
    module = pipeline.generate_packed(DENSE, tmp_path).module
    forward = module.forward

    def late(schedules, *given):  # type: ignore[no-untyped-def]
        *tensors, bounds, longest = given
        return forward(schedules, *tensors, bounds + 1, longest)

    monkeypatch.setattr(module, "forward", late)
    assert not verify(module, lengths=(20, 20), heads=2).ok


# -- the op ----------------------------------------------------------------------------------------------------


def rows(spec: SPLASpec, tokens: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of the public op, with gradients."""
    found = random_inputs(oracle(to_toml(spec)), (1, 2 * spec.group_size, tokens), dtype, device, 0)
    parts = oracle(to_toml(spec)).partition.inputs
    return {a.name: (found[a.name][0] if a.layout in ROWS else found[a.name]).requires_grad_() for a in parts}


@pytest.mark.parametrize("spec", [SPLA, TILES], ids=["tokens", "tiles, not causal"])
def test_the_op_and_its_gradients_are_those_of_its_equations_on_the_cpu(spec: SPLASpec, tmp_path: Path) -> None:
    """float64 rows on the CPU take the oracle, one sequence after the other; float32 ones the interpreter."""
    op = pipeline.generate_packed(spec, tmp_path).op
    ends = torch.tensor([0, 66, 66, 67], dtype=torch.int32)
    results = []
    for dtype in (torch.float32, torch.float64):
        given = {n: x.detach().to(dtype).requires_grad_() for n, x in rows(spec, 68, torch.float32).items()}
        q, k, v, *gains = given.values()
        o = op(q, k, v, ends, 66, **dict(zip(list(given)[3:], gains, strict=True)))
        assert o.shape == q.shape
        results.append([o, *torch.autograd.grad(o.square().sum(), list(given.values()))])
    for x, want in zip(*results, strict=True):
        assert (x.double() - want).norm() <= 2e-5 * want.norm()
        assert want.norm() > 0


@pytest.mark.parametrize(
    "spec", [DENSE, replace(TILES, linear=Residual(lib.elu1), combine="add")], ids=["dense", "tiles"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["interpreter", "oracle"])
def test_the_op_registers_as_torch_wants_it(spec: SPLASpec, dtype: torch.dtype, tmp_path: Path) -> None:
    module = pipeline.generate_packed(spec, tmp_path).module
    q, k, v = (x[None].detach().to(dtype).requires_grad_() for x in rows(spec, 39, torch.float32).values())
    bounds = torch.tensor([0, 4, 39], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module.forward_op, (q, k, v, bounds, 35), test_utils=checks)


@pytest.mark.slow
def test_one_compiled_graph_serves_all_lengths(tmp_path: Path) -> None:
    """The whole call is one graph, which knows T, the sequences and max_seqlen by symbols."""
    op = pipeline.generate_packed(DENSE, tmp_path).op
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for ends, longest in (([0, 4, 9], 5), ([0, 20, 20, 31], 20), ([0, 12, 40, 41], 28)):
        q, k, v = rows(DENSE, ends[-1], torch.float32).values()
        bounds = torch.tensor(ends, dtype=torch.int32)
        found, right = (f(q, k, v, bounds, longest) for f in (compiled, op))
        assert torch.equal(found, right)
        gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, right)]
        assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_bad_input_is_refused_before_anything_is_launched(tmp_path: Path, nothing_runs) -> None:  # type: ignore[no-untyped-def]
    library = pipeline.generate_packed(DENSE, tmp_path)
    nothing_runs(library)
    q, k, v = (x.detach() for x in rows(DENSE, 9, torch.float32).values())
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)

    def refused(message: str, *, q: Tensor = q, k: Tensor = k, ends: Tensor = ends, longest: object = 5) -> None:
        with pytest.raises(ValueError, match=message):
            library.op(q, k, v, ends, longest)

    refused("packed rows", q=q[None])
    refused("give int32", ends=ends.long())
    refused("give int32", ends=ends[None])
    refused("give int32", ends=ends[:1])
    refused("move it", ends=ends.to("meta"))
    refused("at least 1", longest=0)
    refused("number of the host", longest=torch.tensor(5))
    refused("beside q", k=k[:8])
    refused("never fall", ends=torch.tensor([0, 5, 4], dtype=torch.int32))
    refused("never fall", ends=torch.tensor([-1, 5, 9], dtype=torch.int32))
    refused("never fall", ends=torch.tensor([0, 5, 10], dtype=torch.int32))
    refused("sequence 1 has 5 tokens", longest=4)


@settings(max_examples=30)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=9), st.integers(1, 100))
def test_bounds_stay_inside_whatever_cu_seqlens_holds(ends: list[int], tokens: int) -> None:
    module = packed_module()
    bounds = module.bounds_of(torch.tensor(ends, dtype=torch.int32), tokens)
    assert bounds.dtype == torch.int32
    found = bounds.tolist()
    assert all(0 <= a <= b <= tokens for a, b in itertools.pairwise(found))
    if all(0 <= a <= b <= tokens for a, b in itertools.pairwise(ends)):
        assert found == ends


_MODULES: list[ModuleType] = []


def packed_module() -> ModuleType:
    """One module for all examples."""
    if not _MODULES:
        _MODULES.append(pipeline.generate_packed(DENSE, tempfile.mkdtemp()).module)
    return _MODULES[0]


def test_a_sequence_longer_than_max_seqlen_is_cut_there(tmp_path: Path) -> None:
    """The host cannot see it on a GPU: its first tokens get what they get alone, the others 0."""
    found = modules(SPLA, tmp_path, 1)
    inputs = random_inputs(oracle(to_toml(SPLA)), (1, 2, 70), torch.float32, "cpu", 0)
    made, gradients = found.run_packed(inputs, torch.tensor([0, 60, 70], dtype=torch.int32), 41)
    short = {n: x[:, :41].contiguous() if x.ndim > 2 else x for n, x in inputs.items()}
    right, right_gradients = found.run_alone(short)
    assert torch.equal(made["o"][:, :41], right["o"])
    assert torch.equal(gradients["k"][:, :41], right_gradients["k"])
    assert not made["o"][:, 41:60].any()
    assert not gradients["k"][:, 41:60].any()


def test_a_loaded_op_takes_schedules_tuned_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of as many sequences of max_seqlen tokens: kernels of both have the same names."""
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path))
    assert tuning.load_packed(DENSE).__name__ == "spla_varlen"
    module = pipeline.generate_packed(DENSE, tmp_path).module
    q = torch.zeros(1, 100, 3, 16)
    sizes = module.sizes_of(q, torch.zeros(6, dtype=torch.int32), 60)
    assert module.bucket(sizes) == pipeline.generate(DENSE, tmp_path).module.bucket(torch.zeros(5, 60, 3, 16))
    names = {k.name for k in (*pipeline.kernels(DENSE).kernels, *oracle(to_toml(DENSE)).partition.strategies)}
    assert module.SCHEDULES["sm_90"]["bf16"].keys() == names


@pytest.mark.parametrize(("spec", "strategy"), [(DENSE, 0), (SPARSE, 1)], ids=["no selection", "by key"])
def test_a_repeated_call_serves_other_sequences(
    spec: SPLASpec, strategy: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of where sequences begin is kept from the call that is repeated; another max_seqlen is another call."""
    found = modules(spec, tmp_path, strategy)
    inputs = random_inputs(oracle(to_toml(spec)), (1, 2, 24), torch.float32, "cpu", 0)
    places = [torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 24], [3, 3, 22], [0, 1, 20])]

    def results(bounds: Tensor, longest: int) -> list[Tensor]:
        made, gradients = found.run_packed(inputs, bounds, longest)
        return [made[found.part.outputs[0].name], *gradients.values()]

    want = [results(x, 20) for x in places]
    asked, ran = repeatable(found.packed, monkeypatch)
    for bounds, right in zip(places, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(results(bounds, 20), right, strict=True))
        assert bool(asked) == (bounds is places[0])
        asked.clear()
    assert ran
    assert all(x.again is not None for x in found.packed.KEPT.values())
    results(places[2], 19)
    assert asked


def test_parts_that_do_not_fit_go_by_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = modules(SPARSE, tmp_path, 1)
    inputs = random_inputs(oracle(to_toml(SPARSE)), (1, 4, 70), torch.float32, "cpu", 0)
    bounds = torch.tensor([1, 20, 69], dtype=torch.int32)
    launched = record_launches(found.packed, monkeypatch)
    whole = found.run_packed(inputs, bounds, 49)
    assert launched.count("block_sparse_merge") == launched.count("block_sparse_dq_merge") == 1
    launched.clear()
    allow_a_share(found.packed, 2, monkeypatch)
    shares = found.run_packed(inputs, bounds, 49)
    assert launched.count("block_sparse_merge") == launched.count("block_sparse_dq_merge") == 2
    for one, other in zip(whole, shares, strict=True):
        read = one.keys() - {a.name for a in found.part.saved}  # nobody writes those of tokens of no sequence
        assert all(torch.equal(one[name], other[name]) for name in read)


# -- room ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.integers(0, 50))
def test_parts_of_sequences_do_not_meet(lengths: list[int], before: int) -> None:
    """Whatever the lengths, what a sequence needs ends before the next one's begins, and the last one's inside."""
    walk = Walk.of(oracle(to_toml(TILES)).partition.program)
    packing, geometry = Packing.of(walk), Geometry.of(walk.program)
    needs = {
        packing.tiles: lambda n: -(-n // geometry.tile),
        packing.blocks: lambda n: -(-n // geometry.block),
        packing.ends: lambda n: -(-n // geometry.block) + 1,
        packing.segments: lambda n: 2 * -(-n // geometry.block),
    }
    for room, need in needs.items():
        end, first = 0, before
        for number, length in enumerate(lengths):
            begin = room.count(first, number)
            assert begin == eval(room.text("first", "number"))
            assert begin >= end
            end = begin + need(length)
            first += length
        assert end <= room.count(first, len(lengths))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.sampled_from([16, 32, 64]))
def test_programs_of_sequences_do_not_meet(lengths: list[int], block_m: int) -> None:
    """The same of arrays that each program has a part of; a kernel and the host count alike."""
    part = oracle(to_toml(SPLA)).partition
    packing = Packing.of(Walk.of(part.program))
    kernels = [k for k in part.kernels if k.scratch or any(a.layout == "partials" for a in k.outputs)]
    assert len(kernels) == 3  # row_cotangents, forward and dq by union
    for kernel in kernels:
        sizes = {"BLOCK_M": block_m, "cdiv": lambda a, b: -(-a // b)}

        def count(length: int, host: bool, kernel=kernel, sizes=sizes) -> int:  # type: ignore[no-untyped-def]
            return int(eval(packing.programs(kernel, "L", host=host), {"L": length, **sizes}))

        before = packing._programs_before(kernel)
        end, first = 0, 0
        for number, length in enumerate(lengths):
            begin = int(eval(before, {"first_token": first, "sequence": number, **sizes}))
            assert begin >= end
            assert count(length, True) == count(length, False)
            end = begin + count(length, True)
            first += length


def test_kernels_of_a_batch_keep_their_text(tmp_path: Path) -> None:
    """Packing adds lines in one place and changes no other: without it the kernels are those of a batch."""
    part = oracle(to_toml(SPLA)).partition
    packed = pipeline.packed_kernels(SPLA)
    plain, own = ({k.name: k for k in kernels} for kernels in (part.kernels, packed.kernels))
    assert plain.keys() == own.keys()
    for name, kernel in plain.items():
        assert own[name].covers == kernel.covers
        assert own[name].holes == kernel.holes
        assert own[name].template == kernel.template


@pytest.mark.slow
def test_every_kernel_compiles_ahead_of_time(tmp_path: Path) -> None:
    """Of all strategies: the launcher's types fit, and so does shared memory."""
    for spec in (REAL, SPLASpec(head_dim=64, group_size=2, select=None, linear=None)):
        path, part = pipeline.generate_packed(spec, tmp_path).path, pipeline.packed_kernels(spec)
        raise_if_failed(compile_module(path, part, targets=["sm_90"], jobs=1))


# -- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [0, 1, 2, "direct"])
def test_the_gpu_gives_a_sequence_the_bits_that_it_gets_alone(
    strategy: Strategy, device: torch.device, tmp_path: Path
) -> None:
    check_alone(REAL, strategy, torch.bfloat16, REAL_LENGTHS, device, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "spec",
    [
        REAL,
        SPLASpec(head_dim=128, group_size=16),
        SPLASpec(head_dim=64, group_size=2, select=None, linear=None),
        SPLASpec(
            head_dim=64,
            group_size=1,
            causal=False,
            select=Select(granularity="tile", tile=64, budget=4, metric=DIAGONAL),
            linear=Residual(temperature=True, normaliser=True),
            combine="gate",
        ),
    ],
    ids=["residual", "group 16", "no selection", "tiles"],
)
def test_the_gpu_agrees_with_the_oracle(spec: SPLASpec, dtype: torch.dtype, tmp_path: Path) -> None:
    library = pipeline.generate_packed(spec, tmp_path)
    heads = 2 * spec.group_size
    report = pipeline.verify_packed(library, lengths=(700, 0, 1, 129), heads=heads, dtypes=(dtype,), device="cuda")
    report.raise_if_wrong()


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths_and_waits_for_nothing(tmp_path: Path) -> None:
    """T, the number of sequences and max_seqlen stay; where sequences begin changes between replays."""
    op = pipeline.generate_packed(REAL, tmp_path).op
    given = rows(REAL, 2048, torch.bfloat16, "cuda")
    q, k, v, *gains = given.values()
    named = dict(zip(list(given)[3:], gains, strict=True))
    cotangent = torch.randn_like(q)
    ends = torch.tensor([0, 500, 500, 1900], dtype=torch.int32, device="cuda")

    def run(ends: Tensor) -> list[Tensor]:
        o = op(q, k, v, ends, 1500, **named)
        return [o.detach(), *torch.autograd.grad(o, list(given.values()), cotangent)]

    others = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 1, 1400, 2048], [100, 164, 228, 1000])]
    want = [[x.clone() for x in run(other)] for other in others]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(ends)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(ends)
    for other, right in zip(others, want, strict=True):
        ends.copy_(other)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [[-5, 3, 2, 9000], [2048, 0, 7, 100], [0, 2048, 4096, 2**31 - 1]])
def test_wild_bounds_read_and_write_nothing_outside(ends: list[int], tmp_path: Path) -> None:
    """The host does not see them on a GPU: results are finite, and memory behind the rows stays as it was."""
    op = pipeline.generate_packed(REAL, tmp_path).op
    given = rows(REAL, 2048, torch.bfloat16, "cuda")
    q, k, v, *gains = given.values()
    named = dict(zip(list(given)[3:], gains, strict=True))
    o = op(q, k, v, torch.tensor(ends, dtype=torch.int32, device="cuda"), 1000, **named)
    found = [o, *torch.autograd.grad(o.float().square().sum(), list(given.values()))]
    torch.cuda.synchronize()
    assert all(bool(torch.isfinite(x).all()) for x in found)


@pytest.mark.parametrize(
    "spec",
    [
        SPLASpec(head_dim=16, select=Select(block_size=BLOCK, own_rows=True)),
        SPLASpec(head_dim=16, select=Select(block_size=BLOCK), linear=Residual(own_rows=True)),
    ],
)
def test_rows_of_one_branch_alone_are_refused(spec: SPLASpec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own_rows"):
        pipeline.generate_packed(spec, tmp_path)
