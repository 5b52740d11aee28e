"""Kernels of a decoding step: small specs in the interpreter, real sizes on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splagen import library as lib
from splagen.paged_cache import SPLACache
from splagen.pipeline import generate_decoding
from splagen.spec import Residual, Select, SPLASpec, windows
from tests.kernels.cases import CELLS, USER
from tests.kernels.decoding import chosen_blocks, errors, inputs, last_row

pytestmark = pytest.mark.usefixtures("fast_sort")

SELECT = Select(block_size=16, budget=2, sinks=1, local=1)
SMALL = SPLASpec(head_dim=16, group_size=2, select=SELECT)
SPECS = {
    "default": SMALL,
    "no sinks, no local": replace(SMALL, select=replace(SELECT, sinks=0, local=0)),
    "normaliser": replace(SMALL, linear=Residual(normaliser=True), combine="add"),
    "temperature, gate": replace(SMALL, linear=Residual(lib.softmax, temperature=True), combine="gate"),
    "user map, softcap": replace(SMALL, linear=Residual(USER), score=lib.softcap(5.0), combine="rms_residual"),
    "alibi": replace(SMALL, score=lib.alibi()),
    "cells": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=CELLS)),
    "windows": replace(SMALL, select=replace(SELECT, block_size=32, sinks=0, local=0, statistics=windows())),
    "order 1": replace(SMALL, select=replace(SELECT, metric=lib.taylor(order=1))),
    "cumulant": replace(SMALL, select=replace(SELECT, metric=lib.cumulant(clamp=2.0))),
    "no residual": replace(SMALL, linear=None, combine="none"),
    "dense": replace(SMALL, linear=None, select=None, combine="none"),
    "dense below": replace(SMALL, dense_below=80),
    "head 24 value 40 group 3": replace(SMALL, head_dim=24, value_dim=40, group_size=3, scale=0.3),
    "group 1": replace(SMALL, group_size=1),
}
LIMIT = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def cache_of(spec: SPLASpec, folder: Path, device: torch.device, **sizes: object) -> SPLACache:
    block = spec.select.block_size if spec.select else 64
    given = {"sequences": 2, "kv_heads": 2, "tokens": 112, "page_size": max(32, block), "dtype": torch.float32} | sizes
    return SPLACache(generate_decoding(spec, folder), device=device, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_a_step_is_the_last_row_of_the_definition(name: str, tmp_path: Path, device: torch.device) -> None:
    spec = SPECS[name]
    cache = cache_of(spec, tmp_path, device, sequences=1, kv_heads=1)
    cache.allocate(96)
    rows = inputs(spec, 1, 96, 1, torch.float32, device)
    assert errors(spec, cache, rows, range(1, 92), every=7) < LIMIT[torch.float32]
    free = chosen_blocks(cache, -(-91 // cache.part.geometry.block))
    if free is not None:
        assert torch.equal(free, last_row(spec, rows, 91, None, wanted="free"))
