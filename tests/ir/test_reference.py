"""The oracle: every operation against plain torch, and what `evaluate` says of chunks and overrides."""

import itertools
import math

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from splagen.errors import ProgramError
from splagen.expression import log1p, symbol
from splagen.ir.build import Builder
from splagen.ir.program import Program, Var
from splagen.ir.reference import evaluate
from tests.ir.strategies import LENGTH, inputs, programs, sizes

AXES = (("i", symbol("N")), ("J", symbol("nJ")), ("C", 2), ("n", 3), ("Jw", symbol("nJ")), ("d", 4))
X, Y = symbol("x0"), symbol("x1")


def builder() -> Builder:
    return Builder("p", AXES, scalars=("L", "N"))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def single(b: Builder, v: Var, arrays: dict[str, Tensor], **told: object) -> Tensor:
    return evaluate(b.program(v), arrays, **told)[v.name]  # type: ignore[arg-type]


def test_iota_is_the_position_coarse_to_fine() -> None:
    b = builder()
    got = single(b, b.iota("at", "J", "C", "n"), {}, sizes={"J": 5})
    assert torch.equal(got.flatten(), torch.arange(5 * 2 * 3))
    swapped = single(b, b.iota("at", "n", "J"), {}, sizes={"J": 5})
    assert torch.equal(swapped.T.flatten(), torch.arange(3 * 5))


@pytest.mark.parametrize(
    ("expr", "plain"),
    [
        (X + 2 * Y - sp.Rational(1, 3), lambda x, y: x + 2 * y - 1 / 3),
        (X**3 / Y, lambda x, y: x**3 / y),
        (X**-2 + Y ** sp.Rational(3, 2), lambda x, y: x**-2.0 + y**1.5),
        (sp.sqrt(X) - 1 / sp.sqrt(Y), lambda x, y: x.sqrt() - y.rsqrt()),
        (sp.exp(X) + sp.E, lambda x, y: x.exp() + math.e + 0 * y),
        (sp.log(X) + log1p(Y), lambda x, y: x.log() + y.log1p()),
        (sp.tanh(X * Y), lambda x, y: torch.tanh(x * y)),
        (sp.Piecewise((X, X > Y), (Y, True)), torch.maximum),
        (sp.Piecewise((X, sp.Or(X < 0, sp.Not(Y <= 1))), (-sp.oo, True)), None),
        (symbol("L") * X + symbol("N") * Y, lambda x, y: 7.5 * x + 5 * y),
        (10**30 * X + Y, lambda x, y: 1e30 * x + y),
    ],
)
def test_map_is_the_expression(expr: sp.Basic, plain: object) -> None:
    b = builder()
    x, y = b.input("x", ("i", "d")), b.input("y", ("i",))
    arrays = {"x": normal(5, 4).abs() + 0.1, "y": normal(5).abs() + 0.1}
    got = single(b, b.map("out", expr, x, y), arrays, scalars={"L": 7.5})
    if plain is None:
        big = arrays["y"][:, None] > 1
        want = torch.where(big, arrays["x"], torch.full_like(arrays["x"], -math.inf))
    else:
        want = plain(arrays["x"], arrays["y"][:, None].expand(5, 4))  # type: ignore[operator]
    assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (sp.Lt(X, Y), torch.lt), (sp.Le(X, Y), torch.le), (sp.Gt(X, Y), torch.gt), (sp.Ge(X, Y), torch.ge),
        (sp.Eq(X, Y), torch.eq), (sp.Ne(X, Y), torch.ne),
    ],
)  # fmt: skip
def test_map_compares_positions(rule: sp.Basic, plain: object) -> None:
    b = builder()
    got = single(b, b.map("out", rule, b.iota("r", "n"), b.iota("c", "d")), {})
    want = plain(torch.arange(3)[:, None], torch.arange(4)[None])  # type: ignore[operator]
    assert got.dtype == torch.bool
    assert torch.equal(got, want)


def test_map_of_positions_and_constants_is_exact_in_float64() -> None:
    b = builder()
    at = b.iota("at", "n")
    third = b.map("third", sp.Rational(1, 3))
    slope = b.map("slope", lambda i, c: sp.exp(-(i + 1) * sp.log(2) / 7) * (i + c) / 10, at, third)
    exact = [math.exp(-(i + 1) * math.log(2) / 7) * (i + 1 / 3) / 10 for i in range(3)]
    assert single(b, slope, {}).tolist() == pytest.approx(exact, rel=1e-15)


@given(st.lists(st.sets(st.sampled_from("iCnd"), min_size=1), min_size=1, max_size=5), st.data())
def test_contract_equals_einsum(carried: list[set[str]], data: st.DataObject) -> None:
    b = builder()
    args = [b.input("x", axes, data.draw(st.sampled_from(["real", "bool"]))) for axes in carried]
    keep = data.draw(st.sets(st.sampled_from(sorted(set().union(*carried)))))
    p = b.program(b.contract("out", keep, *args))
    arrays = inputs(p, {"i": 5}, data.draw(st.integers(0, 99)))
    (out,) = p.outputs
    spec = ",".join("".join(v.axes) for v in args) + "->" + "".join(out.axes)
    want = torch.einsum(spec, *(arrays[v.name].double() for v in args))
    assert_close(evaluate(p, arrays)["out"], want, rtol=1e-12, atol=1e-12)


def test_a_contraction_of_many_factors_stays_small() -> None:
    """Left to right, the first product alone would hold 600 * 600 * 64 * 64 numbers (12 GB)."""
    axes = [("i", 600), ("J", 600), ("d", 64), ("e", 64)]
    b = Builder("p", axes)
    names = {"u": ("i", "d"), "w": ("J", "e"), "x": ("i", "J"), "y": ("d",), "z": ("e",)}
    v = b.contract("out", (), *(b.input(n, a) for n, a in names.items()))
    arrays = {n: normal(*(dict(axes)[a] for a in at)) for n, at in names.items()}
    want = (arrays["u"] @ arrays["y"]) @ arrays["x"] @ (arrays["w"] @ arrays["z"])
    assert_close(single(b, v, arrays), want, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize("axes", [("J", "n"), ("d",), ("J", "C", "n", "d")])
def test_reduce_is_torchs_where_the_mask_holds(how: str, axes: tuple[str, ...], masked: bool) -> None:
    b = builder()
    x = b.input("x", ("J", "C", "n", "d"))
    mask = b.input("mask", ("J", "C", "n"), "bool")
    arrays = {"x": normal(3, 2, 3, 4), "mask": torch.rand(3, 2, 3) > 0.4}
    got = single(b, b.reduce("out", how, axes, x, mask if masked else None), arrays)  # type: ignore[arg-type]
    held = (arrays["mask"] if masked else torch.ones(3, 2, 3, dtype=torch.bool))[..., None].expand(3, 2, 3, 4)
    dims = ["JCnd".index(a) for a in axes]
    plain = {"sum": torch.nansum, "mean": torch.nanmean}
    if how == "max":
        want = torch.where(held, arrays["x"], -math.inf).amax(dims)
        want = torch.where(held.sum(dims) > 0, want, 0.0)
    else:
        want = plain[how](torch.where(held, arrays["x"], math.nan), dims).nan_to_num()
    assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_the_sum_of_a_mask_is_a_count() -> None:
    b = builder()
    mask = b.input("mask", ("J", "n"), "bool")
    got = single(b, b.reduce("out", "sum", ("n",), mask), {"mask": torch.tensor([[1, 0, 1], [0, 0, 0]]) > 0})
    assert got.tolist() == [2, 0]
    assert not got.is_floating_point()


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_and_lse_are_torchs_where_the_mask_holds(masked: bool) -> None:
    b = builder()
    x, mask = b.input("x", ("J", "C", "n", "d")), b.input("mask", ("J", "n"), "bool")
    held = torch.tensor([[True, False, True], [False, True, False]])
    arrays = {"x": 300 * normal(2, 2, 3, 4), "mask": held}
    where = mask if masked else None
    p = single(b, b.softmax("p", ("C", "n"), x, where), arrays)
    ell = single(b, b.lse("ell", ("C", "n"), x, where), arrays)
    hidden = torch.where(held[:, None, :, None], arrays["x"], -math.inf) if masked else arrays["x"]
    rows = hidden.permute(0, 3, 1, 2).flatten(2)
    assert_close(p.permute(0, 3, 1, 2).flatten(2), rows.softmax(-1), rtol=1e-13, atol=0)
    assert_close(ell, rows.logsumexp(-1), rtol=1e-14, atol=0)


def test_nothing_held_gives_zero_and_minus_infinity() -> None:
    b = builder()
    x, mask = b.input("x", ("J", "n")), b.input("mask", ("J", "n"), "bool")
    arrays = {"x": normal(2, 3) - 9, "mask": torch.tensor([[False] * 3, [True] * 3])}
    outs = [b.reduce("r", how, ("n",), x, mask) for how in ("sum", "mean", "max")]  # type: ignore[arg-type]
    outs += [b.softmax("p", ("n",), x, mask), b.contract("c", ("J",), x, mask)]
    outs += [b.topk("t", 2, "n", x, mask), b.lse("ell", ("n",), x, mask)]
    got = [v[0] for v in evaluate(b.program(*outs), arrays).values()]
    for zero in got[:-1]:
        assert not zero.any()
    assert got[-1] == -math.inf


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=7), st.integers(1, 8), st.data())
def test_topk_takes_the_largest_held_and_of_equals_the_first(row: list[int], k: int, data: st.DataObject) -> None:
    held = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    b = builder()
    x, mask = b.input("x", ("i",)), b.input("mask", ("i",), "bool")
    arrays = {"x": torch.tensor(row, dtype=torch.float64), "mask": torch.tensor(held)}
    got = single(b, b.topk("out", k, "i", x, mask), arrays)
    ranked = sorted((i for i in range(len(row)) if held[i]), key=lambda i: (-row[i], i))
    assert set(got.nonzero().flatten().tolist()) == set(ranked[:k])


def test_cumsum_runs_along_the_group_coarse_to_fine() -> None:
    b = builder()
    x = b.input("x", ("J", "C", "n", "d"))
    arrays = {"x": normal(3, 2, 3, 4)}
    got = single(b, b.cumsum("out", ("J", "n"), x), arrays)
    line = arrays["x"].permute(1, 3, 0, 2).flatten(2).cumsum(-1)
    assert_close(got.permute(1, 3, 0, 2).flatten(2), line, rtol=1e-13, atol=1e-13)


def test_rename_moves_the_array_to_its_new_place() -> None:
    b = builder()
    x = b.input("x", ("J", "C", "d"))
    arrays = {"x": normal(3, 2, 4)}
    got = single(b, b.rename("out", x, J="Jw"), arrays)
    assert torch.equal(got, arrays["x"].movedim(0, 1))


@pytest.mark.parametrize("size", [0, 1, 2, 7])
@pytest.mark.parametrize(("row", "column"), [("i", "j"), ("j", "i")])
def test_unit_inverse_reads_what_lies_below_the_diagonal(row: str, column: str, size: int) -> None:
    """In both orders of the pair, for every index of the other axes; the rest of x may be anything."""
    b = Builder("p", (("c", 2), *((a, symbol("N")) for a in "ijl"), ("d", 3)))
    x = b.input("x", ("c", "i", "j", "d"))
    arrays = {"x": normal(2, size, size, 3)}
    pair = (1, 2) if row == "i" else (2, 1)
    matrices = arrays["x"].movedim(pair, (-2, -1))
    upper = torch.ones(size, size, dtype=torch.bool).triu()
    arrays["x"] = matrices.masked_fill(upper, math.nan).movedim((-2, -1), pair)
    got = single(b, b.unit_inverse("y", x, row, column), arrays).movedim(pair, (-2, -1))
    one = torch.eye(size, dtype=torch.float64)
    assert_close(got @ (matrices.tril(-1) + one), one.expand(2, 3, size, size), rtol=0, atol=1e-11)
    assert not got.triu(1).any()
    assert torch.equal(got.diagonal(dim1=-2, dim2=-1), torch.ones(2, 3, size, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_have_the_type_asked_for(dtype: torch.dtype) -> None:
    b = builder()
    x = b.input("x", ("i", "d"))
    weight = b.softmax("p", ("d",), b.map("y", lambda v, i: v / (i + 1), x, b.iota("at", "i")))
    arrays = {"x": normal(5, 4)}
    got = single(b, b.contract("out", ("i",), weight, x), arrays, dtype=dtype)
    want = single(b, b.contract("out_2", ("i",), weight, x), arrays)
    assert got.dtype == dtype
    assert_close(got, want.to(dtype), rtol=1e-5, atol=1e-6)


def causal_attention() -> Program:
    axes = [("T", symbol("nT")), ("m", 2), ("J", symbol("nJ")), ("n", 2), ("d", 4)]
    b = Builder("attention", axes)
    q, k = b.input("q", ("T", "m", "d")), b.input("k", ("J", "n", "d"))
    v = b.input("v", ("J", "n", "d"))
    seen = b.map("seen", lambda i, j: sp.Le(j, i), b.iota("i", "T", "m"), b.iota("j", "J", "n"))
    s = b.contract("s", ("T", "m", "J", "n"), q, k)
    block = b.reduce("block", "sum", ("m", "n"), b.softmax("share", ("J", "n"), s, seen))
    kept = b.map("kept", sp.And(X, Y), seen, b.topk("free", 2, "J", block))
    return b.program(b.contract("o", ("T", "m", "d"), b.softmax("p", ("J", "n"), s, kept), v))


@given(st.integers(0, 3), st.integers(1, 4))
def test_a_chunk_of_queries_with_an_offset_is_the_slice_of_the_whole(start: int, count: int) -> None:
    p = causal_attention()
    generator = torch.Generator().manual_seed(start)
    arrays = {n: torch.randn(5, 2, 4, generator=generator, dtype=torch.float64) for n in "qkv"}
    whole = evaluate(p, arrays)["o"]
    chunk = evaluate(p, arrays | {"q": arrays["q"][start : start + count]}, offsets={"T": start})["o"]
    assert_close(chunk, whole[start : start + count], rtol=1e-14, atol=0)


@given(programs(), sizes(), st.data())
def test_given_values_stand_in_for_their_equations(p: Program, extents: dict[str, int], data: st.DataObject) -> None:
    """Any set of intermediate values, handed back, changes nothing; and they are not computed again."""
    arrays = inputs(p, extents, 0)
    variables = [eq.out for eq in p.equations]
    all_values = evaluate(p, arrays, scalars={"L": LENGTH}, sizes=extents, wanted=variables)
    names = data.draw(st.sets(st.sampled_from([v.name for v in variables])))
    over = {n: all_values[n] for n in names}
    got = evaluate(p, arrays, scalars={"L": LENGTH}, sizes=extents, given=over)
    for name, x in got.items():
        assert torch.equal(x, all_values[name]), name


def test_given_values_override() -> None:
    p = causal_attention()
    arrays = {n: normal(3, 2, 4) for n in "qkv"}
    free = torch.zeros(3, 3, dtype=torch.bool)
    free[1, 1] = True
    got = evaluate(p, arrays, given={"free": free})["o"]
    assert not got[0].any()
    assert not got[2].any()
    assert_close(got[1, 0], arrays["v"][1, 0], rtol=1e-14, atol=0)


def test_inputs_behind_a_given_value_are_not_needed() -> None:
    p = causal_attention()
    arrays = {n: normal(3, 2, 4) for n in "qkv"}
    p_of = evaluate(p, arrays, wanted=[p.var("p")])["p"]
    got = evaluate(p, {"v": arrays["v"]}, given={"p": p_of}, sizes={"T": 3})["o"]
    assert_close(got, evaluate(p, arrays)["o"], rtol=1e-14, atol=0)


def test_axes_of_one_symbol_have_one_size() -> None:
    b = builder()
    x = b.input("x", ("J", "d"))
    pairs = b.contract("out", ("J", "Jw"), x, b.rename("y", x, J="Jw"), b.map("w", sp.Ge(X, 0), b.iota("at", "Jw")))
    arrays = {"x": normal(3, 4)}
    assert_close(single(b, pairs, arrays), arrays["x"] @ arrays["x"].T, rtol=1e-13, atol=1e-13)
    only = b.map("only", lambda i: i + 1, b.iota("at_w", "Jw"))
    both = b.contract("both", ("J", "Jw"), b.contract("rows", ("J",), x), only)
    want = arrays["x"].sum(1)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert_close(single(b, both, arrays), want, rtol=1e-13, atol=1e-13)


def test_missing_and_misfitting_inputs_are_named() -> None:
    p = causal_attention()
    arrays = {n: normal(3, 2, 4) for n in "qkv"}
    without = {n: x for n, x in arrays.items() if n != "k"}
    with pytest.raises(ProgramError, match=r"attention needs input k\[J n d\]\nhint: given: q, v"):
        evaluate(p, without)
    with pytest.raises(ProgramError, match=r"v\[J n d\] has 3 axes, the tensor given has shape \(4,\)"):
        evaluate(p, arrays | {"v": normal(4)})
    with pytest.raises(ProgramError, match=r"axis J of v\[J n d\] is 2 in the tensor given, and 3 elsewhere"):
        evaluate(p, arrays | {"v": normal(2, 2, 4)})


def test_reduce_over_any_axes_agrees_with_one_axis_at_a_time() -> None:
    b = builder()
    x = b.input("x", ("J", "C", "n"))
    arrays = {"x": normal(4, 2, 3)}
    for axes in itertools.permutations(("J", "C", "n"), 2):
        both = single(b, b.reduce("both", "sum", axes, x), arrays)
        one = b.reduce("one", "sum", axes[:1], x)
        assert_close(single(b, b.reduce("two", "sum", axes[1:], one), arrays), both, rtol=1e-13, atol=1e-13)
