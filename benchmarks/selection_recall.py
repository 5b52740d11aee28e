"""How much attention the blocks hold that a metric chooses, for q and k of a model.

    python -m benchmarks.selection_recall --qk FILE.pt ... [--length 32768] [--device cuda]
    python -m benchmarks.selection_recall --byte-lm 200       # q and k of the byte model, trained that many steps

FILE is torch.save({"q": q [1, L, Hq, D], "k": k [1, L, Hkv, D]}) of one layer, as attention meets them; those of
several layers have the same sizes.  For some queries the attention that each block holds is formed exactly, summed over
the heads of a group.  The best `budget` far blocks by that, and those by each metric, are compared: `of_best` is the
one over the other, `covered` all attention that the query then sees, forced blocks included, and `union` how many
blocks 16 neighbouring queries choose together, over how many one chooses.  Metrics of the library are evaluated by
their definition; the full covariance, which the library does not have, by the variance of the scores of a block's keys,
which is the same number.
Writes benchmarks/results/selection_recall.json and draws docs/selection_recall.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import ROOT, write
from splagen.block_attention import BlockAttention, block_mass
from splagen.figure import pyplot, saved
from splagen.library import Metric, cumulant, taylor
from splagen.qk_file import read_qk
from splagen.spec import Select, SPLASpec

CLAMP = 8.0  # of cumulants
METRICS: dict[str, Metric | str] = {
    "order 1": taylor(order=1),
    "diagonal": taylor(covariance="diag"),
    "rank 2": taylor(covariance="rank2"),
    "rank 4": taylor(covariance="rank4"),
    "rank 8": taylor(covariance="rank8"),
    "full": "taylor",
    "diagonal cumulant": cumulant(covariance="diag", clamp=CLAMP),
    "rank 2 cumulant": cumulant(covariance="rank2", clamp=CLAMP),
    "rank 8 cumulant": cumulant(covariance="rank8", clamp=CLAMP),
    "full cumulant": "cumulant",
}
BLOCKS, BUDGETS = (32, 64, 128), (4, 8, 16, 32)
STRETCH = 16  # neighbouring queries that are evaluated together
SINKS, LOCAL = 1, 1


@dataclass(frozen=True)
class Masses:
    """Of some queries [T]: what a group's heads hold in each block [Hkv, T, J], and which blocks are far [T, J]."""

    held: Tensor
    far: Tensor
    scores: Mapping[str, Tensor]  # by metric, [Hkv, T, J]


def masses(q: Tensor, k: Tensor, block: int, starts: Sequence[int], metrics: Mapping[str, Metric | str]) -> Masses:
    """What blocks hold and what metrics say of it, for STRETCH queries from each start.

    q [1, L, Hq, D] and k [1, L, Hkv, D]; numbers are float64.
    """
    exact = _attention(q, k, block, Metric())
    stretches = [(start, min(start + STRETCH, q.shape[1])) for start in starts]
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for name, metric in metrics.items():
        if isinstance(metric, Metric):
            attention = _attention(q, k, block, metric)
            found[name] = [attention.score(*stretch) for stretch in stretches]
    held, far = [], []
    for stretch in stretches:
        scores = exact.scores(*stretch)
        held.append(block_mass(scores))
        far.append(exact.far(*stretch))
        ends = block * (1 + torch.arange(scores.shape[-2], device=q.device)) - 1
        usable = ends <= torch.arange(*stretch, device=q.device)[:, None]
        for name, form in metrics.items():
            if isinstance(form, str):
                found[name].append(_by_full_covariance(scores, usable, form))
    return Masses(torch.cat(held, 1), torch.cat(far), {name: torch.cat(x, 1) for name, x in found.items()})


def _attention(q: Tensor, k: Tensor, block: int, metric: Metric) -> BlockAttention:
    select = Select(block, budget=1, sinks=SINKS, local=LOCAL, metric=metric)
    return BlockAttention(SPLASpec(q.shape[3], group_size=q.shape[2] // k.shape[2], select=select, linear=None), q, k)


def _by_full_covariance(scores: Tensor, usable: Tensor, form: str) -> Tensor:
    """The metric's mass of each block: the mean and variance of q·k over its keys are q·mean and q^T Cov q."""
    inside = scores.masked_fill(~usable[..., None], 0)
    mean, kappa = inside.mean(-1), inside.var(-1, correction=0)
    excess = torch.log1p(kappa / 2) if form == "taylor" else kappa.clamp(max=CLAMP) / 2
    share = torch.softmax((mean + excess).masked_fill(~usable, -torch.inf), -1)
    return share.nan_to_num(0).sum(1)  # a query before the end of the first block uses none


def recall(m: Masses, budget: int) -> dict[str, dict[str, float]]:
    """By metric `of_best`, `covered` and `union`, averaged over the queries with more far blocks than the budget.

    `union`: how many blocks STRETCH neighbours choose together, over how many one chooses.
    """
    rows = m.far.sum(1) > budget
    alike = rows.view(-1, STRETCH).all(1)
    held, far = m.held[:, rows], m.far[rows]
    total = held.sum(-1)  # heads of a group
    forced = held.masked_fill(far, 0).sum(-1)

    def chosen(by: Tensor) -> Tensor:
        return by.masked_fill(~m.far, -1).topk(budget, -1).indices

    best = held.gather(-1, chosen(m.held)[:, rows]).sum(-1)
    found = {}
    for name, score in {"best": m.held, **m.scores}.items():
        blocks = chosen(score)
        got = held.gather(-1, blocks[:, rows]).sum(-1)
        of_best, covered = (got / best).mean(), ((got + forced) / total).mean()
        found[name] = {"of_best": float(of_best), "covered": float(covered)}
        if alike.any():
            taken = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, blocks, True)
            together = taken.unflatten(1, (-1, STRETCH))[:, alike].any(2).sum(-1)
            found[name]["union"] = float((together / budget).mean())
    return found


def measure(
    q: Tensor, k: Tensor, *, blocks: Sequence[int] = BLOCKS, budgets: Sequence[int] = BUDGETS, stretches: int = 32
) -> list[dict[str, Any]]:
    """A row for each block size, budget and metric; queries come from the second half of the sequence.

    Raises:
        ValueError: nothing is left to choose, because the sequence is short.
    """
    length = q.shape[1]
    starts = [int(x) for x in torch.linspace(length // 2, length - STRETCH, stretches)]
    rows = []
    for block in blocks:
        found = masses(q, k, block, starts, METRICS)
        for budget in budgets:
            if int((found.far.sum(1) > budget).sum()) == 0:
                continue
            for name, figures in recall(found, budget).items():
                rows.append({"block": block, "budget": budget, "metric": name, **figures})
    if not rows:
        what = f"a query of {length} positions has no more far blocks than {min(budgets)}"
        raise ValueError(f"{what}: give a longer sequence, or smaller blocks")
    return rows


def draw(rows: Sequence[Mapping[str, Any]], title: str, target: Path) -> Path:
    """`of_best` against the budget: panels for each source and block size, a line for each metric."""
    plt = pyplot()
    sources, blocks = list(dict.fromkeys(r["source"] for r in rows)), sorted({r["block"] for r in rows})
    size = 4.2 * len(blocks), 3.6 * len(sources) + 0.4
    figure, panels = plt.subplots(len(sources), len(blocks), figsize=size, sharey="row", squeeze=False)
    for line_of_panels, source in zip(panels, sources, strict=True):
        for panel, block in zip(line_of_panels, blocks, strict=True):
            for i, name in enumerate(METRICS):
                found = [r for r in rows if (r["source"], r["block"], r["metric"]) == (source, block, name)]
                style = "--" if "cumulant" in name else "-"
                points = zip(*((r["budget"], r["of_best"]) for r in found), strict=True)
                panel.plot(*points, style, color=f"C{i}", marker="o", markersize=3, label=name)
            panel.set_xscale("log", base=2)
            panel.set_xlabel("blocks chosen")
            panel.set_title(f"{source}, blocks of {block}", fontsize=9)
            panel.grid(alpha=0.3)
        line_of_panels[0].set_ylabel("attention held, over that of the best choice")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return saved(figure, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--qk", type=Path, nargs="+", metavar="FILE.pt")
    source.add_argument("--byte-lm", type=int, metavar="STEPS")
    parser.add_argument("--length", type=int, help="keep the first positions only")
    parser.add_argument("--stretches", type=int, default=32, help=f"of {STRETCH} queries each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if given.qk:
        layers = {path.stem: read_qk(path) for path in given.qk}
    else:
        from examples.real_qkv import real_qkv

        length = given.length or 2048
        q, k, _ = real_qkv(length, head_dim=64, steps=given.byte_lm, context=length)
        layers = {f"byte model of two layers, {given.byte_lm} training steps": (q, k)}
    if len({(q.shape, k.shape) for q, k in layers.values()}) > 1:
        parser.error("files of different sizes: give each a run, and --results and --docs, of its own")
    rows = []
    for name, pair in layers.items():
        q, k = (x[:, : given.length].to(given.device) for x in pair)
        rows += [{"source": name, **row} for row in measure(q, k, stretches=given.stretches)]
    sizes = {"length": q.shape[1], "q_heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3]}
    queries = STRETCH * given.stretches
    print(write("selection_recall", {**sizes, "queries": queries, "rows": rows}, given.results))
    title = f"L = {q.shape[1]}, Hq = {q.shape[2]}, Hkv = {k.shape[2]}, D = {q.shape[3]}, {queries} queries"
    print(draw(rows, title, given.docs / "selection_recall.png"))


if __name__ == "__main__":
    main()
