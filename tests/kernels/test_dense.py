"""On a GPU: what short sequences take, by cuDNN and by flash attention, beside the oracle, and the op around it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splagen import library as lib
from splagen.kinds import oracle
from splagen.pipeline import Library, generate, kernels
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import TOLERANCE, Report, compare, compare_dense, random_inputs, relative_error
from tests.kernels.embedding import embedded, fill_empty_with_nan

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = 1025
SPEC = SPLASpec(
    head_dim=64, group_size=4, select=Select(budget=4, metric=lib.taylor(covariance="diag")), dense_below=LIMIT
)
ROWS = replace(SPEC, linear=None, combine="none")  # nothing behind the attention

SPECS = {
    "rms": SPEC,
    "rms, head 128, group 16": replace(SPEC, head_dim=128, value_dim=128, scale=128**-0.5, group_size=16),
    "rms, head 128, group 1": replace(SPEC, head_dim=128, value_dim=128, scale=128**-0.5, group_size=1),
    "rms_residual, group 5": replace(SPEC, combine="rms_residual", group_size=5),
    "gate, normaliser": replace(SPEC, combine="gate", linear=Residual("elu1", temperature=True, normaliser=True)),
    "gate, not causal": replace(SPEC, combine="gate", causal=False),
    "add": replace(SPEC, combine="add"),
    "no residual": ROWS,
    "tiles, not causal": replace(
        SPEC, causal=False, select=Select(budget=4, granularity="tile", tile=64, metric=lib.taylor(covariance="diag"))
    ),
    "head 16": replace(ROWS, head_dim=16, value_dim=16),
    "head 80": replace(SPEC, head_dim=80, value_dim=80, group_size=3),
    "head 96, value 64": replace(SPEC, head_dim=96, value_dim=64),
    "head 64, value 128": replace(SPEC, head_dim=64, value_dim=128),
    "head 192": replace(ROWS, head_dim=192, value_dim=192, scale=0.1),
    "head 256": replace(SPEC, head_dim=256, value_dim=256, scale=256**-0.5, group_size=2),
    "head 192, value 128": replace(ROWS, head_dim=192, value_dim=128, scale=0.1),
}
LENGTHS = (1, 2, 15, 63, 64, 65, 777, LIMIT - 1, LIMIT)


def dense_rows(
    spec: SPLASpec, lengths: tuple[int, ...], dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Report:
    """The dense path alone, below the limit, with NaN in what kernels are to fill and around every other input."""
    module = generate(spec, folder).module
    fill_empty_with_nan(module, monkeypatch)
    truth = oracle(to_toml(spec))
    rows = []
    for seed, length in enumerate(lengths):
        for batch, heads in ((1, 2), (2, 1)):
            shape = (batch, heads * spec.group_size, length)
            inputs = random_inputs(truth, shape, dtype, "cuda", seed)
            inputs = embedded(inputs) if batch == 2 else inputs
            if module.takes_dense(inputs["q"]):
                rows += compare_dense(module, truth, inputs, shape)
    return Report(spec.name, tuple(rows))


@pytest.mark.parametrize(
    ("dtype", "backend"), [(BF16, "own choice"), (FP16, "own choice"), (BF16, "flash")], ids=["bf16", "fp16", "flash"]
)
@pytest.mark.parametrize("name", SPECS)
def test_output_and_every_gradient(
    name: str, dtype: torch.dtype, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    lengths = LENGTHS if name in ("rms", "no residual") else (65, 777)
    if backend == "flash":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            report = dense_rows(spec, lengths, dtype, tmp_path, monkeypatch)
    else:
        report = dense_rows(spec, lengths, dtype, tmp_path, monkeypatch)
    report.raise_if_wrong()
    quantities = 1 + len(kernels(spec).inputs)
    assert len(report.rows) == 2 * quantities * sum(n < LIMIT for n in lengths)


def test_cudnn_takes_what_it_can_on_hopper(tmp_path: Path) -> None:
    """The times of README are cuDNN's: heads up to 128 everywhere, groups too."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    module = generate(SPECS["rms, head 128, group 16"], tmp_path).module
    q, k = (torch.randn(1, 777, h, 128, device="cuda", dtype=BF16) for h in (16, 1))
    rows = [module.heads_first(x) for x in (q, k, k)]
    assert module.takes_cudnn(*rows)
    module.attend(q, k, k)
    assert module.CUDNN_LSE
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not module.takes_cudnn(*rows)


# -- the op ------------------------------------------------------------------------------------------------


def leaves(spec: SPLASpec, length: int, dtype: torch.dtype, heads: int = 2) -> tuple[list[Tensor], Tensor]:
    truth = oracle(to_toml(spec))
    given = random_inputs(truth, (1, heads * spec.group_size, length), dtype, "cuda", 0)
    part = truth.partition
    return [given[a.name].requires_grad_() for a in part.inputs], given[part.cotangents[0].name]


def op_of(library: Library) -> Callable[..., Tensor]:
    names = [a.name for a in kernels(library.spec).inputs][3:]
    op = library.op
    return lambda q, k, v, *rest: op(q, k, v, **dict(zip(names, rest, strict=True)))


def trained(op: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    plain = [x.detach().requires_grad_() for x in inputs]
    o = op(*plain)
    return [o.detach(), *torch.autograd.grad(o, plain, do)]


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["rms", "gate, normaliser", "no residual"])
def test_the_op_below_the_limit(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    op, truth = op_of(generate(spec, tmp_path)), oracle(to_toml(spec))
    inputs, do = leaves(spec, LIMIT - 1, BF16)
    got = trained(op, inputs, do)
    arguments = [x.detach() for x in inputs]
    made = truth.forward(*arguments)
    saved = dict(zip([a.name for a in (*truth.partition.outputs, *truth.partition.saved)], made, strict=True))
    want = [made[0], *truth.backward(*arguments, *(saved[a.name] for a in truth.partition.residuals), do)]
    largest = max(float(x.double().norm()) for x in want)
    for x, y in zip(got, want, strict=True):
        cancels = float(y.double().norm()) < 1e-9 * largest
        assert relative_error(x, y, largest if cancels else None) < 2 * TOLERANCE[BF16][1]


def test_at_the_limit_blocks_are_chosen(tmp_path: Path) -> None:
    spec = SPECS["rms"]
    module, truth = generate(spec, tmp_path).module, oracle(to_toml(spec))
    shape = (1, 2 * spec.group_size, LIMIT)
    inputs = random_inputs(truth, shape, BF16, "cuda", 0)
    assert module.op_for(inputs["q"]) is module.forward_op
    report = Report(spec.name, tuple(compare(module, truth, inputs, shape)))
    report.raise_if_wrong()
    assert not any(r.quantity.startswith("dense ") for r in report.rows)


@pytest.mark.parametrize("name", ["rms", "gate, normaliser", "no residual"])
def test_deterministic_algorithms_give_equal_bits(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    op = op_of(generate(spec, tmp_path))
    inputs, do = leaves(spec, 777, BF16)
    with deterministic():
        first, second = trained(op, inputs, do), trained(op, inputs, do)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_determinism_may_be_asked_for_between_forward_and_backward(tmp_path: Path) -> None:
    spec = SPECS["no residual"]
    module = generate(spec, tmp_path).module
    (q, k, v), do = leaves(spec, 777, BF16)
    q, k, v = (x.detach() for x in (q, k, v))
    by_cudnn = module.dense_forward(q, k, v)
    with deterministic():
        by_flash = module.dense_forward(q, k, v)
        crossed = module.dense_backward(q, k, v, *by_cudnn, do)
    straight = module.dense_backward(q, k, v, *by_flash, do)
    for x, y in zip((*by_cudnn, *crossed), (*by_flash, *straight), strict=True):
        assert relative_error(x, y) < TOLERANCE[BF16][1]


@pytest.mark.parametrize("name", ["rms", "no residual"])
def test_compiled_once_for_all_lengths_of_a_side(name: str, tmp_path: Path) -> None:
    from torch._inductor.compile_fx import compile_fx

    spec = SPECS[name]
    op = op_of(generate(spec, tmp_path))
    count: list[int] = []

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        count.append(1)
        return compile_fx(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *xs: op(*xs), fullgraph=True, backend=counting)
    for length in (777, 333, LIMIT - 1, LIMIT, 1200):
        inputs, do = leaves(spec, length, BF16)
        plain = [x.detach().requires_grad_() for x in inputs]
        for x in plain:
            if x.ndim >= 3:
                torch._dynamo.mark_dynamic(x, 1)
        o = compiled(*plain)
        got = [o.detach(), *torch.autograd.grad(o, plain, do)]
        for x, y in zip(got, trained(op, inputs, do), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    assert len(count) == 2, f"{len(count)} compilations"


def test_opcheck(tmp_path: Path) -> None:
    module = generate(SPECS["rms"], tmp_path).module
    inputs, _ = leaves(SPECS["rms"], 65, BF16)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module.dense_op, tuple(inputs), test_utils=tests)


def test_a_cuda_graph_replays_it(tmp_path: Path) -> None:
    spec = SPECS["rms"]
    op = op_of(generate(spec, tmp_path))
    inputs, _ = leaves(spec, 256, BF16)
    inputs = [x.detach() for x in inputs]
    want = op(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = op(*inputs)
    o.zero_()
    graph.replay()
    assert torch.equal(o, want)


def test_a_score_function_keeps_its_kernels(tmp_path: Path) -> None:
    spec = replace(SPEC, score=lib.softcap(30.0))
    module = generate(spec, tmp_path).module
    assert not hasattr(module, "dense_op")
