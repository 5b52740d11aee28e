"""SSE's definition, its derived gradient and its oracle against recurrences that walk token by token."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from splagen.ir.check import check
from splagen.ir.frontend_sse import recurrence_program, router_program, sse_program, states
from splagen.ir.gradient import derive_gradient
from splagen.ir.program import Program
from splagen.ir.reference import evaluate
from splagen.sequence import SSEOracle
from splagen.sse_spec import Router, SSESpec
from tests.ir import numpy_sse
from tests.ir.direct_sse import balance, sse
from tests.ir.sse_rows import outputs_of, over_axes, packed, packed_outputs, rows_of
from tests.ir.strategies import BACKBONES, CASES, ROUTES, small_sse_specs

LIMIT = 1e-12


def random_inputs(p: Program, length: int, *, heads: int = 2, decay: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Numbers for every input of a program of rows, two sequences; masks are coins."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {**dict(p.axes), "b": 2, "h": heads, "i": length, "j": length, "l": length}
    found = {}
    for v in p.inputs:
        x = torch.randn([int(str(sizes[a])) for a in v.axes], generator=generator, dtype=torch.float64)
        if v.kind == "bool":
            found[v.name] = x > 0
        elif v.name[0] == "g":
            found[v.name] = -decay * x.abs()
        else:
            found[v.name] = x.sigmoid() if v.name[0] == "b" else x
    return found


def evaluated(p: Program, arrays: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Outputs by place and gradients by input."""
    wanted = [*p.outputs, *(g for _, g in p.gradients)]
    sizes = {"i": length, "j": length, "l": length}
    got = evaluate(p, arrays, scalars={"L": length}, sizes=sizes, wanted=list(dict.fromkeys(wanted)))
    return {n: got[v.name] for n, v in enumerate(p.outputs)} | {f"d{x.name}": got[g.name] for x, g in p.gradients}  # type: ignore[misc]


def assert_near(got: Tensor, want: Tensor, limit: float = LIMIT, name: str = "") -> None:
    assert got.isfinite().all(), name
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    assert_close(got / scale, want / scale, rtol=0, atol=limit, msg=lambda m: f"{name}: {m}")


def direct_outputs(spec: SSESpec, x: Mapping[str, Tensor]) -> list[Tensor]:
    """What the recurrence gives, in the order of the definition's outputs."""
    out = sse(spec, x)
    return [out[n] for n in ("o", "final1", "final2", "balance") if n in out]


def compare(spec: SSESpec, length: int, *, decay: float = 0.3, seed: int = 0, limit: float = LIMIT) -> None:
    """The definition and its derived gradient against the recurrence and torch's autograd of it."""
    joint = check(derive_gradient(check(sse_program(spec))))
    x = random_inputs(joint, length, decay=decay, seed=seed)
    leaves = {v.name: x[v.name].requires_grad_() for v, _ in joint.gradients}
    want = direct_outputs(spec, leaves)
    total = sum((y * x[dy.name]).sum() for y, (_, dy) in zip(want, joint.cotangents, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]
    got = evaluated(joint, {n: a.detach() for n, a in x.items()}, length)
    for n, y in enumerate(want):
        assert_near(got[n], y.detach(), limit, joint.outputs[n].name)
    for name, g in zip(leaves, grads, strict=True):
        assert_near(got[f"d{name}"], g, limit, f"d{name}")


# -- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_the_recurrence_and_its_gradient_autograd(name: str) -> None:
    compare(CASES[name], 9)


@settings(max_examples=20)
@given(small_sse_specs(), st.integers(1, 12), st.integers(0, 99))
def test_any_spec_is_the_recurrence_and_its_gradient_autograd(spec: SSESpec, length: int, seed: int) -> None:
    compare(spec, length, seed=seed)


@pytest.mark.parametrize("decay", [5.0, 40.0])
@pytest.mark.parametrize(("backbone", "site"), BACKBONES[1:])
def test_a_strong_decay_is_finite_and_right(backbone: str, site: str | None, decay: float) -> None:
    """The sum of decays passes -700, where exp is 0, and no ratio of two exponentials is formed."""
    spec = SSESpec(head_dim=16, backbone=backbone, gate_site=site, router=Router(writers=2))  # type: ignore[arg-type]
    compare(spec, 40, decay=decay, limit=1e-11)


def turned(x: np.ndarray) -> Tensor:
    return torch.tensor(np.moveaxis(x, 0, 1))[None]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("backbone", "site", "writers", "readers"),
    [(*b, k, k) for b in BACKBONES[2:] for k in (1, 2)] + [("scalar", None, 1, 3), ("vector", None, 1, 3)],
)
def test_the_recurrence_in_torch_is_the_one_in_numpy(
    backbone: str, site: str | None, writers: int, readers: int, group: int
) -> None:
    """Value heads of a group have the key head's queries, keys and decays per feature."""
    rng = np.random.default_rng(writers)
    t, h, k, v, n = 23, 2, 16, 20, 4
    heads = h * group
    p = {x: rng.standard_normal((t, h, k)) for x in ("q1", "q2", "k1", "k2")}
    p |= {x: -np.abs(rng.standard_normal((t, h if backbone == "vector" else heads, k))) for x in ("g1", "g2")}
    p |= {x: rng.random((t, heads)) for x in ("b1", "b2")} | {"v": rng.standard_normal((t, heads, v))}
    p |= {"S1": rng.standard_normal((heads, k, v)), "S2": rng.standard_normal((n, heads, k, v))}
    if backbone != "vector":
        p |= {x: np.broadcast_to(p[x][..., :1], p[x].shape) for x in ("g1", "g2")}
    logits = rng.standard_normal((t, n))
    eta = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ranked = np.argsort(-logits, axis=-1)
    masks = [np.zeros((t, n), bool) for _ in range(2)]
    for mask, count in zip(masks, (writers, readers), strict=True):
        np.put_along_axis(mask, ranked[:, :count], True, axis=-1)
    whole = {x: np.repeat(a, heads // a.shape[1], 1) if x[0] in "qkg" else a for x, a in p.items()}
    if backbone == "delta":
        want = numpy_sse.sse_gdn(whole, eta, masks[0], 0.25, str(site))
    else:
        want = numpy_sse.sse_recurrent(whole, eta, masks[0], masks[1], 0.25)

    spec = SSESpec(
        head_dim=k, value_dim=v, group_size=group, backbone=backbone, gate_site=site, scale=0.25,  # type: ignore[arg-type]
        router=Router(n, writers, readers), q_map="identity", k_map="identity", form="masked",  # type: ignore[arg-type]
    )  # fmt: skip
    x = {m: turned(p[m]) for m in ("q1", "q2", "k1", "k2")}
    for m in "12":
        x[f"g{m}"] = turned(p[f"g{m}"]) if backbone == "vector" else turned(p[f"g{m}"][..., 0]).unflatten(1, (h, group))
        x[f"beta{m}"] = turned(p[f"b{m}"]).unflatten(1, (h, group))
    x["v"] = turned(p["v"]).unflatten(1, (h, group))
    x["state1"] = torch.tensor(p["S1"]).unflatten(0, (h, group))[None]
    x["state2"] = torch.tensor(np.moveaxis(p["S2"], 0, 1)).unflatten(0, (h, group))[None]
    x["logits"] = torch.tensor(logits)[None]
    out = sse(spec, x)
    assert_near(out["o"], turned(want[0]).unflatten(1, (h, group)))
    assert_near(out["final1"], torch.tensor(want[1]).unflatten(0, (h, group))[None])
    assert_near(out["final2"], torch.tensor(np.moveaxis(want[2], 0, 1)).unflatten(0, (h, group))[None])


@pytest.mark.parametrize("scope", ["token", "head"])
def test_ties_of_the_router_go_to_the_lowest_partition(scope: str) -> None:
    spec = SSESpec(head_dim=16, router=Router(5, 2, 3, scope=scope), form="masked")  # type: ignore[arg-type]
    p = router_program(spec)
    line = [[0.0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [-0.0, 0.0, -1, 0.0, 2], [0, 3, 0, 3, 3]]
    rows = torch.tensor(line, dtype=torch.float64)
    logits = rows.expand(1, 4, 5) if scope == "token" else torch.stack([rows, rows.flip(0)])[None]
    got = evaluate(p, {"logits": logits}, scalars={"L": 4}, wanted=[p.var("write"), p.var("read")])
    first = lambda name: got[name] if scope == "token" else got[name][:, 0]  # noqa: E731
    chosen = [[[n for n in range(5) if row[n]] for row in first(name)[0]] for name in ("write", "read")]
    assert chosen[0] == [[0, 1], [0, 2], [0, 4], [1, 3]]
    assert chosen[1] == [[0, 1, 2], [0, 2, 3], [0, 1, 4], [1, 3, 4]]


# -- composition -----------------------------------------------------------------------------------------------------

ROW_AXES = ("i", "j")


@settings(max_examples=20)
@given(small_sse_specs(), st.integers(0, 7), st.integers(0, 7), st.integers(0, 99))
def test_a_sequence_is_its_two_parts_with_the_state_carried(spec: SSESpec, first: int, rest: int, seed: int) -> None:
    """For any masks, also such as no router gives; the gradients compose backwards."""
    length = first + rest
    for kind in states(spec):
        joint = derive_gradient(recurrence_program(spec, kind))
        x = random_inputs(joint, length, seed=seed)
        state = next(v for v in joint.inputs if v.name.startswith("state"))
        (_, do), (_, dfinal) = joint.cotangents
        whole = evaluated(joint, x, length)

        def part(start: int, stop: int, x: dict[str, Tensor] = x, p: Program = joint, **changes: Tensor) -> dict:
            cut = dict(x)
            for v in p.inputs:
                for axis in set(v.axes) & set(ROW_AXES):
                    cut[v.name] = x[v.name].narrow(v.axes.index(axis), start, stop - start)
            return evaluated(p, {**cut, **changes}, stop - start)

        early = part(0, first)
        late = part(first, length, **{state.name: early[1]})
        assert_near(torch.cat([early[0], late[0]], do.axes.index("i")), whole[0], name="o")
        assert_near(late[1], whole[1], name="final")
        early = part(0, first, **{dfinal.name: late[f"d{state.name}"]})
        for v, _ in joint.gradients:
            name = f"d{v.name}"
            rows = [a for a in v.axes if a in ROW_AXES]
            if v == state:
                got = early[name]
            elif rows:
                got = torch.cat([early[name], late[name]], v.axes.index(rows[0]))
            else:
                got = early[name] + late[name]
            assert_near(got, whole[name], name=name)


# -- the oracle ------------------------------------------------------------------------------------------------------

ORACLES = {
    name: CASES[name]
    for name in (
        "none no router", "constant per-head router", "scalar masked, k_w != k_r", "scalar gate of writers",
        "scalar no gate",
        "vector no router", "vector gates of the selected", "vector gate of readers, no shared state",
        "delta pre_norm masked, k_w != k_r", "delta post_norm per-head router",
    )
}  # fmt: skip
PACKED = (0, 1, 37, 0, 33)


@pytest.mark.parametrize("name", ORACLES)
def test_the_oracle_of_packed_sequences_is_the_recurrence_of_each(name: str) -> None:
    """Across chunks, with empty sequences and one of one token; the balance loss is that of all tokens."""
    spec = ORACLES[name]
    x = packed(spec, PACKED, 2 if "per-head" in name else 1)
    oracle = SSEOracle(spec)
    leaves = {n: x[n].requires_grad_() for n in (*oracle.names, "state")}
    rows, finals = [], []
    for sample, (a, b) in enumerate(zip(x["cu_seqlens"][:-1].tolist(), x["cu_seqlens"][1:].tolist(), strict=True)):
        one = rows_of(x, a, b, state=x["state"][sample : sample + 1])
        o, final = packed_outputs(spec, sse(spec, over_axes(spec, one)) if b > a else empty(spec, one))
        rows.append(o)
        finals.append(final)
    want = {"o": torch.cat(rows), "final": torch.cat(finals)}
    if spec.router:
        want["balance"] = balance(spec.router, x["logits"])
    total = sum((want[n] * x[f"d{n}"]).sum() for n in outputs_of(spec))
    grads = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]
    plain = {n: a.detach() for n, a in x.items()}
    got, back = oracle.values(plain), oracle.gradients(plain)
    assert got.keys() == want.keys()
    for n, y in want.items():
        assert_near(got[n], y.detach(), name=n)
    for n, g in zip(leaves, grads, strict=True):
        assert_near(back[n], g, name=f"d{n}")


def empty(spec: SSESpec, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of no token: the states stay."""
    axes = over_axes(spec, x)
    return {"o": axes["v"], **{n.replace("state", "final"): a for n, a in axes.items() if n.startswith("state")}}


@pytest.mark.parametrize("backbone", ["scalar", "vector", "delta"])
def test_a_prefill_in_two_calls_is_one_call(backbone: str) -> None:
    """Chunks of the oracle move with the split."""
    spec = SSESpec(head_dim=16, backbone=backbone, router=Router(2))  # type: ignore[arg-type]
    oracle, x = SSEOracle(spec), packed(spec, [140])
    x["dbalance"] = torch.zeros_like(x["dbalance"])  # the loss is one of all tokens
    whole, whole_back = oracle.values(x), oracle.gradients(x)
    early = oracle.values(rows_of(x, 0, 77))
    rest = rows_of(x, 77, 140, state=early["final"])
    late, late_back = oracle.values(rest), oracle.gradients(rest)
    early_back = oracle.gradients(rows_of(x, 0, 77, dfinal=late_back["state"]))
    assert_near(torch.cat([early["o"], late["o"]]), whole["o"])
    assert_near(late["final"], whole["final"])
    for n in oracle.names:
        got = late_back[n] + early_back[n] if x[n].ndim == 1 else torch.cat([early_back[n], late_back[n]])
        assert_near(got, whole_back[n], name=f"d{n}")
    assert_near(early_back["state"], whole_back["state"])


@pytest.mark.parametrize("route", ["no router", "per-head router"])
def test_no_token_leaves_the_states(route: str) -> None:
    spec = SSESpec(head_dim=16, **ROUTES[route])  # type: ignore[arg-type]
    oracle, x = SSEOracle(spec), packed(spec, [0, 0])
    got, back = oracle.values(x), oracle.gradients(x)
    assert torch.equal(got["final"], x["state"])
    assert torch.equal(back["state"], x["dfinal"])
    assert all(back[n].shape == x[n].shape for n in oracle.names)


def test_the_oracle_of_an_op_gives_the_types_of_its_tensors() -> None:
    spec = CASES["delta post_norm per-head router"]
    oracle, x = SSEOracle(spec), packed(spec, [3, 2], dtype=torch.float16)
    names = (*oracle.names, "state", "cu_seqlens")
    o, final, loss = oracle.forward(*(x[n] for n in names))
    assert (o.dtype, final.dtype, loss.dtype) == (torch.float16, torch.float32, torch.float32)
    got = oracle.backward(*(x[n] for n in (*names, "do", "dfinal", "dbalance")))
    for n, g in zip((*oracle.names, "state"), got, strict=True):
        assert (g.dtype, g.shape) == (x[n].dtype, x[n].shape), n
