"""Between the oracle's arrays with named axes and the arrays of kernels in memory."""

from types import ModuleType

import torch
from torch import Tensor

from splagen.codegen.geometry import Geometry, features_of, is_total, padded
from splagen.codegen.kernel import Array
from splagen.codegen.partition import Partition
from splagen.codegen.state_kernels import SPAN
from splagen.ir.program import Lse, Var, ordered
from splagen.ir.reference import evaluate
from splagen.layout import Blocked

NAN = float("nan")
ROWS = {
    "query_rows": ("b", "h", "g", "T", "m"),
    "query_scalars": ("b", "h", "g", "T", "m"),
    "key_rows": ("b", "h", "J", "C", "n"),
    "cell_rows": ("b", "h", "J", "C"),
    "head_rows": ("h", "g"),
    "kv_head_scalars": ("h",),
}


class Memory:
    """The arrays of one call of a spec's kernels."""

    def __init__(self, part: Partition, module: ModuleType, blocked: Blocked, dtype: torch.dtype) -> None:
        self.program, self.module, self.blocked, self.dtype = part.program, module, blocked, dtype
        self.geometry = Geometry.of(part.program)

    def full(self, v: Var, value: Tensor, rows: tuple[str, ...]) -> Tensor:
        """The value over every row axis, also those that it does not depend on."""
        axes = (*rows, *features_of(v))
        shape = [value.shape[v.axes.index(a)] if a in v.axes else 1 for a in axes]
        return value.reshape(shape).expand([self.blocked.sizes[a] for a in axes])

    def store(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array as kernels find it in memory, in its own dtype, with padding of zeros."""
        dtype = self.dtype if a.dtype == "input" else getattr(torch, a.dtype)
        return self.store_exactly(a, v, value).to(dtype).contiguous()

    def store_exactly(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array in float64."""
        axes = ordered((*ROWS[a.layout], *features_of(v)), self.program.order)
        rows = Var(v.name, axes, v.kind)
        x = self.full(v, value, ROWS[a.layout])
        cells = a.layout == "cell_rows"
        x = x.permute(0, 2, 3, 1, *range(4, x.ndim)).flatten(1, 2) if cells else self.blocked.to_tensor(rows, x)
        if a.features and a.padded:
            x = torch.nn.functional.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))
        if len(a.features) > 1:
            x = x.flatten(-len(a.features))
        return x

    def given(self, a: Array, v: Var, stored: Tensor) -> Tensor:
        """What the oracle goes on from where a kernel reads `stored`: rounded values, over axes."""
        x = self.load(a, stored.double())
        if a.layout == "cell_rows":
            sizes = self.blocked.sizes
            x = x.unflatten(1, (sizes["J"], sizes["C"])).permute(0, 3, 1, 2, *range(4, x.ndim + 1))
        else:
            axes = ordered((*ROWS[a.layout], *features_of(v)), self.program.order)
            x = self.blocked.to_axes(Var(v.name, axes, v.kind), x)
        full = (*ROWS[a.layout], *features_of(v))
        return x[tuple(slice(None) if axis in v.axes else 0 for axis in full)]

    def load(self, a: Array, stored: Tensor) -> Tensor:
        """Rows without their padding: the last dimensions are the features."""
        if not a.features:
            return stored
        sizes = [self.geometry.size(f) for f in a.features]
        wide = [*sizes[:-1], padded(sizes[-1]) if a.padded else sizes[-1]]
        return stored.unflatten(-1, wide)[..., : sizes[-1]]

    # -- sums ----------------------------------------------------------------------------------------------

    def chunk_states(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """[B * Hkv, chunks, left, right]: what a chunk of positions adds, or the total of a sequence, padded."""
        left = [f for f in features_of(v) if f != "e"]
        x = (value.unsqueeze(2) if is_total(v) else value).flatten(0, 1)  # [bh, places, *features]
        if "e" not in v.axes:
            x = torch.nn.functional.pad(x.unsqueeze(-1), (0, 15))
        else:
            x = torch.nn.functional.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))
        d = x.shape[-2]
        x = torch.nn.functional.pad(x, (0, 0, 0, padded(d) - d))
        x = x.reshape(*x.shape[:2], -1, x.shape[-1]) if len(left) > 1 else x
        tiles = a.chunk // self.geometry.tile if "T" in v.axes else 1
        chunks = -(-x.shape[1] // tiles)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, chunks * tiles - x.shape[1]))
        return x.unflatten(1, (chunks, tiles)).sum(2)

    def store_states(self, a: Array, v: Var, value: Tensor, origin: int) -> Tensor:
        """The array of states: entry c holds the sum of the chunks from the origin to before c."""
        one = self.chunk_states(a, v, value)
        one[:, :origin] = 0
        return torch.cat([torch.zeros_like(one[:, :1]), one.cumsum(1)], dim=1).to(torch.float32).contiguous()

    def unscanned(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array of states before a scan: entry c + 1 holds chunk c, entry 0 nothing."""
        one = self.chunk_states(a, v, value)
        dtype = self.dtype if a.dtype == "input" else torch.float32
        return torch.cat([torch.full_like(one[:, :1], NAN), one], dim=1).to(dtype).contiguous()

    def parts_of_total(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array of a total before it is summed: uneven parts that add up to it, entry 0 nothing."""
        share = torch.arange(1.0, -(-self.blocked.length // SPAN) + 1, dtype=value.dtype, device=value.device)
        parts = self.chunk_states(a, v, value) * (share / share.sum())[None, :, None, None]
        return torch.cat([torch.full_like(parts[:, :1], NAN), parts], dim=1).to(torch.float32).contiguous()

    def store_total(self, a: Array, v: Var, value: Tensor) -> Tensor:
        """The array of a total: entry 0 holds it, its parts are not read."""
        one = self.chunk_states(a, v, value)
        parts = one.new_full((len(one), -(-self.blocked.length // SPAN), *one.shape[2:]), NAN)
        return torch.cat([one, parts], dim=1).to(torch.float32).contiguous()

    def usable_cells(self) -> Tensor:
        """[nC]: the cells whose statistic some query may use."""
        lse = [eq for eq in self.program.equations if isinstance(eq.op, Lse) and "n" not in eq.op.axes]
        (usable,) = (eq.args[1] for eq in lse)
        scalars, sizes = {"L": self.blocked.length, "Hkv": self.blocked.sizes["h"]}, self.blocked.sizes
        where = evaluate(self.program, {}, scalars=scalars, sizes=sizes, wanted=[usable])[usable.name]
        return where.flatten(-2).flatten(0, -2).any(0)

    def states_of(self, a: Array, stored: Tensor) -> Tensor:
        """[B * Hkv, chunks + 1, left, right] of a launched array, which may be allocated larger."""
        chunks = -(-self.blocked.length // a.chunk)
        heads = self.blocked.sizes["b"] * self.blocked.sizes["h"]
        left, right = stored.shape[-2:]
        count = heads * (chunks + 1) * left * right
        return stored.reshape(-1)[:count].view(heads, chunks + 1, left, right)

    def key_blocks(self, v: Var, value: Tensor) -> Tensor:
        """[B * Hkv, nJ, BLOCK, *features] of rows of keys."""
        x = self.full(v, value, ROWS["key_rows"]).flatten(0, 1)
        return x.flatten(2, 3)

    def segments(self, a: Array, v: Var, value: Tensor, work) -> Tensor:  # type: ignore[no-untyped-def]
        """Partial sums of key rows as `merge_segments` reads them: uneven parts, and NaN where nothing is."""
        x = self.key_blocks(v, value)
        if a.padded:
            x = torch.nn.functional.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))
        x = x.reshape(*x.shape[:3], -1)  # [bh, nJ, BLOCK, width]
        owners = work.blocks.long()
        counts = work.firsts.diff(dim=1)
        share = 1.0 / counts.clamp(min=1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        nowhere = owners == x.shape[1]
        inside = owners.clamp(max=x.shape[1] - 1)
        out = x[rows, inside] * share[rows, inside][..., None, None]
        out = out.masked_fill(nowhere[..., None, None], NAN)
        return out.to(torch.float32).reshape(*self._heads(), *out.shape[1:]).contiguous()

    def merged(self, a: Array, stored: Tensor, work) -> Tensor:  # type: ignore[no-untyped-def]
        """[B * Hkv, nJ, BLOCK, *features]: the sum of each block's segments."""
        x = stored.flatten(0, 1).double()  # [bh, segments, BLOCK, width]
        total = x.new_zeros(x.shape[0], self.blocked.blocks + 1, *x.shape[2:])
        for row in range(len(x)):
            total[row].index_add_(0, work.blocks[row].long(), x[row])
        return self.load(a, total[:, : self.blocked.blocks])

    def partials(self, a: Array, stored: Tensor, v: Var) -> Tensor:
        """The sum of the programs' parts, over the variable's axes."""
        total = stored.double().sum(0)  # [heads, width]
        sizes = self.blocked.sizes
        if len(a.features) == 1:
            return total.reshape(sizes["h"], -1).sum(1)
        return total[:, : self.geometry.size(a.features[-2])].reshape([sizes[x] for x in v.axes])

    def _heads(self) -> tuple[int, int]:
        return self.blocked.sizes["b"], self.blocked.sizes["h"]
