"""Sequences of random tokens in the tensors of a cache: what a step is timed on where nobody has a text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splagen.cache_tensors import LARGEST_E4M3, CacheTensors, indexable
from splagen.codegen.decoding import Decoding
from splagen.codegen.geometry import features_of
from splagen.ir.decoding import FIRST, SETTLED, state_pairs
from splagen.ir.program import Var
from splagen.ir.reference import evaluate

KEYS = 1 << 17  # of all KV heads, at a time: 128 MiB are their rows of 128 features in float64


def fill(cache: CacheTensors, part: Decoding, draw: torch.Generator, parameters: Mapping[str, Tensor]) -> None:
    """Draw keys and values, normal in units of their scales, for every page, and `settle` what follows from them."""
    for name in part.key_rows:
        pool = cache.pages[f"{name}_pages"]
        for some in torch.split(pool, _pages_at_a_time(pool)):
            drawn = torch.empty(some.shape, device=pool.device)
            some.copy_(drawn.normal_(generator=draw))  # not every type has random numbers of its own
    settle(cache, part, parameters)


def settle(cache: CacheTensors, part: Decoding, parameters: Mapping[str, Tensor]) -> None:
    """Write the numbers of keys, statistics and states that follow from the keys and values in the pages.

    They are those of the equations of a step, evaluated in float64: of every key and cell for which a sequence has
    pages, and states as of its `settled`.  `parameters` are those of a step by name.  What cells have whose window ends
    behind the last page no step reads.
    """
    settled = cache.settled.tolist()
    for b, pages in enumerate(cache.page_table):
        held = pages[pages >= 0].long()
        if len(held):
            _Sequence(cache, part, held, parameters).settle(b, settled[b])


class _Sequence:
    """One sequence, whose `held` pages are walked over some at a time."""

    def __init__(self, cache: CacheTensors, part: Decoding, held: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self.cache, self.part, self.held, self.parameters = cache, part, held, parameters
        self.geometry, self.program = part.geometry, part.program
        first = cache.pages[part.pages[0].name]
        self.heads, self.page = first.shape[1:3]
        self.step = _pages_at_a_time(first)
        self.reach = -(-part.overhang // part.geometry.block) * part.geometry.block  # of windows, into blocks behind
        self.kept = {a.name: self.program.var(a.name.removesuffix("_pages")) for a in part.pages}
        for name in part.key_rows:
            del self.kept[f"{name}_pages"]

    def settle(self, b: int, settled: int) -> None:
        """Number `b` of the cache, with states as of its first `settled` tokens."""
        pairs = state_pairs(self.program)
        states = {
            before.name: torch.zeros(
                1, self.heads, *map(self.geometry.size, features_of(before)), dtype=torch.float64,
                device=self.held.device,
            )
            for before, _ in pairs
        }  # fmt: skip
        for start in range(0, len(self.held), self.step):
            pages = self.held[start : start + self.step]
            for name, x in self._evaluate(start, self.reach, settled, list(self.kept.values()), {}).items():
                self._store(f"{name}_pages", pages, x)
            after = self._evaluate(start, 0, settled, [v for _, v in pairs], states)
            states = {before.name: after[v.name] for before, v in pairs}
        for name, x in states.items():
            self.cache.states[name][b].zero_()[tuple(slice(n) for n in x.shape[1:])] = x[0]

    def _evaluate(
        self, start: int, behind: int, settled: int, wanted: list[Var], states: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Variables of the keys of pages from `start` on, and of so many behind them."""
        rows = {name: self._rows(name, start, behind) for name in self.part.key_rows}
        block = start * self.page // self.geometry.block
        return evaluate(
            self.program,
            {**self.parameters, **rows, **states},
            scalars={"L": len(self.held) * self.page, FIRST.name: settled, SETTLED.name: 0},
            offsets={"J": block, "Jw": block},
            wanted=wanted,
        )

    def _rows(self, name: str, start: int, behind: int) -> Tensor:
        """Keys or values as a step sees them, [1, Hkv, blocks, cells, keys of a cell, features]."""
        more = -(-behind // self.page)
        pool = self.cache.pages[f"{name}_pages"]
        x = indexable(pool)[self.held[start : start + self.step + more]].view(pool.dtype)
        if pool.element_size() == 1:
            scale = self._scale(f"{name}_pages")
            x = x.to(scale.dtype) * scale
        x = x.transpose(0, 1).flatten(1, 2)[:, : self.step * self.page + behind]
        return x.reshape(1, self.heads, -1, self.geometry.cells, self.geometry.cell, x.shape[-1])

    def _store(self, name: str, pages: Tensor, x: Tensor) -> None:
        """Write what is kept of keys or cells, [1, Hkv, blocks, cells(, keys)(, features)], as pages hold it."""
        pool = self.cache.pages[name]
        rows, features = pool.shape[2], features_of(self.kept[name])
        x = x[0].flatten(1, x.dim() - 2 - len(features))[:, : len(pages) * rows]  # [Hkv, rows(, features)]
        if features:
            columns = pool.shape[3] // (self.geometry.rank if "r" in features else 1)
            x = torch.nn.functional.pad(x, (0, columns - x.shape[-1])).flatten(2)
        x = x.reshape(self.heads, len(pages), rows, *x.shape[2:]).transpose(0, 1)
        if pool.element_size() == 1:
            x = (x.float() / self._scale(name).float()).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        indexable(pool)[pages] = indexable(x.to(pool.dtype))

    def _scale(self, pages: str) -> Tensor:
        return self.cache.scales[pages.removesuffix("_pages") + "_scale"][:, None, None]


def _pages_at_a_time(pool: Tensor) -> int:
    return max(1, KEYS // (pool.shape[1] * pool.shape[2]))
