"""Prefill on a cache: many new tokens of some sequences at once, and the cache as single steps would have left it.

New keys and values go into their pages; what all pages of a sequence hold is copied into packed rows, so that prefill
attends to the numbers that later steps attend to, rounded ones too.  The kernels of the last queries of packed
sequences then give the outputs, and on the way all that a step reads: numbers of keys, statistics of cells, sums over
far blocks.  Copies are torch operations on the device, and what must not be written goes into a page of nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from splagen.cache_tensors import LARGEST_E4M3, CacheTensors
from splagen.codegen.decoding import Decoding
from splagen.codegen.prefill_partition import PrefillPartition
from splagen.errors import InputError
from splagen.pipeline import PrefillLibrary


@dataclass(frozen=True)
class Placed:
    """Where new tokens go: for each, its sequence of the call, its position, and whether it is taken.

    By sequence, `before` is its length, `after` the one with its tokens, 0 where none is taken; `bounds` are those of
    the packed keys.
    """

    sequence: Tensor
    position: Tensor
    taken: Tensor
    before: Tensor
    after: Tensor
    bounds: Tensor

    @property
    def first_key(self) -> Tensor:
        """The first of the packed keys, [sequences]."""
        return self.bounds[:-1].long()


class PagedPrefill:
    """The steps of one call on the tensors of a cache; `slots` int64 are the sequences of the call."""

    def __init__(self, made: CacheTensors, step: Decoding, library: PrefillLibrary, slots: Tensor) -> None:
        """`step` is the decoding that the cache is for, `library` the prefill of the same spec."""
        self.made, self.step, self.library, self.slots = made, step, library, slots
        self.part: PrefillPartition = library.part
        first = made.pages[step.pages[0].name]
        self.pages, self.heads, self.page_size = first.shape[:3]
        self.table = made.page_table[slots].long()
        self.head = torch.arange(self.heads, device=slots.device)

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
        own = next(iter((self.made.scales or self.made.pages).values()))
        for a in self.step.tokens:
            x, of_keys = rows[a.name], a.name in self.step.key_rows
            if a.layout != "token_rows":
                continue
            shape = (q.shape[0], self.heads * (1 if of_keys else self.step.geometry.group), *a.width)
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
        module = self.library.module
        tokens = rows["q"].shape[0]
        bounds = module.bounds_of(cu_seqlens, tokens)
        placed, refused = self.place(bounds, tokens, most, longest)
        pages = self.rows_of(placed.position, placed.sequence, placed.taken)
        packed = dict(rows)
        for name in self.step.key_rows:
            self.store(f"{name}_pages", pages, rows[name])
        packed |= self.cached(placed, keys, longest)
        given = [packed[a.name] for a in self.part.inputs]
        by_token = {a.name for a in self.part.inputs if a.layout in ("query_rows", "query_scalars")}
        given = [x[None] if a.name in by_token else x for a, x in zip(self.part.inputs, given, strict=True)]
        before, settled = self._before(placed)
        o, *kept = module.prefill_op(*given, *before, bounds, placed.bounds, settled, most, longest)
        found = dict(zip([a.name for a in self.part.kept], kept, strict=True))
        self._keep_numbers(found, placed, pages)
        self._keep_statistics(found, placed, most)
        self._keep_states(found, placed)
        return torch.where(refused[:, None, None], float("nan"), o[0]).to(o.dtype)

    # -- places -------------------------------------------------------------------------------------------

    def place(self, bounds: Tensor, tokens: int, most: int, longest: int) -> tuple[Placed, Tensor]:
        """Where the tokens go, and which are refused for want of a page."""
        before = self.made.seqlens[self.slots].long()
        new = (bounds[1:] - bounds[:-1]).clamp(max=most).long()
        after = before + new
        column = torch.arange(self.table.shape[1], device=self.slots.device)
        needed = (after + self.page_size - 1) // self.page_size
        missing = ((self.table < 0) | (self.table >= self.pages)) & (column < needed[:, None])
        asked = (before >= 0) & (new > 0)
        room = min(longest, self.table.shape[1] * self.page_size)
        fits = asked & ~missing.any(1) & (after <= room)
        after = torch.where(fits, after, 0)
        ends = torch.cat([after.new_zeros(1), after.cumsum(0)]).int()
        sequence, place = _of(bounds, tokens)
        inside = (place >= 0) & (place < new[sequence])
        taken = inside & fits[sequence]
        refused = inside & (asked & ~fits)[sequence]
        return Placed(sequence, before[sequence] + place, taken, before, after, ends), refused

    def rows_of(self, position: Tensor, sequence: Tensor, taken: Tensor, span: int = 1) -> Tensor:
        """Rows of pages, [..., Hkv], of what lies at a position of a sequence; those of nobody where none is taken."""
        column = (position // self.page_size).clamp(0, self.table.shape[1] - 1)
        page = torch.where(taken, self.table[sequence, column], self.pages)
        row = torch.where(taken, position % self.page_size // span, 0)
        return (page[..., None] * self.heads + self.head) * (self.page_size // span) + row[..., None]

    # -- rows ---------------------------------------------------------------------------------------------

    def store(self, name: str, rows: Tensor, x: Tensor) -> None:
        """Write x [..., Hkv(, width)] to rows of pages, rounded as they hold it."""
        flat = self.made.flat(name)
        if flat.dtype == torch.float8_e4m3fn:
            x = (x.float() / self._scale(name).float()).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(flat.dtype)
        x = x.reshape(-1, flat.shape[1]).to(flat.dtype)
        if flat.dtype == torch.float8_e4m3fn:
            flat, x = flat.view(torch.uint8), x.view(torch.uint8)
        flat.index_copy_(0, rows.flatten(), x)

    def cached(self, placed: Placed, keys: int, longest: int) -> dict[str, Tensor]:
        """Packed rows [1, keys, Hkv, width] of all tokens of the sequences, by name."""
        names = [a.name for a in self.part.inputs if a.layout == "key_rows"]
        pools = [self.made.pages[f"{name}_pages"] for name in names]
        if self.made.scales:
            scales = [self.made.scales[f"{name}_scale"] for name in names]
        else:
            scales = [torch.ones(self.heads, dtype=x.dtype, device=x.device) for x in pools]
        found = self.library.module.cached(
            pools, scales, self.made.page_table, self.slots, placed.bounds, keys, longest
        )
        return dict(zip(names, found, strict=True))

    def _scale(self, pages: str) -> Tensor:
        return self.made.scales[pages.removesuffix("_pages") + "_scale"][:, None]

    def _before(self, placed: Placed) -> tuple[list[Tensor], Tensor]:
        """What sequences carry of far blocks, from which the sums of new tokens go on, and as of which query."""
        found = []
        for a, names in self.part.before:
            parts = [self.made.states[name][self.slots] for name in names]
            joined = torch.stack([x if x.dim() == 4 else x[..., None] for x in parts], dim=2)
            found.append(pad(joined, (0, a.width[1] - joined.shape[4])).reshape(-1, self.heads, *a.width))
        return found, torch.where(placed.after > 0, self.made.settled[self.slots], 0)

    # -- what steps read ----------------------------------------------------------------------------------

    def _keep_numbers(self, found: Mapping[str, Tensor], placed: Placed, rows: Tensor) -> None:
        key = torch.where(placed.taken, placed.first_key[placed.sequence] + placed.position, 0)
        for a in self.part.numbers:
            self.store(f"{a.name}_pages", rows, found[a.name][0].index_select(0, key))

    def _keep_statistics(self, found: Mapping[str, Tensor], placed: Placed, most: int) -> None:
        """Those of cells whose last key is new."""
        geometry = self.step.geometry
        cell, window = geometry.cell, geometry.cell + self.step.overhang
        first = ((placed.before - window) // cell + 1).clamp(min=0)  # that ends behind what was there
        number = first[:, None] + torch.arange(most // cell + 1, device=self.slots.device)  # [sequences, cells]
        sequence = torch.arange(number.shape[0], device=self.slots.device)[:, None].expand_as(number)
        whole = number * cell + window <= placed.after[:, None]
        rows = self.rows_of(number * cell, sequence, whole, cell)
        blocks = placed.first_key // geometry.block + torch.arange(number.shape[0], device=self.slots.device)
        at = torch.where(whole, blocks[:, None] * geometry.cells + number, 0)
        for a in self.part.statistics:
            self.store(f"{a.name}_pages", rows, found[a.name][0].index_select(0, at.flatten()))

    def _keep_states(self, found: Mapping[str, Tensor], placed: Placed) -> None:
        """Sums over what is far for the last token, and the lengths with and without it."""
        taken = placed.after > 0
        for a, names in self.part.states:
            x = found[a.name]
            x = x.view(*x.shape[:2], len(names), -1, x.shape[3])
            for name, own in zip(names, x.unbind(2), strict=True):
                state = self.made.states[name]
                own = own if own.dim() == state.dim() else own[..., 0]
                mine = taken.view(-1, *[1] * (state.dim() - 1))
                state.index_copy_(0, self.slots, torch.where(mine, own, state[self.slots]))
        for lengths, x in ((self.made.seqlens, placed.after), (self.made.settled, placed.after - 1)):
            lengths.index_copy_(0, self.slots, torch.where(taken, x, lengths[self.slots]).int())


def numbers_on(device: torch.device, slots: Sequence[int]) -> Tensor:
    """Numbers of slots on a device, int64, without waiting for it.  Raises InputError where one is there twice."""
    if len({*slots}) < len(slots):
        raise InputError(f"slots are {[*slots]}", "name each once")
    if [*slots] == [*range(len(slots))]:
        return torch.arange(len(slots), device=device)
    found = torch.tensor(slots)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _of(bounds: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of so many packed rows the sequence, the last one behind the end, and the place in it."""
    row = torch.arange(rows, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], row, right=True).clamp(max=bounds.shape[0] - 2)
    return sequence, row - bounds[sequence]
