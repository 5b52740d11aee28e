"""Between tensors [B, L, H, D] and the blocked axes of a Program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splagen.ir.program import Program, Var


class Blocked:
    """The axis sizes of one call, and the way there and back.

    A sequence of L positions becomes tiles (T, m) on the query side and blocks (J, C, n) on the key side, padded with
    zeros at the end; heads become (h, g).
    """

    def __init__(self, program: Program, batch: int, length: int, kv_heads: int) -> None:
        """Sizes follow from the program's integer extents."""
        fixed = {a: e for a, e in program.axes if isinstance(e, int)}
        self.length = length
        self.group, self.tile = fixed["g"], fixed["m"]
        self.block = fixed["C"] * fixed["n"]
        self.tiles, self.blocks = -(-length // self.tile), -(-length // self.block)
        self.sizes: dict[str, int] = fixed | {
            "b": batch,
            "h": kv_heads,
            "T": self.tiles,
            "J": self.blocks,
            "Jw": self.blocks,
        }

    def to_axes(self, v: Var, x: Tensor) -> Tensor:
        """A tensor as the public API has it, over the axes of the variable."""
        if "T" in v.axes:
            x = _pad(x, self.tiles * self.tile)
            x = x.reshape(x.shape[0], self.tiles, self.tile, -1, self.group, *x.shape[3:])
            return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim))
        if "J" in v.axes:
            x = _pad(x, self.blocks * self.block)
            cells = self.sizes["C"]
            x = x.reshape(x.shape[0], self.blocks, cells, self.block // cells, *x.shape[2:])
            return x.permute(0, 4, 1, 2, 3, *range(5, x.ndim))
        if v.axes[:2] == ("h", "g"):
            return x.reshape(-1, self.group, *x.shape[1:])
        return x

    def to_tensor(self, v: Var, x: Tensor, length: int | None = None) -> Tensor:
        """The inverse: [B, L, H, ...] from the variable's axes (`length` positions of a chunk).

        A number per tile (n_unsel) is repeated for its rows.
        """
        if "T" in v.axes:
            for place, axis in enumerate(("b", "h", "g", "T", "m")):
                if axis not in v.axes:
                    x = x.unsqueeze(place)
                    x = x.expand(*x.shape[:place], self.sizes[axis], *x.shape[place + 1 :])
            x = x.permute(0, 3, 4, 1, 2, *range(5, x.ndim))
            x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])
            return x[:, : self.length if length is None else length]
        if "J" in v.axes:
            x = x.permute(0, 2, 3, 4, 1, *range(5, x.ndim))
            x = x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3], *x.shape[4:])
            return x[:, : self.length]
        if v.axes[:2] == ("h", "g"):
            return x.reshape(-1, *x.shape[2:])
        return x

    def mask(self, block_indices: Tensor) -> Tensor:
        """free [b h T J] from block_indices [B, Hkv, T, budget], -1 where there is none."""
        chosen = torch.zeros(*block_indices.shape[:3], self.blocks + 1, dtype=torch.bool, device=block_indices.device)
        slots = torch.where(block_indices < 0, self.blocks, block_indices.long())
        return chosen.scatter(3, slots, True)[..., : self.blocks]

    def indices(self, free: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """block_indices [B, Hkv, T, budget] int32, ascending and -1 behind, and their counts, from the mask."""
        number = torch.arange(self.blocks, device=free.device)
        found = torch.where(free, number, self.blocks).sort(-1).values[..., :budget]
        found = torch.nn.functional.pad(found, (0, budget - found.shape[-1]), value=self.blocks)
        counts = free.sum(-1).to(torch.int32)
        return torch.where(found == self.blocks, -1, found).to(torch.int32).contiguous(), counts


def chunked(inputs: Mapping[str, Tensor], axes: Mapping[str, int], start: int, stop: int) -> dict[str, Tensor]:
    """The tiles start .. stop of every input that has tiles; `axes` gives the place of T by name."""
    return {n: x.narrow(axes[n], start, stop - start) if n in axes else x for n, x in inputs.items()}


def _pad(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x
