"""Sequences [B, L, H, D] as the blocked, zero-padded arrays that an SPLA Program reads, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from splagen.ir.frontend_spla import block_size, cell_size, spla_program, tile_size
from splagen.ir.program import Program
from splagen.ir.reference import evaluate
from splagen.spec import SPLASpec


def padded(x: Tensor, axis: int, multiple: int) -> Tensor:
    """X with zeros appended along `axis` up to whole multiples."""
    missing = -x.shape[axis] % multiple
    shape = [*x.shape]
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)


def query_rows(spec: SPLASpec, x: Tensor, *, spare: int = 0) -> Tensor:
    """[B, L, Hq, ...] -> [b h g T m ...], with `spare` more tiles of padding."""
    tile, group = tile_size(spec), spec.group_size
    x = torch.cat([padded(x, 1, tile), x.new_zeros(x.shape[0], spare * tile, *x.shape[2:])], 1)
    x = x.unflatten(2, (-1, group)).unflatten(1, (-1, tile))
    return x.movedim((0, 3, 4, 1, 2), (0, 1, 2, 3, 4))


def key_rows(spec: SPLASpec, x: Tensor, *, spare: int = 0) -> Tensor:
    """[B, L, Hkv, D] -> [b h J C n d], with `spare` more blocks of padding."""
    block, cell = block_size(spec), cell_size(spec)
    x = torch.cat([padded(x, 1, block), x.new_zeros(x.shape[0], spare * block, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, block // cell, cell)).movedim(4, 1)


def plain_rows(x: Tensor, length: int) -> Tensor:
    """[b h g T m ...] -> [B, L, Hq, ...]."""
    return x.movedim((3, 4), (1, 2)).flatten(1, 2).flatten(2, 3)[:, :length]


def plain_keys(x: Tensor, length: int) -> Tensor:
    """[b h J C n d] -> [B, L, Hkv, D]."""
    return x.movedim(1, 4).flatten(1, 3)[:, :length]


def random_rows(
    spec: SPLASpec, batch: int, length: int, kv_heads: int, seed: int = 0, spread: float = 1.0
) -> dict[str, Tensor]:
    """Random float64 inputs of the spec in plain layout: q, k, v and what else it asks for, by name."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * spec.group_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {
        "q": spread * normal(batch, length, heads, spec.head_dim),
        "k": spread * normal(batch, length, kv_heads, spec.head_dim),
        "v": normal(batch, length, kv_heads, spec.value_dim),
        "q_m": spread * normal(batch, length, heads, spec.head_dim),
        "k_m": spread * normal(batch, length, kv_heads, spec.head_dim),
        "q_r": spread * normal(batch, length, heads, spec.head_dim),
        "k_r": spread * normal(batch, length, kv_heads, spec.head_dim),
        "gamma_s": 1 + normal(kv_heads, spec.group_size, spec.value_dim) / 4,
        "gamma_r": 1 + normal(kv_heads, spec.group_size, spec.value_dim) / 4,
        "gate_s": normal(batch, length, heads),
        "gate_r": normal(batch, length, heads),
        "temperature": normal(kv_heads) / 4,
    }
    wanted = {v.name for v in spla_program(spec).inputs}
    return {name: x for name, x in rows.items() if name in wanted}


def blocked(spec: SPLASpec, rows: Mapping[str, Tensor], *, spare: int = 0) -> dict[str, Tensor]:
    """The arrays that the spec's Program reads; a cotangent do is laid out like q."""
    made = {}
    for name, x in rows.items():
        if name in ("q", "q_m", "q_r", "do", "do_s", "gate_s", "gate_r"):
            made[name] = query_rows(spec, x, spare=spare)
        elif name in ("k", "v", "k_m", "k_r"):
            made[name] = key_rows(spec, x, spare=spare)
        else:
            made[name] = x
    return made


def value(spec: SPLASpec, rows: Mapping[str, Tensor], name: str, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """One variable of the spec's Program at plain inputs, in the Program's layout."""
    program = spla_program(spec)
    length = rows["q"].shape[1]
    wanted = [program.var(name)]
    return evaluate(program, blocked(spec, rows), scalars={"L": length}, given=given, wanted=wanted)[name]


def output(spec: SPLASpec, rows: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> Tensor:
    """The output [B, L, Hq, E] of the spec at plain inputs."""
    (out,) = spla_program(spec).outputs
    return plain_rows(value(spec, rows, out.name, given), rows["q"].shape[1])


def evaluated(program: Program, spec: SPLASpec, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of a Program made from the spec's, at plain inputs."""
    return evaluate(program, blocked(spec, rows), scalars={"L": rows["q"].shape[1]})
