"""Specs: TOML round trip, digests that do not move, and errors that name the field."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given

from splagen import library
from splagen.errors import SpecError
from splagen.spec import (
    Numerics,
    Residual,
    Select,
    SPLASpec,
    Statistics,
    canonical,
    digest,
    from_toml,
    read_spec,
    to_toml,
    windows,
)
from tests.strategies import specs

DIAGONAL = Select(metric=library.taylor(covariance="diag"))


@given(specs())
def test_toml_round_trip(spec):
    again = from_toml(to_toml(spec))
    assert again == spec
    assert to_toml(again) == to_toml(spec)
    assert digest(again) == digest(spec)


@given(specs(), specs())
def test_equal_text_means_equal_specs(one, other):
    assert (canonical(one) == canonical(other)) == (one == other)


def test_digest_does_not_depend_on_the_hash_seed(tmp_path):
    spec = SPLASpec(linear=Residual(lambda x: library.relu(x) ** 2 + x * library.silu(x)), score=library.alibi())
    path = tmp_path / "spec.toml"
    path.write_text(to_toml(spec))
    program = f"from splagen.spec import digest, read_spec; print(digest(read_spec({str(path)!r})))"
    for seed in ("0", "7"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True
        )
        assert ran.stdout.strip() == digest(spec)


def test_digest_of_the_default_spec():
    # Written down once: every platform and version must find the same.
    assert digest(SPLASpec()) == "34e12794039dd5c3ec5e82a2c35c48032891ebf35f17f5258ffcbcce7676e9be"
    assert digest(SPLASpec(select=DIAGONAL)) == "713f91839e7fc3e4e9300c30918045c1861eba00e9aecc4cae16739a977f748c"


def test_younger_options_of_a_feature_map_are_absent_from_older_text():
    spec = SPLASpec(select=DIAGONAL, linear=Residual(lambda x: library.relu(x) ** 2))
    for text in (to_toml(spec), canonical(spec)):
        assert "expression" in text
        assert "l2norm" not in text
        assert "topk" not in text
    assert digest(spec) == "5ddb45d56faef53a6a9ceb80ebf1593854f06910eee69cd7cc3549f938909fb5"


def test_a_file_may_name_its_kind():
    assert "kind" not in to_toml(SPLASpec())
    assert from_toml('kind = "spla"') == SPLASpec()
    for kind in ('"splat"', "1"):
        with pytest.raises(SpecError, match="kind"):
            from_toml(f"kind = {kind}")


def test_a_select_without_a_metric_takes_what_its_statistics_have():
    assert Select().metric == library.taylor(covariance="rank2")
    assert Select(statistics=Statistics(cell=16)) == Select(metric=library.taylor(), statistics=Statistics(cell=16))
    assert Select(statistics=windows()) == Select(metric=library.taylor(covariance="diag"), statistics=windows())
    assert replace(DIAGONAL, statistics=windows(), metric=None) == Select(statistics=windows())
    for table, statistics in (
        ("", Statistics()),
        ("cell = 16", Statistics(cell=16)),
        ('cell = 16\nwidth = 32\nstride = 16\npool = "max"', windows()),
    ):
        spec = SPLASpec(select=Select(statistics=statistics))
        assert from_toml(f"[select.statistics]\n{table}") == spec == from_toml(to_toml(spec))
        assert (
            f'[select.metric]\norder = 2\nform = "taylor"\ncovariance = "{spec.select.metric.covariance}"'
            in to_toml(spec)
        )


def test_defaults_are_filled_in():
    spec = SPLASpec(head_dim=64)
    assert (spec.value_dim, spec.scale, spec.combine) == (64, 0.125, "rms")
    assert SPLASpec(linear=None).combine == "none"
    assert from_toml("") == SPLASpec()
    assert from_toml('select = "none"\nlinear = "none"') == SPLASpec(select=None, linear=None)
    assert SPLASpec(head_dim=64) == SPLASpec(head_dim=64, value_dim=64, scale=0.125, combine="rms")


BAD = [
    ("head_dim", lambda: SPLASpec(head_dim=20)),
    ("head_dim", lambda: SPLASpec(head_dim=264)),
    ("head_dim", lambda: SPLASpec(head_dim=None)),
    ("value_dim", lambda: SPLASpec(value_dim=8)),
    ("group_size", lambda: SPLASpec(group_size=0)),
    ("group_size", lambda: SPLASpec(group_size=True)),
    ("causal", lambda: SPLASpec(causal=1)),
    ("scale", lambda: SPLASpec(scale=0.0)),
    ("scale", lambda: SPLASpec(scale=float("nan"))),
    ("scale", lambda: SPLASpec(scale="big")),
    ("score", lambda: SPLASpec(score="tanh")),
    ("score", lambda: SPLASpec(score=library.sliding_window(64))),
    ("select", lambda: SPLASpec(select=64)),
    ("select", lambda: SPLASpec(select=None)),
    ("linear", lambda: SPLASpec(linear="hedgehog")),
    ("combine", lambda: SPLASpec(combine="sum")),
    ("combine", lambda: SPLASpec(combine="none")),
    ("combine", lambda: SPLASpec(linear=None, combine="add")),
    ("dense_below", lambda: SPLASpec(dense_below=-1)),
    ("dense_below", lambda: SPLASpec(select=None, linear=None, dense_below=10)),
    ("numerics", lambda: SPLASpec(numerics="hilo")),
    ("numerics.split", lambda: Numerics(split="full")),
    ("numerics.deterministic", lambda: Numerics(deterministic=0)),
    ("name", lambda: SPLASpec(name="a-b")),
    ("name", lambda: SPLASpec(name="class")),
    ("name", lambda: SPLASpec(name="")),
    ("select.block_size", lambda: Select(block_size=48)),
    ("select.budget", lambda: Select(budget=0)),
    ("select.budget", lambda: Select(budget=257)),
    ("select.budget", lambda: Select(budget=2.0)),
    ("select.sinks", lambda: Select(sinks=65)),
    ("select.local", lambda: Select(local=-1)),
    ("select.granularity", lambda: Select(granularity="row")),
    ("select.tile", lambda: Select(tile=16)),
    ("select.tile", lambda: Select(granularity="tile")),
    ("select.metric", lambda: Select(metric="taylor")),
    ("select.metric.covariance", lambda: Select(metric=library.taylor(covariance="rank4"), statistics=windows())),
    ("select.metric.covariance", lambda: Select(metric=library.taylor(), statistics=windows())),
    ("select.metric.covariance", lambda: replace(Select(), statistics=windows())),
    ("select.statistics", lambda: Select(statistics=None)),
    ("select.statistics.width", lambda: Select(block_size=16, statistics=windows())),
    ("select.statistics.cell", lambda: Statistics(cell=32)),
    ("select.statistics.cell", lambda: Statistics(width=32, stride=16, pool="max")),
    ("select.statistics.width", lambda: Statistics(width=32)),
    ("select.statistics.width", lambda: Statistics(pool="max")),
    ("select.statistics.stride", lambda: Statistics(stride=16)),
    ("select.statistics.pool", lambda: Statistics(pool="mean")),
    ("feature_map", lambda: Residual(feature_map="hedgehogs")),
    ("linear.temperature", lambda: Residual(temperature=1)),
    ("linear.normaliser", lambda: Residual(normaliser=None)),
    ("linear.normaliser", lambda: Residual("identity", normaliser=True)),
    ("linear.temperature", lambda: SPLASpec(linear=Residual("relu2", temperature=True), combine="rms")),
    ("linear.normaliser", lambda: SPLASpec(linear=Residual("relu", True, normaliser=True), combine="gate")),
    ("feature_map.signs", lambda: library.FeatureMap("x", signs=2.0)),
    ("feature_map.topk", lambda: library.FeatureMap("x", softmax=True, topk=True)),
    ("feature_map.name", lambda: library.FeatureMap("x", name='a"b')),
    ("metric.order", lambda: library.Metric(order=2.0)),
    ("metric.covariance", lambda: library.Metric(covariance=["diag"])),
    ("metric.clamp", lambda: library.Metric(form="cumulant", clamp="8")),
    ("score.name", lambda: library.ScoreFunction("s", name="größe")),
    ("linear.feature_map has l2norm", lambda: Residual("silu_l2norm")),
    ("linear.feature_map has topk", lambda: Residual(library.topk_softmax(4))),
]


@pytest.mark.parametrize(("field", "make"), BAD)
def test_bad_field_is_named(field, make):
    with pytest.raises(SpecError) as caught:
        make()
    assert field in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("head_dims = 64", "did you mean head_dim?"),
        ("[select]\nbuget = 3", "select.buget"),
        ("[select.metric]\nordr = 1", "did you mean order?"),
        ("[select]\nmetric = 3", "[select.metric]"),
        ('linear = "off"', "[linear]"),
        ("[linear.feature_map]\nsigns = 2", "linear.feature_map.expression"),
        ("[linear.feature_map]\nexpression = \"__import__('os').system('x')\"", "Call"),
        ("[linear.feature_map]\nexpression = 3", "text"),
        ("[linear.feature_map]\nexpression = 'x'\nsigns = 3", "linear.feature_map.signs is 3"),
        ("[linear.feature_map]\nexpression = 'x'\nsigns = 2.0", "linear.feature_map.signs is 2.0"),
        ("[linear.feature_map]\nexpression = 'x'\nname = ['x']", "linear.feature_map.name"),
        ("[linear.feature_map]\nexpression = ['x']", "text"),
        ("[select.metric]\ncovariance = ['diag']", "metric.covariance"),
        ("[score]\nexpression = 's'\nname = '\"\"\"'", "score.name"),
        ("[score]\nname = 'cap'", "score.expression"),
        ("[score]\nexpression = 's'\nmasks = true", "score.masks"),
        ("head_dim = ", "TOML"),
        ("scale = nan", "scale"),
        ("[select]\nbudget = 13.0", "select.budget"),
        ('causal = "yes"', "causal"),
    ],
)
def test_bad_file_is_refused(source, says, tmp_path):
    with pytest.raises(SpecError) as caught:
        from_toml(source)
    assert says in str(caught.value)
    path = tmp_path / "bad.toml"
    path.write_text(source)
    with pytest.raises(SpecError, match=r"bad\.toml"):
        read_spec(path)


def test_missing_file(tmp_path):
    with pytest.raises(SpecError, match="cannot read"):
        read_spec(tmp_path / "none.toml")


def test_readme_spec():
    spec = SPLASpec(
        head_dim=128,
        group_size=16,
        causal=True,
        select=Select(block_size=64, budget=13, sinks=1, local=1, metric=library.taylor(order=2, covariance="rank2")),
        linear=Residual(feature_map=lambda x: library.relu(x)),
        combine="rms",
    )
    assert spec.linear.feature_map == library.relu
