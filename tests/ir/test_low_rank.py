"""Laws of the low-rank factors of a covariance, on any rows; and of the κ that the metric makes of them."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from splagen import library
from splagen.ir.build import Builder
from splagen.ir.frontend_spla import POWER_STEPS
from splagen.ir.gradient import derive_gradient
from splagen.ir.program import LOW_RANK_FEATURES
from splagen.ir.reference import evaluate
from splagen.spec import Select, SPLASpec
from tests.ir.blocked import random_rows, value
from tests.ir.direct_spla import small_spec

MOST = library.MOST_RANKS


def factors(x: Tensor, rank: int, mask: Tensor | None = None, steps: int = POWER_STEPS) -> Tensor:
    """[..., rank, features] of x [c, rows, features]."""
    c, n, d = x.shape
    b = Builder("p", (("c", c), ("n", n), ("r", rank), ("d", d)))
    held = b.input("held", ("c", "n"), "bool") if mask is not None else None
    out = b.low_rank("w", b.input("x", ("c", "n", "d")), held, rows="n", features="d", rank="r", steps=steps)
    given = {"x": x} if mask is None else {"x": x, "held": mask}
    return evaluate(b.program(out), given)["w"]


def moment(x: Tensor) -> Tensor:
    """x^T x / n."""
    return x.mT @ x / x.shape[-2]


def rows(seed: int, n: int, d: int, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, d, generator=g, dtype=torch.float64) * torch.linspace(2, 0.1, d, dtype=torch.float64)
    if rank is not None:
        x = x[..., :rank] @ torch.randn(2, rank, d, generator=g, dtype=torch.float64)
    return x


def outer(w: Tensor) -> Tensor:
    return w.mT @ w


SHAPES = {"seed": st.integers(0, 10**6), "n": st.integers(1, 24), "d": st.integers(1, 24), "rank": st.integers(1, MOST)}


@given(**SHAPES)
@example(seed=0, n=1, d=1, rank=8)
@example(seed=0, n=2, d=24, rank=3)
def test_the_sum_of_factors_lies_between_nothing_and_the_whole(seed: int, n: int, d: int, rank: int) -> None:
    """0 <= sum_i w_i w_i^T <= x^T x / n as forms, term by term: so κ grows with the rank and never exceeds the full."""
    x = rows(seed, n, d)
    w, whole = factors(x, rank), moment(x)
    size = whole.diagonal(dim1=-2, dim2=-1).sum(-1)
    for i in range(rank + 1):
        left = whole - outer(w[:, :i])
        assert bool((torch.linalg.eigvalsh(left)[:, 0] >= -1e-12 * size).all()), i
        assert bool((left.diagonal(dim1=-2, dim2=-1) >= -1e-12 * size[:, None]).all())
    assert_close(factors(x, max(1, rank - 1)), w[:, : max(1, rank - 1)], rtol=0, atol=1e-13)


@given(seed=SHAPES["seed"], n=st.integers(1, 24), d=st.integers(1, 24), rank=st.integers(1, MOST))
def test_rows_of_small_rank_are_captured_whole(seed: int, n: int, d: int, rank: int) -> None:
    x = rows(seed, n, d, min(rank, d))
    assert_close(outer(factors(x, rank)), moment(x), rtol=1e-9, atol=1e-10 * float(moment(x).abs().max()))


@pytest.mark.parametrize("n", [2, 5, MOST + 1])
def test_one_less_than_the_keys_of_a_cell_is_the_full_covariance(n: int) -> None:
    x = rows(3, n, 16)
    centred = x - x.mean(1, keepdim=True)
    assert_close(outer(factors(centred, n - 1)), moment(centred), rtol=1e-10, atol=1e-12)


@given(seed=SHAPES["seed"], n=st.integers(2, 40), d=st.integers(2, 40), rank=st.integers(1, MOST))
def test_factors_hold_no_more_than_the_leading_eigenvectors(seed: int, n: int, d: int, rank: int) -> None:
    """The trace of r factors is at most the sum of the r leading eigenvalues."""
    x = rows(seed, n, d)
    best = torch.linalg.eigvalsh(moment(x)).flip(-1)[:, :rank].sum(-1)
    assert bool((factors(x, rank).square().sum((-2, -1)) <= best * (1 + 1e-12)).all())


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_few_steps_hold_nine_tenths_of_it_on_average(rank: int) -> None:
    """Of random keys, whose eigenvalues lie close; of single ones less: 0.59 was seen for rank 1."""
    shares = []
    for seed in range(40):
        x = rows(seed, 40, 16)
        best = torch.linalg.eigvalsh(moment(x)).flip(-1)[:, :rank].sum(-1)
        shares.append(factors(x, rank).square().sum((-2, -1)) / best)
    assert torch.cat(shares).mean() > 0.9


def test_more_steps_come_to_the_leading_eigenvectors() -> None:
    x = rows(1, 40, 12)
    values, vectors = torch.linalg.eigh(moment(x))
    leading = vectors[..., -3:] * values[:, None, -3:].sqrt()
    near = [float((outer(factors(x, 3, steps=s)) - leading @ leading.mT).norm()) for s in (1, 3, 10, 300)]
    assert near == sorted(near, reverse=True)
    assert near[-1] < 1e-8


@given(seed=SHAPES["seed"], n=st.integers(2, 16), d=st.integers(2, 16), rank=st.integers(1, MOST))
def test_order_and_size_of_rows_do_not_matter(seed: int, n: int, d: int, rank: int) -> None:
    """Rows in another order, all turned around, scaled or repeated: the factors are the same or scale along."""
    x = rows(seed, n, d)
    w = factors(x, rank)
    close = {"rtol": 0.0, "atol": 1e-7 * float(w.abs().max())}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(factors(x[:, order], rank), w, **close)
    assert_close(outer(factors(-x, rank)), outer(w), **close)
    assert_close(factors(8 * x, rank), 8 * w, rtol=0, atol=8 * close["atol"])
    assert_close(factors(torch.cat([x, x], 1), rank), w, **close)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_masked_rows_are_not_there(count: int) -> None:
    x = rows(4, 7, 5)
    mask = torch.arange(7)[None].expand(2, 7) < count
    junk = x.masked_fill(~mask[..., None], math.nan)
    want = factors(x[:, :count], 4) if count else torch.zeros(2, 4, 5, dtype=torch.float64)
    assert_close(factors(junk, 4, mask), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_keys_have_no_covariance(value: float) -> None:
    x = torch.full((2, 16, 8), value, dtype=torch.float64)
    w = factors(x - x.mean(1, keepdim=True), 8)
    assert not w.any()


@pytest.mark.parametrize(("n", "d"), [(16, 256), (128, 16), (128, 128)])
def test_a_single_key_apart_is_seen_wherever_it_points(n: int, d: int) -> None:
    """The start is orthogonal to no axis and to no difference of two axes: one factor holds one key that stands out."""
    spread = torch.zeros(2 * d - 1, n, d, dtype=torch.float64)
    spread[torch.arange(d), 5, torch.arange(d)] = 1
    spread[d + torch.arange(d - 1), 5, torch.arange(d - 1)] = 1
    spread[d + torch.arange(d - 1), 5, 1 + torch.arange(d - 1)] = -1
    x = spread - spread.mean(1, keepdim=True)
    assert_close(outer(factors(x, 1)), moment(x), rtol=0, atol=1e-13)


def test_the_starts_of_all_features_differ() -> None:
    """No two features have the same weight in a start, and none has 0."""
    for i in range(MOST):
        start = [2 * ((i + 1) * (d + 1) ** 2 % 521) - 521 for d in range(LOW_RANK_FEATURES)]
        assert len({*start}) == len(start)
        assert 0 not in start


def test_float32_agrees_where_eigenvalues_meet() -> None:
    """Two evaluations agree to rounding on rows without a leading direction, where eigenvectors would not."""
    x = torch.eye(16, dtype=torch.float64).repeat(2, 2, 1)
    single = evaluate_in_float32(x, 8)
    assert_close(single.double(), factors(x, 8), rtol=0, atol=2e-5)


def evaluate_in_float32(x: Tensor, rank: int) -> Tensor:
    c, n, d = x.shape
    b = Builder("p", (("c", c), ("n", n), ("r", rank), ("d", d)))
    out = b.low_rank("w", b.input("x", ("c", "n", "d")), rows="n", features="d", rank="r", steps=POWER_STEPS)
    return evaluate(b.program(out), {"x": x}, dtype=torch.float32)["w"]


def test_there_is_no_gradient() -> None:
    b = Builder("p", (("n", 4), ("r", 2), ("d", 3)))
    x = b.input("x", ("n", "d"))
    w = b.low_rank("w", x, rows="n", features="d", rank="r", steps=1)
    joint = derive_gradient(b.program(b.contract("out", (), b.contract("sum", (), w), b.contract("norm", (), x, x))))
    arrays = {"x": rows(0, 4, 3)[0]} | {dy.name: torch.ones((), dtype=torch.float64) for _, dy in joint.cotangents}
    found = evaluate(joint, arrays)
    (gradient,) = [g.name for _, g in joint.gradients]
    want = 2 * arrays["x"] * factors(arrays["x"][None], 2, steps=1).sum()
    assert_close(found[gradient], want, rtol=1e-12, atol=1e-12)


def spec_of(covariance: str) -> SPLASpec:
    metric = library.taylor(covariance=covariance)  # type: ignore[arg-type]
    return small_spec(
        select=Select(block_size=16, budget=1, sinks=0, local=0, metric=metric), linear=None, combine=None
    )


def test_kappa_grows_with_the_rank_to_that_of_the_full_covariance() -> None:
    """Block of 16 keys in 16 features: every κ of the metric, over ranks, against q^T Cov q."""
    rows = random_rows(spec_of("rank1"), 1, 40, 1, spread=1.5)
    names = [f"rank{r}" for r in range(1, MOST + 1)]
    kappas = [value(spec_of(name), rows, "kappa")[..., :2, :] for name in names]
    keys = rows["k"][0, :32, 0].reshape(2, 16, 16)
    centred = keys - keys.mean(1, keepdim=True)
    q = rows["q"][0]
    full = torch.einsum("thd,jde,the->htj", q, moment(centred), q)
    last = torch.zeros_like(full)
    for kappa in kappas:
        now = kappa[0, 0, :, :40, 0, :, 0]
        assert bool((now >= last - 1e-12).all())
        assert bool((now <= full * (1 + 1e-12)).all())
        last = now
    assert float(last.sum() / full.sum()) > 0.9
