"""Steps of decoding beside the definition at the last query, with the blocks that the kernels chose."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from splagen.ir.frontend_spla import spla_program
from splagen.ir.reference import evaluate
from splagen.paged_cache import SPLACache
from splagen.spec import SPLASpec
from splagen.verification import relative_error
from tests.ir.blocked import blocked, plain_rows

ROWS = ("q", "k", "v", "q_m", "k_m", "q_r", "k_r")
BY_TOKEN = (*ROWS, "gate_s", "gate_r")


def inputs(
    spec: SPLASpec,
    batch: int,
    length: int,
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random rows of whole sequences by name: [B, L, heads, ...], and parameters, as an op takes them."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * spec.group_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = {
        "q": normal(batch, length, heads, spec.head_dim),
        "k": normal(batch, length, kv_heads, spec.head_dim),
        "v": normal(batch, length, kv_heads, spec.value_dim),
        "gamma_s": 1 + normal(heads, spec.value_dim) / 4,
        "gamma_r": 1 + normal(heads, spec.value_dim) / 4,
        "gate_s": normal(batch, length, heads),
        "gate_r": normal(batch, length, heads),
        "temperature": normal(kv_heads) / 4,
        "q_m": normal(batch, length, heads, spec.head_dim),
        "k_m": normal(batch, length, kv_heads, spec.head_dim),
        "q_r": normal(batch, length, heads, spec.head_dim),
        "k_r": normal(batch, length, kv_heads, spec.head_dim),
    }
    wanted = [v.name for v in spla_program(spec).inputs]
    return {n: rows[n].to(device=device, dtype=dtype if n in ROWS else torch.float32) for n in wanted}


def tokens(rows: Mapping[str, Tensor], t: int) -> list[Tensor]:
    """What a step takes at position t."""
    return [x[:, t] if n in BY_TOKEN else x for n, x in rows.items()]


def chosen_blocks(cache: SPLACache, blocks: int) -> Tensor | None:
    """The choice of the last step, [B, Hkv, 1, blocks]; None where a spec chooses nothing."""
    if "block_indices" not in cache.scratch:
        return None
    indices, counts = cache.scratch["block_indices"].long(), cache.scratch["block_counts"]
    assert torch.equal((indices >= 0).sum(-1), counts.long())
    mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter(2, torch.where(indices < 0, blocks, indices), True)[:, :, None, :blocks]


def last_row(spec: SPLASpec, rows: Mapping[str, Tensor], length: int, free: Tensor | None, wanted: str = "o") -> Tensor:
    """The definition at query length - 1 of sequences of that length, in float64; `free` replaces the choice."""
    program = spla_program(spec)
    tiled = spec.select is not None  # where nothing is selected, tiles have many queries: all rows, of which the last
    seen = {}
    for n, x in rows.items():
        x = x.double()
        x = x[:, :length] if n in BY_TOKEN else x
        x = x[:, length - 1 :] if n in BY_TOKEN and n[0] not in "kv" and tiled else x
        seen[n] = x.unflatten(0, (-1, spec.group_size)) if n.startswith("gamma") else x
    arrays = blocked(spec, seen)
    blocks = arrays["k"].shape[2]
    sizes = {"T": 1, "J": blocks, "Jw": blocks} if tiled else {}
    given = {} if free is None else {"free": free[..., :blocks]}
    name = program.outputs[0].name if wanted == "o" else wanted
    offsets = {"T": length - 1} if tiled else {}
    asked = [program.var(name)]
    found = evaluate(
        program, arrays, scalars={"L": length}, sizes=sizes, offsets=offsets, given=given, wanted=asked
    )  # fmt: skip
    return plain_rows(found[name], 1 if tiled else length)[:, -1] if wanted == "o" else found[name]


def relative(got: Tensor, want: Tensor) -> float:
    """The relative RMS error, as `verify` measures it."""
    assert torch.isfinite(got).all()
    return relative_error(got, want)


def errors(
    spec: SPLASpec, cache: SPLACache, rows: Mapping[str, Tensor], lengths: Iterator[int] | range, every: int = 1
) -> float:
    """Step a cache at these lengths; the relative RMS error against the definition over all that are compared."""
    got, want = [], []
    for length in lengths:
        o = cache.step(*tokens(rows, length - 1))
        if length % every == 0:
            blocks = -(-length // cache.part.geometry.block)
            got.append(o)
            want.append(last_row(spec, rows, length, chosen_blocks(cache, blocks)))
    return relative(torch.stack(got), torch.stack(want))
