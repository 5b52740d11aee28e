"""What is computed: frozen, validated specs, their TOML form and their digest.

Here stand the spec of SPLA and the text of every kind of spec; SSE's is in `splagen.sse_spec`.
How it runs is a schedule's business: nothing here mentions a tile, a warp or a device.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from splagen.errors import SpecError
from splagen.fields import identifier, is_a, one_of, placed, positive_number, whole
from splagen.library import FEATURE_MAPS, FeatureMap, Metric, ScoreFunction, hedgehog, later, score_function, taylor
from splagen.library import feature_map as make_feature_map

if TYPE_CHECKING:
    from splagen.sse_spec import SSESpec

__all__ = [
    "FeatureMap", "Metric", "Numerics", "Residual", "SPLASpec", "ScoreFunction", "Select", "Spec", "Statistics",
    "canonical", "digest", "from_toml", "read_spec", "to_toml", "windows",
]  # fmt: skip

Spec: TypeAlias = "SPLASpec | SSESpec"

_toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@dataclass(frozen=True)
class Statistics:
    """Which keys share one mean and variance, and how a block gets its score (arXiv 2601.22379).

    Attributes:
        cell: keys per non-overlapping cell: 16, or None for the whole block.
        width: keys per window, or None for windows that are the cells; see `windows`.
        stride: keys from one window's start to the next, or None.
        pool: "logsum" adds the masses of a block's cells; "max" takes the largest window touching it.
    """

    cell: int | None = None
    width: int | None = None
    stride: int | None = None
    pool: Literal["logsum", "max"] = "logsum"

    def __post_init__(self) -> None:
        one_of("select.statistics.pool", self.pool, ("logsum", "max"))
        one_of("select.statistics.cell", self.cell, (None, 16))
        one_of("select.statistics.width", self.width, (None, 32))
        one_of("select.statistics.stride", self.stride, (None, 16))
        wanted = (None, None) if self.pool == "logsum" else (32, 16)
        for name, value in zip(("width", "stride"), wanted, strict=True):
            if getattr(self, name) != value:
                given = f"select.statistics.{name} is {getattr(self, name)!r} with pool {self.pool!r}"
                raise SpecError(given, 'overlapping windows are windows(): pool "max", width 32, stride 16')
        if self.pool == "max" and self.cell != 16:
            raise SpecError(
                f"select.statistics.cell is {self.cell!r} with windows", "windows are built from cells of 16"
            )


def windows() -> Statistics:
    """InfLLM-v2's overlapping windows of 32 keys every 16, max-pooled; for comparison: it selects worse.

    Of a covariance they take the diagonal alone, which a Select without a metric then chooses.
    """
    return Statistics(cell=16, width=32, stride=16, pool="max")


@dataclass(frozen=True)
class Select:
    """Which blocks of keys a query attends to exactly (SPLA, arXiv 2601.22379).

    A metric given as None is filled in, so `dataclasses.replace` of statistics keeps it.

    Attributes:
        block_size: keys per block: 16, 32, 64 or 128.
        budget: freely chosen blocks per query (or tile) and KV head, 1 to 256; sinks and local come on top.
        sinks: blocks at the start that are always attended, 0 to 64.
        local: complete blocks next to the query's own always attended, 0 to 1024; both sides if not causal.
        granularity: "token" chooses for every query, "tile" for `tile` neighbouring queries together.
        tile: queries that share a choice: 1 with "token"; 16, 32, 64 or 128 with "tile".
        metric: the log score of a block; None is taylor(), with windows taylor(covariance="diag").
        statistics: what the metric is computed from.
        own_rows: whether scores and statistics are of rows q_m and k_m that the caller gives, such as those before
            RoPE, in place of q and k.
    """

    block_size: int = 64
    budget: int = 13
    sinks: int = 1
    local: int = 1
    granularity: Literal["token", "tile"] = "token"
    tile: int = 1
    metric: Metric = None  # type: ignore[assignment]
    statistics: Statistics = Statistics()
    own_rows: bool = later(False)

    def __post_init__(self) -> None:
        one_of("select.block_size", self.block_size, (16, 32, 64, 128))
        whole("select.budget", self.budget, 1, 256)
        whole("select.sinks", self.sinks, 0, 64)
        whole("select.local", self.local, 0, 1024)
        one_of("select.granularity", self.granularity, ("token", "tile"))
        one_of("select.tile", self.tile, (1,) if self.granularity == "token" else (16, 32, 64, 128))
        is_a("select.statistics", self.statistics, (Statistics,), "Statistics() or windows()")
        if self.metric is None:
            object.__setattr__(self, "metric", taylor(covariance="diag" if self.statistics.width else None))
        is_a("select.metric", self.metric, (Metric,), "taylor() or cumulant()")
        one_of("select.own_rows", self.own_rows, (False, True))
        if self.statistics.width and self.block_size < self.statistics.width:
            what = f"select.statistics.width {self.statistics.width} with select.block_size {self.block_size}"
            raise SpecError(what, "a window must fit into a block: a larger block_size, or Statistics()")
        if self.statistics.width and self.metric.rank:
            what = f"select.metric.covariance is {self.metric.covariance!r} with overlapping windows"
            raise SpecError(
                what, 'windows take a metric with covariance="diag"; a low rank takes Statistics(), of blocks or cells'
            )


@dataclass(frozen=True)
class Residual:
    """Linear attention over the blocks not selected (SPLA, arXiv 2601.22379; phi: RAttention, 2506.15545).

    Attributes:
        feature_map: phi, of raw (unscaled) queries and keys, without l2norm and topk; a name or a formula is
            converted.
        temperature: whether x is multiplied by exp(temperature[h]), a learned input per KV head, before phi; not where
            it would cancel.
        normaliser: whether the branch is divided by phi(q)·Σ phi(k), at least 1e-6; for phi >= 0 only.
        own_rows: whether phi is of rows q_r and k_r that the caller gives, such as those before RoPE (as in
            RAttention), in place of q and k.
    """

    feature_map: FeatureMap = hedgehog
    temperature: bool = False
    normaliser: bool = False
    own_rows: bool = later(False)

    def divided_by(self, combine: str) -> str | None:
        """What divides the branch by a factor that all of it has; None where nothing does."""
        if self.normaliser:
            return "linear.normaliser"
        return f"combine = {combine}" if combine in ("rms", "rms_residual") else None

    def temperature_cancels(self, combine: str) -> bool:
        """True where nothing would depend on a temperature: φ(c x) = cⁿ φ(x), and cⁿ is divided away."""
        return self.feature_map.homogeneous and self.divided_by(combine) is not None

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_map", make_feature_map(self.feature_map))
        option = "l2norm" if self.feature_map.l2norm else "topk" if self.feature_map.topk is not None else None
        if option:
            hint = "use hedgehog, softmax or an elementwise map here; q_map and k_map of an SSESpec take it"
            raise SpecError(f"linear.feature_map has {option}, which the residual branch does not support", hint)
        one_of("linear.temperature", self.temperature, (False, True))
        one_of("linear.normaliser", self.normaliser, (False, True))
        one_of("linear.own_rows", self.own_rows, (False, True))
        if self.normaliser and not self.feature_map.non_negative:
            what = f"linear.normaliser with linear.feature_map {self.feature_map.expression}, which may be < 0"
            raise SpecError(what, "use hedgehog, softmax, relu, relu2, elu1 or exp, or declare non_negative")


@dataclass(frozen=True)
class Numerics:
    """How the arithmetic rounds; accumulators, softmax and states are float32 whatever is chosen.

    Attributes:
        split: "hilo" multiplies states as two halves of the input type, hi + lo, so that subtracting
            nearly equal states stays accurate.
        deterministic: equal inputs give equal bits (fixed order of sums, none of them atomic).  Of 16-bit gradients
            below dense_below, which are torch's, only under torch.use_deterministic_algorithms.

    Each has one value: gradients by atomics were slower than those in a fixed order (`benchmarks/atomics.py`), and one
    half of a state alone loses what a difference needs.  The fields say so in a spec, and may get other values.
    """

    split: Literal["hilo"] = "hilo"
    deterministic: Literal[True] = True

    def __post_init__(self) -> None:
        one_of("numerics.split", self.split, ("hilo",))
        one_of("numerics.deterministic", self.deterministic, (True,))


@dataclass(frozen=True)
class SPLASpec:
    """Block-sparse softmax attention plus linear attention over the rest: SPLA, arXiv 2601.22379.

    Fields given as None are filled in, so `dataclasses.replace` of head_dim keeps value_dim and scale.

    Attributes:
        head_dim: D of q and k, a multiple of 8 from 16 to 256.
        value_dim: E of v and o, likewise; None is head_dim.
        group_size: query heads per KV head, 1 to 64.
        causal: whether a query sees only keys at or before it.
        scale: factor of q·k in the softmax and the metric; None is head_dim ** -0.5.
        score: what is done to a scaled score before the softmax, or None.
        select: the choice of blocks, or None for dense attention.
        linear: the residual branch, or None for block-sparse attention alone.
        combine: o from o_s and o_r: "add"; "rms", both normalised (None with a residual); "rms_residual":
            o_s + RMS(o_r); "gate": g_s o_s + g_r o_r, gates [B, L, Hq] from the caller; "none" without one.
        dense_below: sequences shorter than this attend to every key, and o_r is 0; 0 switches it off.  There 16-bit
            rows take torch's dense attention on an NVIDIA GPU, unless there is a score function.
        numerics: how the arithmetic rounds.
        name: of the op and of its module, an identifier.
    """

    kind: ClassVar[Literal["spla"]] = "spla"

    head_dim: int = 128
    value_dim: int = None  # type: ignore[assignment]
    group_size: int = 1
    causal: bool = True
    scale: float = None  # type: ignore[assignment]
    score: ScoreFunction | None = None
    select: Select | None = field(default_factory=Select)
    linear: Residual | None = field(default_factory=Residual)
    combine: Literal["none", "add", "rms", "rms_residual", "gate"] = None  # type: ignore[assignment]
    dense_below: int = 0
    numerics: Numerics = Numerics()
    name: str = "spla"

    def __post_init__(self) -> None:
        whole("head_dim", self.head_dim, 16, 256, 8)
        combine = "none" if self.linear is None else "rms"
        for key, value in (
            ("value_dim", self.head_dim),
            ("scale", self.head_dim**-0.5),
            ("combine", combine),
        ):
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        whole("value_dim", self.value_dim, 16, 256, 8)
        whole("group_size", self.group_size, 1, 64)
        one_of("causal", self.causal, (False, True))
        object.__setattr__(self, "scale", positive_number("scale", self.scale, "None is head_dim ** -0.5"))
        if callable(self.score):
            object.__setattr__(self, "score", score_function(self.score))
        is_a("score", self.score, (ScoreFunction, type(None)), "softcap(), alibi(), score_function() or None")
        is_a("select", self.select, (Select, type(None)), "Select(), or None for dense attention")
        is_a("linear", self.linear, (Residual, type(None)), "Residual(), or None")
        is_a("numerics", self.numerics, (Numerics,), "Numerics()")
        whole("dense_below", self.dense_below, 0)
        identifier("name", self.name)
        branches = ("none",) if self.linear is None else ("add", "rms", "rms_residual", "gate")
        one_of("combine", self.combine, branches)
        if self.select is None and self.linear is not None:
            raise SpecError("linear is set but select is None: nothing is left over", "set linear to None too")
        if self.select is None and self.dense_below:
            raise SpecError("dense_below is set but select is None: it is dense already", "set dense_below=0")
        if self.linear is not None and self.score is not None and self.score.masks:
            what = f"score {self.score.name} masks keys (-oo), which the residual of linear would still contain"
            raise SpecError(what, "set linear to None, or use a score function without -oo")
        if self.linear is not None and self.linear.temperature and self.linear.temperature_cancels(self.combine):
            what = f"linear.temperature scales what linear.feature_map {self.linear.feature_map.name} gives as a whole"
            by = self.linear.divided_by(self.combine)
            raise SpecError(f"{what}, and {by} divides by it", "set temperature to false: nothing depends on it")


# -- text --------------------------------------------------------------------------------------------------

_PARTS: dict[str, type[Any]] = {
    "select": Select, "select.metric": Metric, "select.statistics": Statistics, "linear": Residual,
    "linear.feature_map": FeatureMap, "numerics": Numerics, "score": ScoreFunction,
}  # fmt: skip
_ABSENT = ("select", "linear", "router")  # written "none" where None means: without it


def _plain(value: object) -> Any:
    """A spec as nested dicts of what its constructors take; a named feature map is its name."""
    if isinstance(value, FeatureMap) and FEATURE_MAPS.get(value.name) == value:
        return value.name
    if dataclasses.is_dataclass(value):
        given = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
        return {f.name: _plain(v) for f, v in given if not (f.metadata.get("later") and v == f.default)}
    return value


def to_toml(spec: Spec) -> str:
    """The spec as TOML that `from_toml` reads back to an equal one; an absent part is "none"."""
    lines: list[str] = [] if spec.kind == "spla" else [f"kind = {json.dumps(spec.kind)}"]

    def table(path: str, values: Mapping[str, Any]) -> None:
        lines.extend([f"\n[{path}]"] if path else [])
        for key, value in values.items():
            if value is None and key in _ABSENT:
                value = "none"
            if value is not None and not isinstance(value, dict):
                lines.append(f"{key} = {json.dumps(value)}")
        for key, value in values.items():
            if isinstance(value, dict):
                table(f"{path}.{key}" if path else key, value)

    table("", _plain(spec))
    return "\n".join(lines) + "\n"


def from_toml(text: str) -> Spec:
    """Read a spec from TOML, an SSESpec where `kind = "sse"` says so; what is left out takes its default.

    Raises:
        SpecError: not TOML, an unknown kind, an unknown key (with the closest known one), or a value that is refused.
    """
    try:
        values = _toml.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"not a TOML file: {error}", "compare it with the output of to_toml(SPLASpec())") from None
    name = values.pop("kind", "spla")
    one_of("kind", name, ("spla", "sse"))
    from splagen.sse_spec import PARTS, SSESpec

    made: Spec = _build("", SPLASpec, values, _PARTS) if name == "spla" else _build("", SSESpec, values, PARTS)
    return made


def _build(path: str, kind: type[Any], values: object, parts: Mapping[str, type[Any]]) -> Any:
    if not isinstance(values, dict):
        raise SpecError(f"{path} is {values!r}", f"a table [{path}]")
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    made: dict[str, object] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise SpecError(f"unknown key {where}", f"did you mean {near}? keys: {', '.join(known)}")
        if where in _ABSENT and value == "none":
            made[key] = None
        elif where in parts and not (parts[where] is FeatureMap and isinstance(value, str)):
            made[key] = _build(where, parts[where], value, parts)
        else:
            made[key] = value
    if "expression" in known and "expression" not in made:
        raise SpecError(f"{path}.expression is missing", "give the formula as text")
    try:
        return kind(**made)
    except SpecError as error:
        if kind is not FeatureMap:
            raise
        raise placed(path, error) from None


def read_spec(path: str | Path) -> Spec:
    """Read a spec from a TOML file; the error of a bad one names the file.

    Raises:
        SpecError: the file cannot be read, or as for `from_toml`.
    """
    try:
        return from_toml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}", "give the path of a TOML file") from error
    except SpecError as error:
        raise type(error)(f"{path}: {error.message}", error.hint) from error


def canonical(spec: Spec) -> str:
    """Sorted JSON of every field, floats by repr: equal text means equal specs, on every machine."""
    return json.dumps({"kind": spec.kind, **_plain(spec)}, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(spec: Spec) -> str:
    """SHA-256 of `canonical(spec)`, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()
