"""Feature maps against torch, metrics against closed forms and sampling, score functions by value."""

import math

import numpy as np
import pytest
import sympy as sp
import torch

from splagen import expression
from splagen.errors import ExpressionError, SpecError
from splagen.expression import evaluate, log1p, symbol
from splagen.library import (
    FEATURE_MAPS,
    FeatureMap,
    Metric,
    ScoreFunction,
    alibi,
    cumulant,
    feature_map,
    hedgehog,
    identity,
    l2norm,
    maximum,
    metric_expression,
    relu,
    score_function,
    sigmoid,
    silu,
    silu_l2norm,
    sliding_window,
    softcap,
    taylor,
    topk_softmax,
    where,
)

A, K = symbol("a"), symbol("kappa")
HEDGEHOG = "hedgehog"


def features(phi, x):
    """phi of rows x [n, d], written from the meaning in FeatureMap's docstring; [n, signs * d]."""
    parts = []
    for s in range(phi.signs):
        y = torch.tensor([[evaluate(phi.expr, {"x": v}) for v in row] for row in ((1 - 2 * s) * x).tolist()])
        y = y.to(torch.float64)
        if phi.topk is not None:  # a stable sort leaves the first of equal entries in front
            y = y.scatter(-1, y.sort(dim=-1, descending=True, stable=True).indices[:, phi.topk :], -math.inf)
        if phi.l2norm:
            y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        parts.append(y.softmax(-1) if phi.softmax else y)
    return torch.cat(parts, -1)


TORCH = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu2": lambda x: torch.cat([torch.relu(x), torch.relu(-x)], -1),
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "hedgehog": lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], -1),
    "silu": torch.nn.functional.silu,
    "l2norm": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
    "silu_l2norm": lambda x: TORCH["l2norm"](TORCH["silu"](x)),
}


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_feature_map_against_torch(name):
    phi, x = FEATURE_MAPS[name], torch.randn(5, 8, dtype=torch.float64)
    got = features(phi, x)
    torch.testing.assert_close(got, TORCH[name](x))
    assert got.shape[-1] == phi.width(8)
    if phi.non_negative:
        assert (got >= 0).all()
    assert feature_map(name) is phi
    assert feature_map(phi) is phi


def test_every_named_map_is_tested():
    assert TORCH.keys() == FEATURE_MAPS.keys()


def test_feature_map_from_formulas():
    assert feature_map(lambda x: x, signs=2, softmax=True) == hedgehog
    assert feature_map(lambda t: t) == identity
    square = feature_map(lambda x: relu(x) ** 2, non_negative=True)
    assert evaluate(square.expr, {"x": 3.0}) == 9
    assert evaluate(square.expr, {"x": -3.0}) == 0
    assert feature_map(sp.Symbol("x") * 0.1).expression == "x/10"
    assert feature_map(lambda t: t * sigmoid(t)) == silu
    assert feature_map(lambda t: t * sigmoid(t), l2norm=True) == silu_l2norm
    assert feature_map(lambda t: t, l2norm=True) == l2norm
    assert feature_map(lambda t: t, softmax=True, topk=3) == topk_softmax(3)
    assert FeatureMap("x*1").expression == "x"


@pytest.mark.parametrize("x", [symbol("x"), 2 * symbol("y") + 1, 1.5, 3, relu(symbol("x"))])
def test_silu_is_a_function_in_formulas(x):
    assert silu(x) == expression.silu(x)
    assert silu.expr == silu(symbol("x"))


def test_topk_softmax_keeps_the_first_of_equal_entries():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    e = math.e
    want = [[0, e / (2 * e + 1), 1 / (2 * e + 1), 0, e / (2 * e + 1)], [1 / 3, 1 / 3, 1 / 3, 0, 0]]
    torch.testing.assert_close(features(topk_softmax(3), x), torch.tensor(want, dtype=torch.float64))
    assert topk_softmax(3).width(5) == 5
    assert topk_softmax(3).non_negative


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: feature_map("hedgehogs"), HEDGEHOG),
        (lambda: feature_map(lambda x: sp.Max(x, 0)), "maximum"),
        (lambda: feature_map(lambda x: max(x, 0)), "maximum"),
        (lambda: feature_map(lambda x: "x"), "sympy"),
        (lambda: feature_map(lambda x: 3), "depend"),
        (lambda: feature_map(lambda x: x > 0), "condition"),
        (lambda: feature_map(lambda x: where(x > 0, x, -sp.oo)), "infinite"),
        (lambda: feature_map(lambda x, y: x), "y"),
        (lambda: feature_map(lambda x: x, non_negative=True), "non_negative"),
        (lambda: feature_map("relu", signs=2), "options"),
        (lambda: FeatureMap("x", signs=3), "signs"),
        (lambda: FeatureMap("x", l2norm=1), "feature_map.l2norm"),
        (lambda: FeatureMap("x", l2norm=True, softmax=True), "feature_map.l2norm is set together with softmax"),
        (lambda: FeatureMap("x", l2norm=True, signs=2), "feature_map.signs is 2 with l2norm"),
        (lambda: FeatureMap("x", softmax=True, topk=2, signs=2), "feature_map.signs is 2 with topk"),
        (lambda: FeatureMap("x", topk=2), "feature_map.topk is 2 without softmax"),
        (lambda: topk_softmax(0), "feature_map.topk"),
        (lambda: topk_softmax(257), "feature_map.topk"),
        (lambda: topk_softmax(True), "feature_map.topk"),
        (lambda: feature_map("softmax", topk=2), "options"),
        (lambda: feature_map(silu, l2norm=True), "options"),
        (lambda: l2norm(symbol("x")), "elementwise"),
        (lambda: FeatureMap("__import__('os')"), "unknown function"),
        (lambda: FeatureMap(3), "feature_map.expression"),
        (lambda: hedgehog(symbol("x")), "elementwise"),
        (lambda: score_function(lambda s, k: s), "k"),
        (lambda: score_function(lambda s: sp.Integer(1)), "depend"),
        (lambda: score_function(lambda s, m: where(m > 0, s, sp.oo)), "oo"),
        (lambda: ScoreFunction("s", name="a b"), "name"),
        (lambda: softcap(-1.0), "softcap"),
        (lambda: softcap(math.inf), "softcap"),
        (lambda: sliding_window(0), "sliding_window"),
    ],
)
def test_refused(make, says):
    with pytest.raises((SpecError, ExpressionError)) as caught:
        make()
    assert says in str(caught.value)
    assert caught.value.hint


def test_the_rank_of_a_covariance():
    assert [taylor(covariance=f"rank{r}").rank for r in range(1, 9)] == [*range(1, 9)]
    assert taylor(covariance="diag").rank == taylor(order=1).rank == 0
    assert metric_expression(taylor(covariance="rank2")) == metric_expression(taylor(covariance="diag"))


def test_two_factors_are_the_default_of_order_2():
    assert Metric() == taylor() == taylor(covariance="rank2")
    assert cumulant() == cumulant(covariance="rank2")
    assert taylor(order=1).covariance == cumulant(order=1).covariance == "none"


def test_metric_closed_forms():
    assert metric_expression(taylor(order=1)) == A
    assert metric_expression(cumulant(order=1)) == A
    assert metric_expression(taylor()) == A + log1p(K / 2)
    wide = metric_expression(cumulant(clamp=8.0))
    assert sp.diff(wide, A) == 1
    for kappa in (0.0, 0.5, 7.0, 8.0, 100.0):
        assert evaluate(wide, {"a": 2.0, "kappa": kappa}) == 2 + min(kappa, 8.0) / 2


@pytest.mark.parametrize("metric", [taylor(), cumulant()])
def test_metric_against_sampling(metric):
    a, kappa = 0.7, 0.04
    half = np.random.default_rng(0).normal(0.0, math.sqrt(kappa), 200_000)
    delta = np.concatenate([half, -half])
    want = math.log(np.exp(a + delta).mean())
    # the next moment, E δ⁴ = 3 κ², is what the second order leaves out
    assert evaluate(metric_expression(metric), {"a": a, "kappa": kappa}) == pytest.approx(want, abs=kappa**2)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"order": 3}, "metric.order"),
        ({"order": True}, "metric.order"),
        ({"form": "pade"}, "metric.form"),
        ({"covariance": "rank"}, "up to rank8"),
        ({"covariance": "rank0"}, "metric.covariance"),
        ({"covariance": "rank9"}, "metric.covariance"),
        ({"covariance": 4}, "metric.covariance"),
        ({"order": 1, "covariance": "rank4"}, "metric.covariance"),
        ({"covariance": "full"}, "metric.covariance"),
        ({"covariance": "none"}, "metric.covariance"),
        ({"order": 1}, "metric.covariance"),
        ({"clamp": 3.0}, "metric.clamp"),
        ({"form": "cumulant"}, "metric.clamp"),
        ({"form": "cumulant", "clamp": 0.0}, "metric.clamp"),
        ({"form": "cumulant", "clamp": math.nan}, "metric.clamp"),
        ({"order": 1, "covariance": "none", "form": "cumulant", "clamp": 8.0}, "metric.clamp"),
    ],
)
def test_metric_refused(options, field):
    with pytest.raises(SpecError, match=field) as caught:
        Metric(**options)
    assert caught.value.hint


def test_score_functions():
    at = {"s": 3.0, "m": 10.0, "n": 6.0, "h": 1.0, "H": 4.0}
    assert evaluate(softcap(5.0).expr, at) == pytest.approx(5 * math.tanh(0.6))
    assert evaluate(alibi().expr, at) == pytest.approx(3 - 4 * 2 ** (-8 * 2 / 4))
    assert evaluate(alibi().expr, {**at, "n": 14.0}) == pytest.approx(3 - 4 * 2 ** (-8 * 2 / 4))
    window = sliding_window(4)
    for n, kept in ((6, False), (7, True), (10, True), (13, True), (14, False)):
        assert (evaluate(window.expr, {**at, "n": float(n)}) == 3) is kept
    assert window.masks
    assert not softcap(5.0).masks
    assert not alibi().masks
    assert score_function(lambda m, s: maximum(s, m) * sigmoid(s)).expr.free_symbols == {
        symbol("s"),
        symbol("m"),
    }
    assert score_function(window) is window


def test_which_maps_only_grow_with_a_factor_of_their_row() -> None:
    assert {m.name for m in FEATURE_MAPS.values() if m.homogeneous} == {"identity", "relu", "relu2"}
    assert feature_map(lambda x: x**3).homogeneous
    assert not feature_map(lambda x: x**3 + x).homogeneous
