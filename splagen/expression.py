"""The closed list of sympy nodes that a Map may use: the check, builders, and the value at a point.

Accepted: rationals and symbols, + * and ** with integer or half-integer exponents, exp log log1p tanh,
Piecewise whose last arm is unconditional, comparisons, And Or Not, true, false, and oo or -oo as a whole arm.
The list is closed under differentiation.
The rest is refused when it arrives, so that printers and evaluators need these nodes only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import sympy as sp
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from splagen.errors import ExpressionError

__all__ = [
    "ACCEPTED", "COMPARISONS", "FUNCTIONS", "ExpressionError", "absolute", "check_expression", "children",
    "evaluate", "exponent_fits", "is_condition", "log1p", "maximum", "minimum", "rational_of", "relu",
    "sigmoid", "silu", "symbol", "where",
]  # fmt: skip

Number: TypeAlias = "sp.Expr | float"

MAX_ARMS = 32  # ways through the Piecewise inside one condition


class log1p(sp.Function):  # type: ignore[misc]
    """log(1 + x), kept as one node because log of a rounded 1 + x loses a small x."""

    nargs = 1

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        """log1p(0) = 0; anything else stays."""
        return sp.S.Zero if x.is_zero else None

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        """1 / (1 + x)."""
        return 1 / (1 + self.args[0])


COMPARISONS: dict[type[sp.Basic], str] = {
    sp.StrictLessThan: "<", sp.LessThan: "<=", sp.StrictGreaterThan: ">", sp.GreaterThan: ">=",
    sp.Equality: "==", sp.Unequality: "!=",
}  # fmt: skip
FUNCTIONS: dict[type[sp.Basic], str] = {sp.exp: "exp", sp.log: "log", log1p: "log1p", sp.tanh: "tanh"}
ACCEPTED: frozenset[type[sp.Basic]] = frozenset(
    {sp.Add, sp.Mul, sp.Pow, sp.Piecewise, sp.And, sp.Or, sp.Not, *COMPARISONS, *FUNCTIONS}
)
"""Types of the inner nodes; leaves are Symbol, Rational, oo, -oo, E (which is exp(1)), true and false."""

_CLOSEST = {
    "Max": "use maximum() of splagen.library, which builds a Piecewise",
    "Min": "use minimum() of splagen.library, which builds a Piecewise",
    "Abs": "use absolute() of splagen.library, which builds a Piecewise",
    "sign": "use where(x > 0, 1, -1) of splagen.library",
    "Heaviside": "use where(x > 0, 1, 0) of splagen.library",
    "Xor": "write it with And, Or, Not",
    "Implies": "write it with Or and Not",
    "floor": "compare positions instead: block i holds position m where m >= B*i and m < B*(i+1)",
    "ceiling": "compare positions instead: block i holds position m where m >= B*i and m < B*(i+1)",
    "Mod": "compare positions instead: block i holds position m where m >= B*i and m < B*(i+1)",
    "erf": "use x*sigmoid(1.702*x) for gelu",
    "cosh": "write (exp(x) + exp(-x))/2",
    "sinh": "write (exp(x) - exp(-x))/2",
    "coth": "write 1/tanh(x)",
    "Pi": "write the number",
    "ImaginaryUnit": "the expression is not real: look for the root or logarithm of a negative number",
    "ComplexInfinity": "the expression divides by zero or takes log(0)",
    "NaN": "the expression is undefined: look for oo - oo, 0*oo or 0/0",
}
GRAMMAR = "accepted: + - * /, ** with integers and halves, exp log log1p tanh, where, comparisons, and or not"


def symbol(name: str) -> sp.Symbol:
    """The one symbol of this name: sympy's symbols of one name differ when their assumptions do."""
    return sp.Symbol(name, real=True)


def is_condition(expr: sp.Basic) -> bool:
    """True for a node whose value is a truth value; a symbol may stand for either."""
    return isinstance(expr, Boolean) and not isinstance(expr, sp.Symbol)


# -- the list ----------------------------------------------------------------------------------------------


def check_expression(expr: sp.Basic, names: Iterable[str]) -> sp.Basic:
    """Return `expr` with its symbols replaced by `symbol(name)` and floats by the rationals they print as.

    Args:
        expr: a sympy expression or condition.
        names: the symbols that may occur, by name.

    Raises:
        ExpressionError: a node is not on the list (with the closest alternative), or a symbol not in `names`.
    """
    allowed = frozenset(names)
    if not isinstance(expr, sp.Basic):
        raise ExpressionError(f"{expr!r} is not a sympy expression", "wrap a number in sympy.Integer or Rational")
    if expr.has(sp.ITE):
        expr = _without_ite(expr)
    changes: dict[sp.Basic, sp.Basic] = {}
    seen: set[tuple[sp.Basic, bool | None]] = set()
    stack: list[tuple[sp.Basic, bool | None]] = [(expr, None)]
    while stack:
        node, condition = item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if type(node) is sp.Symbol:
            if node.name not in allowed:
                known = ", ".join(sorted(allowed)) or "none"
                raise ExpressionError(f"unknown name {node.name} in `{expr}`", f"names: {known}")
            changes[node] = symbol(node.name)
            continue
        if isinstance(node, sp.Float):
            changes[node] = rational_of(float(node), expr)
            continue
        if condition is not None and condition != is_condition(node):
            wanted = "a condition" if condition else "a number"
            hint = "compare a number, as in x > 0" if condition else "use where(condition, 1, 0)"
            raise ExpressionError(f"`{node}` stands where {wanted} belongs, in `{expr}`", hint)
        stack += children(node, expr)
    return expr.xreplace({old: new for old, new in changes.items() if old is not new and old != new})


def children(node: sp.Basic, whole: sp.Basic) -> Iterator[tuple[sp.Basic, bool]]:
    """Arguments of a node and whether each should be a condition; raises for a node not on the list."""
    kind = type(node)
    if isinstance(node, (sp.Rational, BooleanTrue, BooleanFalse)) or node in (sp.oo, -sp.oo, sp.E):
        return
    if kind is sp.Piecewise:
        if node.args[-1].cond != sp.true:
            raise ExpressionError(f"`{node}` has no default", "end it with (value, True)")
        for value, condition in node.args:
            yield value, False
            yield condition, True
        return
    if kind is sp.Pow and not exponent_fits(node.exp):
        raise ExpressionError(
            f"exponent {node.exp} in `{whole}`",
            "exponents are integers or halves; write exp(b*log(a)) for a**b of a positive a",
        )
    if kind not in ACCEPTED:
        raise _unsupported(node, whole)
    for arg in node.args:
        if arg in (sp.oo, -sp.oo):
            raise ExpressionError(f"{arg} inside `{node}`", "oo may only be an arm of where(), or all of it")
        yield arg, kind in (sp.And, sp.Or, sp.Not)


def _unsupported(node: sp.Basic, whole: sp.Basic) -> ExpressionError:
    name = type(node).__name__
    return ExpressionError(f"{name} is not supported, in `{whole}`", _CLOSEST.get(name, GRAMMAR))


def exponent_fits(exponent: sp.Basic) -> bool:
    """True for an integer or a half."""
    if isinstance(exponent, sp.Float):
        return float(2 * exponent).is_integer()
    return isinstance(exponent, sp.Rational) and exponent.q in (1, 2)


def rational_of(value: float, where_: object) -> sp.Rational:
    """The decimal that a float prints as, exactly: 0.1 is 1/10."""
    if not math.isfinite(value):
        raise ExpressionError(f"{value} in `{where_}`", "write oo for infinity")
    return sp.Rational(repr(value))


# -- functions that build accepted nodes -------------------------------------------------------------------


def _sympy(value: object) -> sp.Basic:
    return sp.sympify(value, strict=True)  # strict: text is refused, never executed


def where(condition: sp.Basic | bool, value: Number, *rest: sp.Basic | bool | float) -> sp.Expr:
    """`value` where `condition` holds, else the rest: further conditions and values, at last the default."""
    items = [_sympy(x) for x in (condition, value, *rest)]
    if len(items) % 2 == 0:
        raise ExpressionError(f"where() of {len(items)} arguments", "where(condition, value, ..., default)")
    pairs = [(items[i + 1], _without_arms(items[i])) for i in range(0, len(items) - 1, 2)]
    # Not evaluated: sympy would solve and merge conditions, which is slow and differs between its versions.
    return sp.Piecewise(*pairs, (items[-1], sp.true), evaluate=False)


def _without_arms(condition: sp.Basic) -> sp.Basic:
    """A condition without Piecewise inside: sympy would turn it into ITE, which is not on the list."""
    inner = [node for node in sp.preorder_traversal(condition) if isinstance(node, sp.Piecewise)]
    if math.prod(len(node.args) for node in inner) > MAX_ARMS:
        raise ExpressionError(f"a condition over more than {MAX_ARMS} cases", "compare simpler quantities")
    if not inner:
        return condition
    cases, before = [], sp.true
    for value, holds in inner[0].args:
        cases.append(sp.And(before, holds, _without_arms(condition.xreplace({inner[0]: value}))))
        before = sp.And(before, sp.Not(holds))
    return sp.Or(*cases)


def _without_ite(expr: sp.Basic) -> sp.Basic:
    return expr.replace(
        lambda node: isinstance(node, sp.ITE),
        lambda node: sp.Or(sp.And(node.args[0], node.args[1]), sp.And(sp.Not(node.args[0]), node.args[2])),
    )


def maximum(a: Number, b: Number) -> sp.Expr:
    """The larger of two; a tie is b's, also for the gradient."""
    return where(sp.Gt(_sympy(a), _sympy(b)), a, b)


def minimum(a: Number, b: Number) -> sp.Expr:
    """The smaller of two; a tie is b's, also for the gradient."""
    return where(sp.Lt(_sympy(a), _sympy(b)), a, b)


def absolute(x: Number) -> sp.Expr:
    """|x|, with slope 1 at 0."""
    return where(sp.Ge(_sympy(x), 0), x, -x)


def relu(x: Number) -> sp.Expr:
    """max(x, 0), with slope 0 at 0."""
    return where(sp.Gt(_sympy(x), 0), x, 0)


def sigmoid(x: Number) -> sp.Expr:
    """1 / (1 + exp(-x)) as (1 + tanh(x/2))/2, whose derivative stays finite where exp overflows."""
    return (1 + sp.tanh(_sympy(x) / 2)) / 2


def silu(x: Number) -> sp.Expr:
    """x * sigmoid(x)."""
    return _sympy(x) * sigmoid(x)


# -- numbers -----------------------------------------------------------------------------------------------


def evaluate(expr: sp.Basic, values: Mapping[str, float]) -> float:
    """Value of an accepted expression at one point, in Python floats; truth values are 0 and 1.

    Overflow gives inf and an undefined value nan, as in floating-point arrays.
    """
    if isinstance(expr, sp.Symbol):
        return float(values[expr.name])
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return float(bool(expr))
    if isinstance(expr, sp.Piecewise):
        return next(evaluate(v, values) for v, c in expr.args if evaluate(c, values))
    if expr == sp.E or isinstance(expr, sp.Number):
        return float(expr)
    if type(expr) not in _VALUE:
        raise _unsupported(expr, expr)
    args = [evaluate(a, values) for a in expr.args]
    try:
        return float(_VALUE[type(expr)](*args))
    except OverflowError:
        return math.inf
    except (ValueError, ZeroDivisionError):
        return math.nan


_VALUE: dict[type[sp.Basic], Callable[..., float]] = {
    sp.Add: lambda *x: sum(x), sp.Mul: lambda *x: math.prod(x), sp.Pow: math.pow,
    sp.exp: math.exp, sp.log: math.log, log1p: math.log1p, sp.tanh: math.tanh,
    sp.And: lambda *x: all(x), sp.Or: lambda *x: any(x), sp.Not: operator.not_,
    sp.StrictLessThan: operator.lt, sp.LessThan: operator.le, sp.StrictGreaterThan: operator.gt,
    sp.GreaterThan: operator.ge, sp.Equality: operator.eq, sp.Unequality: operator.ne,
}  # fmt: skip
