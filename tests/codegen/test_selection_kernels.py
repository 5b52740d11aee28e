"""Statistics, normaliser and choice of blocks by generated kernels against the oracle, in the interpreter."""

import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import sympy as sp
import torch
from torch import Tensor

from splagen import library, pipeline
from splagen.codegen.partition import Partition, partition
from splagen.codegen.selection import Selection
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.frontend_spla import spla_program
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Equation, Map, Program, placeholder
from splagen.ir.reference import evaluate
from splagen.layout import Blocked
from splagen.spec import Select, SPLASpec, Statistics, windows
from splagen.verification import TOLERANCE, relative_error
from tests.interpreter_sort import patch

patch()

LAUNCHERS = ("statistics", "score_lse", "score_topk")
METRICS = {
    "order 1": library.taylor(order=1),
    "Taylor": library.taylor(covariance="diag"),
    "cumulant": library.cumulant(covariance="diag", clamp=1.5),
    "rank 2": library.taylor(),
    "cumulant of rank 5": library.cumulant(covariance="rank5", clamp=1.5),
}
STATISTICS = {"block": Statistics(), "cells": Statistics(cell=16), "windows": windows()}


def spec_of(
    metric: str = "Taylor",
    statistics: str = "block",
    *,
    group: int = 3,
    tile: int = 1,
    budget: int = 4,
    block: int = 32,
    sinks: int = 1,
    local: int = 0,
    causal: bool = True,
    head_dim: int = 16,
    dense_below: int = 0,
) -> SPLASpec:
    select = Select(
        block_size=block, budget=budget, sinks=sinks, local=local, tile=tile, metric=METRICS[metric],
        granularity="token" if tile == 1 else "tile", statistics=STATISTICS[statistics],
    )  # fmt: skip
    return SPLASpec(
        head_dim=head_dim,
        group_size=group,
        causal=causal,
        select=select,
        linear=None,
        dense_below=dense_below,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


@cache
def program_of(spec: SPLASpec) -> Program:
    return run(spla_program(spec), LOWERING)


@cache
def part_of(spec: SPLASpec) -> Partition:
    return pipeline.kernels(spec)


@cache
def module_of(spec: SPLASpec, out: Path) -> ModuleType:
    return pipeline.generate(spec, out).module


def rows(spec: SPLASpec, batch: int, length: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """q, and k as a part of a wider tensor."""
    g = torch.Generator().manual_seed(length * 31 + spec.group_size)
    spread = 0.5 + torch.rand(spec.head_dim, generator=g)
    q = torch.randn(batch, length, kv_heads * spec.group_size, spec.head_dim, generator=g) * 2
    wide = torch.randn(batch, length, kv_heads, 2 * spec.head_dim, generator=g)
    return q, wide[..., : spec.head_dim] * spread if length % 2 else (wide * 0.8)[..., : spec.head_dim]


def kernels(spec: SPLASpec, out: Path, q: Tensor, k: Tensor, **changes: dict[str, int]) -> dict[str, Tensor]:
    """Everything that the three kernels write."""
    module = module_of(spec, out)
    n = module.sizes_of(q)
    schedules = module.schedules_for(q)
    found = {"q": q, "k": k}
    part = part_of(spec)
    for name in LAUNCHERS:
        (kernel,) = [x for x in part.forward if x.name == name]
        got = getattr(module, f"launch_{name}")(
            n, schedules[name] | changes.get(name, {}), *(found[a.name] for a in kernel.inputs)
        )
        got = got if isinstance(got, tuple) else (got,)
        found |= dict(zip([a.name for a in kernel.outputs], got, strict=True))
    return found


def oracle(spec: SPLASpec, q: Tensor, k: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    low = program_of(spec)
    blocked = Blocked(low, q.shape[0], q.shape[1], k.shape[2])
    tensors = {"q": q, "k": k, "v": torch.zeros_like(k)}
    inputs = {v.name: blocked.to_axes(v, tensors[v.name].double()) for v in low.inputs}
    return evaluate(
        low, inputs, scalars={"L": q.shape[1]}, sizes=blocked.sizes, wanted=[low.var(name) for name in wanted]
    )


def assert_same_choice(spec: SPLASpec, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """block_indices are a top-k by the oracle's scores: as many, ascending, far, no worse beyond rounding."""
    indices, counts = got["block_indices"], got["block_counts"]
    far, free, score = want["far"], want["free"], want["score"]
    chosen = Blocked(program_of(spec), indices.shape[0], 1, indices.shape[1])
    chosen.blocks = free.shape[-1]
    mask = chosen.mask(indices)
    assert torch.equal(counts.long(), free.sum(-1))
    assert torch.equal((indices >= 0).sum(-1), counts.long())
    slot = torch.arange(indices.shape[-1])
    assert torch.equal(indices >= 0, slot < counts[..., None])
    rising = (indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] < 0)
    assert rising.all()
    assert not (mask & ~far).any()
    differ = (mask != free).any(-1)
    gained = torch.where(mask, score, 0).sort(-1).values
    wanted = torch.where(free, score, 0).sort(-1).values
    torch.testing.assert_close(gained, wanted, rtol=1e-4, atol=1e-7)
    assert differ.float().mean() < 0.01


def compare(spec: SPLASpec, out: Path, batch: int, length: int, kv_heads: int, **changes: dict[str, int]) -> None:
    low = program_of(spec)
    selection = Selection.of(low)
    assert selection is not None
    q, k = rows(spec, batch, length, kv_heads)
    got = kernels(spec, out, q, k, **changes)
    statistics = [v.name for v in selection.statistics]
    lse = selection.lse.out
    want = oracle(spec, q, k, [*statistics, lse.name, "usable", "far", "free", "score"])
    blocked = Blocked(low, batch, length, kv_heads)
    # a statistic that no query may use need not be the oracle's: a window that leaves the sequence
    used = want["usable"].any(0).any(0).reshape(-1)
    for name in statistics:
        x = want[name].permute(0, 2, 3, 1, *range(4, want[name].ndim)).flatten(1, 2)
        found = got[name].unflatten(-1, (*x.shape[3:-1], -1))  # factors lie side by side
        assert torch.isfinite(found).all()
        kept, x = found[..., : spec.head_dim].double()[:, used], x[:, used]
        if "r" in low.var(name).axes:  # rounding moves an entry by a share of the largest factor
            assert relative_error(kept, x) <= TOLERANCE[torch.float32][0]
        else:
            torch.testing.assert_close(kept, x, rtol=1e-5, atol=1e-6)
        assert not found[..., spec.head_dim :].any()
    x = blocked.to_tensor(lse, want[lse.name])
    torch.testing.assert_close(got[lse.name].double(), x, rtol=1e-5, atol=1e-5)
    assert_same_choice(spec, got, want)


AXES: dict[str, Iterable[object]] = {
    "metric": METRICS,
    "statistics": STATISTICS,
    "causal": (True, False),
    "group": (1, 3, 4, 16),
    "tile": (1, 16),
    "budget": (1, 4, 13),
    "length": (1, 15, 63, 65, 130),
}


def pairs() -> list[tuple[object, ...]]:
    """Few cases among which any two choices of different axes meet."""
    everything = [c for c in itertools.product(*AXES.values()) if not (METRICS[c[0]].rank and c[1] == "windows")]
    both = list(itertools.combinations(range(len(AXES)), 2))
    missing = {(i, j, c[i], c[j]) for c in everything for i, j in both}
    cases = []
    while missing:
        best = max(everything, key=lambda c: sum((i, j, c[i], c[j]) in missing for i, j in both))
        missing -= {(i, j, best[i], best[j]) for i, j in both}
        cases.append(best)
    return cases


@pytest.mark.parametrize(tuple(AXES), pairs())
def test_kernels_are_the_oracle(
    out: Path, metric: str, statistics: str, causal: bool, group: int, tile: int, budget: int, length: int
) -> None:
    spec = spec_of(metric, statistics, causal=causal, group=group, tile=tile, budget=budget)
    # few programs: the interpreter's time is per operation
    many = {"BLOCK_M": 32 if group == 1 else 64 if group == 3 else 256}
    compare(spec, out, 1, length, 2 if length < 65 else 1, score_topk=many, score_lse={"BLOCK_M": 256})


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        # a program of several tiles, of one, of a part of one; fewer and more blocks at once than are kept
        ({"group": 4, "tile": 1, "block": 16}, {"BLOCK_M": 64, "BLOCK_C": 16}),
        ({"group": 1, "tile": 16, "block": 16}, {"BLOCK_M": 64, "BLOCK_C": 16}),
        ({"group": 4, "tile": 16, "block": 16, "budget": 3}, {"BLOCK_M": 16, "BLOCK_C": 16}),
        ({"group": 33, "tile": 1, "block": 16, "budget": 13}, {"BLOCK_M": 16, "BLOCK_C": 16}),
        ({"group": 2, "tile": 1, "block": 16, "budget": 200}, {"BLOCK_M": 32, "BLOCK_C": 16}),
        ({"group": 2, "statistics": "windows", "block": 64, "sinks": 0}, {"BLOCK_M": 32, "BLOCK_C": 16}),
        ({"group": 2, "statistics": "cells", "block": 64, "causal": False}, {"BLOCK_M": 32, "BLOCK_C": 16}),
    ],
)
def test_schedules_do_not_change_the_choice(out: Path, changes: dict[str, object], schedule: dict[str, int]) -> None:
    length = 60 if changes["group"] == 33 else 600 if changes.get("statistics") == "windows" else 200
    spec = spec_of(**changes)  # type: ignore[arg-type]
    compare(spec, out, 1, length, 1, score_topk=schedule, score_lse={"BLOCK_M": 128, "BLOCK_C": 64})


@pytest.mark.parametrize("block_m", [64, 512])
@pytest.mark.parametrize(
    "changes",
    [
        {"group": 1},
        {"group": 4, "statistics": "cells"},
        {"group": 1, "statistics": "windows", "block": 64, "sinks": 0},
        {"group": 1, "causal": False},
        {"group": 2, "metric": "rank 2"},
    ],
    ids=str,
)
def test_tiles_of_cells_with_and_without_a_mask_add_up(out: Path, changes: dict[str, object], block_m: int) -> None:
    """All of 64 rows may use many tiles of cells; between the first and the last of 512 rows lies more than one."""
    spec = spec_of(**{"block": 16, **changes})  # type: ignore[arg-type]
    length = 600 if changes["group"] == 1 else 400
    compare(spec, out, 1, length, 1, score_lse={"BLOCK_M": block_m, "BLOCK_C": 16}, score_topk={"BLOCK_C": 64})


@pytest.mark.parametrize("head_dim", [24, 80])
def test_head_dims_are_padded(out: Path, head_dim: int) -> None:
    compare(spec_of(head_dim=head_dim), out, 2, 70, 1)


@pytest.mark.parametrize("length", [99, 130])
def test_nothing_is_chosen_below_dense_below(out: Path, length: int) -> None:
    spec = spec_of(dense_below=100)
    compare(spec, out, 1, length, 1)
    assert kernels(spec, out, *rows(spec, 1, length, 1))["block_counts"].any() == (length >= 100)


@pytest.mark.parametrize("budget", [1, 5, 13])
def test_ties_go_to_the_lowest_block(out: Path, budget: int) -> None:
    spec = spec_of(group=2, budget=budget, block=16)
    q, k = rows(spec, 1, 200, 1)
    got = kernels(spec, out, q, torch.zeros_like(k), score_topk={"BLOCK_M": 64})
    for t in range(200):
        n = min(budget, max(0, t // 16 - 1))
        assert got["block_indices"][0, 0, t].tolist() == [*range(1, 1 + n), *([-1] * (budget - n))]


def test_equal_keys_have_factors_of_0_and_ties_stay_ties(out: Path) -> None:
    spec = spec_of("rank 2", group=2, budget=5, block=16)
    q, k = rows(spec, 1, 130, 1)
    got = kernels(spec, out, q, torch.ones_like(k) / 4, score_topk={"BLOCK_M": 64})
    assert not got["factor"].any()
    assert got["block_indices"][0, 0, 129].tolist() == [1, 2, 3, 4, 5]


def test_large_products_do_not_overflow(out: Path) -> None:
    spec = spec_of(group=2, block=16)
    q, k = (30 * x for x in rows(spec, 1, 130, 1))
    got, want = kernels(spec, out, q, k), oracle(spec, q, k, ["lse_share"])
    blocked = Blocked(program_of(spec), 1, 130, 1)
    x = blocked.to_tensor(program_of(spec).var("lse_share"), want["lse_share"])
    torch.testing.assert_close(got["lse_share"].double(), x, rtol=1e-5, atol=1e-3)


# -- what is found from the equations ------------------------------------------------------------------


def with_metric(expr: sp.Expr) -> Program:
    """The program with another metric: an expression in a (x0) and kappa (x1)."""
    op = Map(expr.xreplace({symbol("a"): placeholder(0), symbol("kappa"): placeholder(1)}))
    return with_map(program_of(spec_of()), "metric", op)


def with_map(program: Program, name: str, op: Map) -> Program:
    """The program with another Map behind a variable."""
    return program.with_equations(
        Equation(eq.out, op, eq.args) if eq.out.name == name else eq for eq in program.equations
    )


def test_no_logarithm_is_left_of_a_factor_of_the_mass() -> None:
    a, kappa = symbol("a"), symbol("kappa")
    found = Selection.of(program_of(spec_of("Taylor")))
    assert found is not None
    exponent, weight = found.mass()
    assert weight == 1 + kappa
    assert exponent.free_symbols == {a}
    found = Selection.of(with_metric(a / 4 + sp.log(kappa**2 + 3) + sp.tanh(kappa)))
    assert found is not None
    exponent, weight = found.mass()
    assert weight.subs(kappa, 2) == 7
    assert exponent.has(sp.tanh)
    assert not exponent.has(sp.log)


def test_order_1_loads_no_variance() -> None:
    for kernel in partition(program_of(spec_of("order 1"))).forward[:3]:
        assert "variance" not in {a.name for a in (*kernel.inputs, *kernel.outputs)}


def test_every_equation_of_the_selection_is_covered() -> None:
    low = program_of(spec_of("Taylor", "windows"))
    covered = {eq.out.name for k in partition(low).forward[:3] for eq in k.covers}
    assert {"window_mean", "window_variance", "kappa", "lse_share", "share_w", "score", "free"} <= covered


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("centred", lambda x, mu: x - 2 * mu, r"factor\[.*centred keys"),
        ("along2", lambda x: x * symbol("L"), "nothing stands for L"),
    ],
)
def test_other_equations_of_a_covariance_are_refused(name: str, change: object, message: str) -> None:
    low = program_of(spec_of("rank 2"))
    old = low.definitions[low.var(name)]
    expr = change(*(placeholder(i) for i in range(len(old.args))))  # type: ignore[operator]
    with pytest.raises(PartitionError, match=message):
        partition(with_map(low, name, Map(expr)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("centred2", lambda x, mu: (x - mu) ** 3),
        ("band", lambda i, j: sp.And(sp.Ge(j - i, 1), sp.Lt(j - i, 3))),
        ("usable", lambda i, c: sp.Le(16 * c + 15, i)),
        ("share", lambda x, ell, mask: sp.Piecewise((sp.exp(2 * x - ell), mask), (0, True))),
    ],
)
def test_other_equations_are_refused(name: str, change: object) -> None:
    low = program_of(spec_of("Taylor", "windows"))
    old = low.definitions[low.var(name)]
    expr = change(*(placeholder(i) for i in range(len(old.args))))  # type: ignore[operator]
    with pytest.raises(PartitionError, match=re.escape(name) + "|window|moment|softmax"):
        partition(with_map(low, name, Map(expr)))
