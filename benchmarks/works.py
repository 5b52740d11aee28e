"""What `python -m benchmarks.run` measures: the works, their sizes, the systems beside them and the times to reach.

Everything is bf16 on an H200, B = 1, D = 128, blocks of 64; times are medians in milliseconds.  A target has the time
that is asked for ("at least") and the one aimed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from splagen.library import FeatureMap, Metric, hedgehog, identity, softmax, taylor
from splagen.spec import Residual, Select, Spec, SPLASpec, windows
from splagen.sse_spec import SSESpec
from splagen.verification import Shape

HEADS, D, BLOCK = 32, 128, 64
FREE, SINKS, LOCAL = 13, 1, 1  # with the query's own block 16 blocks per token

Timed: TypeAlias = Literal["op", "given", "selection"]
"""The whole op; what follows the selection, with chosen blocks given; the selection alone."""

Pass: TypeAlias = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Target:
    """Milliseconds of forward and, where it is asked for, backward."""

    at_least: tuple[float, ...]
    aim: tuple[float, ...]


@dataclass(frozen=True)
class Size:
    """KV heads and query heads of each; `beside` names the systems that are measured at it."""

    kv_heads: int
    group: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One row of splagen and the rows of the systems beside it."""

    work: str
    variant: str
    spec: Spec
    size: Size
    length: int
    target: Target | None

    @property
    def shape(self) -> Shape:
        """B, Hq, L."""
        return 1, self.size.kv_heads * self.size.group, self.length

    @property
    def label(self) -> dict[str, int | str]:
        """What a row says of its sizes."""
        named: dict[str, int | str] = {"variant": self.variant} if self.variant else {}
        kv_heads, group = self.size.kv_heads, self.size.group
        return named | {"length": self.length, "heads": kv_heads * group, "kv_heads": kv_heads, "group_size": group}


@dataclass(frozen=True)
class Work:
    """Specs by the name of a variant, as functions of the group size, at sizes and lengths.

    `targets` has the variant, the length and the KV heads of what is asked for; only groups that make HEADS query
    heads have one.  Of the systems beside it, the `slow` ones are measured at 64k alone.
    """

    name: str
    summary: str
    specs: Mapping[str, Callable[[int], Spec]]
    timed: Timed
    sizes: tuple[Size, ...]
    lengths: tuple[int, ...]
    passes: tuple[Pass, ...] = PASSES
    targets: Mapping[tuple[str, int, int], Target] = field(default_factory=dict)
    slow: tuple[str, ...] = ()

    def cases(self, lengths: Sequence[int] = (), kv_heads: Sequence[int] = ()) -> list[Case]:
        """All cases, or those of other lengths or KV heads: sizes that are not listed take the systems of the first."""
        sizes = list(self.sizes)
        if kv_heads:
            listed = {s.kv_heads for s in sizes}
            sizes = [s for s in sizes if s.kv_heads in kv_heads]
            sizes += [Size(h, HEADS // h, self.sizes[0].beside) for h in kv_heads if h not in listed]
        found = []
        for variant, spec_of in self.specs.items():
            for size in sizes:
                for length in lengths or self.lengths:
                    key = variant, length, size.kv_heads
                    target = self.targets.get(key) if size.kv_heads * size.group == HEADS else None
                    beside = tuple(s for s in size.beside if s not in self.slow or length == 64 * K)
                    there = replace(size, beside=beside)
                    found.append(Case(self.name, variant, spec_of(size.group), there, length, target))
            sizes = [replace(s, beside=()) for s in sizes]  # the systems beside it are the same for every variant
        return found


def sparse_spec(group: int) -> SPLASpec:
    """Block-sparse softmax alone: a sink, the query's block and the one before, 13 free blocks."""
    return SPLASpec(head_dim=D, group_size=group, select=_select(), linear=None, name="sparse")


def whole_spec(group: int, feature_map: FeatureMap = hedgehog) -> SPLASpec:
    """SPLA with the same blocks: residual over the rest, both branches normalised."""
    return SPLASpec(head_dim=D, group_size=group, select=_select(), linear=Residual(feature_map), combine="rms")


def whole_softmax_spec(group: int) -> SPLASpec:
    """The same with as many features as the head has: a softmax over the head dimension."""
    return whole_spec(group, softmax)


def short_spec(group: int) -> SPLASpec:
    """The same with dense attention up to 8k, so that every length of the work is below the limit."""
    return replace(whole_spec(group), dense_below=8 * K + 1, name="short")


def short_sparse_spec(group: int) -> SPLASpec:
    """Block-sparse softmax alone with the same limit: nothing stands behind the attention."""
    return replace(sparse_spec(group), dense_below=8 * K + 1, name="short_sparse")


def rank_2_spec(group: int) -> SPLASpec:
    """Block-sparse softmax whose metric has a covariance of rank 2."""
    return _rank_spec(group, taylor(covariance="rank2"))


def rank_4_spec(group: int) -> SPLASpec:
    """The same of rank 4."""
    return _rank_spec(group, taylor(covariance="rank4"))


def rank_8_spec(group: int) -> SPLASpec:
    """The same of rank 8."""
    return _rank_spec(group, taylor(covariance="rank8"))


def _rank_spec(group: int, metric: Metric) -> SPLASpec:
    return replace(sparse_spec(group), select=replace(_select(), metric=metric), name="rank")


def infllm_spec(group: int) -> SPLASpec:
    """InfLLM-v2's preset: a sink, 33 local blocks with the query's own, 62 free ones, no residual.

    Scores are those of means of windows of 32 keys every 16 (order 1), max-pooled to blocks.
    """
    select = Select(BLOCK, budget=62, sinks=1, local=32, metric=taylor(order=1), statistics=windows())
    return SPLASpec(head_dim=D, group_size=group, select=select, linear=None, name="infllm")


def tile_spec(group: int, linear: Residual | None = None) -> SPLASpec:
    """Not causal: 64 neighbouring queries share 16 blocks, their own and 15 chosen ones."""
    metric = taylor(covariance="diag")
    select = Select(BLOCK, budget=15, sinks=0, local=0, granularity="tile", tile=64, metric=metric)
    return SPLASpec(head_dim=D, group_size=group, causal=False, select=select, linear=linear, name="tile")


def tile_residual_spec(group: int) -> SPLASpec:
    """The same with a hedgehog residual over the other blocks, both branches normalised."""
    return tile_spec(group, Residual(hedgehog))


def tile_softmax_spec(group: int) -> SPLASpec:
    """The same with as many features as the head has: the map that SLA has unless it is told another."""
    return tile_spec(group, Residual(softmax))


def linear_spec(group: int) -> SSESpec:
    """Causal linear attention of queries and keys as they are: one state, no decay, no normaliser."""
    return SSESpec("linear", head_dim=D, group_size=group, backbone="none", router=None, q_map=identity, k_map=identity)


def _select() -> Select:
    return Select(BLOCK, budget=FREE, sinks=SINKS, local=LOCAL, metric=taylor(covariance="diag"))


SDPA = ("dense cuDNN", "dense flash")
DENSE = (*SDPA, "FlexAttention")
K = 1024


WORKS: dict[str, Work] = {
    w.name: w
    for w in (
        Work(
            "sparse",
            "block-sparse softmax alone, 16 blocks per token, 13 of them random and given",
            {"": sparse_spec},
            "given",
            (
                Size(2, 16, (*DENSE, "fla parallel_nsa")),
                *(Size(h, HEADS // h, (*SDPA, "fla parallel_nsa")) for h in (8, 32)),
                *(Size(h, g) for h, g in ((8, 3), (4, 5), (4, 6), (4, 7), (4, 8))),
            ),
            (64 * K,),
            targets={
                ("", 64 * K, 2): Target((7.0, 15), (6, 13)),
                ("", 64 * K, 8): Target((10, 25), (8, 20)),
                ("", 64 * K, 32): Target((24, 55), (16, 40)),
            },
        ),
        Work(
            "selection",
            "statistics, scores of order 2 and the top 13 alone",
            {"": sparse_spec},
            "selection",
            (Size(2, 16), Size(8, 4)),
            (64 * K,),
            passes=("forward",),
            targets={("", 64 * K, 2): Target((6,), (4,)), ("", 64 * K, 8): Target((9,), (6,))},
        ),
        Work(
            "selection_rank",
            "statistics, scores with a covariance of rank 2, 4 or 8 and the top 13 alone",
            {"rank 2": rank_2_spec, "rank 4": rank_4_spec, "rank 8": rank_8_spec},
            "selection",
            (Size(2, 16), Size(8, 4)),
            (64 * K,),
            passes=("forward",),
        ),
        Work(
            "whole",
            "SPLA, selection included: hedgehog residual, both branches normalised, 16 blocks per token",
            {"": whole_spec},
            "op",
            (Size(2, 16, DENSE), Size(8, 4, SDPA)),
            (8 * K, 16 * K, 32 * K, 64 * K, 128 * K),
            targets={
                ("", 64 * K, 2): Target((20, 48), (14, 30)),
                ("", 64 * K, 8): Target((28, 65), (18, 40)),
                ("", 128 * K, 2): Target((42, 100), (29, 62)),
            },
            slow=("dense flash", "FlexAttention"),
        ),
        Work(
            "dense_below",
            "sequences shorter than dense_below: SPLA, both branches normalised, and block-sparse softmax alone",
            {"whole": short_spec, "sparse": short_sparse_spec},
            "op",
            tuple(Size(h, HEADS // h, ("dense cuDNN", "dense cuDNN, grouped")) for h in (2, 8)),
            (1 * K, 2 * K, 4 * K, 8 * K),
        ),
        Work(
            "whole_softmax",
            "the same with a feature map of the width of a head",
            {"": whole_softmax_spec},
            "op",
            (Size(2, 16),),
            (64 * K,),
            targets={("", 64 * K, 2): Target((17, 40), (12, 26))},
        ),
        Work(
            "infllm",
            "InfLLM-v2's preset, selection included: 1 sink, 33 local, 62 free blocks, no residual",
            {"": infllm_spec},
            "op",
            (Size(2, 16, ("dense cuDNN",)),),
            (128 * K,),
            passes=("forward",),
            targets={("", 128 * K, 2): Target((100,), (70,))},
        ),
        Work(
            "tile",
            "tiles of 64 queries share 16 blocks, given; not causal, as many KV heads as query heads",
            {"sparse": tile_spec, "residual": tile_residual_spec, "residual, softmax": tile_softmax_spec},
            "given",
            (Size(32, 1, (*DENSE, "FlexAttention, the chosen blocks")),),
            (32 * K,),
            targets={
                ("sparse", 32 * K, 32): Target((1.55, 4.5), (1.3, 4)),
                ("residual", 32 * K, 32): Target((3.5, 11), (2.6, 8)),
                ("residual, softmax", 32 * K, 32): Target((3.5, 11), (2.6, 8)),
            },
        ),
        Work(
            "linear",
            "causal linear attention alone: one state, no decay",
            {"": linear_spec},
            "op",
            (Size(32, 1, ("fla chunk_linear_attn", "fla chunk_simple_gla")),),
            (32 * K,),
            targets={("", 32 * K, 32): Target((0.75, 2.6), (0.6, 2.2))},
        ),
    )
}
