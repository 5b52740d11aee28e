"""What the blocks hold that a spec's queries choose: the definition of the selection beside all of softmax attention.

The choice and the scores are the oracle's, in float64, a few tiles of queries at a time: no kernel runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splagen.errors import InputError
from splagen.ir.frontend_spla import spla_program
from splagen.ir.program import Var
from splagen.ir.reference import evaluate
from splagen.layout import Blocked, chunked
from splagen.spec import SPLASpec


class BlockAttention:
    """The selection of a spec for q [1, L, Hq, D] and k [1, L, Hkv, D], and the scores of all keys.

    Methods take the tiles `start` to `stop` of queries, which are T tiles and R queries (the last tile may have fewer
    than others); J counts blocks, n their keys, g the query heads of a KV head.  The device is that of q.

    Attributes:
        tiles: how many tiles the sequence has.
        tile: queries of a tile; 1 where each chooses by itself.
    """

    def __init__(self, spec: SPLASpec, q: Tensor, k: Tensor, head: int | None = None) -> None:
        """`head`: of one KV head alone, Hkv is then 1 in what the methods return.

        Raises:
            InputError: the spec selects nothing, or by rows of its own; q and k do not have its sizes; no such head.
        """
        if spec.select is None:
            raise InputError(f"{spec.name} attends to every key: it has no select", "give a spec with [select]")
        if spec.select.own_rows:
            what = f"{spec.name} has select.own_rows: its scores are of rows other than q and k"
            raise InputError(what, "set own_rows to false, and give the rows of the selection as q and k")
        heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
        if (dim, heads) != (spec.head_dim, kv_heads * spec.group_size):
            what = f"q is {list(q.shape)}, k is {list(k.shape)}"
            of_spec = f"{spec.name} has head_dim {spec.head_dim} and {spec.group_size} query heads per KV head"
            raise InputError(f"{what}, but {of_spec}", "set head_dim and group_size to those of the model")
        if head is not None and not 0 <= head < kv_heads:
            raise InputError(f"KV head {head} of {kv_heads}", f"a number from 0 to {kv_heads - 1}")
        self._scalars = {"L": q.shape[1], "Hkv": kv_heads}  # a score function may ask for the number of heads
        self._head = head or 0
        if head is not None:
            q, k = q[:, :, head * spec.group_size : (head + 1) * spec.group_size], k[:, :, head : head + 1]
        self.program = p = spla_program(replace(spec, linear=None, combine="none"))
        self._blocked = Blocked(p, 1, q.shape[1], k.shape[2])
        self.tiles, self.tile = self._blocked.tiles, self._blocked.tile
        self._rows, self._keys = (self._blocked.to_axes(p.var(n), x.double()) for n, x in (("q", q), ("k", k)))
        cells = [e.out for e in p.equations if {"J", "C", "d"} <= {*e.out.axes} and not {"T", "n"} & {*e.out.axes}]
        self._statistics = evaluate(
            p, {"k": self._keys}, sizes=self._blocked.sizes, wanted=cells, scalars=self._scalars
        )

    def score(self, start: int, stop: int) -> Tensor:
        """What the metric says of every block [Hkv, T, J]."""
        return self._evaluated(start, stop, "score")[0][0]

    def far(self, start: int, stop: int) -> Tensor:
        """The blocks that a tile may choose or leave, [T, J]."""
        return self._evaluated(start, stop, "far")[0]

    def free(self, start: int, stop: int) -> Tensor:
        """The far blocks that are chosen, [Hkv, T, J]."""
        return self._evaluated(start, stop, "free")[0][0]

    def seen(self, start: int, stop: int) -> Tensor:
        """The blocks of which a tile may see a key, [T, J]: all of its past, or without causality all."""
        (seen,) = self._evaluated(start, stop, self._mask.name)
        if "T" not in self._mask.axes:
            return seen.flatten(1).any(1).expand(stop - start, -1)
        return seen.any(1).flatten(2).any(2)  # [T m J C n]

    def scores(self, start: int, stop: int) -> Tensor:
        """What the softmax of dense attention takes, [Hkv, g, R, J, n]: scaled, and -inf where a query sees no key."""
        s, seen = self._evaluated(start, stop, "s", self._mask.name)
        rows = min(stop * self.tile, self._blocked.length) - start * self.tile
        return s.masked_fill(~seen, -torch.inf)[0].flatten(2, 3)[:, :, :rows].flatten(-2)

    @property
    def _mask(self) -> Var:
        return self.program.var("seen" if "seen" in self.program.names() else "valid")

    def _evaluated(self, start: int, stop: int, *names: str) -> list[Tensor]:
        p = self.program
        inputs = chunked({"q": self._rows}, {"q": p.var("q").axes.index("T")}, start, stop) | {"k": self._keys}
        found = evaluate(
            p,
            inputs,
            scalars=self._scalars,
            sizes=self._blocked.sizes | {"T": stop - start},
            offsets={"T": start, "h": self._head},
            given=self._statistics,
            wanted=[p.var(n) for n in names],
        )
        return [found[n] for n in names]


def block_mass(scores: Tensor) -> Tensor:
    """What the softmax over all keys gives to each block, summed over the heads of a group.

    [Hkv, g, R, J, n] becomes [Hkv, R, J], of which a row sums to g; a query that sees no key gives 0.
    """
    return torch.softmax(scores.flatten(-2), -1).nan_to_num(0).view(scores.shape).sum((1, -1))


@dataclass(frozen=True)
class Coverage:
    """What some tiles of queries see, choose, and so attend to.

    Shares are of the attention that the softmax over all keys gives, means over the queries of a tile and the heads of
    a group.

    Attributes:
        positions: [T], the first query of each tile.
        forced: [T, J], blocks that are attended to by position.
        far: [T, J], blocks of which `budget` may be chosen.
        free: [Hkv, T, J], those that are chosen.
        forced_share: [Hkv, T], held by the forced blocks.
        covered: [Hkv, T], held by the forced and the chosen blocks.
        best: [Hkv, T], the most that the forced blocks and any choice of as many could hold.
    """

    positions: Tensor
    forced: Tensor
    far: Tensor
    free: Tensor
    forced_share: Tensor
    covered: Tensor
    best: Tensor


def coverage(spec: SPLASpec, q: Tensor, k: Tensor, *, head: int | None = None, tiles: int = 512) -> Coverage:
    """The choice of at most `tiles` tiles, spread evenly over the sequence, and what it covers.

    Raises:
        InputError: as for BlockAttention, or tiles is below 1.
    """
    if tiles < 1:
        raise InputError(f"{tiles} tiles", "1 or more")
    attention = BlockAttention(spec, q, k, head)
    assert spec.select is not None
    kept = torch.linspace(0, attention.tiles - 1, min(tiles, attention.tiles), dtype=torch.float64).round().long()
    parts: list[list[Tensor]] = [[] for _ in range(6)]
    for t in kept.tolist():
        far, free = attention.far(t, t + 1), attention.free(t, t + 1)
        forced = attention.seen(t, t + 1) & ~far
        held = block_mass(attention.scores(t, t + 1)).mean(1, keepdim=True) / spec.group_size  # [Hkv, 1, J]
        by_position = held.masked_fill(~forced, 0).sum(-1)
        chosen = held.masked_fill(~free, 0).sum(-1)
        most = held.masked_fill(~far, 0).topk(min(spec.select.budget, far.shape[1]), -1).values.sum(-1)
        found = (forced, far, free, by_position, by_position + chosen, by_position + most)
        for part, x in zip(parts, found, strict=True):
            part.append(x)
    dims = (0, 0, 1, 1, 1, 1)
    return Coverage(kept * attention.tile, *(torch.cat(p, d) for p, d in zip(parts, dims, strict=True)))
