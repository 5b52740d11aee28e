"""Passes on sums of products: no value changes, and what they are for is found on small cases."""

import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from splagen.expression import symbol
from splagen.ir.build import Builder
from splagen.ir.check import check
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import drop_unused, run
from splagen.ir.products import pull_factors, reuse, reuse_sums
from splagen.ir.program import Contract, Map, Program, Reduce, placeholder
from tests.ir.strategies import programs, sizes
from tests.ir.test_recurrence import check_same

N = symbol("N")
AXES = (("h", 2), ("i", N), ("j", N), ("d", 3), ("e", 4))
EXTENTS = {"i": 3, "j": 3}


@given(programs(), sizes(), st.booleans(), st.sets(st.sampled_from("ijtde")), st.integers(0, 99))
def test_factors_of_axes_that_are_summed_last_change_no_value(
    p: Program, extents: dict[str, int], joint: bool, last: set[str], seed: int
) -> None:
    p = derive_gradient(p) if joint else p
    check_same(p, check(pull_factors(p, last=sorted(last))), extents, seed)


@given(programs(), sizes(), st.booleans(), st.integers(0, 99))
def test_reused_sums_change_no_value(p: Program, extents: dict[str, int], joint: bool, seed: int) -> None:
    p = derive_gradient(p) if joint else p
    check_same(p, check(reuse_sums(p)), extents, seed)


def test_a_factor_of_heads_leaves_a_sum_over_features_and_heads() -> None:
    """sum over h and e of w[h i] x[h i e] y[e]: the product of x and y comes first, the heads are summed behind it."""
    b = Builder("p", AXES)
    w, x, y = b.input("w", ("h", "i")), b.input("x", ("h", "i", "e")), b.input("y", ("e",))
    p = b.program(b.contract("out", ("i",), w, x, y))
    after = check(pull_factors(p, last=("h",)))
    product, scaled, total = after.equations
    assert product.op == Contract(("h", "i"))
    assert set(product.args) == {x, y}
    assert isinstance(scaled.op, Map)
    assert total.op == Reduce("sum", ("h",))
    check_same(p, after, EXTENTS, 0)
    assert pull_factors(p) == p


def test_a_sum_of_a_product_that_is_a_map_becomes_a_contraction_where_a_factor_leaves_it() -> None:
    b = Builder("p", AXES)
    w, x, y = b.input("w", ("i",)), b.input("x", ("i", "e")), b.input("y", ("i", "e"))
    whole = b.map("whole", lambda u, v, z: 2 * u * v * z, w, x, y)
    p = b.program(b.reduce("out", "sum", ("e",), whole))
    after = check(drop_unused(pull_factors(p)))
    assert after.equations[0].op == Contract(("i",))
    assert [len(eq.args) for eq in after.equations] == [2, 2]
    check_same(p, after, EXTENTS, 0)


def test_a_product_is_left_out_where_another_that_is_asked_for_replaces_it() -> None:
    """sum_e do (q S) = sum_d q (S do), where S do is computed anyway, behind it or before it."""
    for late in (False, True):
        b = Builder("p", AXES)
        q, s, do = b.input("q", ("i", "d")), b.input("s", ("d", "e")), b.input("do", ("i", "e"))
        past = b.contract("past", ("i", "e"), q, s)
        dq = None if late else b.contract("dq", ("i", "d"), s, do)
        total = b.contract("total", ("i",), do, past)
        dq = dq or b.contract("dq", ("i", "d"), s, do)
        p = b.program(total, dq)
        after = check(run(p, (reuse, drop_unused)))
        assert {eq.out.name for eq in after.equations} == {"dq", "total"}
        check_same(p, after, EXTENTS, 0)
        assert reuse(after) == after


def test_a_product_that_others_read_stays() -> None:
    b = Builder("p", AXES)
    q, s, do = b.input("q", ("i", "d")), b.input("s", ("d", "e")), b.input("do", ("i", "e"))
    past = b.contract("past", ("i", "e"), q, s)
    p = b.program(past, b.contract("total", ("i",), do, past), b.contract("dq", ("i", "d"), s, do))
    assert reuse(p) == p


def gradient_of_a_decay(joined: bool) -> Program:
    """dq = a + 3 r w, dk = c + r u, and the terms of q dq and -k dk one by one: a sum of each, or one of all."""
    b = Builder("p", AXES)
    q, k, a, c, r, w, u = (b.input(n, ("i", "d") if n in "qkac" else ("i",)) for n in "qkacrwu")
    second = b.map("second", lambda x, y: 3 * x * y, r, w)
    dq = b.map("dq", lambda x, y: x + y, a, second)
    dk = b.map("dk", lambda x, y, z: x + y * z, c, r, u)
    product = b.map("product", lambda x, y: x * y, q, r)
    of_q = [b.map("ahead", lambda x, y: 3 * x * y, product, w), b.map("inside", lambda x, y: x * y, q, a)]
    of_k = [b.map("left", lambda x, y: -x * y, k, c), b.map("more", lambda x, y, z: -x * y * z, k, r, u)]
    sums = {"ddecay": of_q + of_k} if joined else {"ddecay_q": of_q, "ddecay_k": of_k}
    return b.program(dq, dk, *(b.map(n, lambda *x: sp.Add(*x), *terms) for n, terms in sums.items()))


def test_the_gradient_of_a_decay_reads_the_gradients_of_rows() -> None:
    """Of a sum that holds terms of both it reads the first: a sum is written with one other."""
    for joined, read in ((False, [{"q", "dq"}, {"k", "dk"}]), (True, [{"q", "dq", "left", "more"}])):
        p = gradient_of_a_decay(joined)
        after = check(run(p, (reuse_sums, reuse_sums, drop_unused)))
        assert [{v.name for v in after.definitions[total].args} for total in after.outputs[2:]] == read
        check_same(p, after, EXTENTS, 0)


def test_a_product_that_holds_another_reads_it() -> None:
    b = Builder("p", AXES)
    x, y, z = (b.input(n, ("i", "d")) for n in "xyz")
    first = b.map("first", lambda u, v: 2 * u * v, x, y)
    p = b.program(first, b.map("second", lambda u, v, w: u * v * w, x, y, z))
    after = check(reuse_sums(p))
    second = after.definitions[after.outputs[1]]
    assert set(second.args) == {first, z}
    assert second.op == Map(placeholder(second.args.index(first)) * placeholder(second.args.index(z)) / 2)
    check_same(p, after, EXTENTS, 0)
