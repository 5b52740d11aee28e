"""Printing the accepted sympy nodes as Triton source; anything else is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy as sp

from splagen.codegen.affine import Bound, Interval
from splagen.errors import PartitionError
from splagen.expression import log1p

_SUM, _PRODUCT, _ATOM = 1, 2, 3
_RELATIONS = {
    sp.StrictLessThan: "<",
    sp.LessThan: "<=",
    sp.StrictGreaterThan: ">",
    sp.GreaterThan: ">=",
    sp.Equality: "==",
    sp.Unequality: "!=",
}


def triton_text(expr: sp.Basic, names: Mapping[str, str]) -> str:
    """Source of `expr`; `names` maps each symbol to the source that stands for it.

    Raises PartitionError for a node without a Triton form and for a symbol without a name.
    """
    return _print(expr, names)[0]


def _print(e: sp.Basic, names: Mapping[str, str]) -> tuple[str, int]:
    if isinstance(e, sp.Expr) and e.is_number and e.is_finite and not e.is_Integer:
        return repr(float(e)), _ATOM if e >= 0 else _SUM
    match e:
        case sp.Symbol():
            if e.name not in names:
                raise PartitionError(f"nothing stands for {e.name} in a kernel", hint=f"known: {sorted(names)}")
            return names[e.name], _ATOM
        case sp.Integer():
            small = abs(int(e)) < 2**31
            return str(int(e)) if small else repr(float(e)), _ATOM if e >= 0 else _SUM
        case sp.core.numbers.Infinity():
            return 'float("inf")', _ATOM
        case sp.core.numbers.NegativeInfinity():
            return '-float("inf")', _SUM
        case sp.Piecewise():
            return _piecewise(e, names), _ATOM
        case sp.Add():
            return _sum(e, names), _SUM
        case sp.Mul():
            return _product(e, names)
        case sp.Pow():
            return _power(e, names)
        case sp.exp():
            return f"tl.exp({_print(e.args[0], names)[0]})", _ATOM
        case sp.log():
            return f"tl.log({_print(e.args[0], names)[0]})", _ATOM
        case log1p():
            return f"log1p({_print(e.args[0], names)[0]})", _ATOM
        case sp.tanh():
            return f"tanh({_print(e.args[0], names)[0]})", _ATOM
        case sp.And():
            return " & ".join(_at(a, names, _ATOM) for a in _sorted(e.args)), _SUM
        case sp.Or():
            return " | ".join(_at(a, names, _ATOM) for a in _sorted(e.args)), _SUM
        case sp.Not():
            return f"~{_at(e.args[0], names, _ATOM)}", _PRODUCT
    if type(e) in _RELATIONS:
        left, right = (_at(a, names, _SUM) for a in e.args)
        return f"({left} {_RELATIONS[type(e)]} {right})", _ATOM
    raise PartitionError(f"{type(e).__name__} has no Triton form, in `{e}`")


def _at(e: sp.Basic, names: Mapping[str, str], level: int) -> str:
    source, own = _print(e, names)
    return source if own >= level else f"({source})"


def _sorted(args: Sequence[sp.Basic]) -> list[sp.Basic]:
    return sorted(args, key=sp.default_sort_key)


def _sum(e: sp.Add, names: Mapping[str, str]) -> str:
    """Positive terms first, so that a difference reads as one."""
    out = ""
    for term in sorted(e.args, key=lambda t: (t.could_extract_minus_sign(), sp.default_sort_key(t))):
        if out and term.could_extract_minus_sign():
            out += f" - {_at(-term, names, _PRODUCT)}"
        else:
            out += (" + " if out else "") + _at(term, names, _PRODUCT if out else _SUM)
    return out


def _product(e: sp.Mul, names: Mapping[str, str]) -> tuple[str, int]:
    if e.could_extract_minus_sign():
        return f"-{_at(-e, names, _PRODUCT)}", _SUM
    number = sp.Mul(*(a for a in e.args if a.is_number and a.is_finite))
    factors = [a for a in _sorted(e.args) if not (a.is_number and a.is_finite)]
    over = ([number] if number != 1 else []) + [a for a in factors if not _is_reciprocal(a)]
    under = [1 / a for a in factors if _is_reciprocal(a)]
    text = " * ".join(_at(a, names, _PRODUCT if i == 0 else _ATOM) for i, a in enumerate(over)) or "1.0"
    for a in under:
        text += f" / {_at(a, names, _ATOM)}"
    return text, _PRODUCT


def _is_reciprocal(e: sp.Basic) -> bool:
    return isinstance(e, sp.Pow) and e.exp.is_Integer and e.exp < 0


def _power(e: sp.Pow, names: Mapping[str, str]) -> tuple[str, int]:
    base, exponent = e.args
    if base == sp.E:
        return f"tl.exp({_print(exponent, names)[0]})", _ATOM
    if base == 2:
        return f"tl.exp2({_print(exponent, names)[0]})", _ATOM
    if exponent == sp.Rational(1, 2):
        return f"tl.sqrt({_print(base, names)[0]})", _ATOM
    if exponent == -sp.Rational(1, 2):
        return f"(1.0 / tl.sqrt({_print(base, names)[0]}))", _ATOM
    if exponent.is_Integer and exponent < 0:
        return f"1.0 / {_at(base**-exponent, names, _ATOM)}", _PRODUCT
    if exponent.is_Integer:
        return " * ".join([_at(base, names, _ATOM)] * int(exponent)), _PRODUCT
    if (2 * exponent).is_Integer:
        whole = int(exponent - sp.Rational(1, 2)) if exponent > 0 else int(exponent + sp.Rational(1, 2))
        root = sp.Rational(1, 2) if exponent > 0 else sp.Rational(-1, 2)
        return f"{_at(base**whole, names, _PRODUCT)} * {_at(base**root, names, _ATOM)}", _PRODUCT
    raise PartitionError(f"power {exponent} has no Triton form, in `{e}`")


def _piecewise(e: sp.Piecewise, names: Mapping[str, str]) -> str:
    *arms, last = e.args
    source = _print(last[0], names)[0]
    if last[1] != sp.true:
        raise PartitionError(f"the last arm of `{e}` needs to hold otherwise")
    for value, condition in reversed(arms):
        source = f"tl.where({_print(condition, names)[0]}, {_print(value, names)[0]}, {source})"
    return source


def interval_text(interval: Interval, names: Mapping[str, str], extent: str, *, host: bool = False) -> tuple[str, str]:
    """Source of `low` and `high` of an interval: for a kernel, or as Python for the host.

    0 <= low <= extent and high <= extent; the interval is empty where high <= low.  `//` truncates towards zero at run
    time in Triton; the numerators are built so that this, clamped at 0, is right.
    """
    most, least = ("max", "min") if host else ("tl.maximum", "tl.minimum")

    def bound(b: Bound) -> str:
        numerator = _print(b.numerator, names)[0]
        return numerator if b.divisor == 1 else f"({numerator}) // {b.divisor}"

    high = extent
    real = [b for b in interval.lows if not b.numerator.is_zero]  # what is left holds of every low
    lows = [bound(b) for b in real]
    low = lows[0] if lows else "0"
    if real and not _is_natural(real[0]):
        low = f"{most}({low}, 0)"
    for other in lows[1:]:
        low = f"{most}({low}, {other})"
    low = f"{least}({low}, {extent})" if lows else low
    for b in interval.highs:
        high = f"{least}({high}, {bound(b)})"
    for guard in interval.guards:
        holds = f"{_print(guard, names)[0]} >= 0"
        high = f"({high} if {holds} else 0)" if host else f"tl.where({holds}, {high}, 0)"
    return low, high


def _is_natural(b: Bound) -> bool:
    return bool(b.numerator.is_Integer and b.numerator >= 0)
