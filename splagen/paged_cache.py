"""The cache of decoding: keys, values and statistics in pages, and a state per sequence, all allocated once.

A state has the blocks that are far for the first token of the last step, at `settled`; no token from there on is in one
of them.  So a sequence may be cut back to any length from `settled` on, which is what `accept` does, and neither states
nor pages need to change: what lies in pages behind the length is written again before it is read, and statistics of a
cell are made when its last key comes, from the keys themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from splagen import settings
from splagen.cache_tensors import LARGEST_E4M3, NO_PAGE, NO_SEQUENCE, CacheTensors
from splagen.errors import InputError
from splagen.paged_prefill import PagedPrefill, numbers_on
from splagen.pipeline import DecodingLibrary
from splagen.spec import digest, to_toml

MOST_TOKENS = 8  # of a step: fewer than the tokens of a page, so that they lie in two pages at the most
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SPLACache:
    """Sequences of one layer in pages, for `{name}_step` of a decoding module.

    A sequence has a slot; its keys, values and statistics lie in pages that its row of `page_table` lists, and what
    far blocks add up to lies in its states.  Pages are given out on the host, for as many tokens as a sequence may get:
    steps then run without it.  `seqlens` counts tokens on the device; steps skip a slot of length -1, which has none.

    Attributes:
        page_table: int32 [sequences, pages of `tokens`], -1 where there is no page.
        seqlens: int32 [sequences].
        settled: int32 [sequences], the lengths before the last step: the least that `accept` leaves.
        pages: keys, values, numbers of keys and statistics by name, [pages, Hkv, rows of a page(, width)].
        states: float32 sums over far blocks by name, [sequences, Hkv, ...].
        scratch: what a step hands from kernel to kernel.
    """

    def __init__(
        self,
        library: DecodingLibrary,
        *,
        sequences: int,
        kv_heads: int,
        tokens: int,
        pages: int | None = None,
        page_size: int | None = None,
        step_tokens: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        scales: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Allocate everything.

        Args:
            library: of `generate_decoding`.
            sequences: slots; every step takes as many tokens for each.
            kv_heads: Hkv.
            tokens: the longest that a sequence may get.
            pages: of all sequences together; None has room for every one at its longest.
            page_size: tokens of a page, a multiple of the block; None is 256, or a block where that is larger.
            step_tokens: the most tokens per sequence that a step takes, 1 to 8: room for what kernels hand on.
            dtype: of keys, values and statistics.
            device: where it lies.
            scales: of a library whose pages are e4m3, by "k" and "v": a power of two, or a tensor of them [Hkv]; 1 for
                those that are not given.  A number is kept as a multiple of its scale, from 2^-9 to 448 in size.

        Raises:
            InputError: a size that is out of range, a scale that is no power of two, scales without e4m3, or a GPU
                that has no e4m3.
        """
        self.library, self.part = library, library.part
        self.spec_text = to_toml(library.spec)
        block = self.part.geometry.block
        page_size = self.part.default_page_size if page_size is None else page_size
        for name, value in (("sequences", sequences), ("kv_heads", kv_heads), ("tokens", tokens)):
            if value < 1:
                raise InputError(f"{name} is {value}", "give at least 1")
        if sequences * kv_heads * self.part.geometry.group >= 2**16:
            what = f"{sequences} sequences of {kv_heads} KV heads of {self.part.geometry.group} query heads"
            raise InputError(what, "a launch takes up to 65535 sequences and query heads: make several caches")
        if page_size < block or page_size % block:
            raise InputError(f"page_size is {page_size}", f"a multiple of the block of {block} tokens")
        if not 1 <= step_tokens <= MOST_TOKENS:
            raise InputError(f"step_tokens is {step_tokens}", f"a step takes 1 to {MOST_TOKENS} tokens per sequence")
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype}", f"one of {', '.join(map(str, DTYPES))}")
        self.page_size, self.width = page_size, -(-tokens // page_size)
        total = sequences * self.width if pages is None else pages
        if total < 1 or total * kv_heads * (page_size // block) >= 2**31:
            raise InputError(f"pages is {total}", "1 or more, and fewer than 2**31 blocks over all heads")
        self.sequences, self.kv_heads, self.dtype, self.device = sequences, kv_heads, dtype, torch.device(device)
        self.made = CacheTensors.allocate(
            library.module, self.part, sequences=sequences, kv_heads=kv_heads, width=self.width, pages=total,
            page_size=page_size, dtype=dtype, device=self.device, step_tokens=step_tokens,
        )  # fmt: skip
        self.step_tokens = step_tokens
        self.page_table, self.seqlens, self.settled = self.made.page_table, self.made.seqlens, self.made.settled
        self.pages, self.states, self.scratch = self.made.pages, self.made.states, self.made.scratch
        self.scales = self.made.scales
        self._set_scales(scales or {})
        self._free = list(range(total))[::-1]
        self._uses: Counter[int] = Counter()
        self._held: dict[int, list[int]] = {}

    def _set_scales(self, given: Mapping[str, float | Tensor]) -> None:
        """Scales of keys and values, and of statistics by how they grow with the keys."""
        if not self.scales and given:
            raise InputError("scales of pages in the type of q", 'generate_decoding(..., page_type="e4m3") has some')
        if not self.scales:
            return
        if (
            self.device.type == "cuda"
            and not torch.version.hip
            and torch.cuda.get_device_capability(self.device) < (8, 9)
        ):
            raise InputError(f"{torch.cuda.get_device_name(self.device)} has no e4m3", "take pages in the type of q")
        names = self.part.key_rows
        if unknown := sorted(given.keys() - set(names)):
            raise InputError(f"scale of {', '.join(unknown)}", f"pages of {', '.join(names)} have one")
        chosen = {n: torch.as_tensor(given.get(n, 1.0), dtype=torch.float32).expand(self.kv_heads) for n in names}
        for pages, degree in self.part.degrees.items():
            name = pages.removesuffix("_pages")
            value = chosen[name] if name in chosen else chosen[names[0]] ** degree
            kept = value.to(self.dtype)
            mantissa = torch.frexp(value).mantissa
            if not bool(((value > 0) & (mantissa == 0.5) & (kept.float() == value)).all()):
                raise InputError(
                    f"the scale of {name} is {value.tolist()}", f"powers of two in the range of {self.dtype}"
                )
            self.scales[f"{name}_scale"].copy_(kept)

    # -- steps --------------------------------------------------------------------------------------------

    def tensors(self, spec_text: str, tokens: int = 1) -> tuple[Tensor, ...]:
        """What the kernels of a module take, checked where SPLAGEN_CHECK_CACHE asks for it and no graph is captured.

        Raises:
            ValueError: the module is of another spec.
            InputError: more tokens than this cache has room for, or as for `check`.
        """
        if spec_text != self.spec_text:
            raise ValueError(
                f"this cache is of {self.library.spec.name} {digest(self.library.spec)[:8]}, the step of another spec: "
                "make a cache with the library of that step"
            )
        if not 1 <= tokens <= self.step_tokens:
            what = f"a step of {tokens} tokens per sequence, in a cache for 1 to {self.step_tokens}"
            raise InputError(what, "make the cache with a larger step_tokens, up to 8")
        if settings.check_cache() and not torch.compiler.is_compiling() and not self._captured():
            self.check(room=tokens)
        return self.made.arguments

    def _captured(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def step(self, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, out: Tensor | None = None) -> Tensor:
        """The library's step on this cache.

        One token per slot: q [sequences, Hq, D], k and v [sequences, Hkv, ...] give o [sequences, Hq, E].  Or t tokens,
        up to `step_tokens`: q [sequences, t, Hq, D], k and v alike, give o [sequences, t, Hq, E].
        """
        made: Tensor = self.library.op(q, k, v, *others, cache=self, out=out)
        return made

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *others: Tensor,
        cu_seqlens: Tensor,
        max_tokens: int,
        slots: Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Take many new tokens of some sequences: o [T, Hq, E], as single steps give it; waits for nothing.

        The cache is left as single steps leave it, the last of which `accept` may take back.  A sequence without pages
        for all of its tokens is left as it is, and its o is NaN; o is 0 for tokens of no sequence.

        Args:
            q: [T, Hq, D], packed.
            k: [T, Hkv, D].
            v: [T, Hkv, E].
            *others: what else a step takes, packed where it is rows of tokens.
            cu_seqlens: int32 [slots + 1] on the device: where the new tokens of each slot begin; it may have none.
            max_tokens: no less than the new tokens of any slot.
            slots: those of the call, each once; None is all of them.  Room is made for all that their pages hold.
            max_length: no less than the length of any of them afterwards, if that is less than what its pages hold.

        Raises:
            InputError: tensors that do not fit this cache, a slot without sequence, or as for `check`.
        """
        chosen = [*range(self.sequences)] if slots is None else [*slots]
        capacity = [len(self._held.get(s, ()) if slots is None else self._pages_of(s)) * self.page_size for s in chosen]
        longest = max([1, *capacity]) if max_length is None else max_length
        work = PagedPrefill(self.made, self.part, self.library.prefill, numbers_on(self.device, chosen))
        rows = work.checked((q, k, v, *others), cu_seqlens, max_tokens, longest)
        if settings.check_cache() and not torch.compiler.is_compiling() and not self._captured():
            room = torch.zeros(self.sequences, dtype=torch.int64, device=self.device)
            self.check(room.index_copy_(0, work.slots, (cu_seqlens[1:] - cu_seqlens[:-1]).long()))
        keys = max(1, sum(min(n, longest) for n in capacity))
        return work.run(rows, cu_seqlens, max_tokens, longest, keys)

    def accept(self, counts: Tensor) -> None:
        """Keep the first `counts` tokens of the last step and forget those behind them; waits for nothing.

        Args:
            counts: int32 [sequences] on the cache's device: below 0 counts as 0, and more than there are as all.

        Raises:
            InputError: counts of another shape, dtype or device.
        """
        like = self.seqlens
        if (counts.shape, counts.dtype, counts.device) != (like.shape, like.dtype, like.device):
            what = f"counts are {counts.dtype} {tuple(counts.shape)} on {counts.device}"
            raise InputError(what, f"give {like.dtype} {tuple(like.shape)} on {like.device}")
        torch.minimum(self.seqlens, self.settled + counts.clamp(0, self.step_tokens), out=self.seqlens)

    def check(self, room: int | Tensor = 0) -> None:
        """Check lengths and page tables on the device, with room for `room` more tokens; waits for the device.

        `room` is a number, or one for each slot.

        Raises:
            InputError: names the sequence, and what is wrong with it.
        """
        lengths = self.seqlens.long()
        more = room if isinstance(room, Tensor) else torch.full_like(lengths, room)
        columns = torch.arange(self.width, device=self.device)
        needed = (lengths + more + self.page_size - 1) // self.page_size
        some = self.pages[self.part.pages[0].name].shape[0]
        wrong = (
            ((self.page_table < 0) | (self.page_table >= some)) & (columns < needed[:, None]) & (lengths >= 0)[:, None]
        )
        held = torch.tensor([slot in self._held for slot in range(self.sequences)], device=self.device)
        kinds = torch.stack([
            (lengths < NO_SEQUENCE) | ((lengths < 0) & held),
            (lengths >= 0) & ((self.settled < 0) | (self.settled > lengths)),
            lengths + more > self.width * self.page_size,
            wrong.any(1),
        ])  # fmt: skip
        for slot, (no_length, no_states, no_room, no_page) in enumerate(kinds.T.tolist()):
            if not (no_length or no_states or no_room or no_page):
                continue
            n = int(lengths[slot])
            if no_length:
                hint = "lengths are 0 or more, -1 for a slot without sequence"
                raise InputError(f"sequence {slot} has length {n}", hint)
            if no_states:
                what = f"sequence {slot} of {n} tokens has states as of {int(self.settled[slot])}"
                raise InputError(what, "accept() shortens a sequence to 0 to all tokens of its last step, no further")
            if no_room:
                what = f"sequence {slot} has {n} tokens: no room for {int(more[slot])} more in "
                raise InputError(f"{what}{self.width * self.page_size}", "make a longer cache")
            column = int(wrong[slot].to(torch.int32).argmax())
            what = f"sequence {slot} of {n} tokens has page {int(self.page_table[slot, column])} at {column} of its"
            raise InputError(f"{what} page table", f"pages are 0 to {some - 1}; -1 is none: reserve() more tokens")

    # -- sequences ----------------------------------------------------------------------------------------

    def allocate(self, tokens: int) -> int:
        """The slot of a new, empty sequence with pages for `tokens` tokens.

        Raises:
            InputError: no slot or not enough pages are left, or more tokens than a sequence may get.
        """
        slot = next((s for s in range(self.sequences) if s not in self._held), None)
        if slot is None:
            raise InputError(f"all {self.sequences} slots have a sequence", "free() one, or make a larger cache")
        self._held[slot] = []
        try:
            self.reserve(slot, tokens)
        except InputError:
            del self._held[slot]
            raise
        self.reset(slot)
        return slot

    def reserve(self, slot: int, tokens: int) -> None:
        """Pages for a sequence to get `tokens` tokens in all; those that it has stay.

        Raises:
            InputError: the slot has no sequence, too many tokens, or not enough pages are left.
        """
        held = self._pages_of(slot)
        self._need_room(slot, tokens)
        missing = -(-tokens // self.page_size) - len(held)
        if missing > len(self._free):
            what = f"sequence {slot} needs {missing} more pages of {self.page_size} tokens, {len(self._free)} are free"
            raise InputError(what, "free() another sequence, or make a cache with more pages")
        held += [self._take() for _ in range(missing)]
        self._write_table(slot)

    def reset(self, slot: int) -> None:
        """An empty sequence in the same pages.  Raises InputError where other sequences share some of them."""
        held = self._pages_of(slot)
        if any(self._uses[p] > 1 for p in held):
            raise InputError(f"sequence {slot} shares pages with a fork", "free() it and allocate() another")
        self.seqlens[slot], self.settled[slot] = 0, 0
        for state in self.states.values():
            state[slot].zero_()

    def free(self, slot: int) -> None:
        """Give a sequence's slot back, and its pages once no fork shares them."""
        for page in self._pages_of(slot):
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)
        del self._held[slot]
        self.page_table[slot] = NO_PAGE
        self.seqlens[slot] = NO_SEQUENCE

    def fork(self, slot: int, tokens: int | None = None) -> int:
        """The slot of a sequence that goes on from where this one stands, with pages for `tokens` (None: as many).

        Complete pages are shared, with their statistics; the last page and the states are copied, and so is what
        `accept` may take back.  Reads the length, which waits for the device.

        Raises:
            InputError: the slot has no sequence, or as for `allocate`.
        """
        held = self._pages_of(slot)
        length, settled = int(self.seqlens[slot]), int(self.settled[slot])
        # a window that reaches into the next page is written with that page's keys: its page is not shared before;
        # tokens from `settled` on may be taken back and others written in their place
        shared = max(0, settled - self.part.overhang) // self.page_size
        wanted = max(length, len(held) * self.page_size if tokens is None else tokens)
        self._need_room(slot, wanted)
        fresh = -(-wanted // self.page_size) - shared
        if fresh > len(self._free):
            what = f"a fork of sequence {slot} needs {fresh} pages, {len(self._free)} are free"
            raise InputError(what, "free() another sequence, or make a cache with more pages")
        new = self.allocate(0)
        for page in held[:shared]:
            self._uses[page] += 1
        self._held[new] = held[:shared]
        self.reserve(new, wanted)
        for old, copy in zip(held[shared:], self._held[new][shared:], strict=False):
            for pool in self.pages.values():
                pool[copy].copy_(pool[old])
        for state in self.states.values():
            state[new].copy_(state[slot])
        self.seqlens[new], self.settled[new] = length, settled
        return new

    def _need_room(self, slot: int, tokens: int) -> None:
        most = self.width * self.page_size
        if not 0 <= tokens <= most:
            raise InputError(f"{tokens} tokens for sequence {slot}", f"0 to {most} in this cache")

    def _pages_of(self, slot: int) -> list[int]:
        if slot not in self._held:
            held = ", ".join(map(str, sorted(self._held))) or "none"
            raise InputError(f"slot {slot} has no sequence", f"slots that have one: {held}")
        return self._held[slot]

    def _take(self) -> int:
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def _write_table(self, slot: int) -> None:
        held = self._held[slot]
        row = held + [NO_PAGE] * (self.width - len(held))
        self.page_table[slot].copy_(torch.tensor(row, dtype=torch.int32))

    # -- save and restore ---------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that lies on the device and lasts from step to step, by name."""
        found = {"page_table": self.page_table, "seqlens": self.seqlens, "settled": self.settled}
        return found | self.pages | self.scales | self.states

    def save(self) -> dict[str, Any]:
        """Everything that makes the sequences, as tensors and plain values that torch.save takes."""
        return {
            "spec": self.spec_text,
            "dtype": str(self.dtype),
            "page_size": self.page_size,
            "held": {slot: list(pages) for slot, pages in self._held.items()},
            "tensors": {n: x.clone() for n, x in self._tensors().items()},
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what `save` of a cache of the same spec, dtype and sizes gave.

        Raises:
            InputError: another spec, dtype, size or type of pages, or a page table at odds with the pages that
                sequences hold; nothing is changed.
        """
        hint = "restore it into a cache made like the first"
        mine = self._tensors()
        if missing := sorted({"spec", "dtype", "page_size", "held", "tensors"} - saved.keys()):
            raise InputError(f"what was saved has no {', '.join(missing)}", "give what save() of a cache gave")
        for name, own in (("spec", self.spec_text), ("dtype", str(self.dtype)), ("page_size", self.page_size)):
            if saved[name] != own:
                theirs = "another" if name == "spec" else saved[name]
                raise InputError(f"what was saved has {theirs} {name}", hint)
        given: Mapping[str, Tensor] = saved["tensors"]
        if given.keys() != mine.keys() or any(given[n].dtype != x.dtype for n, x in mine.items()):
            raise InputError("what was saved has pages of another type", hint)
        for n, x in mine.items():
            if given[n].shape != x.shape:
                what = f"what was saved has {n} of sizes {tuple(given[n].shape)}, this cache {tuple(x.shape)}"
                raise InputError(what, hint)
        held = {slot: list(pages) for slot, pages in saved["held"].items()}
        total = next(iter(self.pages.values())).shape[0]
        table = given["page_table"].tolist()
        rows = {slot: row for slot, row in enumerate(table) if slot in held or row != [NO_PAGE] * self.width}
        listed = {slot: pages + [NO_PAGE] * (self.width - len(pages)) for slot, pages in held.items()}
        if rows != listed or any(not 0 <= p < total for pages in held.values() for p in pages):
            raise InputError("what was saved has a page table at odds with what sequences hold", hint)
        for n, x in mine.items():
            x.copy_(given[n])
        self._held = held
        self._uses = Counter(page for pages in held.values() for page in pages)
        self._free = [p for p in range(total) if not self._uses[p]][::-1]


def scale_of(rows: Tensor, headroom: float = 4.0) -> Tensor:
    """A scale for pages in e4m3 of rows like these, [..., Hkv, D] -> [Hkv]: a power of two.

    The largest of them, times `headroom` for those to come, is within what e4m3 holds.  e4m3 rounds to 4 digits of two
    over 15 powers of it, so the scale decides what falls off at either end and no more.
    """
    largest = rows.detach().float().abs().amax(-1).flatten(0, -2).amax(0).clamp(min=2.0**-100)
    return torch.exp2(torch.ceil(torch.log2(largest * headroom / LARGEST_E4M3)))
