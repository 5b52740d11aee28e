"""Feature maps, selection metrics and score functions, as data: canonical text and a few flags.

Each is given by name, by an expression, or by a Python function of sympy symbols that returns one.
`where`, `maximum` and their like build Piecewise, which stays on the accepted list when differentiated.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import sympy as sp

from splagen.errors import ExpressionError, SpecError
from splagen.expression import (
    absolute,
    check_expression,
    evaluate,
    is_condition,
    log1p,
    maximum,
    minimum,
    sigmoid,
    symbol,
    where,
)
from splagen.expression_text import parse, text
from splagen.fields import identifier, is_a, one_of, positive_number, whole

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "Metric",
    "ScoreFunction",
    "absolute",
    "alibi",
    "cumulant",
    "elu1",
    "exp",
    "feature_map",
    "hedgehog",
    "identity",
    "l2norm",
    "log1p",
    "maximum",
    "metric_expression",
    "minimum",
    "relu",
    "relu2",
    "score_function",
    "sigmoid",
    "silu",
    "silu_l2norm",
    "sliding_window",
    "softcap",
    "softmax",
    "taylor",
    "topk_softmax",
    "where",
]

Formula: TypeAlias = "Callable[..., sp.Basic | float] | sp.Basic"


def _canonical(source: str | sp.Basic, names: tuple[str, ...], needs: str, path: str) -> str:
    """Canonical text of an expression or of text, checked to be a number that depends on `needs`."""
    try:
        expr = check_expression(source, names) if isinstance(source, sp.Basic) else parse(source, names)
    except ExpressionError as error:
        raise ExpressionError(f"{path}: {error.message}", error.hint) from None
    if is_condition(expr):
        raise ExpressionError(f"{path} is the condition `{expr}`", "use where(condition, a, b)")
    if symbol(needs) not in expr.free_symbols:
        raise ExpressionError(f"{path} does not depend on {needs}: `{expr}`", f"write it in terms of {needs}")
    canonical = text(expr)
    if parse(canonical, names) != expr:
        canonical = text(parse(canonical, names))
    return canonical


def _call(fn: Callable[..., object], names: tuple[str, ...], path: str) -> sp.Basic:
    """The expression that a function of some of `names` builds; parameters go by name."""
    parameters = tuple(inspect.signature(fn).parameters)
    if len(names) == 1 and len(parameters) == 1:
        parameters = names
    if unknown := sorted({*parameters} - {*names}):
        raise SpecError(f"{path} takes {', '.join(unknown)}", f"its parameters are among {', '.join(names)}")
    try:
        return sp.sympify(fn(*[symbol(p) for p in parameters]), strict=True)
    except (TypeError, sp.SympifyError) as error:
        hint = "build it with sympy and splagen.library: where(), maximum() instead of if, max"
        raise ExpressionError(f"{path} does not give a sympy expression: {error}", hint) from error


# -- feature maps ------------------------------------------------------------------------------------------


def later(default: Any) -> Any:
    """A field younger than the first specs: their text, and so their digest, leaves it out at its default."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class FeatureMap:
    """phi of a linear branch, applied to rows x [..., D] in float32; the result has `width(D)` features.

    phi(x) runs over an extra axis s of size `signs`: y[s, :] = expression at (1 - 2 s) x, then softmax over D
    if `softmax`.  Source: RAttention, arXiv 2506.15545 (hedgehog is its feature map); l2norm and topk: SSE,
    arXiv 2507.16577.

    Attributes:
        expression: canonical text in x, elementwise.
        signs: 1, or 2 to apply it to x and to -x; 1 with l2norm or topk.
        softmax: whether a softmax over the head dimension follows, for each sign alone.
        non_negative: whether every feature is >= 0, which a normaliser needs; a softmax always is.
        name: of a named map; "custom" otherwise.
        l2norm: whether the row y is divided by sqrt(Σ y² + 1e-6); not together with softmax.
        topk: k from 1 to 256: the softmax runs over the k largest entries of the row y, of equal ones the first,
            and the others give 0.  None takes all of them.

    Raises:
        ExpressionError: the expression is not accepted.
        SpecError: a field is out of range, options exclude each other, or a map declared non-negative has a
            negative value.
    """

    expression: str
    signs: Literal[1, 2] = 1
    softmax: bool = False
    non_negative: bool = False
    name: str = "custom"
    l2norm: bool = later(False)
    topk: int | None = later(None)

    def __post_init__(self) -> None:
        identifier("feature_map.name", self.name)
        one_of("feature_map.signs", self.signs, (1, 2))
        for flag in ("softmax", "non_negative", "l2norm"):
            one_of(f"feature_map.{flag}", getattr(self, flag), (False, True))
        if self.topk is not None:
            whole("feature_map.topk", self.topk, 1, 256)
        if self.topk is not None and not self.softmax:
            raise SpecError(f"feature_map.topk is {self.topk} without softmax", "set softmax, or leave topk out")
        if self.l2norm and self.softmax:
            raise SpecError("feature_map.l2norm is set together with softmax", "set one of the two")
        if self.signs == 2 and (self.l2norm or self.topk is not None):
            raise SpecError(f"feature_map.signs is 2 with {'l2norm' if self.l2norm else 'topk'}", "set signs to 1")
        object.__setattr__(self, "expression", _canonical(self.expression, ("x",), "x", "feature_map.expression"))
        object.__setattr__(self, "non_negative", self.non_negative or self.softmax)
        expr = self.expr
        if expr.has(sp.oo, -sp.oo):
            raise ExpressionError(f"feature_map.expression has an infinite arm: {self.expression}", "make it finite")
        if self.non_negative and not self.softmax:
            bad = [x for x in (-8.0, -2.0, -0.5, -0.01, 0.01, 0.5, 2.0, 8.0) if not evaluate(expr, {"x": x}) >= 0]
            if bad:
                hint = "drop non_negative, or square it or take relu"
                raise SpecError(f"feature_map.non_negative: {self.expression} is not >= 0 at x = {bad[0]}", hint)

    @property
    def expr(self) -> sp.Expr:
        """The elementwise part as a sympy expression in `symbol("x")`."""
        return parse(self.expression, ("x",))

    @property
    def homogeneous(self) -> bool:
        """True if φ(c x) is a power of c times φ(x) for c > 0, as some points tell: for identity, relu and relu2."""
        if self.softmax or self.l2norm:
            return False
        expr, degrees = self.expr, set()
        for x in (-8.0, -0.5, -0.01, 0.01, 0.5, 8.0):
            value = evaluate(expr, {"x": x})
            for c in (2.0, 3.0):
                grown = evaluate(expr, {"x": c * x})
                if value * grown > 0:
                    degrees.add(round(math.log(grown / value, c), 6))
                elif value or grown:
                    return False
        return len(degrees) == 1

    def width(self, head_dim: int) -> int:
        """Number of features of a row of `head_dim` numbers."""
        return self.signs * head_dim

    def __call__(self, x: sp.Expr | float) -> sp.Expr:
        """The elementwise map at an expression, so that `lambda x: relu(x) ** 2` is a formula."""
        if self.softmax or self.l2norm or self.signs == 2:
            hint = "use identity, relu, elu1, exp or silu in a formula"
            raise ExpressionError(f"{self.name} is not elementwise", hint)
        return self.expr.xreplace({symbol("x"): sp.sympify(x, strict=True)})


identity = FeatureMap("x", name="identity")
relu = FeatureMap("relu(x)", non_negative=True, name="relu")
relu2 = FeatureMap("relu(x)", signs=2, non_negative=True, name="relu2")
elu1 = FeatureMap("where(x > 0, x + 1, exp(x))", non_negative=True, name="elu1")
exp = FeatureMap("exp(x)", non_negative=True, name="exp")
softmax = FeatureMap("x", softmax=True, name="softmax")
hedgehog = FeatureMap("x", signs=2, softmax=True, name="hedgehog")
silu = FeatureMap("silu(x)", name="silu")
l2norm = FeatureMap("x", l2norm=True, name="l2norm")
silu_l2norm = FeatureMap("silu(x)", l2norm=True, name="silu_l2norm")

_NAMED = (identity, relu, relu2, elu1, exp, softmax, hedgehog, silu, l2norm, silu_l2norm)
FEATURE_MAPS: dict[str, FeatureMap] = {m.name: m for m in _NAMED}


def topk_softmax(k: int) -> FeatureMap:
    """Softmax over the k largest entries of a row, k from 1 to 256, and 0 elsewhere: SSE, arXiv 2507.16577."""
    return FeatureMap("x", softmax=True, topk=k)


def _options(phi: FeatureMap) -> tuple[int, bool, bool, int | None]:
    return phi.signs, phi.softmax, phi.l2norm, phi.topk


def feature_map(
    source: FeatureMap | str | Formula,
    *,
    signs: Literal[1, 2] = 1,
    softmax: bool = False,
    non_negative: bool = False,
    l2norm: bool = False,
    topk: int | None = None,
) -> FeatureMap:
    """A feature map from a name, a formula in x, a function of a sympy symbol, or a feature map (kept).

    Args:
        source: for example `"hedgehog"` or `lambda x: relu(x) ** 2`.
        signs: 1, or 2 to apply it to x and to -x.
        softmax: whether a softmax over the head dimension follows.
        non_negative: declares that the formula is >= 0 everywhere.
        l2norm: whether the row is divided by its length.
        topk: how many of the largest entries the softmax takes; None is all.

    Raises:
        SpecError: an unknown name, or options given together with a map that is complete already.
        ExpressionError: the formula is not accepted.
    """
    complete = isinstance(source, (FeatureMap, str))
    if complete and (signs != 1 or softmax or non_negative or l2norm or topk is not None):
        raise SpecError(f"feature_map: options given together with {source!r}", "give a formula and the options")
    if isinstance(source, FeatureMap):
        return source
    if isinstance(source, str):
        if source not in FEATURE_MAPS:
            near = difflib.get_close_matches(source, FEATURE_MAPS, 1, 0.0)
            raise SpecError(
                f"feature_map: unknown name {source!r}",
                f"did you mean {near[0]}? names: {', '.join(FEATURE_MAPS)}; or give a function of x",
            )
        return FEATURE_MAPS[source]
    expr = _call(source, ("x",), "feature_map") if callable(source) else source
    formula = _canonical(expr, ("x",), "x", "feature_map")
    made = FeatureMap(formula, signs, softmax, non_negative, l2norm=l2norm, topk=topk)
    for known in FEATURE_MAPS.values():  # one spelling of one map, so that equal specs have equal digests
        if (known.expression, *_options(known)) == (made.expression, *_options(made)):
            return known
    return made


# -- metrics -----------------------------------------------------------------------------------------------

MOST_RANKS = 8  # factors of a covariance: more cost what the keys of a block do
Covariance: TypeAlias = Literal["none", "diag", "rank1", "rank2", "rank3", "rank4", "rank5", "rank6", "rank7", "rank8"]

_COVARIANCES = {
    "rank": f"a low-rank covariance says its rank, up to rank{MOST_RANKS}",
    "pairdiag": "only the diagonal of the covariance is kept",
    "full": "a full covariance costs more bytes than the keys of its block",
}


@dataclass(frozen=True)
class Metric:
    """Log score of a block of keys, from their mean and covariance; source: SPLA, arXiv 2601.22379.

    With a = q·mean and κ = qᵀ Cov q in natural units (q is scaled), the score estimates log E exp(q·k).

    Attributes:
        order: 1 uses the mean only, 2 the variance as well.
        form: "taylor" expands the mass, giving a + log1p(κ/2); "cumulant" expands its logarithm: a + κ/2.
        covariance: "none" (order 1); of order 2 "rank1" to "rank8", "rank2" unless told: κ = Σ_r (q·w_r)² over that
            many factors w_r of the covariance, without what they leave of its diagonal; or "diag": κ = Σ_i q_i²
            variance_i, per feature, 1/n.
        clamp: largest κ that enters a cumulant of order 2, which overrates wide blocks; else None.

    Raises:
        SpecError: a combination outside these rules, naming the field.
    """

    order: Literal[1, 2] = 2
    form: Literal["taylor", "cumulant"] = "taylor"
    covariance: Covariance = "rank2"
    clamp: float | None = None

    def __post_init__(self) -> None:
        one_of("metric.order", self.order, (1, 2))
        one_of("metric.form", self.form, ("taylor", "cumulant"))
        is_a("metric.covariance", self.covariance, (str,), f'"none", "diag", or "rank1" to "rank{MOST_RANKS}"')
        if self.covariance not in (("none",) if self.order == 1 else get_args(Covariance)[1:]):
            wanted = _covariance(self.order)
            why = _COVARIANCES.get(self.covariance, f"order {self.order} uses covariance {wanted!r}")
            raise SpecError(
                f"metric.covariance is {self.covariance!r}: {why}",
                f'"rank1" to "rank{MOST_RANKS}" or "diag" with order 2, or "none" with order 1',
            )
        if self.form == "cumulant" and self.order == 2:
            hint = "8.0 for instance: without it one outlier key wins every selection"
            object.__setattr__(self, "clamp", positive_number("metric.clamp", self.clamp, hint))
        elif self.clamp is not None:
            raise SpecError(f"metric.clamp is {self.clamp!r}", "only a cumulant of order 2 takes a clamp: drop it")

    @property
    def rank(self) -> int:
        """Factors of the covariance; 0 where it is none or a diagonal."""
        return int(self.covariance.removeprefix("rank")) if self.covariance.startswith("rank") else 0


def _covariance(order: int) -> Covariance:
    """What a metric takes unless told."""
    return "none" if order == 1 else "rank2"


def taylor(order: Literal[1, 2] = 2, covariance: Covariance | None = None) -> Metric:
    """Expansion of the mass, SPLA's metric: a, or a + log1p(κ/2). `covariance` None: "none", of order 2 "rank2"."""
    return Metric(order, "taylor", covariance or _covariance(order))


def cumulant(order: Literal[1, 2] = 2, covariance: Covariance | None = None, clamp: float | None = 8.0) -> Metric:
    """Expansion of the log mass, exact for Gaussian keys: a (which has no clamp), or a + min(κ, clamp)/2.

    `covariance` None: "none", of order 2 "rank2".
    """
    return Metric(order, "cumulant", covariance or _covariance(order), None if order == 1 else clamp)


@cache
def metric_expression(metric: Metric) -> sp.Expr:
    """The log score in `symbol("a")` and `symbol("kappa")`, from E exp(a + δ), E δ = 0, E δ² = κ."""
    a, kappa = symbol("a"), symbol("kappa")
    delta, t = sp.Symbol("delta", real=True), sp.Symbol("t", real=True)
    moments = {0: sp.S.One, 1: sp.S.Zero, 2: kappa}

    def expectation(expr: sp.Expr) -> sp.Expr:
        polynomial = sp.Poly(expr, delta)
        return sum((c * moments[k] for (k,), c in polynomial.terms()), sp.S.Zero)

    # Mass relative to exp(a); t counts orders of δ.
    mass = expectation(sp.series(sp.exp(t * delta), t, 0, metric.order + 1).removeO())
    if metric.form == "taylor":
        excess = sp.expand(mass.subs(t, 1) - 1)
        return a + log1p(excess)
    correction = sp.expand(sp.series(sp.log(mass), t, 0, metric.order + 1).removeO().subs(t, 1))
    if metric.clamp is not None:
        correction = correction.xreplace({kappa: minimum(kappa, sp.Rational(repr(metric.clamp)))})
    return a + correction


# -- score functions ---------------------------------------------------------------------------------------

_SCORE = ("s", "m", "n", "h", "H")


@dataclass(frozen=True)
class ScoreFunction:
    """What the softmax sees in place of its score, per query, key and head; residual and metric do not.

    Attributes:
        expression: canonical text in s (the score, already scaled), m and n (query and key position, from 0),
            h (query head) and H (number of query heads).  -oo masks the key.
        name: an identifier, for listings.
        masks: whether some arm is -oo; found, not given.

    Raises:
        ExpressionError: the expression is not accepted, does not use s, or contains oo.
    """

    expression: str
    name: str = "custom"
    masks: bool = field(init=False)

    def __post_init__(self) -> None:
        identifier("score.name", self.name)
        object.__setattr__(self, "expression", _canonical(self.expression, _SCORE, "s", "score.expression"))
        if self.expr.has(sp.oo):
            raise ExpressionError(f"score.expression gives oo: {self.expression}", "use a large number; -oo masks")
        object.__setattr__(self, "masks", self.expr.has(-sp.oo))

    @property
    def expr(self) -> sp.Expr:
        """The function as a sympy expression in `symbol("s")` and so on."""
        return parse(self.expression, _SCORE)


def score_function(source: ScoreFunction | Formula, name: str = "custom") -> ScoreFunction:
    """A score function from a formula in s, m, n, h, H, or from a function of some of them, by these names.

    Args:
        source: for example `lambda s, m, n: where(m - n < 512, s, -oo)`; a ScoreFunction is kept.
        name: an identifier, for listings.

    Raises:
        SpecError: the function has a parameter of another name, or `name` is no identifier.
        ExpressionError: the formula is not accepted.
    """
    if isinstance(source, ScoreFunction):
        return source
    expr = _call(source, _SCORE, "score") if callable(source) else source
    return ScoreFunction(_canonical(expr, _SCORE, "s", "score"), name)


def softcap(cap: float) -> ScoreFunction:
    """cap * tanh(s / cap), which keeps scores inside (-cap, cap)."""
    c = _positive(cap, "softcap")
    return score_function(c * sp.tanh(symbol("s") / c), "softcap")


def alibi() -> ScoreFunction:
    """s - slope |m - n| with slope 2**(-8 (h + 1) / H)."""
    s, m, n, h, heads = (symbol(name) for name in _SCORE)
    return score_function(s - sp.exp(-8 * sp.log(2) * (h + 1) / heads) * absolute(m - n), "alibi")


def sliding_window(width: int) -> ScoreFunction:
    """Keys closer than `width` positions, the query's own included: n in (m - width, m + width)."""
    w = _positive(width, "sliding_window")
    s, m, n, *_ = (symbol(name) for name in _SCORE)
    return score_function(where(sp.And(m - n < w, n - m < w), s, -sp.oo), "sliding_window")


def _positive(value: float, path: str) -> sp.Rational:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SpecError(f"{path}({value!r})", "give a positive finite number")
    return sp.Rational(repr(value))
