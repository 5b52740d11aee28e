"""What short sequences take: which Programs torch's attention takes, the rows behind it, and the code around it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from splagen import library as lib
from splagen.codegen.dense import DenseAttention, dense_attention
from splagen.codegen.geometry import Geometry
from splagen.codegen.index_kernels import index_kernels
from splagen.codegen.schedule import TARGETS, default_schedules
from splagen.errors import PartitionError
from splagen.ir.assumptions import below
from splagen.ir.build import Builder
from splagen.ir.frontend_spla import LENGTH, spla_program
from splagen.ir.passes import run
from splagen.ir.program import Program
from splagen.kinds import oracle
from splagen.pipeline import generate, kernels, source
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import Report, compare, compare_dense, random_inputs
from tests.codegen.torch_attention import TorchAttention, plain_attention, plain_gradients
from tests.interpreter_sort import patch
from tests.kernels.embedding import embedded, fill_empty_with_nan

patch()

LIMIT = 50
SELECT = Select(block_size=16, budget=1, sinks=0, local=0, metric=lib.taylor(covariance="diag"))


def spec_of(**changes: Any) -> SPLASpec:
    return replace(SPLASpec(head_dim=16, group_size=2, select=SELECT, dense_below=LIMIT), **changes)


SPECS = {
    "rms": spec_of(),
    "rms, value 24": spec_of(value_dim=24, scale=0.4),
    "rms_residual": spec_of(combine="rms_residual"),
    "gate": spec_of(combine="gate", linear=Residual("elu1", temperature=True, normaliser=True)),
    "add, not causal": spec_of(combine="add", causal=False),
    "no residual": spec_of(linear=None, combine="none", group_size=1),
    "tiles, not causal": spec_of(causal=False, select=replace(SELECT, granularity="tile", tile=16)),
}


def short(spec: SPLASpec) -> Program:
    return run(spla_program(spec), below(LENGTH, spec.dense_below))


@contextmanager
def on_the_cpu(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, *, cudnn: bool = True, lse_axes: tuple[int, ...] = (1,)
) -> Iterator[TorchAttention]:
    """The module takes the dense path on CPU tensors, by operators that stand for torch's on a GPU."""
    monkeypatch.setattr(module, "takes_dense", lambda q: q.shape[1] < LIMIT)
    monkeypatch.setattr(module, "takes_cudnn", lambda *_: cudnn)
    with TorchAttention(lse_axes) as found:
        yield found


# -- which Programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_dense_attention_is_found_with_its_scale_and_mask(name: str) -> None:
    spec = SPECS[name]
    found = DenseAttention.of(short(spec))
    assert found is not None
    assert (found.q.name, found.k.name, found.v.name, found.o.name) == ("q", "k", "v", "o_s")
    assert found.causal == spec.causal
    assert found.scale == pytest.approx(spec.scale, rel=1e-15)


@pytest.mark.parametrize("score", [lib.softcap(9.0), lib.alibi(), lib.sliding_window(20)])
def test_a_score_function_keeps_the_kernels(score: lib.ScoreFunction) -> None:
    """Torch has no such attention: the module is the one without a second path."""
    spec = spec_of(score=score, linear=None, combine="none")
    assert DenseAttention.of(short(spec)) is None
    assert kernels(spec).dense is None  # type: ignore[union-attr]
    assert "scaled_dot_product" not in source(spec)


@pytest.mark.parametrize("name", ["rms", "no residual"])
def test_what_selects_blocks_is_no_dense_attention(name: str) -> None:
    assert DenseAttention.of(spla_program(SPECS[name])) is None


def test_without_a_limit_there_is_no_second_path() -> None:
    text = source(spec_of(dense_below=0))
    assert "dense" not in text.replace("dense_below = 0", "")
    assert "return apply(forward_op, q, k, v, gamma_s, gamma_r)[0]" in text


def test_what_stands_behind_it_must_be_rows() -> None:
    """A sum over positions behind the attention is an error that prints it."""
    b = Builder.resume(short(SPECS["no residual"]))
    (o,) = short(SPECS["no residual"]).outputs
    mean = b.reduce("mean_o", "sum", ("T", "m"), o)
    program = b.program(b.map("y", lambda x, mu: x * mu, o, mean))
    with pytest.raises(PartitionError, match="mean_o"):
        dense_attention(program, LIMIT)


# -- beside the oracle -------------------------------------------------------------------------------------


def verified(
    spec: SPLASpec, shapes: list[tuple[int, int, int]], folder: Path, around: Callable[[ModuleType], Any]
) -> Report:
    """The dense path alone at these shapes."""
    module, truth = generate(spec, folder).module, oracle(to_toml(spec))
    rows = []
    with around(module):
        for seed, shape in enumerate(shapes):
            rows += compare_dense(
                module, truth, embedded(random_inputs(truth, shape, torch.float32, "cpu", seed)), shape
            )
    return Report(spec.name, tuple(rows))


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_output_and_every_gradient(name: str, cudnn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN around the inputs and in what kernels are to fill; the longest is a position below the limit."""
    spec = SPECS[name]

    def around(module: ModuleType) -> Any:
        fill_empty_with_nan(module, monkeypatch)
        return on_the_cpu(module, monkeypatch, cudnn=cudnn)

    shapes = [(1, 2 * spec.group_size, LIMIT - 1), (2, spec.group_size, 1)]
    report = verified(spec, shapes, tmp_path, around)
    report.raise_if_wrong()
    wanted = {"o" if spec.combine != "none" else "o_s", *("d" + a.name for a in kernels(spec).inputs)}
    assert {(r.quantity.removeprefix("dense "), r.shape) for r in report.rows} == {
        (q, shape) for q in wanted for shape in shapes
    }


def test_a_comparison_has_both_paths_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["add, not causal"]
    module, truth = generate(spec, tmp_path).module, oracle(to_toml(spec))
    fill_empty_with_nan(module, monkeypatch)
    found = {}
    with on_the_cpu(module, monkeypatch):
        for length in (LIMIT - 1, LIMIT):
            shape = (1, spec.group_size, length)
            rows = compare(module, truth, embedded(random_inputs(truth, shape, torch.float32, "cpu", 0)), shape)
            Report(spec.name, tuple(rows)).raise_if_wrong()
            found[length] = {r.quantity for r in rows}
    results = {"o", *("d" + a.name for a in kernels(spec).inputs)}
    assert results <= found[LIMIT]
    assert found[LIMIT - 1] == found[LIMIT] | {f"dense {q}" for q in results}


@pytest.mark.parametrize("lse_axes", [(), (1,)])
def test_either_backend_goes_on_from_the_other(
    lse_axes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Determinism may be asked for between forward and backward; the form of cuDNN's log-sum-exp is its version's."""
    spec = SPECS["no residual"]
    module = generate(spec, tmp_path).module
    truth = oracle(to_toml(spec))
    given = random_inputs(truth, (1, 2, 33), torch.float32, "cpu", 0)
    q, k, v, do = (given[n] for n in ("q", "k", "v", "do_s"))
    monkeypatch.setattr(module, "CUDNN_LSE", [])
    with on_the_cpu(module, monkeypatch, lse_axes=lse_axes) as seen:
        for forward, backward in ((False, True), (True, False), (False, True), (True, True)):
            monkeypatch.setattr(module, "takes_cudnn", lambda *_, now=forward: now)
            o, lse = module.dense_forward(q, k, v)
            monkeypatch.setattr(module, "takes_cudnn", lambda *_, now=backward: now)
            module.dense_backward(q, k, v, o, lse, do)
    first = ["flash", "flash backward"]  # as long as cuDNN's form is not known
    assert seen.calls == [*first, "cudnn", "flash backward", "flash", "cudnn backward", "cudnn", "cudnn backward"]


def test_rows_that_torch_cannot_load_are_copied(tmp_path: Path) -> None:
    module = generate(SPECS["no residual"], tmp_path).module
    x = torch.randn(2, 5, 3, 16, dtype=torch.float16)
    assert module.heads_first(x).data_ptr() == x.data_ptr()
    assert (
        module.heads_first(x[:1].expand(1, 5, 3, 16)).data_ptr() == x.data_ptr()
    )  # one sample: its stride is not used
    for odd in (
        x[:1].expand(2, -1, -1, -1),
        x[:, :1].expand(-1, 5, -1, -1),
        torch.randn(2, 5, 3, 20)[..., 2:18].half(),
    ):
        found = module.heads_first(odd)
        assert torch.equal(found, odd.transpose(1, 2))
    shifted = torch.randn(2 * 5 * 3 * 16 + 1, dtype=torch.float16)[1:].view(2, 5, 3, 16)
    assert module.heads_first(shifted).data_ptr() % 16 == 0
    assert module.heads_first(shifted).data_ptr() != shifted.data_ptr()


def test_torch_itself_is_asked_about_cudnn(tmp_path: Path) -> None:
    """Here there is no GPU: what matters is that the question fits this version of torch."""
    module = generate(SPECS["no residual"], tmp_path).module
    x = module.heads_first(torch.randn(1, 5, 2, 16, dtype=torch.float16))
    assert module.takes_cudnn(x, x, x) is False


@pytest.mark.parametrize(
    ("widths", "wanted"), [((16, 16, 24), 24), ((200, 200, 64), 256), ((64,), 64), ((256, 8), 256)]
)
def test_rows_of_one_width(widths: tuple[int, ...], wanted: int, tmp_path: Path) -> None:
    module = generate(SPECS["no residual"], tmp_path).module
    rows = [torch.randn(1, 2, 3, n) for n in widths]
    for x, wide in zip(rows, module.of_one_width(*rows), strict=True):
        assert wide.shape[-1] == wanted
        assert torch.equal(wide[..., : x.shape[-1]], x)
        assert not wide[..., x.shape[-1] :].any()


# -- the choice --------------------------------------------------------------------------------------------


class Row:
    """As much of a tensor as the choice asks for."""

    def __init__(self, length: int, dtype: torch.dtype, *, is_cuda: bool = True) -> None:
        self.shape, self.dtype, self.is_cuda = (1, length, 2, 16), dtype, is_cuda


def test_short_sequences_of_16_bit_on_a_gpu_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = generate(SPECS["rms"], tmp_path).module
    for dtype in (torch.bfloat16, torch.float16):
        for length in (1, LIMIT - 1):
            assert module.op_for(Row(length, dtype)) is module.dense_op
        assert module.op_for(Row(LIMIT, dtype)) is module.forward_op
        assert module.op_for(Row(1, dtype, is_cuda=False)) is module.forward_op
    assert module.op_for(Row(1, torch.float32)) is module.forward_op
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert module.op_for(Row(1, torch.bfloat16)) is module.forward_op


def test_the_kernels_beside_it_are_compiled_and_have_schedules_for_every_gpu() -> None:
    part = kernels(SPECS["rms"])
    assert {k.name for k in part.all_kernels} - {k.name for k in part.op_kernels} == {"dense_rows", "dense_cotangents"}
    written = re.findall(r"^def (\w+)_kernel\(", source(SPECS["rms"]), re.MULTILINE)
    assert sorted(written) == sorted(k.name for k in (*part.all_kernels, *index_kernels(part.program, part.kernels)))
    dense = part.dense  # type: ignore[union-attr]
    assert dense is not None
    made = default_schedules(dense.kernels, Geometry.of(dense.rows))
    for arch in TARGETS:
        assert {d: made[arch][d] for d in ("bf16", "fp16")} == {d: made["sm_90"][d] for d in ("bf16", "fp16")}


# -- the op ------------------------------------------------------------------------------------------------


def leaves(spec: SPLASpec, length: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    truth = oracle(to_toml(spec))
    given = random_inputs(truth, (1, 2 * spec.group_size, length), dtype, "cpu", 0)
    part = truth.partition
    return [given[a.name].requires_grad_() for a in part.inputs], given[part.cotangents[0].name]


def plain_ops(module: ModuleType, spec: SPLASpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op takes the dense path on the CPU, where a mode does not reach: its functions of attention are replaced."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), spec.causal, spec.scale)
        return o.transpose(1, 2).contiguous(), lse

    def attend_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor) -> list[Tensor]:
        found = plain_gradients(*(x.transpose(1, 2) for x in (do, q, k, v)), spec.causal, spec.scale)
        return [x.transpose(1, 2).contiguous() for x in found]

    monkeypatch.setattr(module, "takes_dense", lambda q: q.shape[1] < LIMIT)
    monkeypatch.setattr(module, "attend", attend)
    monkeypatch.setattr(module, "attend_backward", attend_backward)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["rms", "gate", "add, not causal", "no residual"])
def test_opcheck(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    module = generate(spec, tmp_path).module
    plain_ops(module, spec, monkeypatch)
    inputs, do = leaves(spec, 19)
    torch.library.opcheck(module.dense_op, tuple(inputs), test_utils=OPCHECKS)
    made = module.dense_op(*(x.detach() for x in inputs))
    arguments = (*(x.detach() for x in inputs), *made[-2:], do)
    torch.library.opcheck(module.dense_backward_op, arguments, test_utils=OPCHECKS[:1] + OPCHECKS[2:])


@pytest.mark.parametrize("name", ["gate", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rms", "no residual"))])
def test_compiled_once_for_all_lengths_of_a_side(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths below the limit share a graph, and those from it on; both agree with the oracle."""
    from torch._dynamo.backends.debugging import aot_eager

    spec = SPECS[name]
    library = generate(spec, tmp_path)
    op = library.op
    plain_ops(library.module, spec, monkeypatch)
    count: list[int] = []

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        count.append(1)
        return aot_eager(graph, examples)

    names = [a.name for a in kernels(spec).inputs]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *xs: op(*xs[:3], **dict(zip(names[3:], xs[3:], strict=True))), fullgraph=True, backend=counting
    )
    truth = oracle(to_toml(spec))
    for length in (33, 20, LIMIT - 1, LIMIT, 52):
        inputs, do = leaves(spec, length)
        for x in inputs:
            if x.ndim >= 3:
                torch._dynamo.mark_dynamic(x, 1)
        o = compiled(*inputs)
        o.backward(do)
        arguments = [x.detach() for x in inputs]
        want = truth.forward(*arguments)
        torch.testing.assert_close(o.detach(), want[0], rtol=1e-4, atol=1e-4)
        saved = dict(zip([a.name for a in (*truth.partition.outputs, *truth.partition.saved)], want, strict=True))
        residuals = [saved[a.name] for a in truth.partition.residuals]
        for x, g in zip(inputs, truth.backward(*arguments, *residuals, do), strict=True):
            torch.testing.assert_close(x.grad, g, rtol=1e-3, atol=1e-4)
    assert len(count) == 2, f"{len(count)} compilations"
