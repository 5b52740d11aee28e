"""Random rows of an SSE op's call, packed, and the same rows over the axes of the definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splagen.codegen.sequence_partition import parts_of
from splagen.sequence import input_names
from splagen.sse_spec import SSESpec


def outputs_of(spec: SSESpec) -> tuple[str, ...]:
    return ("o", "final", *(["balance"] if spec.router else []))


def packed(
    spec: SSESpec,
    lengths: Sequence[int],
    heads: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    decay: float = 0.3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Arguments of the op by name, with cotangents do, dfinal and dbalance: `heads` key heads, decays -decay |normal|.

    q, k, v and do are in `dtype`; everything else is float32, or float64 with them.
    """
    generator = torch.Generator().manual_seed(seed)
    total, values = sum(lengths), heads * spec.group_size
    other = dtype if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def row(name: str) -> Tensor:
        match name[0]:
            case "q" | "k":
                return normal(total, heads, spec.head_dim)
            case "v":
                return normal(total, values, spec.value_dim)
            case "b":
                return normal(total, values).sigmoid()
            case "l":
                assert spec.router
                head = (heads,) if spec.router.scope == "head" else ()
                return normal(total, *head, spec.router.partitions)
        wide = {"constant": (values,), "vector": (total, heads, spec.head_dim)}
        return -decay * normal(*wide.get(spec.backbone, (total, values))).abs()

    found = {n: row(n).to(dtype if n[0] in "qkv" else other) for n in input_names(spec)}
    states = (len(lengths), parts_of(spec), values, spec.head_dim, spec.value_dim)
    found["state"] = normal(*states).mul(0.5).to(other)
    found["do"] = normal(total, values, spec.value_dim).to(dtype)
    found["dfinal"] = normal(*states).mul(0.3).to(other)
    if spec.router:
        found["dbalance"] = torch.tensor(0.7 * max(total, 1), dtype=other)  # the loss is a mean over tokens
    found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {n: x.to(device) for n, x in found.items()}


def rows_of(given: Mapping[str, Tensor], start: int, stop: int, **changes: Tensor) -> dict[str, Tensor]:
    """One sequence of positions start to stop; `changes` replaces states and their cotangents."""
    whole = given["v"].shape[0]
    fixed = ("state", "dfinal", "dbalance", "cu_seqlens")
    cut = {n: x if n in fixed or (x.ndim == 1 and n[0] == "g") else x[start:stop] for n, x in given.items()}
    assert 0 <= start <= stop <= whole
    ends = torch.tensor([0, stop - start], dtype=torch.int32, device=given["v"].device)
    return {**cut, "cu_seqlens": ends, **changes}


def over_axes(spec: SSESpec, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows and state of one sequence as the definition's inputs: a batch of one."""
    group = spec.group_size

    def heads_of(rows: Tensor) -> Tensor:  # [T, HV, ...] as [1, h, g, T, ...]
        return rows.movedim(0, 1).unflatten(0, (-1, group)).unsqueeze(0)

    found = {}
    for name in input_names(spec):
        rows = x[name]
        if name == "v" or name[0] == "b" or (name[0] == "g" and spec.backbone in ("scalar", "delta")):
            found[name] = heads_of(rows)
        elif name[0] == "g" and spec.backbone == "constant":
            found[name] = rows.unflatten(0, (-1, group))
        else:
            found[name] = (rows if name == "logits" and rows.ndim == 2 else rows.movedim(0, 1)).unsqueeze(0)
    (state,) = x["state"]
    if spec.shared:
        found["state1"] = state[0].unflatten(0, (-1, group)).unsqueeze(0)
    if spec.router:
        sparse = state[int(spec.shared) :]  # [P, HV, D, E]
        found["state2"] = sparse.movedim(0, 1).unflatten(0, (-1, group)).unsqueeze(0)
    return found


def packed_outputs(spec: SSESpec, out: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """o [T, HV, E] and the states [1, parts, HV, D, E] of a batch of one over axes."""
    o = out["o"][0].flatten(0, 1).movedim(1, 0)
    finals = [out["final1"][0].flatten(0, 1).unsqueeze(0)] if spec.shared else []
    finals += [out["final2"][0].flatten(0, 1).movedim(1, 0)] if spec.router else []
    return o, torch.cat(finals).unsqueeze(0)
