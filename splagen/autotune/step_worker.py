"""Time kernels of a decoding step on request, as `splagen.autotune.worker` those of an op.

A step runs once on a cache of random sequences, and one launcher at a time is timed on what it was given.  Kernels cut
the work of splits in pieces that depend on their Schedules, so a Schedule is judged by what the whole step makes of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from splagen.autotune.worker import LIMIT, Kernels, Schedules, difference, serve
from splagen.cache_tensors import CacheTensors, indexable, rows_span
from splagen.codegen.decoding import decoding
from splagen.random_cache import fill
from splagen.spec import SPLASpec, from_toml
from splagen.verification import Shape

NAN_E4M3 = 0x7F
MOVED_LISTS = 0.02  # of lists, that differ from the default's in one block: equal scores but for their rounding


class Steps(Kernels):
    """The launchers of a decoding module with what a step gives them; shape is (sequences, Hq, tokens of a sequence).

    The sequences are as long as they get, at every place in a block: for the first one a block has become far, and the
    second one completes a block with its token.
    """

    def __init__(self, module: ModuleType, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        spec = from_toml(module.SPEC)
        assert isinstance(spec, SPLASpec)
        self.module, self.dtype, self.device, self.part = module, dtype, device, decoding(spec, module.PAGE_TYPE)
        self.kept, self.large = {}, None
        sequences, heads, tokens = shape
        self.sizes = sequences, heads // self.part.group_size, tokens
        self.draw = torch.Generator(device=device).manual_seed(seed)
        self.given = [self._given(a.name, a.layout, a.width) for a in self.part.tokens]
        self.cache = self._filled()
        self.o = torch.empty(sequences, heads, self.part.geometry.value_dim, dtype=dtype, device=device)
        self.first = self.given[0]
        self.lengths = self.cache.seqlens.clone()
        self.states = {n: x.clone() for n, x in self.cache.states.items()}
        self.run = self.step
        self.found: dict[str, dict[str, Tensor]] = {}

    def _filled(self) -> CacheTensors:
        """A cache of random sequences whose pages lie in no order."""
        sequences, kv_heads, tokens = self.sizes
        page, block = self.part.default_page_size, self.part.geometry.block
        width = -(-tokens // page)
        cache = CacheTensors.allocate(
            self.module, self.part, sequences=sequences, kv_heads=kv_heads, width=width, pages=sequences * width,
            page_size=page, dtype=self.dtype, device=torch.device(self.device),
        )  # fmt: skip
        order = torch.randperm(sequences * width, generator=self.draw, device=self.device)
        cache.page_table.copy_(order.view(sequences, width))
        number = torch.arange(sequences, device=self.device)
        cache.seqlens.copy_(((tokens - 1) // block * block - number % block).clamp(min=0))
        _step_before(cache)
        given = {a.name: x for a, x in zip(self.part.tokens, self.given, strict=True)}
        fill(cache, self.part, self.draw, {n: given[n] for n in self.part.parameters})
        return cache

    def _given(self, name: str, layout: str, width: tuple[int, ...]) -> Tensor:
        sequences, kv_heads, _ = self.sizes
        heads = kv_heads * (1 if name in self.part.key_rows else self.part.group_size)
        shape = {"head_rows": (heads,), "kv_head_scalars": (kv_heads,)}.get(layout, (sequences, heads))
        return torch.randn(*shape, *width, generator=self.draw, device=self.device).to(self.dtype)

    def defaults(self) -> Schedules:
        """The Schedules of the module for these sizes."""
        return {n: dict(s) for n, s in self.cache.schedules(self.module, self.first).items()}

    def keeps(self, size: int) -> bool:
        """What launchers get is the cache itself."""
        return True

    def step(self, schedules: Mapping[str, Mapping[str, int]]) -> None:
        """One token for every sequence, from where they stood at first."""
        self.rewind()
        for name, x in self.states.items():
            self.cache.states[name].copy_(x)
        self.module.step(schedules, *self.given, *self.cache.arguments, self.o)

    def rewind(self) -> None:
        """The lengths before the step, and before the step of one token before it."""
        self.cache.seqlens.copy_(self.lengths)
        _step_before(self.cache)

    def timed(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One kernel with a Schedule, or the whole step with a splitting and the `schedules` of the job."""
        if job["kernel"] == self.part.splitting.name:
            return self.whole(job["schedule"], job["schedules"], job["repetitions"])
        return self.time(job["kernel"], job["schedule"], job["shared"], job["repetitions"])

    def time(
        self, kernel: str, schedule: dict[str, int], shared: Mapping[str, int], repetitions: int
    ) -> dict[str, Any]:
        """Median and spread in milliseconds; an error if the step's results differ from those with the default."""
        if error := self.wrong({kernel: schedule}):
            return {"error": error}
        n, *arguments = self.launch(kernel, {})[1]
        launch, n = getattr(self.module, f"launch_{kernel}"), n._replace(kept={})
        return _summary(self.samples(lambda: launch(n, schedule, *arguments), self.rewind, repetitions))

    def whole(self, numbers: dict[str, int], schedules: Schedules, repetitions: int) -> dict[str, Any]:
        """The same of a step whose work is split by these numbers."""
        chosen = {**self.defaults(), **schedules, self.part.splitting.name: numbers}
        sequences, kv_heads, _ = self.sizes
        capacity = self.cache.page_table.shape[1] * self.part.default_page_size
        default, device = self.cache.scratch, torch.device(self.device)
        self.results({})  # with the arrays of the default
        try:
            self.cache.scratch = self.module.scratch(chosen, sequences, kv_heads, capacity, self.dtype, device)
            if error := self.wrong(chosen):
                return {"error": error}
            given = (chosen, *self.given, *self.cache.arguments, self.o)
            return _summary(self.samples(lambda: self.module.step(*given), self.rewind, repetitions))
        finally:
            self.cache.scratch = default

    def wrong(self, schedules: Mapping[str, Mapping[str, int]]) -> float:
        """By how much a step with these Schedules differs from the default's; 0.0 within the limit."""
        want, got = self.results({}), self.results(schedules)
        alike = torch.ones(self.o.shape[:2], dtype=torch.bool, device=self.o.device)
        if "blocks" in want:
            moved = (want["blocks"] != got["blocks"]).sum(-1) // 2  # [sequences, Hkv] blocks that are others
            if int(moved.max()) > 1 or int(moved.sum()) > max(1, MOVED_LISTS * moved.numel()):
                return math.inf
            alike = (moved == 0).repeat_interleave(self.part.group_size, dim=1)
        pairs = [(got[n], x) for n, x in want.items() if n not in ("o", "blocks")]
        pairs.append((got["o"][alike], want["o"][alike]))
        error = max(difference(x, y) for x, y in pairs)
        return 0.0 if error <= LIMIT[self.dtype] else error

    def results(self, schedules: Mapping[str, Mapping[str, int]]) -> dict[str, Tensor]:
        """What a step makes: o, states, lengths, the choice of blocks, and the rows of the token in pages."""
        if not schedules and self.found:
            return self.found[""]
        page = self.part.default_page_size
        rows = torch.arange(self.sizes[0], device=self.device)
        held = self.cache.page_table[rows, self.lengths // page].long()
        for name, x in self.cache.pages.items():
            if rows_span(self.part, name) == 1:
                indexable(x)[held, :, self.lengths.long() % page] = NAN_E4M3 if x.element_size() == 1 else torch.nan
        self.o.fill_(torch.nan)
        self.step({**self.defaults(), **schedules})
        found = {"o": self.o.clone(), "seqlens": self.cache.seqlens.float(), "settled": self.cache.settled.float()}
        found |= {n: x.clone() for n, x in self.cache.states.items()}
        for name, x in self.cache.pages.items():
            span = rows_span(self.part, name)
            found[name] = indexable(x)[held, :, self.lengths.long() % page // span].view(x.dtype).float()
        if self.part.budget:
            blocks = -(-self.sizes[2] // self.part.geometry.block) + 1
            indices = self.cache.scratch["block_indices"].long()
            mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
            found["blocks"] = mask.scatter(2, torch.where(indices < 0, blocks, indices), True)
        if not schedules:
            self.found[""] = found
        return found


def _step_before(cache: CacheTensors) -> None:
    """Let the step before have been one of one token."""
    torch.sub(cache.seqlens, 1, out=cache.settled).clamp_(min=0)


def _summary(samples: list[float]) -> dict[str, Any]:
    return {"ms": statistics.median(samples), "spread": max(samples) - min(samples)}


if __name__ == "__main__":
    serve(Steps)
