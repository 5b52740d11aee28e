"""Specs that cover every axis: small ones for Triton's interpreter, and real sizes for a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from splagen import library as lib
from splagen.spec import Residual, Select, SPLASpec, Statistics, windows

Shape = tuple[int, int, int]  # B, Hq, L


@dataclass(frozen=True)
class Case:
    """A spec with the shapes and dtypes it is compared at.

    `instead` names the cases that have together what this one has: it is slow, and they are not.
    """

    name: str
    spec: SPLASpec
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    instead: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


CELLS = Statistics(cell=16)
USER = lib.feature_map(lambda x: lib.where(x > 0, x**2 + x, -x / 2), signs=2, non_negative=True)
DIAGONAL = lib.taylor(covariance="diag")
SELECT = Select(block_size=16, budget=1, sinks=1, local=1, metric=DIAGONAL)


def select(**changes: Any) -> Select:
    if "tile" in changes:
        changes["granularity"] = "tile"
    return replace(SELECT, **changes)


def small(name: str, *shapes: Shape, fp16: bool = False, instead: tuple[str, ...] = (), **axes: Any) -> Case:
    """A case for the interpreter; the residual is on and head_dim is 16 unless told."""
    given = {"head_dim": 16, "group_size": 2, "select": SELECT, "linear": Residual()} | axes
    dtypes = (torch.float32, torch.float16) if fp16 else (torch.float32,)
    return Case(name, SPLASpec(**given), shapes, dtypes, instead)


DENSE: dict[str, Any] = {"select": None, "linear": None}

SMALL = (
    # dense attention and score functions
    small("dense", (1, 2, 50), (2, 4, 1), fp16=True, **DENSE),
    small("dense non-causal", (2, 2, 50), causal=False, **DENSE),
    small("dense group 3 value 40", (1, 3, 37), head_dim=24, group_size=3, value_dim=40, **DENSE),
    small("dense softcap", (1, 2, 50), score=lib.softcap(5.0), scale=0.7, **DENSE),
    small("dense alibi", (1, 4, 50), score=lib.alibi(), **DENSE),
    small("dense window", (1, 2, 70), score=lib.sliding_window(20), **DENSE),
    small("dense alibi non-causal", (1, 4, 50), score=lib.alibi(), causal=False, **DENSE),
    # block-sparse alone
    small("sparse", (1, 2, 90), (2, 2, 15), linear=None, instead=("sparse order 1",)),
    small("sparse non-causal", (1, 2, 90), causal=False, linear=None,
          instead=("rank 4 tile 16 non-causal", "non-causal no local")),
    small("sparse window", (1, 2, 90), score=lib.sliding_window(40), linear=None),
    small("sparse softcap tile 16", (1, 2, 90), score=lib.softcap(5.0), linear=None, select=select(tile=16)),
    small("sparse budget 1", (1, 2, 120), linear=None, select=select(sinks=0, local=0),
          instead=("sparse all", "relu2")),
    small("sparse all", (1, 2, 70), linear=None, select=select(budget=9)),
    small("sparse order 1", (1, 2, 110), (2, 2, 15), linear=None, select=select(metric=lib.taylor(order=1))),
    # the residual: feature maps, temperature, normaliser, combine
    small("default", (1, 2, 107), (1, 2, 1), fp16=True, select=Select(block_size=16, budget=2)),
    small("identity add", (1, 2, 90), linear=Residual(lib.identity), combine="add"),
    small("relu add value 40", (1, 2, 90), value_dim=40, linear=Residual(lib.relu), combine="add"),
    small("relu2", (1, 2, 90), linear=Residual(lib.relu2), select=select(sinks=0, local=0)),
    small("elu1 gate", (1, 1, 100), group_size=1, linear=Residual(lib.elu1), combine="gate",
          instead=("normaliser add", "temperature gate")),
    small("exp rms_residual", (1, 2, 90), linear=Residual(lib.exp), combine="rms_residual"),
    small("softmax", (1, 2, 90), linear=Residual(lib.softmax), instead=("temperature gate",)),
    small("user map", (1, 2, 105), linear=Residual(USER), select=select(sinks=2, local=2)),
    small("temperature", (1, 4, 81), linear=Residual(temperature=True), instead=("temperature gate",)),
    small("temperature gate", (1, 2, 90), linear=Residual(lib.softmax, temperature=True), combine="gate"),
    small("normaliser add", (1, 2, 90), linear=Residual(lib.elu1, normaliser=True), combine="add", fp16=True),
    small("normaliser hedgehog rms", (1, 2, 90), linear=Residual(normaliser=True),
          instead=("default", "everything at once")),
    small(
        "everything at once", (1, 3, 105), head_dim=24, value_dim=40, group_size=3, scale=0.3,
        score=lib.softcap(10.0),
        select=select(block_size=32, sinks=0, statistics=CELLS, metric=lib.cumulant(covariance="diag", clamp=2.0)),
        linear=Residual(temperature=True, normaliser=True), combine="rms_residual",
    ),
    small("softcap residual", (1, 2, 90), score=lib.softcap(5.0), instead=("everything at once",)),
    small("alibi residual", (1, 2, 90), score=lib.alibi()),
    # granularity, blocks, statistics, metrics
    small("non-causal", (1, 2, 90), causal=False, instead=("non-causal no local", "non-causal normaliser")),
    small("non-causal no local", (1, 2, 90), causal=False, select=select(sinks=0, local=0)),
    small("non-causal normaliser", (1, 2, 70), causal=False, linear=Residual(normaliser=True)),
    small("non-causal total of two parts", (1, 1, 1040), (1, 1, 15), causal=False, group_size=1,
          select=select(block_size=64, tile=16, sinks=0, local=0)),
    small("non-causal prefixes", (1, 16, 85), causal=False, group_size=16, select=select(local=2)),
    small("non-causal nothing left", (1, 2, 70), causal=False, select=select(budget=9),
          instead=("non-causal total of two parts",)),
    small("tile 16", (1, 2, 150), select=select(budget=2, tile=16), fp16=True),
    small("tile 16 block 32", (1, 2, 150), select=select(tile=16, block_size=32)),
    small("tile 32", (2, 2, 150), select=select(budget=2, tile=32), instead=("tile 64 block 16", "windows tile 32")),
    small("tile 32 non-causal", (1, 2, 150), causal=False, select=select(budget=2, tile=32)),
    small("tile 64 non-causal, a cut block chosen", (1, 1, 200), (1, 1, 192), group_size=1, causal=False,
          select=select(budget=6, tile=64, sinks=0, local=0), fp16=True),
    small("states of tiles: normaliser, temperature, value 40", (1, 3, 150), (1, 3, 1), causal=False, group_size=3,
          head_dim=24, value_dim=40, select=select(tile=32, local=2), fp16=True,
          linear=Residual(lib.elu1, temperature=True, normaliser=True), combine="add"),
    small("states of tiles for keys alone", (1, 1, 200), causal=False, group_size=1, head_dim=64,
          select=select(tile=64, block_size=32, sinks=0, local=0)),
    small("tile 64 block 16", (1, 1, 200), group_size=1, select=select(tile=64)),
    small("tile 64 block 64", (1, 1, 330), group_size=1, select=select(tile=64, block_size=64)),
    small("tile 128 block 32", (1, 1, 300), group_size=1, select=select(tile=128, block_size=32, local=0)),
    small("block 32 cells", (1, 2, 110), select=select(block_size=32, sinks=0, statistics=CELLS),
          instead=("everything at once",)),
    small("block 64 windows tile 16", (1, 2, 330), select=select(block_size=64, tile=16, statistics=windows()),
          instead=("tile 16 block 32", "windows tile 32")),
    small("windows tile 32", (1, 2, 250), select=select(block_size=32, tile=32, statistics=windows())),
    small("block 32 windows non-causal", (1, 1, 110), causal=False, group_size=1,
          select=select(block_size=32, statistics=windows())),
    small("block 128 cells", (1, 1, 270), group_size=1,
          select=select(block_size=128, sinks=0, local=0, statistics=CELLS, tile=64)),
    small("order 1", (1, 2, 110), select=select(metric=lib.taylor(order=1)), instead=("sparse order 1",)),
    small("cumulant", (1, 2, 110), select=select(metric=lib.cumulant(covariance="diag", clamp=3.0)),
          instead=("everything at once",)),
    small("rank 2", (1, 2, 110), fp16=True, linear=None, select=select(metric=lib.taylor(covariance="rank2"))),
    small("rank 4 tile 16 non-causal", (1, 2, 110), causal=False, linear=None,
          select=select(tile=16, metric=lib.taylor(covariance="rank4"))),
    small("rank 8 cells head 24", (1, 2, 110), head_dim=24, value_dim=16, linear=None,
          select=select(block_size=32, sinks=0, statistics=CELLS, metric=lib.cumulant(covariance="rank8"))),
    small("many sinks and local", (1, 2, 135), select=select(sinks=3, local=4), instead=("user map",)),
    small("budget 17", (1, 1, 330), group_size=1, select=select(budget=17, sinks=0, local=0, tile=16)),
    # sizes
    small("group 1", (2, 1, 81), group_size=1, instead=("dense below: sparse",)),
    small("group 3", (1, 3, 90), group_size=3, instead=("everything at once",)),
    small("group 5", (1, 5, 90), group_size=5, instead=("everything at once", "group 7 tile 16")),
    small("group 7 tile 16", (1, 7, 90), group_size=7, select=select(tile=16)),
    small("group 16", (1, 16, 70), group_size=16, instead=("non-causal prefixes", "group 64")),
    small("group 64", (1, 64, 33), group_size=64, select=select(sinks=0, local=0)),
    small("head 80 value 48", (1, 1, 90), group_size=1, head_dim=80, value_dim=48, select=select(tile=16)),
    small("sums apart", (1, 2, 110), (1, 2, 5), head_dim=80, value_dim=48, select=select(tile=16),
          instead=("head 80 value 48", "sums apart add")),
    small("sums apart non-causal", (1, 2, 110), head_dim=80, causal=False, select=select(tile=16), combine="gate",
          linear=Residual(temperature=True, normaliser=True)),
    small("sums apart add", (1, 2, 110), (1, 2, 5), head_dim=80, combine="add", select=select(tile=16),
          linear=Residual(lib.elu1), fp16=True),
    small("head 40 value 16", (1, 2, 90), head_dim=40, value_dim=16, select=select(tile=16)),
    small("head 16 value 96", (2, 1, 90), group_size=1, value_dim=96, select=select(tile=16)),
    # queries and keys of one branch alone
    small("own rows of the residual, temperature, dense below", (1, 2, 70), (1, 2, 31), dense_below=32,
          linear=Residual(own_rows=True, temperature=True, normaliser=True), combine="add"),
    small("own rows of both, head 24, tile 16", (1, 2, 150), head_dim=24, select=select(own_rows=True, tile=16),
          linear=Residual(own_rows=True)),
    # short sequences
    small("dense below: dense", (1, 2, 90), dense_below=128, instead=("dense below: sparse",)),
    small("dense below: sparse", (1, 1, 70), (1, 1, 31), dense_below=32, group_size=1),
    small("dense below non-causal", (1, 1, 31), (1, 1, 70), dense_below=32, causal=False, group_size=1),
)  # fmt: skip

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def real(name: str, lengths: tuple[int, ...], *dtypes: torch.dtype, batch: int = 1, kv: int = 1, **axes: Any) -> Case:
    """A case for a GPU; the residual is on, and sizes are those of a model unless told."""
    given = {"head_dim": 64, "group_size": 4, "select": chosen(), "linear": Residual()} | axes
    spec = SPLASpec(**given)
    shapes = tuple((batch if n < 2000 else 1, kv * spec.group_size, n) for n in lengths)
    return Case(name, spec, shapes, dtypes)


def chosen(**changes: Any) -> Select:
    if "tile" in changes:
        changes["granularity"] = "tile"
    return replace(Select(budget=4, metric=DIAGONAL), **changes)


# Compiling takes most of the time of these: about 15 kernels for each dtype of a case.
GPU = (
    real("default", (1000, 64), BF16, FP16, FP32, head_dim=128, batch=2, kv=2, select=Select(budget=4)),
    real("default odd", (4095, 63, 1), BF16, head_dim=128, group_size=16, select=Select(budget=4)),
    real("dense", (1000, 63), BF16, FP16, FP32, batch=2, **DENSE),
    real("dense softcap non-causal", (1000, 15), BF16, FP32, causal=False, score=lib.softcap(30.0), **DENSE),
    real("dense window", (4095, 65), BF16, head_dim=128, score=lib.sliding_window(256), **DENSE),
    real("sparse tile 64", (4095, 1), BF16, FP16, head_dim=128, linear=None, select=chosen(tile=64)),
    real("sparse group 16 order 1", (4095, 65), BF16, FP32, head_dim=128, linear=None, group_size=16,
         select=chosen(metric=lib.taylor(order=1))),
    real("sparse alibi group 8", (1000,), FP16, linear=None, group_size=8, score=lib.alibi()),
    real("tile 16 block 32", (1000, 65), BF16, FP32, select=chosen(tile=16, block_size=32)),
    real("tile 64 non-causal", (1000, 64), BF16, FP16, head_dim=128, causal=False, select=chosen(tile=64)),
    real("tile 64 non-causal group 1", (4095, 64, 1), BF16, FP32, head_dim=128, causal=False, group_size=1,
         select=chosen(tile=64, sinks=0, local=0)),
    real("non-causal group 16", (1000, 65), BF16, FP32, causal=False, group_size=16),
    real("tile 128 block 16", (4095,), BF16, group_size=1, select=chosen(tile=128, block_size=16)),
    real("tile 32 windows user map", (1000, 15), BF16, group_size=5, linear=Residual(USER),
         select=chosen(tile=32, statistics=windows())),
    real("block 16 cumulant", (1000, 63), FP16, group_size=6,
         select=chosen(block_size=16, budget=16, metric=lib.cumulant(covariance="diag", clamp=8.0))),
    real("rank 2", (1000, 4095), BF16, FP32, select=chosen(metric=lib.taylor(covariance="rank2"))),
    real("rank 4 head 128", (4095,), BF16, FP16, head_dim=128, group_size=16,
         select=chosen(metric=lib.taylor(covariance="rank4"))),
    real("rank 8 block 128 tile 64", (1000,), BF16, causal=False, head_dim=80,
         select=chosen(block_size=128, tile=64, metric=lib.cumulant(covariance="rank8"))),
    real("block 128 cells", (4095,), BF16, head_dim=128, group_size=8,
         select=chosen(block_size=128, budget=2, statistics=CELLS)),
    real("non-causal", (1000, 65), BF16, FP32, causal=False, batch=2),
    real("head 80", (1000,), BF16, FP32, head_dim=80, group_size=3, select=chosen(tile=16)),
    real("head 96 value 64", (1000, 15), BF16, FP16, head_dim=96, value_dim=64,
         linear=Residual(lib.elu1), combine="add"),
    real("head 192 value 128", (1000,), BF16, head_dim=192, value_dim=128, linear=Residual(lib.softmax)),
    real("head 256", (1000,), BF16, head_dim=256, group_size=1, linear=Residual(lib.relu),
         combine="rms_residual"),
    real("value 256", (1000,), FP16, value_dim=256, group_size=2, linear=Residual(lib.identity),
         combine="add"),
    real("group 64", (1000,), BF16, group_size=64, linear=Residual(lib.relu2)),
    real("group 7 gate", (1000, 15), BF16, FP32, group_size=7, linear=Residual(lib.exp), combine="gate",
         score=lib.softcap(30.0)),
    real("temperature", (1000, 64), BF16, FP16, kv=2, batch=2, linear=Residual(temperature=True)),
    real("normaliser", (1000, 65), BF16, FP32, linear=Residual(normaliser=True), combine="add"),
    real("normaliser tile non-causal", (1000,), FP16, causal=False, select=chosen(tile=32),
         linear=Residual(lib.elu1, temperature=True, normaliser=True), combine="add"),
    real("dense below", (1000, 1001), BF16, dense_below=1001),
    real("own rows", (1000, 65), BF16, FP32, head_dim=128, select=chosen(own_rows=True),
         linear=Residual(own_rows=True)),
    real("own rows dense below", (1000, 1001), BF16, dense_below=1001, linear=Residual(own_rows=True)),
)  # fmt: skip

# sizes of a model, for tests of single kernels and of Schedules on a GPU
REAL_SPECS = {
    "token": SPLASpec(head_dim=128, group_size=4, select=chosen()),
    "tile": SPLASpec(
        head_dim=64,
        group_size=4,
        causal=False,
        select=chosen(tile=64),
        linear=Residual(normaliser=True),
        combine="add",
    ),
}
