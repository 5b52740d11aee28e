"""Hypothesis strategies that others build on: `specs()` draws every axis of a spec, valid ones only."""

from dataclasses import replace

from hypothesis import strategies as st

from splagen import library, spec

FORMULAS = [lambda x: x * library.sigmoid(x), lambda x: library.relu(x) ** 2, lambda x: x**3 / 4 - x]
SCORES = [library.softcap(30.0), library.alibi(), library.score_function(lambda s, m, n: s + (n - m) / 64)]
MASKS = [
    library.sliding_window(40),
    library.score_function(lambda s, m, n: library.where(n < m + 8, s / 2, -library.sp.oo)),
]


def head_dims() -> st.SearchStrategy[int]:
    """Mostly small head dimensions, with the odd ones that templates must pad."""
    return st.sampled_from([16, 16, 16, 32, 32, 24, 64, 80, 128, 192, 256])


def metrics() -> st.SearchStrategy[library.Metric]:
    clamps = st.floats(0.25, 64.0, width=32)
    ranks = st.integers(1, library.MOST_RANKS).map("rank{}".format)
    return st.one_of(
        st.sampled_from([library.taylor(), library.taylor(order=1), library.cumulant(order=1)]),
        clamps.map(lambda c: library.cumulant(clamp=c)),
        ranks.map(lambda r: library.taylor(covariance=r)),
        st.builds(lambda r, c: library.cumulant(covariance=r, clamp=c), ranks, clamps),
    )


def feature_maps(*, non_negative: bool = False) -> st.SearchStrategy[library.FeatureMap]:
    named = [m for m in library.FEATURE_MAPS.values() if not m.l2norm and (m.non_negative or not non_negative)]
    made = [
        library.feature_map(f, signs=signs, softmax=softmax)  # type: ignore[arg-type]
        for f in FORMULAS
        for signs in (1, 2)
        for softmax in (False, True)
        if softmax or not non_negative
    ]
    return st.sampled_from(named) | st.sampled_from(made)


@st.composite
def selects(draw: st.DrawFn) -> spec.Select:
    block_size = draw(st.sampled_from([16, 32, 64, 128]))
    granularity = draw(st.sampled_from(["token", "tile"]))
    metric = draw(metrics())
    statistics = [spec.Statistics(), spec.Statistics(cell=16)]
    if block_size >= 32 and not metric.rank:
        statistics.append(spec.windows())
    return spec.Select(
        block_size=block_size,
        budget=draw(st.integers(1, 4) | st.integers(1, 256)),
        sinks=draw(st.integers(0, 2) | st.integers(0, 64)),
        local=draw(st.integers(0, 2) | st.integers(0, 1024)),
        granularity=granularity,
        tile=1 if granularity == "token" else draw(st.sampled_from([16, 32, 64, 128])),
        metric=metric,
        statistics=draw(st.sampled_from(statistics)),
    )


@st.composite
def residuals(draw: st.DrawFn) -> spec.Residual:
    normaliser = draw(st.booleans())
    phi = draw(feature_maps(non_negative=normaliser))
    return spec.Residual(
        phi,
        temperature=draw(st.booleans()),
        normaliser=normaliser,
        own_rows=draw(st.sampled_from([False, False, False, True])),
    )


@st.composite
def specs(draw: st.DrawFn) -> spec.SPLASpec:
    """A valid spec; keep sequences short, since budget, sinks and local may be as large as a spec allows."""
    select = draw(st.none() | selects() | selects() | selects())
    linear = draw(st.none() | residuals() | residuals()) if select else None
    combine = draw(st.sampled_from(["add", "rms", "rms_residual", "gate"])) if linear else None
    if linear and linear.temperature_cancels(combine):
        linear = replace(linear, temperature=False)  # a spec refuses it
    return spec.SPLASpec(
        head_dim=draw(head_dims()),
        value_dim=draw(st.none() | head_dims()),
        group_size=draw(st.sampled_from([1, 1, 2, 3, 4, 16, 64])),
        causal=draw(st.booleans()),
        scale=draw(st.none() | st.floats(0.01, 2.0)),
        score=draw(st.none() | st.sampled_from(SCORES if linear else SCORES + MASKS)),
        select=select,
        linear=linear,
        combine=combine,
        dense_below=draw(st.sampled_from([0, 0, 100, 8192])) if select else 0,
        name=draw(st.sampled_from(["spla", "spla_64", "Layer0"])),
    )
