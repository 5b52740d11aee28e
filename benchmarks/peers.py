"""What others compute of the same sizes: dense attention, FlexAttention with block masks, flash-linear-attention.

A peer takes a `Task` and gives its forward and, if it has one, its backward, both ready to be called again.  What it
cannot do or needs and does not find it raises; the text then stands in the record.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from benchmarks.given import Selection, attended
from benchmarks.timing import peak_bytes, repeats_for, time_ms
from benchmarks.triton_autotuner import compile_side_by_side, tune_briefly
from splagen.spec import SPLASpec
from splagen.verification import Shape

FLEX_BLOCK = 128  # its own default


@dataclass(frozen=True)
class Task:
    """The sizes that a peer runs at, [B, Hq, L] and KV heads, and the chosen blocks where they are given."""

    shape: Shape
    kv_heads: int
    dim: int
    causal: bool = True
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    spec: SPLASpec | None = None
    selection: Selection | None = None

    def random(self, *sizes: int) -> Tensor:
        """Normal numbers that take part in the gradient."""
        return torch.randn(sizes, device=self.device, dtype=self.dtype).requires_grad_()

    def rows(self, *, heads_first: bool, repeated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: [B, H, L, D] or [B, L, H, D]; `repeated`: as many KV heads as query heads."""
        batch, heads, length = self.shape
        found = []
        for h in (heads, *[heads if repeated else self.kv_heads] * 2):
            found.append(self.random(*((batch, h, length) if heads_first else (batch, length, h)), self.dim))
        return found[0], found[1], found[2]


@dataclass(frozen=True)
class Runs:
    """Forward, and backward from an output that is kept; what is said of them stands in the row."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    note: str = ""

    def backward(self) -> Callable[[], object]:
        """The gradient of one forward, to be called again and again."""
        o = self.forward()
        do = torch.randn_like(o)
        return lambda: torch.autograd.grad(o, self.leaves, do, retain_graph=True)

    def both(self) -> object:
        """Forward, then its gradient: what a training step holds."""
        return self.backward()()


def measure(runs: Runs, passes: Sequence[str]) -> dict[str, Any]:
    """Milliseconds, spreads and peak memory; what a backward pass fails with stands beside the forward's figures.

    Forward keeps what backward needs, as in training.
    """
    seen = time_ms(runs.forward, repeats_for(runs.forward), 1, asleep=True)
    row: dict[str, Any] = {"forward_ms": seen.median, "forward_spread_ms": seen.spread}
    row |= {"note": runs.note} if runs.note else {}
    if "backward" in passes:
        try:
            run = runs.backward()
            seen = time_ms(run, repeats_for(run), 1, asleep=True)
            row |= {"backward_ms": seen.median, "backward_spread_ms": seen.spread}
            del run
            row["peak_gib_beyond_inputs"] = peak_bytes(runs.both) / 2**30
        except Exception as error:
            row["backward_reason"] = text_of(error)
    return row


def text_of(error: BaseException) -> str:
    """Type and the first line of the message, short."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


# -- dense ---------------------------------------------------------------------------------------------------------


def dense(backend: SDPBackend, *, grouped: bool = False) -> Callable[[Task], Runs]:
    """Dense attention by one of torch's backends; KV heads are repeated beforehand, as not all take groups.

    `grouped`: they are not, and serve the query heads of their group.
    """

    def prepare(task: Task) -> Runs:
        q, k, v = task.rows(heads_first=True, repeated=not grouped)

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=task.causal, enable_gqa=grouped)

        return Runs(forward, (q, k, v))

    return prepare


def flex(task: Task) -> Runs:
    """Dense attention, causal by a block mask, compiled."""
    mask = causal_mask(task.shape[2], task.device) if task.causal else None
    return _flex(task, mask)


def flex_chosen(task: Task) -> Runs:
    """The chosen blocks of tiles as a block mask, compiled: the same work where a tile has the size of a block."""
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
    return _flex(task, chosen_mask(task), tiles)  # its own choice is larger than the blocks


def _flex(task: Task, mask: BlockMask | None, tiles: dict[str, int] | None = None) -> Runs:
    q, k, v = task.rows(heads_first=True)
    torch.compiler.reset()  # after eight shapes it would run uncompiled, in memory for length² scores
    run = torch.compile(flex_attention, dynamic=False) if task.device == "cuda" else flex_attention
    grouped = task.shape[1] != task.kv_heads
    return Runs(lambda: run(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=tiles), (q, k, v))


def causal_mask(length: int, device: str) -> BlockMask:
    """Written down block by block: what torch makes of a function takes length² bytes first."""
    count = -(-length // FLEX_BLOCK)
    row = torch.arange(count, dtype=torch.int32, device=device)
    one = torch.ones(1, 1, count, dtype=torch.int32, device=device)
    diagonal = torch.zeros(1, 1, count, count, dtype=torch.int32, device=device)
    diagonal[..., 0] = row
    return BlockMask.from_kv_blocks(
        one,
        diagonal,
        row.expand(1, 1, -1).contiguous(),
        row.expand(1, 1, count, -1).contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, m, n: m >= n,
        seq_lengths=(length, length),
    )


def chosen_mask(task: Task) -> BlockMask:
    """The blocks that tiles attend to, all of them whole."""
    spec, given = task.spec, task.selection
    assert spec is not None
    assert spec.select is not None
    assert given is not None
    size, length = spec.select.block_size, task.shape[2]
    if spec.causal or spec.select.tile != size or length % size or task.shape[1] != task.kv_heads:
        raise ValueError("a block mask takes whole blocks, one row of them for each tile and query head")
    whole, count = attended(spec, length, given), length // size
    indices = torch.nn.functional.pad(whole.indices.clamp(min=0), (0, count - whole.indices.shape[-1]))
    none = torch.zeros_like(whole.counts)
    return BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(indices),
        whole.counts,
        indices.contiguous(),
        BLOCK_SIZE=size,
        seq_lengths=(length, length),
    )


# -- flash-linear-attention ----------------------------------------------------------------------------------------


def fla_nsa(task: Task) -> Runs:
    """Native sparse attention with all attended blocks given; it pools k and v in every call all the same."""
    parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    assert task.spec is not None
    assert task.spec.select is not None
    assert task.selection is not None
    every = attended(task.spec, task.shape[2], task.selection)
    indices = every.indices.transpose(1, 2).long().contiguous()
    size = task.spec.select.block_size
    q, k, v = task.rows(heads_first=False)
    _prepare_tuning()
    return Runs(
        lambda: parallel_nsa(q, k, v, block_indices=indices, block_counts=indices.shape[-1], block_size=size),
        (q, k, v),
    )


def fla_linear(task: Task) -> Runs:
    """Linear attention in chunks, without a normaliser."""
    chunk = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    q, k, v = task.rows(heads_first=False)
    _prepare_tuning()
    return Runs(lambda: chunk(q, k, v, normalize=False)[0], (q, k, v))


def fla_gated(task: Task) -> Runs:
    """The same with a decay per head and token: it may refuse its backward pass (see `unchecked`)."""
    chunk = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v = task.rows(heads_first=False)
    batch, heads, length = task.shape
    g = logsigmoid(torch.randn(batch, length, heads, device=task.device)).div_(16).requires_grad_()
    _prepare_tuning()
    return Runs(lambda: chunk(q, k, v, g)[0], (q, k, v, g), "with a decay per head and token")


@contextmanager
def unchecked() -> Iterator[None]:
    """Lift `fla`'s refusal to run a gated gradient, which Triton before 3.7.1 miscompiles on Hopper."""
    checked = importlib.import_module("fla.ops.common.chunk_o")
    kept = getattr(checked, "TRITON_ABOVE_3_7_1", None)
    checked.TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        checked.TRITON_ABOVE_3_7_1 = kept  # type: ignore[attr-defined]


def _prepare_tuning() -> None:
    tune_briefly()
    compile_side_by_side()


PEERS: dict[str, Callable[[Task], Runs]] = {
    "dense cuDNN": dense(SDPBackend.CUDNN_ATTENTION),
    "dense cuDNN, grouped": dense(SDPBackend.CUDNN_ATTENTION, grouped=True),
    "dense flash": dense(SDPBackend.FLASH_ATTENTION),
    "FlexAttention": flex,
    "FlexAttention, the chosen blocks": flex_chosen,
    "fla parallel_nsa": fla_nsa,
    "fla chunk_linear_attn": fla_linear,
    "fla chunk_simple_gla": fla_gated,
}
SAME_FOR_ALL_KV_HEADS = ("dense cuDNN", "dense flash")
