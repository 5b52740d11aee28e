"""Steps of decoding against the oracle: sequences from their first token on, every row, and every choice of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from splagen.cache_tensors import CacheTensors
from splagen.codegen.decoding import Decoding
from splagen.ops import Oracle
from splagen.verification import TOLERANCE, Report, Row, Shape, random_inputs, relative_error, selection_error

MARGIN = 2 * 2.0**-4  # of scores from statistics in e4m3, that of two numbers of 4 digits; seen is up to 0.07


def verify(
    module: ModuleType,
    oracle: Oracle,
    part: Decoding,
    *,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | torch.device = "cpu",
    seed: int = 0,
    dense_below: int = 0,
    schedules: Mapping[str, Mapping[str, int]] | None = None,
) -> Report:
    """Step B sequences of L tokens from the first to the last, and compare o and the choices with the oracle's.

    The law of a step: the row that it gives is that of the whole sequence.  The oracle evaluates the whole in float64
    with the blocks that the steps chose.  A step below `dense_below` attends to everything, whatever comes later: where
    L is not below it, rows from there on are compared.  `schedules` replaces some of the Schedules.  Keys and values
    for pages in e4m3 are numbers of e4m3, and only statistics are rounded: to them choices are held less closely.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        for shape in shapes:
            inputs = random_inputs(oracle, shape, dtype, device, seed)
            if part.page_type == "e4m3":
                inputs |= {n: inputs[n].to(torch.float8_e4m3fn).to(dtype) for n in part.key_rows}
            o, indices, counts = run(module, part, inputs, schedules or {})
            first = dense_below if shape[2] >= dense_below else 0
            exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
            name = oracle.partition.outputs[0].name
            label = str(dtype).removeprefix("torch.")
            (want,) = oracle.values(exact, [name], indices)
            error = relative_error(o[:, first:], want[:, first:])
            rows.append(Row("o of steps", shape, label, error, TOLERANCE[dtype][0]))
            if indices is not None and counts is not None and not first:
                error = selection_error(oracle, inputs, indices, counts)
                limit = MARGIN if part.page_type == "e4m3" else TOLERANCE[dtype][2]
                rows.append(Row("selection of steps", shape, label, error, limit))
    return Report(module.__name__, tuple(rows))


def run(
    module: ModuleType,
    part: Decoding,
    inputs: Mapping[str, Tensor],
    schedules: Mapping[str, Mapping[str, int]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of every step o [B, L, Hq, E], block_indices [B, Hkv, L, budget] and how many; None without a selection."""
    q, k = inputs["q"], inputs["k"]
    batch, length, kv_heads = k.shape[:3]
    page = part.default_page_size
    width = -(-length // page)
    cache = CacheTensors.allocate(
        module, part, sequences=batch, kv_heads=kv_heads, width=width, pages=batch * width, page_size=page,
        dtype=q.dtype, device=q.device,
    )  # fmt: skip
    # no page lies behind the one before it
    cache.page_table.copy_(torch.arange(batch * width, device=q.device).view(width, batch).T)
    cache.seqlens.zero_()
    chosen = {**cache.schedules(module, q[:, 0]), **schedules}
    if "splitting" in schedules:
        cache.scratch = module.scratch(chosen, batch, kv_heads, width * page, q.dtype, q.device)
    given = [inputs[a.name] for a in part.tokens]
    by_token = [a.layout == "token_rows" for a in part.tokens]
    rows, indices = [], []
    for t in range(length):
        token = [x[:, t] if moves else x for x, moves in zip(given, by_token, strict=True)]
        o = torch.full((*q[:, 0].shape[:2], part.geometry.value_dim), torch.nan, dtype=q.dtype, device=q.device)
        module.step(chosen, *token, *cache.arguments, o)
        rows.append(o)
        if part.budget:
            indices.append(cache.scratch["block_indices"].clone())
    if not part.budget:
        return torch.stack(rows, 1), None, None
    lists = torch.stack(indices, 2)
    return torch.stack(rows, 1), lists, (lists >= 0).sum(-1)
