"""SSE specs: TOML round trip, digests that do not move, and errors that name the axis."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import splagen
from splagen import library
from splagen.errors import SpecError
from splagen.spec import Numerics, SPLASpec, canonical, digest, from_toml, read_spec, to_toml
from splagen.sse_spec import Router, SSESpec

EXAMPLES = Path(__file__).resolve().parent.parent / "examples/specs"
BACKBONES = ["none", "constant", "scalar", "vector", "delta"]
ROW_MAPS = [m for m in library.FEATURE_MAPS.values() if m.signs == 1]
ROW_MAPS += [library.topk_softmax(4), library.feature_map(lambda x: library.relu(x) ** 2, l2norm=True)]


@st.composite
def routers(draw: st.DrawFn) -> Router:
    """A valid router; readers differ from writers at times."""
    partitions = draw(st.integers(1, 8) | st.integers(1, 64))
    writers = draw(st.integers(1, partitions))
    readers = draw(st.none() | st.integers(1, partitions))
    return Router(
        partitions=partitions,
        writers=writers,
        readers=readers,
        gate=draw(st.sampled_from(["both", "write", "read", "none"])),
        normalise=draw(st.sampled_from(["all", "selected"] if readers in (None, writers) else ["all"])),
        scope=draw(st.sampled_from(["token", "head"])),
    )


@st.composite
def sse_specs(draw: st.DrawFn) -> SSESpec:
    """Every axis of an SSE spec, valid ones only."""
    backbone = draw(st.sampled_from(BACKBONES))
    shared = draw(st.booleans())
    router = draw(routers() | st.none() if shared else routers())
    forms = ["masked"]
    if router is None or router.readers == router.writers:
        forms.append("sorted")
    if backbone not in ("vector", "delta"):
        forms.append("routed")
    sizes = st.sampled_from([16, 20, 32, 60, 64, 128, 256])
    return SSESpec(
        name=draw(st.sampled_from(["sse", "sse_64", "Layer0"])),
        head_dim=draw(sizes),
        value_dim=draw(st.none() | sizes),
        group_size=draw(st.sampled_from([1, 1, 2, 64])),
        backbone=backbone,
        gate_site=draw(st.sampled_from([None, "pre_norm", "post_norm"])) if backbone == "delta" else None,
        shared=shared,
        router=router,
        q_map=draw(st.sampled_from(ROW_MAPS)),
        k_map=draw(st.none() | st.sampled_from(ROW_MAPS)),
        scale=draw(st.none() | st.floats(0.01, 2.0)),
        form=draw(st.sampled_from(forms)),
    )


@given(sse_specs())
def test_toml_round_trip(spec):
    again = from_toml(to_toml(spec))
    assert type(again) is SSESpec
    assert again == spec
    assert to_toml(again) == to_toml(spec)
    assert digest(again) == digest(spec)


@given(sse_specs(), sse_specs())
def test_equal_text_means_equal_specs(one, other):
    assert (canonical(one) == canonical(other)) == (one == other)


DIGESTS = [
    (SSESpec(), "5734b2527dcee0f1dbf4f2099c595b160802a96d88cecba5b1c1816aca9f0f83"),
    (
        SSESpec(
            name="gdn", head_dim=64, value_dim=128, group_size=2, backbone="delta", form="masked",
            router=Router(partitions=8, writers=2, readers=3, scope="head"),
            q_map=library.topk_softmax(8), k_map=lambda x: library.relu(x) ** 2,
        ),
        "0022e1e00d5ecc2e67c33956656133e12db4f2f92533b499cd0d55376bf9b133",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "written_down"), DIGESTS, ids=["default", "delta"])
def test_digest_is_the_same_on_every_machine_and_for_every_hash_seed(spec, written_down, tmp_path):
    assert digest(spec) == written_down
    path = tmp_path / "spec.toml"
    path.write_text(to_toml(spec))
    program = f"from splagen.spec import digest, read_spec; print(digest(read_spec({str(path)!r})))"
    for seed in ("0", "7"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True
        )
        assert ran.stdout.strip() == written_down


def test_defaults_are_filled_in():
    spec = SSESpec(head_dim=64)
    assert (spec.value_dim, spec.scale, spec.gate_site) == (64, 0.125, None)
    assert (spec.q_map, spec.k_map) == (library.silu, library.softmax)
    assert spec.router == Router(partitions=4, writers=1, readers=1)
    assert from_toml('kind = "sse"') == SSESpec()
    assert Router(writers=2).readers == 2
    delta = SSESpec(backbone="delta")
    assert (delta.q_map, delta.k_map, delta.gate_site) == (library.silu, library.silu, "post_norm")
    assert SSESpec(backbone="delta", k_map="softmax").k_map == library.softmax
    assert replace(spec, head_dim=32).value_dim == 64
    assert replace(delta, scale=2).scale == 2.0


def test_a_kind_has_its_own_text():
    assert to_toml(SSESpec()).startswith('kind = "sse"\n')
    assert '"kind":"sse"' in canonical(SSESpec())
    assert (SSESpec.kind, SPLASpec.kind) == ("sse", "spla")
    assert digest(SSESpec(name="x")) != digest(SPLASpec(name="x"))
    assert splagen.SSESpec is SSESpec
    assert splagen.Router is Router
    assert splagen.topk_softmax(3) == library.topk_softmax(3)


@pytest.mark.parametrize("phi", [*ROW_MAPS, lambda x: library.log1p(library.exp(x))])
def test_feature_maps_as_names_and_tables(phi):
    spec = SSESpec(q_map=phi, k_map=phi)
    text = to_toml(spec)
    assert from_toml(text) == spec
    named = library.FEATURE_MAPS.get(spec.q_map.name)
    assert (f'q_map = "{spec.q_map.name}"' in text) == (named is not None)
    assert ("[q_map]" in text) == (named is None)
    assert ("l2norm = true" in text) == (named is None and spec.q_map.l2norm)
    assert ("topk = " in text) == (spec.q_map.topk is not None)


def test_a_router_may_be_absent():
    alone = from_toml('kind = "sse"\nrouter = "none"')
    assert alone == SSESpec(router=None)
    assert 'router = "none"' in to_toml(alone)


def test_unequal_readers_and_writers():
    router = Router(writers=2, readers=3)
    assert SSESpec(router=router, form="masked").router.readers == 3
    assert SSESpec(router=router, form="routed", backbone="scalar").form == "routed"


BAD = [
    ("name", lambda: SSESpec(name="a-b")),
    ("name", lambda: SSESpec(name="class")),
    ("head_dim", lambda: SSESpec(head_dim=18)),
    ("head_dim", lambda: SSESpec(head_dim=260)),
    ("head_dim", lambda: SSESpec(head_dim=None)),
    ("value_dim", lambda: SSESpec(value_dim=12)),
    ("value_dim", lambda: SSESpec(value_dim=64.0)),
    ("group_size", lambda: SSESpec(group_size=0)),
    ("group_size", lambda: SSESpec(group_size=65)),
    ("backbone", lambda: SSESpec(backbone="gla")),
    ("gate_site", lambda: SSESpec(gate_site="post_norm")),
    ("gate_site", lambda: SSESpec(gate_site="pre_norm", backbone="scalar")),
    ("gate_site", lambda: SSESpec(gate_site="tile", backbone="delta")),
    ("shared", lambda: SSESpec(shared=1)),
    ("shared is False and router is None", lambda: SSESpec(shared=False, router=None)),
    ("router", lambda: SSESpec(router=4)),
    ("q_map", lambda: SSESpec(q_map="silly")),
    ("q_map", lambda: SSESpec(q_map="hedgehog")),
    ("q_map", lambda: SSESpec(q_map=lambda x: 3)),
    ("q_map.topk", lambda: SSESpec(q_map=library.topk_softmax(65), head_dim=64)),
    ("k_map", lambda: SSESpec(k_map=library.relu2)),
    ("k_map", lambda: SSESpec(k_map="l3norm")),
    ("k_map.topk", lambda: SSESpec(k_map=library.topk_softmax(17), head_dim=16)),
    ("scale", lambda: SSESpec(scale=-1.0)),
    ("scale", lambda: SSESpec(scale=float("inf"))),
    ("form", lambda: SSESpec(form="varlen")),
    ("router.readers", lambda: SSESpec(router=Router(writers=2, readers=1))),
    ("backbone is 'vector' with form 'routed'", lambda: SSESpec(form="routed")),
    ("backbone is 'delta' with form 'routed'", lambda: SSESpec(form="routed", backbone="delta")),
    ("numerics", lambda: SSESpec(numerics="hilo")),
    ("numerics.split", lambda: SSESpec(numerics=Numerics(split="full"))),
    ("router.partitions", lambda: Router(partitions=0)),
    ("router.partitions", lambda: Router(partitions=65)),
    ("router.partitions", lambda: Router(partitions=True)),
    ("router.writers", lambda: Router(writers=0)),
    ("router.writers", lambda: Router(writers=5)),
    ("router.readers", lambda: Router(readers=0)),
    ("router.readers", lambda: Router(readers=5)),
    ("router.gate", lambda: Router(gate="forget")),
    ("router.normalise", lambda: Router(normalise="topk")),
    ("router.normalise", lambda: Router(normalise="selected", writers=2, readers=1)),
    ("router.scope", lambda: Router(scope="group")),
]


@pytest.mark.parametrize(("axis", "make"), BAD)
def test_bad_axis_is_named(axis, make):
    with pytest.raises(SpecError) as caught:
        make()
    assert caught.value.message.startswith(axis)
    assert caught.value.hint


def test_a_refused_form_names_one_that_works():
    with pytest.raises(SpecError, match='form "masked"'):
        SSESpec(router=Router(writers=2, readers=1))
    with pytest.raises(SpecError, match='form "sorted"'):
        SSESpec(form="routed")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("head_dims = 64", "did you mean head_dim?"),
        ("causal = true", "unknown key causal"),
        ("[select]\nbudget = 3", "unknown key select"),
        ("[router]\npartition = 3", "did you mean partitions?"),
        ("router = 4", "a table [router]"),
        ('router = "off"', "a table [router]"),
        ("q_map = 3", "a table [q_map]"),
        ('k_map = "silo"', "k_map: unknown name 'silo'"),
        ("[k_map]\nsoftmax = true", "k_map.expression is missing"),
        ("[k_map]\nexpression = 'x'\nsigns = 3", "k_map.signs is 3"),
        ("[q_map]\nexpression = 'x'\ntopk = 3", "q_map.topk is 3 without softmax"),
        ("[q_map]\nexpression = 'sin(x)'", "q_map.expression"),
        ("[router]\nwriters = 2.0", "router.writers"),
    ],
)
def test_bad_file_is_refused(source, says, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(f'kind = "sse"\n{source}\n')
    with pytest.raises(SpecError, match=r"bad\.toml") as caught:
        read_spec(path)
    assert says in str(caught.value)


def test_example_specs():
    gla, gdn = (read_spec(EXAMPLES / f"sse_{name}.toml") for name in ("gla", "gdn"))
    assert gla == SSESpec(name="sse_gla")
    assert gdn == SSESpec(name="sse_gdn", backbone="delta", router=Router(writers=2))
