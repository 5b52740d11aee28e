"""A cache of transformers whose layers are steps of decoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from splagen import settings
from splagen.errors import InputError
from splagen.hf.attention import CARRIED, spec_of
from splagen.nn.cache import StepCache
from splagen.spec import SPLASpec


class SplagenLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: keys, values, statistics and states in pages of a `splagen.SPLACache`.

    `update` hands the new keys and values on, marked with the layer; attention takes them in with their queries.
    """

    is_sliding = False

    def __init__(self, spec: SPLASpec, tokens: int, folder: str | Path | None) -> None:
        super().__init__()
        self.spec, self.tokens, self.folder = spec, tokens, folder
        self.steps: StepCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for k [B, Hkv, L, D]."""
        if not key_states.is_cuda and not settings.interpreted():
            hint = "leave past_key_values out: generate() then computes each token from all keys, on any device"
            raise InputError("steps of decoding run on a GPU or in Triton's interpreter", hint)
        batch, heads = key_states.shape[:2]
        self.steps = StepCache(
            self.spec, sequences=batch, kv_heads=heads, tokens=self.tokens,
            dtype=key_states.dtype, device=key_states.device, folder=self.folder,
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The same keys and values; the keys carry this layer."""
        if self.steps is None:
            self.lazy_initialization(key_states, value_states)
        setattr(key_states, CARRIED, self)
        return key_states, value_states

    def attend(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output [B, L, Hq, E] at L new positions."""
        assert self.steps is not None
        return self.steps.attend(inputs)

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.steps.length if self.steps else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length with the queries, and the first position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Positions that there is room for."""
        return self.tokens

    def reset(self) -> None:
        """Empty sequences in the same pages."""
        if self.steps:
            self.steps.reset()

    def _refused(self, what: str) -> NoReturn:
        raise InputError(f"a SplagenCache does not support {what}", "leave past_key_values out for that")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams would share pages.  Raises InputError."""
        self._refused("beam search")

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot give a block back.  Raises InputError."""
        self._refused("taking tokens back")


class SplagenCache(Cache):  # type: ignore[misc]
    """`past_key_values` of `generate()` for a model with `attn_implementation="splagen"`.

    A prompt is one prefill; a token after it costs one step of decoding, which reads few blocks of the past.
    Sequences of a batch have one length.
    """

    def __init__(self, config: Any, tokens: int, *, folder: str | Path | None = None) -> None:
        """Room for `tokens` positions, prompt included, in each of the model's layers, allocated at the first call.

        Raises:
            InputError: the config has no spec.
        """
        spec = spec_of(config)
        super().__init__(layers=[SplagenLayer(spec, tokens, folder) for _ in range(config.num_hidden_layers)])
