"""The oracle of SPLA against truths written without it: dense attention and direct loops."""

from dataclasses import replace

import numpy as np
import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splagen import library
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.reference import evaluate
from splagen.spec import Residual, Select, SPLASpec, Statistics, windows
from tests.ir.blocked import blocked, output, plain_rows, random_rows, value
from tests.ir.direct_spla import Array, Rows, assert_near, direct, selection, small_spec
from tests.ir.strategies import small_specs

# -- (a) dense attention -------------


def dense(rows: Rows, causal: bool, scale: float) -> Tensor:
    q, k, v = (rows[n].transpose(1, 2) for n in "qkv")
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return o.transpose(1, 2)


ALL_BLOCKS = {
    "dense": None,
    "token": Select(block_size=16, budget=8, sinks=0, local=0),
    "cells and sinks": Select(block_size=32, budget=4, sinks=1, local=1, statistics=Statistics(cell=16)),
    "tile": Select(block_size=16, budget=8, sinks=1, local=0, granularity="tile", tile=32),
    "windows": Select(block_size=32, budget=4, sinks=0, local=0, statistics=windows()),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("select", ALL_BLOCKS.values(), ids=ALL_BLOCKS)
@pytest.mark.parametrize(("group", "width", "length"), [(1, 16, 96), (3, 16, 77), (2, 24, 101), (1, 16, 1)])
def test_dense_attention_where_every_far_block_is_chosen(
    group: int, width: int, length: int, select: Select | None, causal: bool
) -> None:
    linear = Residual() if select else None
    spec = SPLASpec(
        head_dim=16, value_dim=width, group_size=group, causal=causal, select=select, linear=linear,
        combine="add" if linear else None,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = random_rows(spec, 2, length, 2)
    want = dense(rows, causal, spec.scale)
    assert_near(output(spec, rows), want)
    if select:
        assert not value(spec, rows, "o_r").any()
        bare = replace(spec, linear=None, combine="none")
        assert_near(output(bare, rows), want)


@pytest.mark.parametrize("causal", [True, False])
def test_below_dense_below_attention_is_dense_and_the_residual_is_zero(causal: bool) -> None:
    spec = small_spec(dense_below=90, causal=causal, combine="rms")
    for length, is_dense in ((89, True), (90, False)):
        rows = random_rows(spec, 1, length, 2)
        o_r = plain_rows(value(spec, rows, "o_r"), length)
        o_s = plain_rows(value(spec, rows, "o_s"), length)
        far_off = (o_s - dense(rows, causal, spec.scale)).abs().max()
        assert (far_off < 1e-12) == is_dense
        assert (not o_r.any()) == is_dense
        if is_dense:  # the combination stays what the spec says: RMS of each branch
            gain = rows["gamma_s"].flatten(0, 1)
            normal = o_s * (o_s.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            assert_near(output(spec, rows), gain * normal)


# -- (b) a direct definition, row by row -------------

DIRECT = {
    "token": small_spec(combine="add"),
    "rms": small_spec(select=Select(block_size=16, budget=2, sinks=0, local=1), combine="rms"),
    "gate, normaliser": small_spec(
        combine="gate", linear=Residual("elu1", temperature=True, normaliser=True), group_size=3
    ),
    "two-sided": small_spec(causal=False, combine="rms_residual", linear=Residual("relu2")),
    "tile in a block": small_spec(
        select=Select(block_size=32, budget=1, sinks=0, local=0, granularity="tile", tile=16)
    ),
    "tile over blocks": small_spec(
        select=Select(block_size=16, budget=1, sinks=0, local=0, granularity="tile", tile=32)
    ),
    "two-sided tile over blocks": small_spec(
        causal=False, select=Select(block_size=16, budget=1, sinks=1, local=0, granularity="tile", tile=32)
    ),
    "identity": small_spec(linear=Residual("identity"), combine="add", value_dim=24),
    "sparse": small_spec(linear=None, combine="none"),
    "own rows": small_spec(select=Select(block_size=16, budget=1, own_rows=True), linear=Residual(own_rows=True)),
}


@pytest.mark.parametrize("length", [16, 83, 112])
@pytest.mark.parametrize("spec", DIRECT.values(), ids=DIRECT)
def test_the_program_is_the_direct_definition(spec: SPLASpec, length: int) -> None:
    rows = random_rows(spec, 1, length, 2, seed=length)
    o, o_s, o_r = direct(spec, rows, selection(spec, rows))
    assert_near(output(spec, rows)[0], o)
    assert_near(plain_rows(value(spec, rows, "o_s"), length)[0], o_s)
    if spec.linear:
        assert_near(plain_rows(value(spec, rows, "o_r"), length)[0], o_r)
        if length > 64:
            assert o_r.any()


@settings(max_examples=15)
@given(small_specs().filter(lambda s: s.score is None), st.integers(1, 70), st.integers(0, 9))
def test_any_spec_is_the_direct_definition(spec: SPLASpec, length: int, seed: int) -> None:
    if spec.linear and spec.linear.feature_map.name == "custom":
        spec = replace(spec, linear=replace(spec.linear, feature_map=library.hedgehog))
    rows = random_rows(spec, 1, length, 1, seed)
    chosen = selection(spec, rows) if spec.select else np.zeros((1, length, 1), bool)
    assert_near(output(spec, rows)[0], direct(spec, rows, chosen)[0], 1e-10)


@pytest.mark.parametrize("spec", DIRECT.values(), ids=DIRECT)
def test_more_padding_changes_nothing(spec: SPLASpec) -> None:
    """Tiles and blocks beyond the length are not part of the definition, nor of its gradient."""
    length = 83
    joint = derive_gradient(spla_program(spec))
    rows = random_rows(spec, 1, length, 2)
    cotangent = joint.cotangents[0][1].name
    do = torch.randn(1, length, 2 * spec.group_size, spec.value_dim, dtype=torch.float64)
    (out,) = joint.outputs
    for p in (joint, run(joint, LOWERING)):
        tight, loose = (
            evaluate(p, blocked(spec, {**rows, cotangent: do}, spare=spare), scalars={"L": length}) for spare in (0, 2)
        )
        assert_near(plain_rows(loose[out.name], length), plain_rows(tight[out.name], length), 1e-10)
        for x, g in p.gradients:
            if x.name in ("k", "v"):
                blocks = tight[g.name].shape[2]
                assert_near(loose[g.name][:, :, :blocks], tight[g.name], 1e-8)


@pytest.mark.parametrize("spec", DIRECT.values(), ids=DIRECT)
def test_a_chunk_of_query_tiles_is_the_slice_of_the_whole(spec: SPLASpec) -> None:
    length, program = 112, spla_program(spec)
    rows = blocked(spec, random_rows(spec, 1, length, 2))
    (out,) = program.outputs
    whole = evaluate(program, rows, scalars={"L": length})[out.name]
    start, stop = 1, whole.shape[3] - 1
    part = {n: x[:, :, :, start:stop] if n[0] == "q" or n.startswith("gate") else x for n, x in rows.items()}
    got = evaluate(program, part, scalars={"L": length}, offsets={"T": start})[out.name]
    assert_near(got, whole[:, :, :, start:stop])


# -- (c) the masked definition of the residual, with random selections imposed ---------------------------------


def random_selection(rng: np.random.Generator, length: int, block: int, k: int, n_init: int, n_loc: int) -> Array:
    """sel[t, b]: init blocks, the current block and n_loc blocks before it are forced; rest random."""
    sel = np.zeros((length, -(-length // block)), bool)
    for t in range(length):
        c = t // block
        forced = set(range(min(n_init, c + 1))) | set(range(max(0, c - n_loc), c + 1))
        free = [b for b in range(c + 1) if b not in forced]
        m = max(0, min(k - len(forced), len(free)))
        forced |= set(rng.choice(free, m, replace=False).tolist()) if m else set()
        sel[t, list(forced)] = True
    return sel


def sm(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def phi(x: Array) -> Array:
    return np.concatenate([sm(x), sm(-x)], -1)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_imposed_selection_gives_the_masked_definition(seed: int, lowered: bool) -> None:
    """203 = 12 * 16 + 11 keys; compared on rows with n_unsel > 0, for the definition there is not gated."""
    rng = np.random.default_rng(seed)
    length, d, dv, block, k, n_init, n_loc, group = 203, 16, 16, 16, 6, 1, 2, 3
    keys, values = rng.normal(size=(length, d)) * 2, rng.normal(size=(length, dv))
    queries = rng.normal(size=(length, group, d)) * 2
    gs, gr = rng.normal(size=(group, dv)), rng.normal(size=(group, dv))
    sel = random_selection(rng, length, block, k, n_init, n_loc)
    blk = np.arange(length) // block
    causal = np.arange(length)[None] <= np.arange(length)[:, None]
    taken, left = causal & sel[:, blk], causal & ~sel[:, blk]
    s = np.where(taken[:, None], np.einsum("tgd,jd->tgj", queries, keys) * d**-0.5, -np.inf)
    o_s = sm(s) @ values
    o_r = (np.einsum("tgf,jf->tgj", phi(queries), phi(keys)) * left[:, None]) @ values

    def normalised(x: Array, gain: Array) -> Array:
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    select = Select(block_size=block, budget=k, sinks=n_init, local=n_loc)
    spec = SPLASpec(head_dim=d, group_size=group, select=select, combine="rms")
    program = spla_program(spec)
    program = run(program, LOWERING) if lowered else program
    rows = {
        "q": torch.tensor(queries)[None], "k": torch.tensor(keys)[None, :, None],
        "v": torch.tensor(values)[None, :, None], "gamma_s": torch.tensor(gs)[None],
        "gamma_r": torch.tensor(gr)[None],
    }  # fmt: skip
    b = np.arange(sel.shape[1])
    far = (b >= n_init) & (b < blk[:, None] - n_loc)
    free = torch.tensor(sel & far)[None, None]
    wanted = [program.var(n) for n in ("o_s", "o_r", "o")]
    got = evaluate(program, blocked(spec, rows), scalars={"L": length}, given={"free": free}, wanted=wanted)
    plain = {n: plain_rows(x, length)[0].numpy() for n, x in got.items()}
    some = left.any(1)
    assert 40 < some.sum() < length
    assert_near(plain["o_s"], o_s)
    assert_near(plain["o_r"][some], o_r[some])
    assert not plain["o_r"][~some].any()
    assert_near(plain["o"][some], (normalised(o_s, gs) + normalised(o_r, gr))[some], 1e-10)


# -- (e) score functions -------------


def scored(name: str, s: Array, heads: int) -> Array:
    """Direct formula for scores s [heads, queries, keys]."""
    m, n = np.arange(s.shape[1])[:, None], np.arange(s.shape[2])[None]
    h = np.arange(heads)[:, None, None]
    match name:
        case "softcap":
            return 2.0 * np.tanh(s / 2.0)
        case "alibi":
            return s - 2.0 ** (-8 * (h + 1) / heads) * np.abs(m - n)
        case "window":
            return np.where(np.abs(m - n) < 20, s, -np.inf)
        case "tilted":
            return s + (n - m) / 10 + h / 4 * np.tanh(s)
    raise AssertionError(name)


SCORES = {
    "softcap": library.softcap(2.0),
    "alibi": library.alibi(),
    "window": library.sliding_window(20),
    "tilted": library.score_function(lambda s, m, n, h: s + (n - m) / 10 + h / 4 * sp.tanh(s)),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("select", [None, Select(block_size=16, budget=8, sinks=1, local=0)], ids=["dense", "all"])
@pytest.mark.parametrize("name", SCORES)
def test_score_functions_are_their_formulas(name: str, select: Select | None, causal: bool) -> None:
    spec = small_spec(linear=None, combine="none", select=select, score=SCORES[name], causal=causal)
    length = 75
    rows = random_rows(spec, 1, length, 3)
    q, k, v = (rows[n][0].numpy().swapaxes(0, 1) for n in "qkv")
    k, v = (np.repeat(x, 2, 0) for x in (k, v))
    s = scored(name, spec.scale * q @ k.swapaxes(1, 2), 6)
    s = np.where(np.tri(length, dtype=bool), s, -np.inf) if causal else s
    assert_near(output(spec, rows)[0], (sm(s) @ v).swapaxes(0, 1), 1e-13)
