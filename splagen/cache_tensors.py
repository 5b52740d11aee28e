"""The tensors that a step of decoding works on: pages, tables, states, and what one kernel hands to the next."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from splagen.codegen.decoding import Decoding

NO_PAGE = -1
NO_SEQUENCE = -1
PAGE_TYPES = {"e4m3": torch.float8_e4m3fn, "float32": torch.float32}
LARGEST_E4M3 = 448.0


@dataclass
class CacheTensors:
    """Everything that `step` of a decoding module takes beside the rows of the tokens.

    Attributes:
        page_table: int32 [sequences, pages of the longest], -1 where there is no page.
        seqlens: int32 [sequences], -1 for none.
        settled: int32 [sequences], the lengths before the last step.
        pages: keys, values and statistics by name, [pages, Hkv, rows of a page, width].
        states: float32 sums over far blocks by name, [sequences, Hkv, ...].
        scales: of pages in e4m3 by name, [Hkv] powers of two; 1 unless something else is put there.
        scratch: what a step hands from kernel to kernel.
    """

    page_table: Tensor
    seqlens: Tensor
    settled: Tensor
    pages: dict[str, Tensor]
    states: dict[str, Tensor]
    scales: dict[str, Tensor]
    scratch: dict[str, Tensor]

    @classmethod
    def allocate(
        cls,
        module: ModuleType,
        part: Decoding,
        *,
        sequences: int,
        kv_heads: int,
        width: int,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        step_tokens: int = 1,
    ) -> CacheTensors:
        """Zeros for sequences of up to `width` pages, of which there are `pages` in all; splits as Schedules say.

        `step_tokens`: the most that a step takes for each sequence.
        """

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        table = zeros(sequences, width, dtype=torch.int32).fill_(NO_PAGE)
        found = {
            a.name: zeros(
                pages, kv_heads, page_size // rows_span(part, a.name), *a.width,
                dtype=PAGE_TYPES.get(a.dtype, dtype),
            )
            for a in part.pages
        }  # fmt: skip
        made = cls(
            table,
            zeros(sequences, dtype=torch.int32).fill_(NO_SEQUENCE),
            zeros(sequences, dtype=torch.int32),
            found,
            {a.name: zeros(sequences, kv_heads, *a.width, dtype=torch.float32) for a in part.states},
            {a.name: zeros(kv_heads, dtype=dtype).fill_(1) for a in part.scales},
            {},
        )
        like = torch.empty(sequences, kv_heads * part.geometry.group, 1, dtype=dtype, device=device)
        made.scratch = module.scratch(
            made.schedules(module, like), sequences, kv_heads, width * page_size, dtype, device, step_tokens
        )
        return made

    def schedules(self, module: ModuleType, q: Tensor) -> dict[str, dict[str, int]]:
        """The Schedules that a module takes for queries like these on this cache."""
        found: dict[str, dict[str, int]] = module.schedules_for(q, self.page_table, next(iter(self.pages.values())))
        return found

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """All of them, in the order of a step's arguments."""
        return (
            self.page_table, self.seqlens, self.settled, *self.pages.values(), *self.states.values(),
            *self.scales.values(), *self.scratch.values(),
        )  # fmt: skip


def rows_span(part: Decoding, name: str) -> int:
    """Tokens of one row of a page: one of what tokens bring, a cell of statistics."""
    return 1 if name in [a.name for a in part.keys] else part.geometry.cell


def indexable(x: Tensor) -> Tensor:
    """Numbers of 8 bits as bytes, which every torch operation takes; others as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
