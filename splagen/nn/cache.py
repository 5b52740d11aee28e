"""What a layer keeps from token to token while it generates.

A cache serves one layer and sequences of equal length; a layer appends to the one that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import splagen
from splagen.errors import InputError, SpecError
from splagen.paged_cache import MOST_TOKENS
from splagen.spec import SPLASpec
from splagen.sse_spec import SSESpec

KEY_ROWS = ("k", "v", "k_m", "k_r")
QUERY_ROWS = ("q", "q_m", "q_r", "gate_s", "gate_r")


class RowCache:
    """Keys and values of every position of SPLA; each call computes its rows again from all of them.

    It runs wherever the op runs, without steps of decoding, and costs a whole forward per call.  A query of the past is
    a row of zeros: nothing that is asked for depends on it.

    Attributes:
        length: positions so far.
    """

    def __init__(self, spec: SPLASpec, op: Callable[..., Tensor]) -> None:
        """An empty cache.  Raises SpecError where a query depends on others or on later keys."""
        if not spec.causal or (spec.select and spec.select.tile != 1):
            what = "causal is False" if not spec.causal else 'select.granularity is "tile": queries choose together'
            raise SpecError(what, 'generation takes specs with causal=True and granularity="token"')
        self.op, self.length = op, 0
        self.rows: dict[str, Tensor] = {}

    def attend(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output [B, L, Hq, E] at L new positions from the op's inputs at these positions, by name."""
        self.rows |= {
            n: torch.cat([self.rows[n], x], 1) if n in self.rows else x for n, x in inputs.items() if n in KEY_ROWS
        }
        past, self.length = self.length, self.length + inputs["q"].shape[1]
        whole = {n: _after(past, x) if n in QUERY_ROWS else x for n, x in inputs.items()} | self.rows
        return self.op(**whole)[:, past:]


def _after(past: int, x: Tensor) -> Tensor:
    """Rows x [B, L, ...] behind `past` rows of zeros."""
    return torch.cat([x.new_zeros(x.shape[0], past, *x.shape[2:]), x], 1)


class StepCache:
    """A `splagen.SPLACache` of one layer: a step of decoding for up to 8 tokens, prefill for a longer prompt.

    Both run on a GPU or in Triton's interpreter and have no gradient.

    Attributes:
        paged: the cache in pages; sequence b has slot b.
        length: positions so far.
    """

    def __init__(
        self,
        spec: SPLASpec,
        *,
        sequences: int,
        kv_heads: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: str | Path | None = None,
    ) -> None:
        """Room for `sequences` of up to `tokens` positions.

        Modules of steps and of prefill are written into `folder`; None is splagen's cache, and steps then take the
        Schedules that `splagen tune --decode` found.

        Raises:
            SpecError: a query depends on others or on later keys.
            InputError: a size or dtype that `SPLACache` does not take.
        """
        library = splagen.load_decoding(spec) if folder is None else splagen.generate_decoding(spec, folder)
        self.paged = splagen.SPLACache(
            library, sequences=sequences, kv_heads=kv_heads, tokens=tokens, dtype=dtype, device=device,
            step_tokens=MOST_TOKENS,
        )  # fmt: skip
        self.length, self.tokens = 0, tokens
        for _ in range(sequences):
            self.paged.allocate(tokens)

    def reset(self) -> None:
        """Empty sequences in the same pages."""
        for slot in range(self.paged.sequences):
            self.paged.reset(slot)
        self.length = 0

    def attend(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output [B, L, Hq, E] at L new positions from the op's inputs at these positions, by name.

        Raises:
            InputError: more positions than there is room for; nothing is changed.
        """
        new = inputs["q"].shape[1]
        if self.length + new > self.tokens:
            what = f"{new} more positions after {self.length} in a cache for {self.tokens}"
            raise InputError(what, "make a longer cache")
        given = {n: inputs[n].detach() for n in (a.name for a in self.paged.part.tokens)}
        by_token = {*KEY_ROWS, *QUERY_ROWS}
        if new <= MOST_TOKENS:
            o = self.paged.step(*(x.contiguous() if n in by_token else x for n, x in given.items()))
        else:
            first = torch.arange(self.paged.sequences + 1, dtype=torch.int32, device=self.paged.device) * new
            packed = [x.flatten(0, 1) if n in by_token else x for n, x in given.items()]
            o = self.paged.prefill(*packed, cu_seqlens=first, max_tokens=new, max_length=self.length + new)
            o = o.view(-1, new, *o.shape[1:])
        self.length += new
        return o


class StateCache:
    """The states of SSE of one layer, float32 [sequences, parts, HV, D, E]: equally large at every length.

    Attributes:
        table: the states; sequence b has slot b.
        length: positions so far.
    """

    def __init__(self, spec: SSESpec, *, sequences: int, value_heads: int, device: torch.device | str) -> None:
        """Zero states."""
        parts = spec.shared + (spec.router.partitions if spec.router else 0)
        shape = sequences, parts, value_heads, spec.head_dim, spec.value_dim
        self.table = torch.zeros(shape, dtype=torch.float32, device=device)
        self.slots = torch.arange(sequences, dtype=torch.int32, device=device)
        self.length = 0
