"""Serve many requests at once: continuous batching of the byte-level model on paged caches of SPLA.

Every layer has an `SPLACache`.  A request joins when a slot and pages are free, leaves when it is done, and its pages
go to the next one.  A step takes the same number of tokens of every slot: as many as `STEP_TOKENS` while a prompt goes
in, of which `accept` keeps those that there are, and else one.  What comes out is what prefill of the whole sequence
gives, byte by byte.  From the repository root:

    python -m examples.serving                  # 64 requests on a GPU
    python -m examples.serving --requests 3     # in Triton's interpreter, where there is no GPU
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from examples.byte_lm import TINY, Attention, Block, ByteLM, Config, attention_spec, build, library_files, rotary
from splagen import settings
from splagen.errors import InputError
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding

STEP_TOKENS = 8


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
        library = generate_decoding(attention_spec(model.config), settings.cache_dir() / "kernels")
        self.caches = [
            SPLACache(
                library,
                sequences=slots,
                kv_heads=model.config.kv_heads,
                tokens=longest + STEP_TOKENS,
                pages=pages,
                page_size=model.config.block_size,
                step_tokens=STEP_TOKENS,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in model.blocks
        ]
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
            self._step()
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
            try:  # room for a whole step behind the last byte; every cache gives the same slot
                slots = [cache.allocate(length + STEP_TOKENS) for cache in self.caches]
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

    def _step(self) -> None:
        """One step of every slot; each sequence whose bytes are all in gets its next one."""
        tokens, counts = self._next_tokens()
        device = self.caches[0].device
        logits = self._logits(torch.tensor(tokens, device=device))
        kept = torch.tensor(counts, dtype=torch.int32, device=device)
        for cache in self.caches:
            cache.accept(kept)
        self.steps += 1
        best = logits.argmax(-1).tolist()
        for slot, sequence in self.running.items():
            sequence.held += counts[slot]
            if sequence.held == len(sequence.text):
                sequence.text.append(best[slot][counts[slot] - 1])

    def _next_tokens(self) -> tuple[list[list[int]], list[int]]:
        """What each slot takes next, and how much of it counts: the only place that knows how prompts go in."""
        known = {slot: sequence.text[sequence.held :] for slot, sequence in self.running.items()}
        width = STEP_TOKENS if any(len(text) > 1 for text in known.values()) else 1
        taken = [bytes(known.get(slot, b""))[:width] for slot in range(self.slots)]
        return [[*text.ljust(width, b"\0")] for text in taken], [len(text) for text in taken]

    def _logits(self, tokens: Tensor) -> Tensor:
        """Logits [slots, t, 256] of the byte after each of the tokens [slots, t]."""
        model, lengths = self.model, self.caches[0].seqlens.clamp(min=0)
        x = model.embedding(tokens)
        positions = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        rotation = rotary(model.config.head_dim, positions)
        for block, cache in zip(model.blocks, self.caches, strict=True):
            assert isinstance(block, Block)
            x = block(x, rotation, partial(_attend, cache, block.attention))
        logits: Tensor = model.head(model.norm(x))
        return logits


def _attend(cache: SPLACache, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cache.step(q, k, v, *attention.gains().values())


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
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16, help="requests that run at once")
    parser.add_argument("--longest", type=int, help="bytes of a request; default: 2048 on a GPU, else 64")
    given = parser.parse_args(arguments)
    if given.requests < 1 or given.slots < 1 or (given.longest or 2) < 2:
        parser.error("--requests and --slots must be at least 1, --longest at least 2")
    gpu = torch.cuda.is_available()
    if not gpu:
        settings.interpret()  # before anything imports triton
    longest = given.longest or (2048 if gpu else 64)
    config = replace(Config() if gpu else TINY, attention="spla")
    server = Server(build(config, 0, torch.device("cuda" if gpu else "cpu")), slots=given.slots, longest=longest)
    requests = requests_of(given.requests, longest)
    start = time.perf_counter()
    found = server.serve(requests)
    seconds = time.perf_counter() - start
    total = sum(len(request.prompt) + request.count for request in requests)
    print(f"{len(found)} requests, up to {server.most_at_once} at once: {total} bytes in {server.steps} steps")
    print(f"{seconds:.1f} s, {total / seconds:.0f} bytes per second")


if __name__ == "__main__":
    main()
