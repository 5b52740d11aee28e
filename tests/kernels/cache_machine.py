"""A random history of a cache: whatever was done before, a step gives what recomputing each sequence gives."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from splagen.errors import InputError
from splagen.paged_cache import SPLACache
from splagen.pipeline import DecodingLibrary
from splagen.verification import TOLERANCE
from tests.kernels.decoding import BY_TOKEN, chosen_blocks, inputs, last_row, relative

PAGE = 16


@dataclass(frozen=True)
class Sequence:
    """What a slot should hold: rows of its tokens by name, [1, tokens, ...]; how many pages it was given.

    `before` counts the tokens before its last step.
    """

    rows: dict[str, Tensor]
    pages: int
    before: int = 0

    def cut(self, length: int) -> "Sequence":
        return replace(self, rows={n: x[:, :length] if n in BY_TOKEN else x for n, x in self.rows.items()})

    @property
    def length(self) -> int:
        return self.rows["k"].shape[1]


@dataclass
class Saved:
    """What `save` gave, and what the slots held."""

    of_cache: dict[str, object]
    sequences: dict[int, Sequence] = field(default_factory=dict)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork, go and are restored; `library` and `device` are those of the test."""

    library: ClassVar[DecodingLibrary]
    device: ClassVar[torch.device]
    dtype: ClassVar[torch.dtype] = torch.float32
    slots: ClassVar[int] = 2
    kv_heads: ClassVar[int] = 1
    page_size: ClassVar[int] = PAGE
    width: ClassVar[int] = 6  # pages of the longest sequence
    pages: ClassVar[int] = 9  # fewer than all slots could take
    step_tokens: ClassVar[int] = 8
    tokens: ClassVar[tuple[int, ...]] = (8, 1, 2, 3, 4, 5, 6, 7)  # that a step may take
    runs: ClassVar[tuple[int, ...]] = (1, 3)  # steps of one rule
    start: ClassVar[int] = 40  # tokens of the first sequence, when a history begins
    begun: ClassVar["Saved | None"] = None  # what that gave: made once, and restored for each history

    saves = Bundle("saves")

    def __init__(self) -> None:
        super().__init__()
        self.spec = self.library.spec
        self.cache = SPLACache(
            self.library,
            sequences=self.slots,
            kv_heads=self.kv_heads,
            tokens=self.width * self.page_size,
            pages=self.pages,
            page_size=self.page_size,
            step_tokens=self.step_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        self.live: dict[int, Sequence] = {}
        self.seed = 0

    # -- what is expected ---------------------------------------------------------------------------------

    def drawn(self, tokens: int) -> dict[str, Tensor]:
        """Rows of new tokens of every slot, [slots, tokens, ...], and parameters, which stay the same."""
        self.seed += 1
        rows = inputs(self.spec, self.slots, tokens, self.kv_heads, self.dtype, self.device, seed=self.seed)
        fixed = inputs(self.spec, 1, 1, self.kv_heads, self.dtype, self.device)
        return {n: x if n in BY_TOKEN else fixed[n] for n, x in rows.items()}

    @property
    def free_pages(self) -> int:
        return len(self.cache._free)

    def room(self, slot: int) -> int:
        return self.live[slot].pages * self.page_size - self.live[slot].length

    def compare(self, row: int, o: Tensor, sequence: Sequence) -> None:
        """A token's output [1, Hq, E], row `row` of the step's, beside the definition, with the kernels' choice."""
        free = chosen_blocks(self.cache, sequence.rows, sequence.length, slice(row, row + 1))
        error = relative(o, last_row(self.spec, sequence.rows, sequence.length, free))
        assert error <= TOLERANCE[self.dtype][0]

    # -- steps --------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        """A sequence whose state has blocks already."""
        kind = type(self)
        if kind.begun is None:
            self.allocate(self.width)
            for _ in range(self.start // self.step_tokens):
                new = self.drawn(self.step_tokens)
                self.cache.step(*new.values())
                self.live[0] = self.longer(0, new, self.step_tokens)
            kind.begun = self.save()
        self.restore(kind.begun)
        self.seed = 1000

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 7), several=st.integers(0, 1))
    def step(self, which: int, several: int) -> None:
        """A few steps of so many tokens; the last one's first and last token are compared."""
        tokens = self.tokens[which % len(self.tokens)]
        for _ in range(self.runs[several]):
            new = self.drawn(tokens)
            given = {n: x[:, 0] if tokens == 1 and n in BY_TOKEN else x for n, x in new.items()}
            o = self.cache.step(*given.values())
            o = o[:, None] if tokens == 1 else o
            for slot in range(self.slots):
                if slot not in self.live:
                    assert not o[slot].any()
                    continue
                full = self.room(slot) < tokens
                assert bool(o[slot].isnan().all()) == full
                self.live[slot] = self.longer(slot, new, 0 if full else tokens)
        for slot, sequence in self.live.items():
            if sequence.length > sequence.before:
                for token in {0, tokens - 1}:
                    seen = sequence.cut(sequence.length - tokens + token + 1)
                    self.compare(slot * tokens + token, o[slot : slot + 1, token], seen)

    def longer(self, slot: int, new: dict[str, Tensor], tokens: int) -> Sequence:
        old = self.live[slot]
        rows = {n: torch.cat([old.rows[n], x[slot, :tokens][None]], 1) if n in BY_TOKEN else x for n, x in new.items()}
        return replace(old, rows=rows, before=old.length)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 7), counts=st.lists(st.integers(0, 8), min_size=8, max_size=8))
    def step_and_accept(self, which: int, counts: list[int]) -> None:
        self.step(which, 0)
        self.accept(counts)

    @precondition(lambda self: self.live)
    @rule(counts=st.lists(st.integers(-1, 9), min_size=8, max_size=8))
    def accept(self, counts: list[int]) -> None:
        given = torch.tensor(counts[: self.slots], dtype=torch.int32, device=self.device)
        self.cache.accept(given)
        for slot, sequence in self.live.items():
            kept = min(max(counts[slot], 0), self.step_tokens)
            self.live[slot] = sequence.cut(min(sequence.length, sequence.before + kept))

    # -- sequences ----------------------------------------------------------------------------------------

    @rule(pages=st.integers(0, 6))
    def allocate(self, pages: int) -> None:
        if len(self.live) == self.slots or pages > self.free_pages:
            with pytest.raises(InputError, match=r"slots have a sequence|pages"):
                self.cache.allocate(pages * self.page_size)
            return
        slot = self.cache.allocate(pages * self.page_size)
        assert slot not in self.live
        self.live[slot] = Sequence({n: x[:1] if n in BY_TOKEN else x for n, x in self.drawn(1).items()}, pages).cut(0)

    @precondition(lambda self: self.live)
    @rule(pages=st.integers(0, 6), which=st.integers(0, 9))
    def reserve(self, pages: int, which: int) -> None:
        slot = self.picked(which)
        have = self.live[slot].pages
        if pages - have > self.free_pages:
            with pytest.raises(InputError, match="free"):
                self.cache.reserve(slot, pages * self.page_size)
            return
        self.cache.reserve(slot, pages * self.page_size)
        self.live[slot] = replace(self.live[slot], pages=max(have, pages))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def free(self, which: int) -> None:
        slot = self.picked(which)
        self.cache.free(slot)
        del self.live[slot]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def reset(self, which: int) -> None:
        slot = self.picked(which)
        uses = Counter(p for held in self.cache._held.values() for p in held)
        if any(uses[p] > 1 for p in self.cache._held[slot]):
            with pytest.raises(InputError, match="shares pages"):
                self.cache.reset(slot)
            return
        self.cache.reset(slot)
        old = self.live[slot]
        self.live[slot] = replace(old.cut(0), before=0)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), pages=st.none() | st.integers(0, 9))
    def fork(self, which: int, pages: int | None) -> None:
        slot = self.picked(which)
        old = self.live[slot]
        own = old.pages if pages is None else max(pages, -(-old.length // self.cache.page_size))
        try:
            new = self.cache.fork(slot, None if pages is None else pages * self.cache.page_size)
        except InputError:
            assert len(self.live) == self.slots or own > min(self.free_pages, self.width)
            return
        assert new not in self.live
        self.live[new] = replace(old, pages=own)

    @rule(target=saves)
    def save(self) -> Saved:
        return Saved(self.cache.save(), dict(self.live))

    @rule(saved=saves)
    def restore(self, saved: Saved) -> None:
        self.cache.restore(saved.of_cache)
        self.live = dict(saved.sequences)

    def picked(self, which: int) -> int:
        return sorted(self.live)[which % len(self.live)]

    # -- what always holds --------------------------------------------------------------------------------

    @invariant()
    def lengths_are_those_of_the_sequences(self) -> None:
        want = [self.live[s].length if s in self.live else -1 for s in range(self.slots)]
        assert self.cache.seqlens.tolist() == want
        settled = self.cache.settled.tolist()
        assert all(settled[s] == sequence.before for s, sequence in self.live.items())
        self.cache.check()

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        uses = Counter(p for held in self.cache._held.values() for p in held)
        assert uses == +self.cache._uses
        assert sorted([*uses, *self.cache._free]) == list(range(self.pages))
        for slot in range(self.slots):
            held = self.cache._held.get(slot, [])
            assert self.cache.page_table[slot].tolist() == held + [-1] * (self.width - len(held))
            assert len(held) == (self.live[slot].pages if slot in self.live else 0)
