"""The SSE op as torch sees it: registration, gradients, compilation, autocast, strides, packed sequences, bad input."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from splagen.codegen.sequence_partition import parts_of
from splagen.pipeline import Library, generate
from splagen.sequence import SSEOracle, input_names
from splagen.sse_spec import Router, SSESpec
from splagen.verification import relative_error
from tests.interpreter_sort import patch
from tests.ir.sse_rows import outputs_of, packed

SMALL: dict[str, Any] = {"head_dim": 16, "value_dim": 20, "group_size": 2}
SPECS = {
    "vector": SSESpec(**SMALL, backbone="vector", router=Router(2)),
    "delta per-head": SSESpec(**SMALL, backbone="delta", router=Router(3, 2, scope="head"), shared=False),
    "constant no router": SSESpec(**SMALL, backbone="constant", router=None),
    "scalar masked": SSESpec(**SMALL, backbone="scalar", router=Router(3, 1, 2), form="masked"),
    "scalar routed": SSESpec(**SMALL, backbone="scalar", router=Router(3, 2, 1), form="routed"),
}
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LENGTHS = (5, 0, 1, 12)


@pytest.fixture(scope="session", autouse=True)
def _fast_sort() -> None:
    patch()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[SSESpec], Library]:
    return lambda spec: generate(spec, tmp_path)


@cache
def truth(spec: SSESpec) -> SSEOracle:
    return SSEOracle(spec)


def leaves(given: Mapping[str, Tensor], spec: SSESpec) -> dict[str, Tensor]:
    """Rows and states that ask for gradients, by name."""
    return {n: given[n].detach().clone().requires_grad_() for n in (*input_names(spec), "state")}


def call(library: Library, x: Mapping[str, Tensor], cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """The public op on packed rows [T, ...] as a batch of one."""
    rows = {n: x[n] for n in input_names(library.spec)}  # type: ignore[arg-type]
    whole = [r if r.ndim == 1 else r.unsqueeze(0) for r in rows.values()]
    o, *rest = library.op(*whole, initial_state=x.get("state"), cu_seqlens=cu_seqlens)
    return (o.squeeze(0), *rest)


def total(spec: SSESpec, out: tuple[Tensor, ...], given: Mapping[str, Tensor]) -> Tensor:
    return sum((y * given[f"d{n}"]).sum() for n, y in zip(outputs_of(spec), out, strict=True))  # type: ignore[return-value]


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float64) for n in SPECS] + [(n, torch.float32) for n in SPECS if n != "scalar masked"],
)
def test_autograd_through_the_op_is_the_oracles_gradient(
    name: str, dtype: torch.dtype, make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    """Of packed sequences, with every output in the loss; the states stay float32 in both."""
    spec, library = SPECS[name], make(SPECS[name])
    given = packed(spec, LENGTHS, dtype=torch.float32, device=device)
    if dtype == torch.float64:
        given |= {n: x.double() for n, x in given.items() if n[0] in "qkv" or n == "do"}
    x = leaves(given, spec)
    out = call(library, x, given["cu_seqlens"])
    grads = torch.autograd.grad(total(spec, out, given), list(x.values()))
    limit = 1e-5 if dtype == torch.float32 else 1e-6  # states, balance and their gradients are float32
    for y, (n, want) in zip(out, truth(spec).values(given).items(), strict=True):
        assert y.dtype == (given["v"].dtype if n == "o" else torch.float32), n
        assert relative_error(y, want) < limit, n
    want = truth(spec).gradients(given)
    for n, g in zip(x, grads, strict=True):
        assert (g.dtype, g.shape) == (given[n].dtype, given[n].shape), n
        assert relative_error(g, want[n]) < limit, n


@pytest.mark.parametrize("name", ["vector", "constant no router"])
def test_a_batch_is_its_sequences_packed(name: str, make: Callable[[SSESpec], Library], device: torch.device) -> None:
    """Rows [2, T, ...] and rows [1, 2 T, ...] with cu_seqlens; no state is a state of zeros."""
    spec, library = SPECS[name], make(SPECS[name])
    given = packed(spec, [6, 6], dtype=torch.float64, device=device)
    rows = {n: given[n] for n in input_names(spec)}
    batch = [r if r.ndim == 1 else r.unflatten(0, (2, 6)) for r in rows.values()]
    o, *rest = library.op(*batch)
    zero = torch.zeros_like(given["state"], dtype=torch.float32)
    want, *others = call(library, {**rows, "state": zero}, given["cu_seqlens"].long())
    assert o.shape == (2, *want.unflatten(0, (2, 6)).shape[1:])
    assert torch.equal(o.flatten(0, 1), want)
    for x, y in zip(rest, others, strict=True):
        assert torch.equal(x, y)


def test_ends_may_have_any_stride(make: Callable[[SSESpec], Library], device: torch.device) -> None:
    spec, library = SPECS["vector"], make(SPECS["vector"])
    given = packed(spec, LENGTHS, dtype=torch.float32, device=device)
    ends = given["cu_seqlens"]
    for x, y in zip(call(library, given, torch.stack([ends, -ends], 1)[:, 0]), call(library, given, ends), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["oracle", "interpreter"])
def test_a_prefill_in_two_calls_is_one_call(
    dtype: torch.dtype, make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    spec, library = SPECS["vector"], make(SPECS["vector"])
    x = {n: x.float() if n == "state" else x for n, x in packed(spec, [40], dtype=dtype, device=device).items()}
    whole, final, _ = call(library, x)
    cut = lambda a, b, state: {**{n: x[n][a:b] for n in input_names(spec)}, "state": state}  # noqa: E731
    early, state, _ = call(library, cut(0, 23, x["state"]))
    late, last, _ = call(library, cut(23, 40, state))
    assert relative_error(torch.cat([early, late]), whole) < 1e-6
    assert relative_error(last, final) < 1e-6


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in SPECS for d in (torch.float64, torch.float32)])
def test_a_sequence_is_its_steps(
    name: str, dtype: torch.dtype, make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    """Two sequences of one length, token by token on a table in which their states lie anywhere; -1 is nobody."""
    spec, library = SPECS[name], make(SPECS[name])
    length, order, step = 4, [3, 1], getattr(library.module, f"{spec.name}_step")
    given = packed(spec, [length] * 2, dtype=dtype, device=device)
    given["state"] = given["state"].float()
    want, final, *_ = call(library, given, given["cu_seqlens"])
    table = torch.randn(5, *given["state"].shape[1:], device=device)
    table[order] = given["state"]
    before = table.clone()
    slots = torch.tensor([order[0], -1, order[1]], dtype=torch.int32, device=device)
    for t in range(length):
        where = torch.tensor([t, 0, length + t], device=device)
        o = step(*(given[n] if given[n].ndim == 1 else given[n][where] for n in input_names(spec)), table, slots)
        assert relative_error(o[[0, 2]], want[[t, length + t]]) < 1e-5
        assert not o[1].any()
    assert relative_error(table[order], final) < 1e-5
    idle = [0, 2, 4]
    assert torch.equal(table[idle], before[idle])


@pytest.mark.parametrize("name", ["vector", "delta per-head"])
def test_gradcheck(name: str, make: Callable[[SSESpec], Library], device: torch.device) -> None:
    """Through the op in float64, of o, where the routing is far from a tie."""
    spec, library = SPECS[name], make(SPECS[name])
    given = packed(spec, [4, 3], dtype=torch.float64, device=device)
    if "logits" in given:
        given["logits"] += 2.0 * torch.arange(given["logits"].shape[-1], device=device)
    x = leaves(given, spec)
    names = [n for n in x if n != "state"]
    state = given["state"].float()

    def o(*rows: Tensor) -> Tensor:
        return call(library, {**dict(zip(names, rows, strict=True)), "state": state}, given["cu_seqlens"])[0]

    assert torch.autograd.gradcheck(o, [x[n] for n in names], fast_mode=True)


# -- registration and compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_opcheck_through_the_oracle(name: str, make: Callable[[SSESpec], Library], device: torch.device) -> None:
    check_registration(SPECS[name], make(SPECS[name]), torch.float64, device)


@pytest.mark.parametrize("name", ["constant no router"])
def test_opcheck_through_the_interpreter(name: str, make: Callable[[SSESpec], Library], device: torch.device) -> None:
    check_registration(SPECS[name], make(SPECS[name]), torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), [("vector", torch.bfloat16), ("delta per-head", torch.float32)])
def test_opcheck_on_the_gpu(
    name: str, dtype: torch.dtype, make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    check_registration(SPECS[name], make(SPECS[name]), dtype, device)


def check_registration(spec: SSESpec, library: Library, dtype: torch.dtype, device: torch.device) -> None:
    given = packed(spec, (3, 0, 2), dtype=dtype, device=device)
    given |= {n: x.float() for n, x in given.items() if n in ("state", "dfinal", "dbalance")}
    x = leaves(given, spec)
    arguments = (*x.values(), given["cu_seqlens"])
    torch.library.opcheck(library.module.forward_op, arguments, test_utils=OPCHECKS)
    plain = tuple(a.detach() for a in arguments)
    cotangents = tuple(given[f"d{n}"] for n in outputs_of(spec))
    torch.library.opcheck(library.module.backward_op, (*plain, *cotangents), test_utils=OPCHECKS[:1] + OPCHECKS[2:])
    tokens = [given[n] if given[n].ndim == 1 else given[n][:3] for n in input_names(spec)]
    slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    torch.library.opcheck(library.module.step_op, (*tokens, plain[-2], slots), test_utils=OPCHECKS[:1] + OPCHECKS[2:])


def check_compiled(
    library: Library, backend: Any, dtype: torch.dtype, lengths: list[int], device: torch.device, with_ends: bool
) -> None:
    """Compiled without a break, eager and compiled agree at every length, after one compilation."""
    spec = library.spec
    assert isinstance(spec, SSESpec)
    count: list[int] = []
    op = library.op

    def counting(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        count.append(1)
        return backend(graph, examples)

    def loss(ends: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        o, final, *_ = op(*rows, cu_seqlens=ends)
        return o.square(), final

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for length in lengths:
        given = packed(spec, [length - 3, 3], dtype=dtype, device=device)
        ends = given["cu_seqlens"] if with_ends else None
        rows = [given[n] if given[n].ndim == 1 else given[n].unsqueeze(0) for n in input_names(spec)]
        pair = []
        for function in (compiled, loss):
            x = [r.detach().clone().requires_grad_() for r in rows]
            for r in x:
                if r.ndim > 1:
                    torch._dynamo.mark_dynamic(r, 1)
            o, final = function(ends, *x)
            (o.sum() + final.sum()).backward()
            pair.append((o, final, *(r.grad for r in x)))
        for got, want in zip(*pair, strict=True):
            torch.testing.assert_close(got, want)
    assert len(count) == 1, f"{len(count)} compilations for lengths {lengths}"


@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("name", ["vector", "constant no router"])
def test_one_compilation_for_all_lengths(
    name: str, with_ends: bool, make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    check_compiled(make(SPECS[name]), aot_eager, torch.float64, [9, 20, 14], device, with_ends)


@pytest.mark.gpu
def test_one_compilation_for_all_lengths_on_the_gpu(make: Callable[[SSESpec], Library], device: torch.device) -> None:
    from torch._inductor.compile_fx import compile_fx

    check_compiled(make(SPECS["vector"]), compile_fx, torch.float32, [100, 257, 64], device, with_ends=True)


# -- around the op -----------------------------------------------------------------------------------------------------


def test_autocast_casts_the_rows(make: Callable[[SSESpec], Library], device: torch.device) -> None:
    """q, k and v are cast; decays, logits and states stay, and gradients come back in their own dtype."""
    spec, library = SPECS["vector"], make(SPECS["vector"])
    given = packed(spec, [9], dtype=torch.float32, device=device)
    x = leaves(given, spec)
    with torch.autocast(device.type, dtype=torch.float16):
        o, final, loss = call(library, x)
    assert (o.dtype, final.dtype, loss.dtype) == (torch.float16, torch.float32, torch.float32)
    (o.float().sum() + final.sum() + loss).backward()
    assert all(r.grad is not None and r.grad.dtype == torch.float32 for r in x.values())
    want = call(library, {n: r.detach().half() if n[0] in "qkv" else r.detach() for n, r in x.items()})
    assert all(torch.equal(a, b) for a, b in zip((o, final, loss), want, strict=True))


def test_activation_checkpointing(make: Callable[[SSESpec], Library], device: torch.device) -> None:
    spec, library = SPECS["delta per-head"], make(SPECS["delta per-head"])
    given = packed(spec, [7], dtype=torch.float64, device=device)
    given["state"] = given["state"].float()
    plain, saved = leaves(given, spec), leaves(given, spec)
    call(library, plain)[0].square().sum().backward()

    def again(*xs: Tensor) -> Tensor:
        return call(library, dict(zip(saved, xs, strict=True)))[0]

    checkpoint(again, *saved.values(), use_reentrant=False).square().sum().backward()
    for n in plain:
        assert torch.equal(saved[n].grad, plain[n].grad), n  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["oracle", "interpreter"])
def test_strides(dtype: torch.dtype, make: Callable[[SSESpec], Library], device: torch.device) -> None:
    """Heads before positions in memory, for rows and for the cotangent of o."""
    name = "vector" if dtype == torch.float64 else "constant no router"
    spec, library = SPECS[name], make(SPECS[name])
    given = packed(spec, [9], 2, dtype=dtype, device=device)
    given["state"] = given["state"].float()
    moved = {n: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for n, x in given.items()}
    assert not moved["q1"].is_contiguous()
    pair = []
    for x in (given, moved):
        rows = {n: x[n].detach().requires_grad_() for n in (*input_names(spec), "state")}
        pair.append(torch.autograd.grad(call(library, rows)[0], list(rows.values()), x["do"]))
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_cotangent_of_any_strides_and_outputs_that_no_loss_reads(
    make: Callable[[SSESpec], Library], device: torch.device
) -> None:
    spec, library = SPECS["constant no router"], make(SPECS["constant no router"])
    given = packed(spec, [8], dtype=torch.float32, device=device)
    one, two, three = (leaves(given, spec) for _ in range(3))
    call(library, one)[0].sum().backward()
    o = call(library, two)[0]
    o.backward(torch.ones_like(o))
    for n in one:
        assert torch.equal(one[n].grad, two[n].grad), n  # type: ignore[arg-type]
    call(library, three)[1].sum().backward()
    assert all(not three[n].grad.any() for n in three if n[0] == "q")  # type: ignore[union-attr]
    assert three["v"].grad.any()  # type: ignore[union-attr]


# -- bad input ---------------------------------------------------------------------------------------------------------

T = 6


def good() -> dict[str, Any]:
    """Arguments of SPECS["vector"] with one key head and two value heads."""
    rows = {n: torch.zeros(1, T, 1, 16) for n in ("q1", "k1", "g1", "q2", "k2", "g2")}
    return {**rows, "logits": torch.zeros(1, T, 2), "v": torch.zeros(1, T, 2, 20)}


def states(*, samples: int = 1, **options: Any) -> Tensor:
    return torch.zeros(samples, 3, 2, 16, 20, **options)


def ends(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


BESIDE = "beside v (1, 6, 2, 20) it starts with (1, 6)"
HALF, WIDE = torch.bfloat16, torch.float64
BAD: dict[str, tuple[dict[str, Any], str]] = {
    # name: (changed arguments, the message)
    "v of three dimensions": ({"v": torch.zeros(T, 2, 20)}, "v has shape (6, 2, 20); this spec takes [B, T, HV, 20]"),
    "another length": ({"q2": torch.zeros(1, 5, 1, 16)}, f"q2 has shape (1, 5, 1, 16); {BESIDE}"),
    "another batch": ({"k1": torch.zeros(2, T, 1, 16)}, f"k1 has shape (2, 6, 1, 16); {BESIDE}"),
    "head dim": (
        {"q1": torch.zeros(1, T, 1, 20)},
        "q1 has shape (6, 1, 20) (tokens of all samples first); beside v (6, 2, 20) it must be (6, 1, 16)",
    ),
    "value dim": ({"v": torch.zeros(1, T, 2, 16)}, "v has shape (6, 2, 16)"),
    "width of a decay": ({"g2": torch.zeros(1, T, 1, 8)}, "g2 has shape (6, 1, 8)"),
    "a decay per value head": ({"g1": torch.zeros(1, T, 2, 16)}, "g1 has shape (6, 2, 16)"),
    "partitions": ({"logits": torch.zeros(1, T, 3)}, "logits has shape (6, 3)"),
    "logits per head": ({"logits": torch.zeros(1, T, 1, 2)}, "logits has shape (6, 1, 2)"),
    "heads": ({"v": torch.zeros(1, T, 3, 20)}, "1 key heads and 3 value heads; this spec has group_size 2"),
    "no heads": ({n: x[:, :, :0] for n, x in good().items() if n != "logits"}, "0 key heads and 0 value heads"),
    "mixed dtypes": (
        {"k2": torch.zeros(1, T, 1, 16).half()},
        "k2 is torch.float16, v torch.float32; cast them to one dtype",
    ),
    "integers": (
        {n: x.int() for n, x in good().items() if n[0] in "qkv"},
        "v is torch.int32; use bfloat16, float16 or float32",
    ),
    "device": ({"q1": torch.zeros(1, T, 1, 16, device="meta")}, "q1 is on meta, v on cpu; move it"),
    "strided last dimension": (
        {"q1": torch.zeros(1, T, 16, 2).transpose(2, 3)[:, :, :1]},
        "the last dimension of q1 has stride 2; call .contiguous()",
    ),
    "states of another dtype": (
        {"initial_state": states(dtype=WIDE)},
        "initial_state is torch.float64; states are contiguous float32",
    ),
    "states in half": ({"initial_state": states(dtype=HALF)}, "initial_state is torch.bfloat16; states are contiguous"),
    "states with strides": ({"initial_state": torch.zeros(1, 3, 2, 20, 16).mT}, "call .contiguous()"),
    "states by head": (
        {"initial_state": torch.zeros(1, 2, 3, 16, 20).transpose(1, 2)},
        "initial_state is torch.float32; states are contiguous",
    ),
    "states of another batch": ({"initial_state": states(samples=2)}, "initial_state has shape (2, 3, 2, 16, 20)"),
    "states per sample": ({"initial_state": states(), "cu_seqlens": ends(0, 2, 6)}, "it must be (2, 3, 2, 16, 20)"),
    "states without the shared one": (
        {"initial_state": torch.zeros(1, 2, 2, 16, 20)},
        "initial_state has shape (1, 2, 2, 16, 20)",
    ),
    "states elsewhere": ({"initial_state": states(device="meta")}, "initial_state is on meta"),
    "ends that fall": ({"cu_seqlens": ends(0, 4, 3, 6)}, "it must rise from 0 to T = 6 and never fall"),
    "ends before the last token": (
        {"cu_seqlens": ends(0, 3, 5)},
        "cu_seqlens starts at 0 and ends at 5; it must rise from 0 to T = 6",
    ),
    "ends behind the last token": ({"cu_seqlens": ends(0, 3, 7)}, "cu_seqlens starts at 0 and ends at 7"),
    "ends that start late": ({"cu_seqlens": ends(1, 3, 6)}, "cu_seqlens starts at 1 and ends at 6"),
    "ends of another dtype": (
        {"cu_seqlens": torch.tensor([0.0, 6.0])},
        "cu_seqlens is torch.float32 (2,); give int32 [samples + 1]",
    ),
    "ends of two dimensions": ({"cu_seqlens": ends(0, 6)[None]}, "cu_seqlens is torch.int32 (1, 2)"),
    "one end": ({"cu_seqlens": ends(0)}, "cu_seqlens is torch.int32 (1,)"),
    "ends with a batch": (
        {n: torch.cat([x, x]) for n, x in good().items()} | {"cu_seqlens": ends(0, 12)},
        "cu_seqlens with a batch of 2; packed rows are [1, T, ...]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_before_anything_is_launched(
    name: str, make: Callable[[SSESpec], Library], nothing_runs: Callable[[Library], None]
) -> None:
    library = make(SPECS["vector"])
    nothing_runs(library)
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        library.op(**{**good(), **changes})
    assert str(caught.value).startswith("sse: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "router", "change", "message"),
    [
        ("constant", None, {"g1": torch.zeros(1)}, "g1 has shape (1,)"),
        ("constant", None, {"g1": torch.zeros(1, T, 2)}, "g1 has shape (1, 6, 2)"),
        ("constant", None, {"g1": torch.zeros(2, device="meta")}, "g1 is on meta"),
        ("delta", None, {"beta1": torch.zeros(1, T, 1)}, "beta1 has shape (6, 1)"),
        ("scalar", None, {"g1": torch.zeros(1, T, 1)}, "g1 has shape (6, 1)"),
        ("none", Router(3, scope="head"), {"logits": torch.zeros(1, T, 3)}, "logits has shape (6, 3)"),
    ],
)
def test_bad_rows_of_other_backbones(
    backbone: Any,
    router: Router | None,
    change: dict[str, Tensor],
    message: str,
    make: Callable[[SSESpec], Library],
    nothing_runs: Callable[[Library], None],
) -> None:
    """A constant decay is [HV]; beta and a scalar decay have value heads; logits may have key heads."""
    spec = SSESpec(**SMALL, backbone=backbone, router=router)
    library = make(spec)
    nothing_runs(library)
    given = packed(spec, [T], dtype=torch.float32)
    rows = {n: given[n] if given[n].ndim == 1 else given[n].unsqueeze(0) for n in input_names(spec)}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        library.op(**{**rows, **change})
    assert str(caught.value).startswith("sse: ")


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (ends(0, 1, 3), "slots are distinct and from 0 to 2, or -1; these are [0, 1, 3]"),
        (ends(0, 2, 0), "slots are distinct"),
        (ends(0, -2, 1), "slots are distinct"),
        (ends(0, 1), "slots is torch.int32 (2,) on cpu; give int32 (3,) on cpu"),
        (ends(0, 1, 2, dtype=torch.int64), "slots is torch.int64 (3,) on cpu; give int32 (3,)"),
    ],
)
def test_bad_slots_of_a_step(slots: Tensor, message: str, make: Callable[[SSESpec], Library]) -> None:
    library = make(SPECS["vector"])
    rows = [x[0, :3] for x in good().values()]
    table = states(samples=3).uniform_()
    before = table.clone()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        library.module.sse_step(*rows, table, slots)
    assert str(caught.value).startswith("sse_step: ")
    assert torch.equal(table, before)


def test_an_argument_left_out_is_named(make: Callable[[SSESpec], Library]) -> None:
    rows = good()
    del rows["logits"]
    with pytest.raises(TypeError, match="logits"):
        make(SPECS["vector"]).op(**rows)


def test_the_states_of_a_spec_are_counted() -> None:
    """What the op's messages and its docstring say of the table of states."""
    assert [parts_of(s) for s in SPECS.values()] == [3, 3, 1, 4, 4]
