"""Layers of SPLA and SSE to put into a model: plain torch modules around the generated ops.

They use what splagen gives to everybody, and nothing of splagen uses them.
"""

from splagen.nn.branches import Branches
from splagen.nn.cache import RowCache, StateCache, StepCache
from splagen.nn.layer import AttentionLayer
from splagen.nn.layout import SPIKING_BRAIN_2, layout, sse_h
from splagen.nn.rotary import Rotary
from splagen.nn.spla import SPLAAttention
from splagen.nn.sse import SSEAttention

__all__ = [
    "SPIKING_BRAIN_2", "AttentionLayer", "Branches", "Rotary", "RowCache", "SPLAAttention", "SSEAttention",
    "StateCache", "StepCache", "layout", "sse_h",
]  # fmt: skip
