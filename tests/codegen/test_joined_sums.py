"""Sums that are only added to and taken from each other are one sum."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from splagen.codegen.tile_code import joined_sums
from splagen.ir.build import Builder
from splagen.ir.program import Equation, Var, placeholder


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Var], list[Equation], dict[Var, int]]:
    """Sums, equations that add and subtract two of what is there, and the value of everything."""
    b = Builder("sums", (("T", 4),))
    sums = [b.input(f"x{i}", ("T",)) for i in range(draw(st.integers(2, 5)))]
    value = {v: 10**i for i, v in enumerate(sums)}
    for i in range(draw(st.integers(1, 5))):
        x, y = draw(st.permutations(sorted(value, key=str)))[:2]
        sign, other = draw(st.sampled_from([(1, 1), (1, -1), (-1, 1)]))
        z = b.map(f"y{i}", sign * placeholder(0) + other * placeholder(1), x, y)
        value[z] = sign * value[x] + other * value[y]
    return sums, b.equations, value


@given(chains())
def test_what_is_added_up_is_what_the_equations_say(drawn: tuple[list[Var], list[Equation], dict[Var, int]]) -> None:
    sums, equations, value = drawn
    goes, joined = joined_sums(equations, sums)
    found: Counter[Var] = Counter()
    for v, (into, sign) in goes.items():
        found[into] += sign * value[v]
    assert {into: value[into] for into in found} == dict(found)
    # nothing is lost that an equation which is left still reads
    read = {v for eq in equations if eq not in joined for v in eq.args}
    assert read & {*sums, *(eq.out for eq in joined)} <= {*found}


def test_one_sum_of_several() -> None:
    b = Builder("sums", (("T", 4),))
    far, late, chosen = (b.input(n, ("T",)) for n in ("far", "late", "chosen"))
    total = b.map("total", placeholder(0) + placeholder(1), far, late)
    rest = b.map("rest", placeholder(0) - placeholder(1), total, chosen)
    goes, _ = joined_sums(b.equations, [far, late, chosen])
    assert goes == {far: (rest, 1), late: (rest, 1), chosen: (rest, -1)}
