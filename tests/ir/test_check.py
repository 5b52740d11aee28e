"""Every rule of the verifier: a Program that breaks it, and the message, which quotes the equation."""

from dataclasses import replace

import pytest
import sympy as sp
from hypothesis import given

from splagen.errors import ProgramError
from splagen.expression import symbol
from splagen.ir import build, check, gradient, program, reference, text
from splagen.ir.program import (
    OPS,
    Contract,
    CumSum,
    Equation,
    Iota,
    LowRank,
    Lse,
    Map,
    Op,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    UnitInverse,
    Var,
)
from tests.ir.strategies import programs

X = Var("x", ("i", "d"))
Y = Var("y", ("j",))
Z = Var("z", ("i", "j"))
W = Var("w", ("i", "j", "k"))
V = Var("v", ("i", "j", "e"))
M = Var("m", ("i",), "bool")
F = Var("f", ("i", "d"), "bool")
AXES = (("i", symbol("N")), ("j", symbol("N")), ("k", symbol("N")), ("d", 2), ("r", 4), ("e", 261))


def with_equation(out: Var, op: Op, *args: Var) -> Program:
    return Program("bad", AXES, (X, Y, Z, W, V, M, F), (Equation(out, op, args),), ())


def real(*axes: str) -> Var:
    return Var("out", axes)


BAD = {
    "iota of no axis": (
        with_equation(Var("out", (), "int"), Iota(())),
        "bad: iota takes at least one axis and no argument, in `out[] = iota()`",
    ),
    "iota of an argument": (
        with_equation(Var("out", ("i",), "int"), Iota(("i",)), X),
        "bad: iota takes at least one axis and no argument, in `out[i] = iota(i)`",
    ),
    "iota of an unknown axis": (
        with_equation(Var("out", (), "int"), Iota(("w",))),
        "bad: axis w is not declared, in `out[] = iota(w)`",
    ),
    "map of an unknown name": (
        with_equation(real("i", "d"), Map(symbol("x0") + symbol("speed")), X),
        "bad: unknown name speed in `speed + x0`\nhint: names: L, N, x0, in `out[i d] = speed + x`",
    ),
    "map outside the accepted list": (
        with_equation(real("i", "d"), Map(sp.Abs(symbol("x0"))), X),
        "bad: Abs is not supported, in `Abs(x0)`\nhint: use absolute() of splagen.library, which builds a "
        "Piecewise, in `out[i d] = Map(expr=Abs(x0)) ['x[i d]']`",
    ),
    "contract keeps what nothing carries": (
        with_equation(real("j"), Contract(("j",)), X),
        "bad: keeps j, which no argument carries, in `out[j] = contract(x)`",
    ),
    "contract of nothing": (
        with_equation(real(), Contract(())),
        "bad: contract takes at least one argument, in `out[] = contract()`",
    ),
    "reduce of three": (
        with_equation(real("i"), Reduce("sum", ("d",)), X, M, M),
        "bad: takes an array and at most one mask, not 3 arguments, in `out[i] = sum(x, over=d, where=m)`",
    ),
    "reduce with a real mask": (
        with_equation(real("i", "d"), Reduce("max", ("j",)), X, Y),
        "bad: the mask y is real, not bool, in `out[i d] = max(x, over=j, where=y)`",
    ),
    "softmax over an axis of nothing": (
        with_equation(real("i", "d"), Softmax(("j",)), X, M),
        "bad: no argument carries j, in `out[i d] = softmax(x, over=j, where=m)`",
    ),
    "lse over an axis of nothing": (
        with_equation(real("i", "d"), Lse(("j",)), X),
        "bad: no argument carries j, in `out[i d] = lse(x, over=j)`",
    ),
    "topk of none": (
        with_equation(Var("out", ("j",), "bool"), TopK(0, "j"), Y),
        "bad: k is 0; at least 1 is chosen, in `out[j] = topk(y, over=j, k=0)`",
    ),
    "topk over an axis of nothing": (
        with_equation(Var("out", ("j",), "bool"), TopK(1, "d"), Y),
        "bad: no argument carries d, in `out[j] = topk(y, over=d, k=1)`",
    ),
    "topk with a real mask": (
        with_equation(Var("out", ("i", "j", "d"), "bool"), TopK(1, "d"), X, Y),
        "bad: the mask y is real, not bool, in `out[i j d] = topk(x, over=d, where=y, k=1)`",
    ),
    "topk of three": (
        with_equation(Var("out", ("i", "d"), "bool"), TopK(1, "d"), X, M, M),
        "bad: takes an array and at most one mask, not 3 arguments, in `out[i d] = topk(x, over=d, where=m, k=1)`",
    ),
    "cumsum over an axis it lacks": (
        with_equation(real("j"), CumSum(("i",)), Y),
        "bad: y[j] has no axis i, in `out[j] = cumsum(y, over=i)`",
    ),
    "cumsum of nothing": (
        with_equation(real("j"), CumSum(("j",))),
        "bad: takes one array, not 0 arguments, in `out[j] = CumSum(axes=('j',)) []`",
    ),
    "rename of an axis it lacks": (
        with_equation(real("j"), Rename((("i", "j"),)), Y),
        "bad: y[j] has no axis i, in `out[j] = rename(y, i=j)`",
    ),
    "rename of nothing": (
        with_equation(real("j"), Rename((("i", "j"),))),
        "bad: takes one array, not 0 arguments, in `out[j] = Rename(pairs=(('i', 'j'),)) []`",
    ),
    "rename that makes two axes one": (
        with_equation(real("d"), Rename((("i", "d"),)), X),
        "bad: two axes would be called d, in `out[d] = rename(x, i=d)`",
    ),
    "rename of two axes to one": (
        with_equation(real("j"), Rename((("d", "j"), ("i", "j"))), X),
        "bad: two axes would be called the same, in `out[j] = rename(x, d=j, i=j)`",
    ),
    "rename to an unknown axis": (
        with_equation(real(), Rename((("j", "w"),)), Y),
        "bad: axis w is not declared, in `out[] = rename(y, j=w)`",
    ),
    "rename to another extent": (
        with_equation(real("d"), Rename((("j", "d"),)), Y),
        "bad: an axis may only be renamed to one of the same extent, in `out[d] = rename(y, j=d)`",
    ),
    "unit inverse of two": (
        with_equation(real("i", "j"), UnitInverse("i", "j", "k"), Z, Z),
        "bad: takes one array, not 2 arguments, in `out[i j] = unit_inverse(z, i j)`",
    ),
    "unit inverse over an axis it lacks": (
        with_equation(real("i", "d"), UnitInverse("i", "j", "k"), X),
        "bad: x[i d] has no axis j, in `out[i d] = unit_inverse(x, i j)`",
    ),
    "unit inverse of a rectangle": (
        with_equation(real("i", "d"), UnitInverse("i", "d", "k"), X),
        "bad: i d and k must be three axes of one extent, in `out[i d] = unit_inverse(x, i d)`",
    ),
    "unit inverse whose third axis is of another extent": (
        with_equation(real("i", "j"), UnitInverse("i", "j", "d"), Z),
        "bad: i j and d must be three axes of one extent, in `out[i j] = unit_inverse(z, i j)`",
    ),
    "unit inverse whose third axis is carried": (
        with_equation(real("i", "j", "k"), UnitInverse("i", "j", "k"), W),
        "bad: i j and k must be three axes of one extent, in `out[i j k] = unit_inverse(w, i j)`",
    ),
    "unit inverse of a diagonal": (
        with_equation(real("i", "j"), UnitInverse("i", "i", "k"), Z),
        "bad: i i and k must be three axes of one extent, in `out[i j] = unit_inverse(z, i i)`",
    ),
    "unit inverse whose third axis is its row": (
        with_equation(real("i", "j"), UnitInverse("i", "j", "i"), Z),
        "bad: i j and i must be three axes of one extent, in `out[i j] = unit_inverse(z, i j)`",
    ),
    "low rank of three": (
        with_equation(real("j", "d"), LowRank("i", "d", "r", 1), V, M, M),
        "bad: takes an array and at most one mask, not 3 arguments, in `out[j d] = low_rank(v, over=i, where=m, "
        "steps=1)`",
    ),
    "low rank where a number says so": (
        with_equation(real("d", "r"), LowRank("i", "d", "r", 1), X, Y),
        "bad: the mask y is real, not bool, in `out[d r] = low_rank(x, over=i, where=y, steps=1)`",
    ),
    "low rank of rows it lacks": (
        with_equation(real("i", "r"), LowRank("j", "d", "r", 1), X),
        "bad: x[i d] has no axis j, in `out[i r] = low_rank(x, over=j, steps=1)`",
    ),
    "low rank of one axis": (
        with_equation(real("i", "r"), LowRank("d", "d", "r", 1), X),
        "bad: d is both rows and features, in `out[i r] = low_rank(x, over=d, steps=1)`",
    ),
    "low rank where features differ": (
        with_equation(real("d", "r"), LowRank("i", "d", "r", 1), X, F),
        "bad: the mask f differs between features, in `out[d r] = low_rank(x, over=i, where=f, steps=1)`",
    ),
    "low rank of a rank known at run time": (
        with_equation(real("j", "d"), LowRank("i", "d", "j", 1), X),
        "bad: j must be an axis of a known extent that no argument carries, in `out[j d] = low_rank(x, over=i, "
        "steps=1)`",
    ),
    "low rank over many features": (
        with_equation(real("j", "e", "r"), LowRank("i", "e", "r", 1), V),
        "bad: e must have a known extent of at most 260, in `out[j e r] = low_rank(v, over=i, steps=1)`",
    ),
    "low rank without a step": (
        with_equation(real("d", "r"), LowRank("i", "d", "r", 0), X),
        "bad: steps is 0; at least 1 is taken, in `out[d r] = low_rank(x, over=i, steps=0)`",
    ),
    "two variables of one name": (
        with_equation(Var("x", ("j",)), CumSum(("j",)), Y),
        "bad: x is defined twice, in `x[j] = cumsum(y, over=j)`",
    ),
    "an argument from nowhere": (
        with_equation(real("j"), CumSum(("j",)), Var("u", ("j",))),
        "bad: u[j] is read before it is defined, in `out[j] = cumsum(u, over=j)`",
    ),
    "an axis that is not declared": (
        with_equation(real("w"), CumSum(("j",)), Y),
        "bad: axis w is not declared, in `out[w] = cumsum(y, over=j)`",
    ),
    "axes out of order": (
        with_equation(real("d", "i"), Map(2 * symbol("x0")), X),
        "bad: the result is real over [i d], declared real out[d i], in `out[d i] = 2*x`",
    ),
    "another kind": (
        with_equation(Var("out", ("j",), "bool"), Map(2 * symbol("x0")), Y),
        "bad: the result is real over [j], declared bool out[j], in `out[j] = 2*y`",
    ),
    "two inputs of one name": (
        Program("bad", AXES, (X, X), (), ()),
        "bad: two inputs share a name",
    ),
    "an output from nowhere": (
        Program("bad", AXES, (X,), (), (Y,)),
        "bad: output y[j] is never defined",
    ),
    "a gradient from nowhere": (
        Program("bad", AXES, (X,), (), (X,), gradients=((X, Y),)),
        "bad: output y[j] is never defined",
    ),
    "a gradient over other axes": (
        Program("bad", AXES, (X, Y), (), (X,), gradients=((X, Y),)),
        "bad: the gradient y[j] does not have the axes of x[i d]",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_each_rule_has_a_bad_program_and_its_message(bad: Program, message: str) -> None:
    with pytest.raises(ProgramError) as caught:
        check.check(bad)
    assert str(caught.value) == message


def test_every_operation_is_broken_by_some_bad_program() -> None:
    assert {type(eq.op) for bad, _ in BAD.values() for eq in bad.equations} == set(OPS)


@pytest.mark.parametrize("table", [check.CHECK, reference.EVALUATE, gradient.GRADIENT, text.PRINT])
def test_every_table_has_exactly_the_operations(table: dict[type[Op], object]) -> None:
    assert set(table) == set(OPS)


def test_the_union_of_operations_is_the_list() -> None:
    assert set(program.Op.__args__) == set(OPS)


@given(programs())
def test_a_valid_program_prints_and_a_damaged_one_is_refused(good: Program) -> None:
    printed = text.program_text(good)
    assert all(text.equation_text(eq) in printed for eq in good.equations)
    eq = good.equations[-1]
    with pytest.raises(ProgramError, match="is read before it is defined"):
        check.check(good.with_equations([eq, *good.equations[:-1]]))
    twice = replace(good, equations=(*good.equations, eq))
    with pytest.raises(ProgramError, match=f"{eq.out.name} is defined twice, in `"):
        check.check(twice)


def test_builder_refuses_an_output_that_is_not_its_own() -> None:
    b = build.Builder("b", AXES)
    with pytest.raises(ProgramError, match=r"output y\[j\] of b is not defined"):
        b.program(Y)


def test_builder_numbers_a_name_that_is_taken() -> None:
    b = build.Builder("b", AXES)
    names = [b.input("x", ("i",)).name for _ in range(3)]
    assert len(set(names)) == 3
