"""splagen: a small compiler for attention kernels.

A spec is lowered through a Program of equations to specialised Triton kernels and comes back as a differentiable
torch op.  Importing this module imports neither torch nor triton; the names below load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SPLASpec": "spec",
    "Select": "spec",
    "Residual": "spec",
    "Statistics": "spec",
    "Numerics": "spec",
    "windows": "spec",
    "digest": "spec",
    "from_toml": "spec",
    "to_toml": "spec",
    "read_spec": "spec",
    "SSESpec": "sse_spec",
    "Router": "sse_spec",
    "FeatureMap": "library",
    "feature_map": "library",
    "identity": "library",
    "relu": "library",
    "relu2": "library",
    "elu1": "library",
    "exp": "library",
    "softmax": "library",
    "hedgehog": "library",
    "silu": "library",
    "l2norm": "library",
    "silu_l2norm": "library",
    "topk_softmax": "library",
    "Metric": "library",
    "taylor": "library",
    "cumulant": "library",
    "ScoreFunction": "library",
    "score_function": "library",
    "softcap": "library",
    "alibi": "library",
    "sliding_window": "library",
    "SplagenError": "errors",
    "program": "pipeline",
    "lowered": "pipeline",
    "kernels": "pipeline",
    "source": "pipeline",
    "generate": "pipeline",
    "generate_decoding": "pipeline",
    "generate_packed": "pipeline",
    "generate_prefill": "pipeline",
    "SPLACache": "paged_cache",
    "scale_of": "paged_cache",
    "load": "tuning",
    "load_decoding": "tuning",
    "load_packed": "tuning",
    "Library": "pipeline",
    "DecodingLibrary": "pipeline",
    "PackedLibrary": "pipeline",
    "PrefillLibrary": "pipeline",
    "verify": "pipeline",
    "verify_packed": "pipeline",
    "tune": "tuning",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from splagen.errors import SplagenError as SplagenError
    from splagen.library import FeatureMap as FeatureMap
    from splagen.library import Metric as Metric
    from splagen.library import ScoreFunction as ScoreFunction
    from splagen.library import alibi as alibi
    from splagen.library import cumulant as cumulant
    from splagen.library import elu1 as elu1
    from splagen.library import exp as exp
    from splagen.library import feature_map as feature_map
    from splagen.library import hedgehog as hedgehog
    from splagen.library import identity as identity
    from splagen.library import l2norm as l2norm
    from splagen.library import relu as relu
    from splagen.library import relu2 as relu2
    from splagen.library import score_function as score_function
    from splagen.library import silu as silu
    from splagen.library import silu_l2norm as silu_l2norm
    from splagen.library import sliding_window as sliding_window
    from splagen.library import softcap as softcap
    from splagen.library import softmax as softmax
    from splagen.library import taylor as taylor
    from splagen.library import topk_softmax as topk_softmax
    from splagen.paged_cache import SPLACache as SPLACache
    from splagen.paged_cache import scale_of as scale_of
    from splagen.pipeline import DecodingLibrary as DecodingLibrary
    from splagen.pipeline import Library as Library
    from splagen.pipeline import PackedLibrary as PackedLibrary
    from splagen.pipeline import PrefillLibrary as PrefillLibrary
    from splagen.pipeline import generate as generate
    from splagen.pipeline import generate_decoding as generate_decoding
    from splagen.pipeline import generate_packed as generate_packed
    from splagen.pipeline import generate_prefill as generate_prefill
    from splagen.pipeline import kernels as kernels
    from splagen.pipeline import lowered as lowered
    from splagen.pipeline import program as program
    from splagen.pipeline import source as source
    from splagen.pipeline import verify as verify
    from splagen.pipeline import verify_packed as verify_packed
    from splagen.spec import Numerics as Numerics
    from splagen.spec import Residual as Residual
    from splagen.spec import Select as Select
    from splagen.spec import SPLASpec as SPLASpec
    from splagen.spec import Statistics as Statistics
    from splagen.spec import digest as digest
    from splagen.spec import from_toml as from_toml
    from splagen.spec import read_spec as read_spec
    from splagen.spec import to_toml as to_toml
    from splagen.spec import windows as windows
    from splagen.sse_spec import Router as Router
    from splagen.sse_spec import SSESpec as SSESpec
    from splagen.tuning import load as load
    from splagen.tuning import load_decoding as load_decoding
    from splagen.tuning import load_packed as load_packed
    from splagen.tuning import tune as tune


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"splagen has no {name}")
    return getattr(importlib.import_module(f"splagen.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
