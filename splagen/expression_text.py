"""Expressions as text: read through Python's grammar and a fixed table, never executed; printed to read back.

Text comes from files that anybody may have written: every intermediate result is bounded before the next.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import sympy as sp
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from splagen.expression import (
    COMPARISONS,
    FUNCTIONS,
    GRAMMAR,
    ExpressionError,
    absolute,
    check_expression,
    children,
    evaluate,
    exponent_fits,
    is_condition,
    log1p,
    maximum,
    minimum,
    rational_of,
    relu,
    sigmoid,
    silu,
    symbol,
    where,
)

__all__ = ["parse", "text"]

MAX_TEXT = 2000  # characters of an expression in a file
MAX_DEPTH = 32  # nesting; a chain of + or of * is one level
MAX_NODES = 2000  # of the tree, shared parts counted each time
MAX_BITS = 512  # of a numerator or denominator
MAX_EXPONENT = 64
MAX_VALUE = 1e300  # of a constant


# -- reading -----------------------------------------------------------------------------------------------


def _exp(x: sp.Expr) -> sp.Expr:
    # sympy turns exp(c*log(a)) into a**c, which for a large c never ends
    for term in sp.Add.make_args(x):
        if term.has(sp.log) and abs(term.as_coeff_Mul()[0]) > MAX_EXPONENT:
            raise ExpressionError(f"exp({term}) is a power beyond {MAX_EXPONENT}", "rescale it")
    if not x.free_symbols and not evaluate(x, {}) <= math.log(MAX_VALUE):
        raise ExpressionError(f"exp({x}) is larger than {MAX_VALUE:g}", "rescale the expression")
    return sp.exp(x)


# Calls in text: name -> (builder, number of arguments); only where() takes any number, and conditions.
_CALLS: dict[str, tuple[Callable[..., sp.Basic], int | None]] = {
    "exp": (_exp, 1),
    "expm1": (lambda x: _exp(x) - 1, 1),
    "log": (sp.log, 1),
    "log1p": (log1p, 1),
    "sqrt": (sp.sqrt, 1),
    "tanh": (sp.tanh, 1),
    "sigmoid": (sigmoid, 1),
    "silu": (silu, 1),
    "relu": (relu, 1),
    "abs": (absolute, 1),
    "maximum": (maximum, 2),
    "minimum": (minimum, 2),
    "where": (where, None),
}
RESERVED = frozenset({*_CALLS, "oo"})


def parse(source: str, names: Iterable[str]) -> sp.Basic:
    """Read an expression from text through Python's grammar and a fixed table; the text is never executed.

    Args:
        source: for example ``where(m >= n, 30*tanh(s/30), -oo)``; at most MAX_TEXT characters.
        names: the symbols that may occur, by name.

    Raises:
        ExpressionError: the text is not an expression, uses something outside the table, or is too large.
    """
    allowed = frozenset(names)
    for name in sorted(allowed):
        if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
            raise ExpressionError(f"{name!r} cannot name a symbol", "use an identifier that is no function's name")
    if not isinstance(source, str):
        raise ExpressionError(f"an expression is text, not {type(source).__name__}", "quote it")
    if len(source) > MAX_TEXT:
        raise ExpressionError(f"an expression of {len(source)} characters", f"at most {MAX_TEXT} are read")
    try:
        tree = ast.parse(source.strip(), mode="eval")
        expr = _Reader(source, allowed).read(tree.body, 0)
    except ExpressionError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExpressionError(f"cannot read `{_short(source)}`: {reason}", GRAMMAR) from None
    return check_expression(expr, allowed)


def _bits(number: sp.Rational) -> int:
    return max(int(number.p).bit_length(), int(number.q).bit_length())


def _short(source: str) -> str:
    return source if len(source) <= 80 else f"{source[:77]}..."


class _Reader:
    """Builds the expression of one text; every intermediate result is bounded before the next is computed."""

    compare: Mapping[type[ast.cmpop], Callable[..., sp.Basic]] = {
        ast.Lt: sp.Lt, ast.LtE: sp.Le, ast.Gt: sp.Gt, ast.GtE: sp.Ge, ast.Eq: sp.Eq, ast.NotEq: sp.Ne,
    }  # fmt: skip

    def __init__(self, source: str, names: frozenset[str]) -> None:
        self.source = source
        self.names = names
        self.sizes: dict[sp.Basic, int] = {}

    def refuse(self, what: str, hint: str = GRAMMAR) -> ExpressionError:
        return ExpressionError(f"{what}, in `{_short(self.source)}`", hint)

    def read(self, node: ast.expr, depth: int) -> sp.Basic:
        if depth > MAX_DEPTH:
            raise self.refuse(f"nested deeper than {MAX_DEPTH}", "write it with fewer parentheses")
        return self.bounded(self.build(node, depth + 1))

    def build(self, node: ast.expr, depth: int) -> sp.Basic:
        match node:
            case ast.Constant(value=value):
                return self.constant(value)
            case ast.Name(id="oo"):
                return sp.oo
            case ast.Name(id=name):
                if name not in self.names:
                    known = ", ".join(sorted(self.names)) or "none"
                    raise self.refuse(f"unknown name {name}", f"names: {known}")
                return symbol(name)
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                return self.joined(sp.Add, list(self.terms(node, depth)))
            case ast.BinOp(op=ast.Mult() | ast.Div()) | ast.UnaryOp(op=ast.USub()):
                return self.joined(sp.Mul, list(self.factors(node, depth)))
            case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
                return self.power(self.number(base, depth), self.number(exponent, depth))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return sp.Not(self.condition(operand, depth))
            case ast.BoolOp(op=op, values=values):
                join = sp.And if isinstance(op, ast.And) else sp.Or
                return join(*[self.condition(v, depth) for v in values])
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self.compared([self.number(x, depth) for x in (left, *others)], ops)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self.call(name, args, depth)
        raise self.refuse(f"{type(node).__name__} is not part of an expression")

    def number(self, node: ast.expr, depth: int) -> sp.Expr:
        value = self.read(node, depth)
        if is_condition(value):
            raise self.refuse(f"condition `{value}` stands where a number belongs", "use where(condition, 1, 0)")
        return value

    def condition(self, node: ast.expr, depth: int) -> sp.Basic:
        value = self.read(node, depth)
        if not isinstance(value, Boolean):
            raise self.refuse(f"number `{value}` stands where a condition belongs", "compare it, as in x > 0")
        return value

    def constant(self, value: object) -> sp.Basic:
        match value:
            case bool():
                return sp.true if value else sp.false
            case int():
                return sp.Integer(value)
            case float():
                return rational_of(value, self.source)
        raise self.refuse(f"{type(value).__name__} is not a number")

    def terms(self, node: ast.expr, depth: int) -> Iterator[sp.Expr]:
        """Terms of a chain of + and -, from the right; a loop, since the chain may be long."""
        while isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            if isinstance(node.op, ast.Add):
                yield self.number(node.right, depth)
            else:
                # All factors in one product: -1 times a product of two would be spread over a sum inside it.
                yield self.joined(sp.Mul, [sp.S.NegativeOne, *self.factors(node.right, depth)])
            node = node.left
        yield self.number(node, depth)

    def factors(self, node: ast.expr, depth: int) -> Iterator[sp.Expr]:
        """Factors of a chain of * / and unary minus, from the right."""
        while True:
            match node:
                case ast.BinOp(op=ast.Mult(), left=left, right=right):
                    yield self.number(right, depth)
                case ast.BinOp(op=ast.Div(), left=left, right=right):
                    yield self.power(self.number(right, depth), sp.S.NegativeOne)
                case ast.UnaryOp(op=ast.USub(), operand=left):
                    yield sp.S.NegativeOne
                case _:
                    break
            node = left
        yield self.number(node, depth)

    def joined(self, kind: Callable[..., sp.Expr], parts: list[sp.Expr]) -> sp.Expr:
        if sum(self.size(p) for p in parts) > MAX_NODES:
            raise self.refuse(f"more than {MAX_NODES} nodes", "write a smaller expression")
        return kind(*parts)

    def power(self, base: sp.Expr, exponent: sp.Expr) -> sp.Expr:
        if not exponent_fits(exponent) or abs(exponent) > MAX_EXPONENT:
            hint = f"exponents are integers or halves up to {MAX_EXPONENT}; write exp(b*log(a)) for others"
            raise self.refuse(f"exponent {exponent}", hint)
        if base.is_zero and exponent < 0:
            raise self.refuse("division by zero", "the divisor must not be 0")
        return self.bounded(sp.Pow(base, exponent))

    def compared(self, sides: list[sp.Expr], ops: list[ast.cmpop]) -> sp.Basic:
        parts = []
        for left, op, right in zip(sides[:-1], ops, sides[1:], strict=True):
            if type(op) not in self.compare:
                raise self.refuse(f"{type(op).__name__} is not a comparison of numbers")
            if left.has(sp.oo, -sp.oo) or right.has(sp.oo, -sp.oo):
                raise self.refuse("a comparison with oo", "compare finite numbers")
            self.bounded(left - right)
            parts.append(self.compare[type(op)](left, right))
        return sp.And(*parts)

    def call(self, name: str, args: list[ast.expr], depth: int) -> sp.Basic:
        if name not in _CALLS:
            raise self.refuse(f"unknown function {name}", f"functions: {', '.join(sorted(_CALLS))}")
        function, count = _CALLS[name]
        if count is not None and len(args) != count:
            raise self.refuse(f"{name}() of {len(args)} arguments", f"it takes {count}")
        if count is not None:
            return function(*[self.number(a, depth) for a in args])
        pairs = len(args) - len(args) % 2  # where(): condition, value, ..., default
        read = [self.condition if i < pairs and i % 2 == 0 else self.number for i in range(len(args))]
        return function(*[r(a, depth) for r, a in zip(read, args, strict=True)])

    def bounded(self, expr: sp.Basic) -> sp.Basic:
        """Return `expr` if it is small and sympy can compare its constants in reasonable time."""
        if self.size(expr) > MAX_NODES:
            raise self.refuse(f"more than {MAX_NODES} nodes", "write a smaller expression")
        if not isinstance(expr, sp.Expr) or expr in (sp.oo, -sp.oo):
            return expr
        for factor in sp.Mul.make_args(expr):
            if isinstance(factor, sp.Rational) and _bits(factor) > MAX_BITS:
                raise self.refuse(f"a number of more than {MAX_BITS} bits", "rescale the expression")
            if isinstance(factor, sp.Pow) and factor.exp.is_Rational and abs(factor.exp) > MAX_EXPONENT:
                raise self.refuse(f"an exponent beyond {MAX_EXPONENT}", "use a smaller exponent")
        if not expr.free_symbols and not expr.is_Rational:
            value = evaluate(expr, {})
            if not abs(value) <= MAX_VALUE:
                raise self.refuse(f"a constant that is no number below {MAX_VALUE:g}", "rescale the expression")
            # To tell such a sum from 0, sympy computes a minimal polynomial, whose degree may be anything.
            if expr.is_Add and abs(value) < 1e-9 * sum(abs(evaluate(t, {})) for t in expr.args):
                raise self.refuse(f"the constant `{expr}` nearly cancels", "write the number that is meant")
        return expr

    def size(self, expr: sp.Basic) -> int:
        if expr not in self.sizes:
            self.sizes[expr] = 1 + sum(self.size(a) for a in expr.args)
        return self.sizes[expr]


# -- printing ----------------------------------------------------------------------------------------------

_OR, _AND, _NOT, _COMPARE, _ADD, _MUL, _UNARY, _POW, _ATOM = range(9)


def text(expr: sp.Basic) -> str:
    """Print an accepted expression as text that `parse` reads back; the same in every process.

    Raises:
        ExpressionError: a node is not on the list.
    """
    return _print(expr)[0]


def _inside(expr: sp.Basic, level: int) -> str:
    printed, own = _print(expr)
    return printed if own >= level else f"({printed})"


def _print(expr: sp.Basic) -> tuple[str, int]:
    """The text and how tightly its outermost operator binds."""
    kind = type(expr)
    if kind is sp.Symbol:
        return expr.name, _ATOM
    if isinstance(expr, sp.Float):
        return _print(rational_of(float(expr), expr))
    if isinstance(expr, sp.Rational):
        if expr.q != 1:
            return f"{expr.p}/{expr.q}", _MUL
        return str(expr.p), _ATOM if expr.p >= 0 else _UNARY
    if expr == sp.E:
        return "exp(1)", _ATOM
    if expr in (sp.oo, -sp.oo):
        return ("oo", _ATOM) if expr == sp.oo else ("-oo", _UNARY)
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return str(bool(expr)), _ATOM
    list(children(expr, expr))  # raises for what is not on the list
    if kind is sp.Add:
        printed = [(isinstance(t, sp.Rational), _inside(t, _ADD + 1)) for t in expr.args]
        first, *others = [t for _, _, t in sorted((last, t.startswith("-"), t) for last, t in printed)]
        return first + "".join(f" - {t[1:]}" if t.startswith("-") else f" + {t}" for t in others), _ADD
    if kind in (sp.Mul, sp.Pow):
        return _product(expr)
    if kind in FUNCTIONS:
        return f"{FUNCTIONS[kind]}({text(expr.args[0])})", _ATOM
    if kind is sp.Piecewise:
        arms = [f"{text(c)}, {text(v)}" for v, c in expr.args[:-1]]
        return f"where({', '.join([*arms, text(expr.args[-1].expr)])})", _ATOM
    if kind in COMPARISONS:
        left, right = (_inside(a, _ADD) for a in expr.args)
        return f"{left} {COMPARISONS[kind]} {right}", _COMPARE
    if kind is sp.Not:
        return f"not {_inside(expr.args[0], _NOT)}", _NOT
    word, level = (" and ", _AND) if kind is sp.And else (" or ", _OR)
    return word.join(sorted(_inside(a, level + 1) for a in expr.args)), level


def _product(expr: sp.Expr) -> tuple[str, int]:
    coefficient, above, below = sp.S.One, [], []
    for factor in sp.Mul.make_args(expr):
        if isinstance(factor, (sp.Rational, sp.Float)):
            coefficient *= factor if isinstance(factor, sp.Rational) else rational_of(float(factor), expr)
        elif isinstance(factor, sp.Pow) and factor.exp < 0:
            below.append(_power(factor.base, -factor.exp))
        else:
            above.append(_power(factor.base, factor.exp) if factor.is_Pow else _inside(factor, _POW))
    if expr.is_Pow and not below:
        return above[0], _ATOM if above[0].startswith("sqrt(") else _POW
    numerator, sign = abs(coefficient.p), "-" if coefficient < 0 else ""
    front = [str(numerator)] if numerator != 1 or not above else []
    back = [*sorted(below), *([str(coefficient.q)] if coefficient.q != 1 else [])]
    return sign + "/".join(["*".join([*front, *sorted(above)]), *back]), _MUL


def _power(base: sp.Expr, exponent: sp.Rational) -> str:
    if exponent == 1:
        return _inside(base, _POW)
    if exponent == sp.Rational(1, 2):
        return f"sqrt({text(base)})"
    return f"{_inside(base, _ATOM)}**{exponent if exponent.q == 1 else f'({exponent})'}"
