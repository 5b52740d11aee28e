"""The op as torch sees it: registration, gradients, compilation, autocast, strides, bad input."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from splagen import library as lib
from splagen import ops
from splagen.kinds import oracle
from splagen.pipeline import Library, generate
from splagen.spec import Residual, Select, SPLASpec, to_toml
from splagen.verification import random_inputs, relative_error
from tests.interpreter_sort import patch

TOKEN = Select(block_size=16, budget=1, sinks=0, local=0, metric=lib.taylor(covariance="diag"))
SPECS = {
    "dense": SPLASpec(head_dim=16, group_size=2, select=None, linear=None),
    "sparse": SPLASpec(head_dim=16, group_size=2, select=TOKEN, linear=None),
    "rms temperature": SPLASpec(
        head_dim=16, value_dim=24, group_size=2, select=TOKEN, linear=Residual(temperature=True)
    ),
    "gate normaliser": SPLASpec(
        head_dim=24,
        group_size=2,
        select=replace(TOKEN, granularity="tile", tile=16),
        linear=Residual(lib.elu1, normaliser=True),
        combine="gate",
    ),
    "states of tiles": SPLASpec(
        head_dim=16,
        value_dim=24,
        group_size=1,
        causal=False,
        select=replace(TOKEN, granularity="tile", tile=32),
        linear=Residual(lib.elu1, normaliser=True),
    ),
    "own rows": SPLASpec(
        head_dim=16,
        group_size=2,
        select=Select(block_size=16, budget=1, sinks=0, local=0, own_rows=True, metric=lib.taylor(covariance="diag")),
        linear=Residual(own_rows=True),
        combine="add",
    ),
}
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(scope="session", autouse=True)
def _fast_sort() -> None:
    patch()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[SPLASpec], Library]:
    return lambda spec: generate(spec, tmp_path)


def tensors(
    spec: SPLASpec, length: int, dtype: torch.dtype, device: torch.device, batch: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs and cotangents by name."""
    shape = (batch, 2 * spec.group_size, length)
    found = random_inputs(oracle(to_toml(spec)), shape, dtype, device, seed)
    return {n: x.double() for n, x in found.items()} if dtype == torch.float64 else found


def leaves(spec: SPLASpec, given: dict[str, Tensor]) -> list[Tensor]:
    """Inputs in order; those that have a gradient ask for it."""
    part = oracle(to_toml(spec)).partition
    asked = {n for n, _ in part.gradients}
    return [given[a.name].detach().requires_grad_(a.name in asked) for a in part.inputs]


def op_of(library: Library) -> Callable[..., Tensor]:
    """The public function of all inputs in order: parameters go in by name."""
    names = [a.name for a in oracle(to_toml(library.spec)).partition.inputs][3:]
    op = library.op
    return lambda q, k, v, *rest: op(q, k, v, **dict(zip(names, rest, strict=True)))


def call(library: Library, inputs: list[Tensor]) -> Tensor:
    return op_of(library)(*inputs)


def cotangent(spec: SPLASpec, given: dict[str, Tensor]) -> Tensor:
    return given[oracle(to_toml(spec)).partition.cotangents[0].name]


def backward_arguments(module: ModuleType, spec: SPLASpec, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    part = oracle(to_toml(spec)).partition
    inputs = [given[a.name] for a in part.inputs]
    results = module.forward_op(*inputs)
    saved = dict(zip([a.name for a in (*part.outputs, *part.saved)], results, strict=True))
    return (*inputs, *(saved[a.name] for a in part.residuals), *(given[a.name] for a in part.cotangents))


# -- registration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_opcheck_through_the_oracle(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS[name]
    module = make(spec).module
    given = tensors(spec, 37, torch.float64, device)
    torch.library.opcheck(module.forward_op, tuple(leaves(spec, given)), test_utils=OPCHECKS)
    torch.library.opcheck(
        module.backward_op, backward_arguments(module, spec, given), test_utils=OPCHECKS[:1] + OPCHECKS[2:]
    )


@pytest.mark.parametrize("name", ["dense", "rms temperature"])
def test_opcheck_through_the_interpreter(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS[name]
    module = make(spec).module
    given = tensors(spec, 19, torch.float32, device)
    torch.library.opcheck(module.forward_op, tuple(leaves(spec, given)), test_utils=OPCHECKS)


class Watching(TorchDispatchMode):
    """Notes the ops that torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A kind of tensor of its own."""


def names_seen(how: str, run: Callable[..., Tensor], inputs: list[Tensor]) -> list[str]:
    """What whoever looks on sees of a call."""
    match how:
        case "mode":
            with Watching() as watching:
                run(*inputs)
            return watching.seen
        case "profiler":
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run(*inputs)
            return [event.key for event in seen.key_averages()]
        case "trace":
            return [str(node.target) for node in make_fx(run)(*(x.detach() for x in inputs)).graph.nodes]
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["mode", "profiler", "trace"])
def test_whoever_looks_on_sees_the_op(how: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    library = make(SPECS["dense"])
    name = library.module.forward_op.name().partition("::")[2]
    inputs = leaves(SPECS["dense"], tensors(SPECS["dense"], 20, torch.float32, device))
    assert [x for x in names_seen(how, op_of(library), inputs) if name in x and "backward" not in x]


@pytest.mark.parametrize("kind", ["fake", "subclass"])
def test_tensors_of_another_kind_go_through_the_dispatcher(
    kind: str, make: Callable[[SPLASpec], Library], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make(SPECS["dense"])
    inputs = [x.detach() for x in leaves(SPECS["dense"], tensors(SPECS["dense"], 20, torch.float32, device))]
    monkeypatch.setattr(library.module, "EAGER", {})
    with FakeTensorMode() if kind == "fake" else nullcontext():
        if kind == "subclass":
            inputs = [x.as_subclass(Labelled) for x in inputs]
        else:
            inputs = [torch.empty(x.shape, device=device) for x in inputs]
        assert op_of(library)(*inputs).shape == inputs[0].shape


def test_a_tangent_is_refused_and_not_lost(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    library = make(SPECS["dense"])
    inputs = [x.detach() for x in leaves(SPECS["dense"], tensors(SPECS["dense"], 20, torch.float32, device))]
    with forward_ad.dual_level():
        inputs[0] = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            op_of(library)(*inputs)


@pytest.mark.parametrize("name", ["dense", "rms temperature"])
def test_a_plain_call_gives_what_the_op_gives(
    name: str, make: Callable[[SPLASpec], Library], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, forward and backward; and it runs what the op runs without torch's dispatcher."""
    library, spec = make(SPECS[name]), SPECS[name]
    given = tensors(spec, 37, torch.float32, device)
    found = []
    for op in (lambda *x: library.module.forward_op(*x)[0], op_of(library)):
        inputs = leaves(spec, given)
        o = op(*inputs)
        asked = [x for x in inputs if x.requires_grad]
        found.append([o, *torch.autograd.grad(o, asked, cotangent(spec, given))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    run, _ = library.module.EAGER[library.module.forward_op]
    ran: list[int] = []
    spied = {library.module.forward_op: (lambda *x: (ran.append(1), run(*x))[1], None)}
    monkeypatch.setattr(library.module, "EAGER", spied)
    with torch.no_grad():
        assert torch.equal(op_of(library)(*leaves(spec, given)), found[0][0])
    assert ran


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.bfloat16) for n in SPECS] + [("dense", torch.float32), ("dense", torch.float16)],
)
def test_opcheck_on_the_gpu(
    name: str, dtype: torch.dtype, make: Callable[[SPLASpec], Library], device: torch.device
) -> None:
    spec = SPECS[name]
    module = make(spec).module
    given = tensors(spec, 100, dtype, device, batch=2)
    torch.library.opcheck(module.forward_op, tuple(leaves(spec, given)), test_utils=OPCHECKS)
    torch.library.opcheck(
        module.backward_op, backward_arguments(module, spec, given), test_utils=OPCHECKS[:1] + OPCHECKS[2:]
    )


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    """Through the op in float64, where the selection is far from a tie."""
    spec = SPECS[name]
    library = make(spec)
    inputs = leaves(spec, tensors(spec, 35, torch.float64, device))
    assert torch.autograd.gradcheck(lambda *xs: call(library, list(xs)), inputs, fast_mode=True)


def test_a_second_derivative_is_refused(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    """The gradient's own gradient would be silently absent."""
    spec = SPECS["dense"]
    library = make(spec)
    inputs = leaves(spec, tensors(spec, 20, torch.float64, device))
    (dq, *_) = torch.autograd.grad(call(library, inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dq.sum().backward()


def imported(path: Path, name: str) -> ModuleType:
    found = spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_modules_of_one_text_have_their_own_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported twice by hand, each runs its own kernels with its own Schedules."""
    path = generate(SPECS["dense"], tmp_path).path
    first, second = (imported(path, f"copy_{i}") for i in "ab")
    inputs = [torch.zeros(1, 8, h, 16, dtype=torch.float64) for h in (2, 1, 1)]

    def reached() -> None:
        raise AssertionError("the other module")

    monkeypatch.setattr(second, "equations", reached)
    first.forward_op(*inputs)
    with pytest.raises(AssertionError, match="the other module"):
        second.forward_op(*inputs)


def test_rows_of_the_scores_have_no_gradient(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    """Not even where they ask for one; what they are does decide the output."""
    spec = SPECS["own rows"]
    library = make(spec)
    given = tensors(spec, 70, torch.float64, device)
    inputs = {n: x.requires_grad_() for n, x in given.items() if n in ("q", "k", "v", "q_m", "k_m", "q_r", "k_r")}
    o = library.op(**inputs)
    o.square().sum().backward()
    assert {n for n, x in inputs.items() if x.grad is None} == {"q_m", "k_m"}
    other = library.op(**inputs | {"q_m": -inputs["q_m"]})
    assert (other - o).abs().max() > 1e-3


def test_only_the_output_has_a_gradient(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS["rms temperature"]
    results = make(spec).module.forward_op(*leaves(spec, tensors(spec, 20, torch.float64, device)))
    assert [r.requires_grad for r in results] == [True] + [False] * (len(results) - 1)


# -- compilation -------------------------------------------------------------------------------------------


def check_compiled(
    library: Library, backend: Any, dtype: torch.dtype, lengths: list[int], device: torch.device
) -> None:
    """Compiled and eager agree in output and gradients at every length, after one compilation."""
    spec, op = library.spec, op_of(library)
    count: list[int] = []

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        count.append(1)
        return backend(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *xs: op(*xs).square(), fullgraph=True, backend=counting)
    for length in lengths:
        given = tensors(spec, length, dtype, device)
        inputs, plain = leaves(spec, given), leaves(spec, given)
        for x in inputs:
            if x.ndim >= 3:
                torch._dynamo.mark_dynamic(x, 1)
        got, want = compiled(*inputs), op(*plain).square()
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(got, want)
        for x, y in zip(inputs, plain, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert len(count) == 1, f"{len(count)} compilations for lengths {lengths}"


@pytest.mark.parametrize("name", ["dense", "rms temperature", "gate normaliser"])
def test_one_compilation_for_all_lengths(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    check_compiled(make(SPECS[name]), aot_eager, torch.float64, [37, 20, 64, 51], device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "rms temperature"])
def test_one_compilation_for_all_lengths_on_the_gpu(
    name: str, make: Callable[[SPLASpec], Library], device: torch.device
) -> None:
    from torch._inductor.compile_fx import compile_fx

    check_compiled(make(SPECS[name]), compile_fx, torch.float32, [100, 257, 64], device)


# -- around the op -----------------------------------------------------------------------------------------


def test_autocast_casts_the_rows(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    """Under autocast q, k, v are cast, the gradients come back in their own dtype."""
    spec = SPECS["dense"]
    library = make(spec)
    inputs = leaves(spec, tensors(spec, 20, torch.float32, device))
    with torch.autocast(device.type, dtype=torch.float16):
        o = call(library, inputs)
    assert o.dtype == torch.float16
    o.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)
    want = call(library, [x.detach().half() for x in inputs])
    assert torch.equal(o, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms temperature", "gate normaliser"])
def test_autocast_on_the_gpu(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS[name]
    library = make(spec)
    inputs = leaves(spec, tensors(spec, 100, torch.float32, device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = call(library, inputs)
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("name", SPECS)
def test_activation_checkpointing(name: str, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS[name]
    library = make(spec)
    given = tensors(spec, 37, torch.float64, device)
    plain, saved = leaves(spec, given), leaves(spec, given)
    call(library, plain).square().sum().backward()
    checkpoint(lambda *xs: call(library, list(xs)), *saved, use_reentrant=False).square().sum().backward()
    for x, y in zip(saved, plain, strict=True):
        if x.requires_grad:
            assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def strided(x: Tensor, how: str) -> Tensor:
    """The same values with another layout; the last dimension stays contiguous."""
    match how:
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "batch inside":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "slice":
            return torch.cat([x, x + 1], dim=2)[:, :, : x.shape[2]]
        case "every other position":
            return x.repeat_interleave(2, dim=1)[:, ::2]
    return x[:, :, :1].expand_as(x)  # one head for all: stride 0


@pytest.mark.parametrize("how", ["heads first", "batch inside", "slice", "every other position", "one head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["oracle", "interpreter"])
def test_strides(how: str, dtype: torch.dtype, make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS["sparse"]
    library = make(spec)
    given = tensors(spec, 35 if dtype == torch.float64 else 18, dtype, device, batch=2)
    moved = [strided(x, how) for x in leaves(spec, given)]
    assert any(not x.is_contiguous() for x in moved)
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in moved]
    moved = [x.detach().requires_grad_() for x in moved]
    do = strided(cotangent(spec, given), how)
    got = torch.autograd.grad(call(library, moved), moved, do)
    want = torch.autograd.grad(call(library, plain), plain, do.contiguous())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_cotangent_of_any_strides(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    """The sum of the output sends back a cotangent whose strides are all 0."""
    spec = SPECS["dense"]
    library = make(spec)
    one, two = (leaves(spec, tensors(spec, 20, torch.float32, device)) for _ in range(2))
    call(library, one).sum().backward()
    o = call(library, two)
    o.backward(torch.ones_like(o))
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_query_chunks_bound_memory_and_change_nothing(
    name: str, make: Callable[[SPLASpec], Library], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    library = make(spec)
    given = tensors(spec, 70, torch.float64, device)

    def run() -> list[Tensor]:
        inputs = leaves(spec, given)
        o = call(library, inputs)
        return [o, *torch.autograd.grad(o, [x for x in inputs if x.requires_grad], cotangent(spec, given))]

    whole = run()
    seen: list[tuple[int, int]] = []
    evaluate = ops.evaluate

    def watched(program: Any, inputs: Any, **options: Any) -> dict[str, Tensor]:
        sizes = options["sizes"]
        scores = 8 * math.prod(sizes[a] for a in ("b", "h", "g", "T", "m", "J", "C", "n"))
        seen.append((scores, sizes["T"]))
        return evaluate(program, inputs, **options)

    limit = 40_000
    monkeypatch.setattr(ops, "CHUNK_BYTES", limit)
    monkeypatch.setattr(ops, "evaluate", watched)
    for x, y in zip(run(), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert len(seen) > 4
    assert all(scores <= limit or tiles == 1 for scores, tiles in seen)


def test_the_kernels_and_the_oracle_are_the_same_op(make: Callable[[SPLASpec], Library], device: torch.device) -> None:
    spec = SPECS["rms temperature"]
    library = make(spec)
    exact = tensors(spec, 35, torch.float32, device)
    got = call(library, leaves(spec, exact))
    want = call(library, leaves(spec, {n: x.double() for n, x in exact.items()}))
    assert (got.dtype, want.dtype) == (torch.float32, torch.float64)
    assert relative_error(got, want) < 1e-5


# -- bad input ---------------------------------------------------------------------------------------------

Q, KV = (1, 20, 4, 16), (1, 20, 2, 16)


def rows(q: Any = Q, k: Any = KV, v: Any = KV) -> list[Tensor]:
    return [torch.zeros(shape) for shape in (q, k, v)]


def turned() -> list[Tensor]:
    q, k, v = rows()
    return [q, k.transpose(1, 3).contiguous().transpose(1, 3), v]


def rows_of_two_dtypes() -> list[Tensor]:
    q, k, v = rows()
    return [q, k.half(), v]


def far_apart() -> list[Tensor]:
    """Two positions of k in memory that nobody touches."""
    q, k, v = rows((1, 2, 4, 16), (1, 2, 2, 16), (1, 2, 2, 16))
    return [q, torch.empty_strided(k.shape, (2**25, 2**24, 16, 1)), v]


BAD: dict[str, tuple[Callable[[], list[Any]], str, str]] = {
    # name: (arguments, what the message names, what it asks for)
    "q of three dimensions": (lambda: rows(q=(20, 4, 16)), "q has shape (20, 4, 16)", "[B, L, Hq, 16]"),
    "head dim": (lambda: rows(q=(1, 20, 4, 24)), "q has shape (1, 20, 4, 24)", "[B, L, Hq, 16]"),
    "head dim of k": (lambda: rows(k=(1, 20, 2, 24)), "k has shape (1, 20, 2, 24)", "(1, 20, 2, 16)"),
    "value dim": (lambda: rows(v=(1, 20, 2, 8)), "v has shape (1, 20, 2, 8)", "(1, 20, 2, 16)"),
    "length of k": (lambda: rows(k=(1, 21, 2, 16)), "k has shape (1, 21, 2, 16)", "(1, 20, 2, 16)"),
    "length of v": (lambda: rows(v=(1, 19, 2, 16)), "v has shape (1, 19, 2, 16)", "(1, 20, 2, 16)"),
    "batch of v": (lambda: rows(v=(2, 20, 2, 16)), "v has shape (2, 20, 2, 16)", "(1, 20, 2, 16)"),
    "two dimensions of k": (lambda: rows(k=(20, 16)), "k has shape (20, 16)", "(1, 20, 2, 16)"),
    "heads not a multiple": (
        lambda: rows(q=(1, 20, 3, 16)),
        "q has shape (1, 20, 3, 16)",
        "a multiple of the spec's group_size 2",
    ),
    "another group": (lambda: rows(q=(1, 20, 8, 16)), "k has shape (1, 20, 2, 16)", "(1, 20, 4, 16)"),
    "no positions": (
        lambda: rows((1, 0, 4, 16), (1, 0, 2, 16), (1, 0, 2, 16)),
        "q has shape (1, 0, 4, 16)",
        "L >= 1",
    ),
    "no batch": (
        lambda: rows((0, 20, 4, 16), (0, 20, 2, 16), (0, 20, 2, 16)),
        "q has shape (0, 20, 4, 16)",
        "B and L >= 1",
    ),
    "mixed dtypes": (rows_of_two_dtypes, "float16", "cast"),
    "integers": (lambda: [x.to(torch.int32) for x in rows()], "int32", "use bfloat16, float16 or float32"),
    "complex": (lambda: [x.to(torch.complex64) for x in rows()], "complex64", "bfloat16"),
    "device": (lambda: [rows()[0], rows()[1].to("meta"), rows()[2]], "k is on meta", "move it"),
    "strided last dimension": (turned, "the last dimension of k", ".contiguous()"),
    "positions far apart": (far_apart, "positions of k lie 16777216 elements apart", ".contiguous()"),
    "too many heads": (
        lambda: [torch.zeros(1, 1, 1, 16).expand(n, 1, h, 16) for n, h in ((16384, 4), (16384, 2), (16384, 2))],
        "B * Hq = 65536",
        "65535",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_before_anything_is_launched(
    name: str, make: Callable[[SPLASpec], Library], nothing_runs: Callable[[Library], None]
) -> None:
    library = make(SPECS["dense"])
    nothing_runs(library)
    arguments, what, wanted = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        library.op(*arguments())
    message = str(caught.value)
    assert message.startswith("spla: ")
    assert what in message, message
    assert wanted in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": torch.zeros(3)}, "temperature has shape (3,)"),
        ({"gamma_s": torch.zeros(4, 16)}, "gamma_s has shape (4, 16)"),
        ({"gamma_r": torch.zeros(24)}, "gamma_r has shape (24,)"),
        ({"gamma_r": torch.zeros(4, 24, device="meta")}, "gamma_r is on meta"),
        ({"gamma_r": torch.zeros(24, 4).T}, "the last dimension of gamma_r"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_parameters(
    change: dict[str, Tensor],
    what: str,
    make: Callable[[SPLASpec], Library],
    nothing_runs: Callable[[Library], None],
) -> None:
    spec = SPECS["rms temperature"]
    library = make(spec)
    nothing_runs(library)
    good = {"temperature": torch.zeros(2), "gamma_s": torch.ones(4, 24), "gamma_r": torch.ones(4, 24)}
    with pytest.raises(ValueError, match="spla: ") as caught:
        library.op(*rows(v=(1, 20, 2, 24)), **{**good, **change})
    assert what in str(caught.value)


def test_a_parameter_left_out_is_named(make: Callable[[SPLASpec], Library]) -> None:
    with pytest.raises(TypeError, match="gamma_r"):
        make(SPECS["rms temperature"]).op(
            *rows(v=(1, 20, 2, 24)), temperature=torch.zeros(2), gamma_s=torch.ones(4, 24)
        )


@pytest.mark.gpu
def test_another_device_is_named(
    make: Callable[[SPLASpec], Library], device: torch.device, nothing_runs: Callable[[Library], None]
) -> None:
    library = make(SPECS["dense"])
    nothing_runs(library)
    q, k, v = rows()
    with pytest.raises(ValueError, match=r"spla: k is on cpu, q on cuda:0; move it"):
        library.op(q.to(device), k, v.to(device))
