"""Prefill on a cache: many new tokens of some sequences at once, and the cache as single steps would have left it.

New keys and values go into their pages; what all pages of a sequence hold is copied into packed rows, so that prefill
attends to the numbers that later steps attend to, rounded ones too.  The kernels of the last queries of packed
sequences then give the outputs, and on the way all that a step reads: numbers of keys and statistics of cells, which go
into pages, and sums over far blocks, which go on from those that the cache carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from splagen.cache_tensors import CacheTensors
from splagen.codegen.decoding import Decoding
from splagen.codegen.prefill_partition import PrefillPartition, pools_of, scaled_pools
from splagen.codegen.step_rows import scale_array
from splagen.errors import InputError
from splagen.pipeline import PrefillLibrary

_PARAMETERS = ("head_rows", "kv_head_scalars")


class PagedPrefill:
    """The steps of one call on the tensors of a cache; `slots` int64 are the sequences of the call."""

    def __init__(self, made: CacheTensors, step: Decoding, library: PrefillLibrary, slots: Tensor) -> None:
        """`step` is the decoding that the cache is for, `library` the prefill of the same spec."""
        self.made, self.step, self.library, self.slots = made, step, library, slots
        self.part: PrefillPartition = library.part
        self.heads = made.pages[step.pages[0].name].shape[1]

    def checked(self, tensors: Sequence[Tensor], cu_seqlens: Tensor, most: int, longest: int) -> dict[str, Tensor]:
        """What a step takes, by name, in packed rows.  Raises InputError for what does not fit the cache."""
        names = [a.name for a in self.step.tokens]
        if len(tensors) != len(names):
            raise InputError(f"prefill is given {len(tensors)} tensors", f"this spec takes {', '.join(names)}")
        rows, device = dict(zip(names, tensors, strict=True)), self.slots.device
        q, bounds, count = tensors[0], cu_seqlens, self.slots.shape[0]
        if most < 1 or longest < 1 or q.dim() != 3 or not q.shape[0]:
            what = f"prefill of q {tuple(q.shape)}, max_tokens {most}, max_length {longest}"
            raise InputError(what, "give packed rows [T, Hq, D] of one token or more, and positive sizes")
        if bounds.shape != (count + 1,) or bounds.dtype != torch.int32 or bounds.device != device:
            what = f"cu_seqlens are {bounds.dtype} {tuple(bounds.shape)} on {bounds.device}"
            raise InputError(what, f"give torch.int32 ({count + 1},) on {device}, beside {count} slots")
        geometry, numbered = self.step.geometry, self.library.module.rows_of(q.shape[0], count) * self.heads
        if max(most, longest) * geometry.group >= 2**31 or numbered * max(1, self.step.budget) >= 2**31:
            what = f"prefill of q {tuple(q.shape)}, max_tokens {most}, max_length {longest}"
            raise InputError(what, "rows, and the blocks they choose, are numbered below 2**31: prefill in parts")
        own = next(iter((self.made.scales or self.made.pages).values()))
        for a in self.step.tokens:
            x, of_keys = rows[a.name], a.name in self.step.key_rows
            if a.layout != "token_rows":
                continue
            shape = (q.shape[0], self.heads * (1 if of_keys else geometry.group), *a.width)
            if x.shape != shape or x.device != device or (a.width and x.dtype != own.dtype):
                what = f"{a.name} is {x.dtype} {tuple(x.shape)} on {x.device}"
                raise InputError(what, f"beside q and this cache it is {own.dtype} {shape} on {device}")
        return rows

    def run(self, rows: Mapping[str, Tensor], cu_seqlens: Tensor, most: int, longest: int, keys: int) -> Tensor:
        """Outputs [T, Hq, E] of the new tokens, which the cache takes in.

        Args:
            rows: what a step takes, by name: [T, heads(, width)] of all new tokens, and parameters.
            cu_seqlens: int32 [sequences of the call + 1].
            most: no less than the new tokens of a sequence.
            longest: no less than the length of a sequence afterwards.
            keys: no less than those lengths together.
        """
        made, pools = self.made, pools_of(self.part)
        given = [rows[a.name] for a in self.part.inputs]
        given = [x if a.layout in _PARAMETERS else _in_rows(x) for a, x in zip(self.part.inputs, given, strict=True)]
        pages = [made.pages[a.name] for a in pools]
        where = made.page_table, made.seqlens, made.settled, self.slots, cu_seqlens
        o, *carried, after = self.library.module.paged_op(
            *given, *self._before(), *pages, *self._scales(), *where, most, longest, keys
        )
        self._keep_states(carried, after)
        found: Tensor = o
        return found

    def _scales(self) -> list[Tensor]:
        """Of pages that may be in 8 bits, [Hkv]; 1 where they are in the type of q."""
        names = [scale_array(a).name for a in scaled_pools(self.part)]
        if self.made.scales:
            return [self.made.scales[name] for name in names]
        like = self.made.pages[pools_of(self.part)[0].name]
        return list(torch.ones(len(names), self.heads, dtype=like.dtype, device=like.device).unbind(0))

    def _before(self) -> list[Tensor]:
        """What sequences carry of far blocks, from which the sums of new tokens go on."""
        found = []
        for a, names in self.part.before:
            parts = [self.made.states[name][self.slots] for name in names]
            joined = torch.stack([x if x.dim() == 4 else x[..., None] for x in parts], dim=2)
            missing = a.width[1] - joined.shape[4]  # a sum of numbers is the first column of a state
            joined = pad(joined, (0, missing)) if missing else joined
            found.append(joined.reshape(-1, self.heads, *a.width))
        return found

    def _keep_states(self, carried: Sequence[Tensor], after: Tensor) -> None:
        """Sums over what is far for the last token, and the lengths with and without it."""
        taken = after > 0
        for x, (_, names) in zip(carried, self.part.states, strict=True):
            x = x.view(*x.shape[:2], len(names), -1, x.shape[3])
            for name, own in zip(names, x.unbind(2), strict=True):
                state = self.made.states[name]
                own = own if own.dim() == state.dim() else own[..., 0]
                mine = taken.view(-1, *[1] * (state.dim() - 1))
                state.index_copy_(0, self.slots, torch.where(mine, own, state[self.slots]))
        for lengths, x in ((self.made.settled, after - 1), (self.made.seqlens, after)):
            lengths.index_copy_(0, self.slots, torch.where(taken, x, lengths[self.slots]))


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def numbers_on(device: torch.device, slots: Sequence[int]) -> Tensor:
    """Numbers of slots on a device, int64, without waiting for it.  Raises InputError where one is there twice."""
    if len({*slots}) < len(slots):
        raise InputError(f"slots are {[*slots]}", "name each once")
    if [*slots] == [*range(len(slots))]:
        return torch.arange(len(slots), device=device)
    found = torch.tensor(slots)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
