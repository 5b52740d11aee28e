"""Serve many requests at once: continuous batching of the byte-level model on paged caches of SPLA.

Every layer has an `SPLACache`.  A request joins when a slot and pages are free, leaves when it is done, and its pages
go to the next one.  Prompts go in by chunks, those of several requests packed; then a step takes a byte of every slot.
What comes out is what prefill of the whole sequence gives, byte by byte.  From the repository root:

    python -m examples.serving      # 64 requests on a GPU; where there is none, 2 in Triton's interpreter
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from examples.byte_lm import TINY, Attention, Block, ByteLM, Config, attention_spec, build, library_files, rotary
from splagen import settings
from splagen.errors import InputError
from splagen.paged_cache import SPLACache
from splagen.tuning import load_decoding

CHUNK = 1024  # bytes of a prompt that go in at once

Attend: TypeAlias = Callable[[SPLACache, Attention, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """Continue `prompt`, 1 byte or more, by `count` bytes."""

    prompt: bytes
    count: int


@dataclass
class Running:
    """A request in a slot: `text` are the bytes known so far, of which the caches hold the first `held`."""

    number: int
    length: int
    text: bytearray
    held: int = 0


class Server:
    """Slots of one model, whose attention is SPLA; float32 where the model is.

    Attributes:
        steps: how many steps it has made.
        most_at_once: the most requests that ran together.
    """

    def __init__(self, model: ByteLM, *, slots: int, longest: int, pages: int | None = None) -> None:
        """`longest` bounds a request with its continuation; `pages` are those of a layer, None for enough."""
        self.model, self.slots, self.longest = model, slots, longest
        weight = model.head.weight
        library = load_decoding(attention_spec(model.config))
        self.caches = [
            SPLACache(
                library,
                sequences=slots,
                kv_heads=model.config.kv_heads,
                tokens=longest,
                pages=pages,
                page_size=model.config.block_size,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in model.blocks
        ]
        self.device = weight.device
        self.running: dict[int, Running] = {}
        self.steps = self.most_at_once = 0

    @torch.no_grad()
    def serve(self, requests: Sequence[Request]) -> list[bytes]:
        """The continuation of each request by greedy choice, in their order; waiting ones join as others leave.

        Raises:
            InputError: a request has no prompt, is longer than `longest`, or needs more pages than there are.
        """
        for request in requests:
            if not request.prompt or len(request.prompt) + request.count > self.longest:
                what = f"a request of {len(request.prompt)} + {request.count} bytes"
                raise InputError(what, f"prompts have 1 byte or more, and all together at most {self.longest}")
        waiting = deque(enumerate(requests))
        found = [b""] * len(requests)
        while waiting or self.running:
            self._admit(waiting)
            self._advance()
            for slot, request in [*self.running.items()]:
                if len(request.text) >= request.length:
                    found[request.number] = bytes(request.text[len(requests[request.number].prompt) :])
                    self._leave(slot)
        return found

    def _admit(self, waiting: deque[tuple[int, Request]]) -> None:
        """Give slots and pages to those that have waited longest."""
        while waiting:
            number, request = waiting[0]
            length = len(request.prompt) + request.count
            try:  # every cache gives the same slot
                slots = [cache.allocate(length) for cache in self.caches]
            except InputError:
                if not self.running:
                    raise
                break
            waiting.popleft()
            self.running[slots[0]] = Running(number, length, bytearray(request.prompt))
        self.most_at_once = max(self.most_at_once, len(self.running))

    def _leave(self, slot: int) -> None:
        del self.running[slot]
        for cache in self.caches:
            cache.free(slot)

    def _advance(self) -> None:
        """Prompts go in first, a chunk of each; once they are all in, every sequence gets its next byte."""
        waiting = [slot for slot, sequence in self.running.items() if len(sequence.text) - sequence.held > 1]
        if waiting:
            self._prefill(waiting)
        else:
            self._step()

    def _prefill(self, slots: Sequence[int]) -> None:
        """The next chunk of the prompts of these slots, packed; one that is all in then gets its next byte."""
        chosen = [self.running[slot] for slot in slots]
        chunks = [sequence.text[sequence.held : sequence.held + CHUNK] for sequence in chosen]
        counts = [len(chunk) for chunk in chunks]
        ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=self.device)
        positions = [n for x, count in zip(chosen, counts, strict=True) for n in range(x.held, x.held + count)]
        where = {"cu_seqlens": ends, "max_tokens": max(counts), "slots": slots}

        def attend(cache: SPLACache, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cache.prefill(q[0], k[0], v[0], *attention.gains().values(), **where)[None]

        logits = self._logits([[*b"".join(chunks)]], torch.tensor([positions], device=self.device), attend)
        best = logits[0, ends[1:].long() - 1].argmax(-1).tolist()
        self._took(chosen, counts, best)

    def _step(self) -> None:
        """One byte of every slot, of which those without a request take none."""
        tokens = [[x.text[x.held]] if (x := self.running.get(slot)) else [0] for slot in range(self.slots)]
        positions = self.caches[0].seqlens.clamp(min=0)[:, None]

        def attend(cache: SPLACache, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cache.step(q, k, v, *attention.gains().values())

        best = self._logits(tokens, positions, attend)[:, 0].argmax(-1).tolist()
        self.steps += 1
        self._took([*self.running.values()], [1] * len(self.running), [best[slot] for slot in self.running])

    @staticmethod
    def _took(chosen: Sequence[Running], counts: Sequence[int], best: Sequence[int]) -> None:
        """So many more bytes of each are in; one that is all in goes on by the best."""
        for sequence, count, byte in zip(chosen, counts, best, strict=True):
            sequence.held += count
            if sequence.held == len(sequence.text):
                sequence.text.append(byte)

    def _logits(self, tokens: Sequence[Sequence[int]], positions: Tensor, attend: Attend) -> Tensor:
        """Logits [B, t, 256] of the byte after each of the tokens [B, t]."""
        model = self.model
        x = model.embedding(torch.tensor(tokens, device=self.device))
        rotation = rotary(model.config.head_dim, positions)
        for block, cache in zip(model.blocks, self.caches, strict=True):
            assert isinstance(block, Block)
            x = block(x, rotation, partial(attend, cache, block.attention))
        logits: Tensor = model.head(model.norm(x))
        return logits


def requests_of(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Prompts from the sources of Python's standard library, from one byte to three quarters of `longest`."""
    draw = random.Random(seed)
    text = b"".join(file.read_bytes() for file in library_files()[:20])
    found = []
    for _ in range(count):
        length = draw.randint(1, longest * 3 // 4)
        start = draw.randrange(len(text) - length)
        found.append(Request(text[start : start + length], draw.randint(1, longest - length)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.serving", description=__doc__.partition("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--requests", type=int, default=64 if gpu else 2)
    parser.add_argument("--slots", type=int, default=16 if gpu else 2, help="requests that run at once")
    parser.add_argument("--longest", type=int, default=2048 if gpu else 16, help="bytes of a request and its answer")
    given = parser.parse_args(arguments)
    if given.requests < 1 or given.slots < 1 or given.longest < 2:
        parser.error("--requests and --slots must be at least 1, --longest at least 2")
    if not gpu:
        settings.interpret()  # before anything imports triton
    config = replace(Config() if gpu else TINY, attention="spla")
    server = Server(build(config, 0, torch.device("cuda" if gpu else "cpu")), slots=given.slots, longest=given.longest)
    requests = requests_of(given.requests, given.longest)
    start = time.perf_counter()
    found = server.serve(requests)
    seconds = time.perf_counter() - start
    total = sum(len(request.prompt) + request.count for request in requests)
    print(f"{len(found)} requests, up to {server.most_at_once} at once: {total} bytes in {server.steps} steps")
    print(f"{seconds:.1f} s, {total / seconds:.0f} bytes per second")


if __name__ == "__main__":
    main()
