"""Tables and pictures of the records of a study: mean and spread over seeds.

    python -m examples.fidelity.report                  # of examples/results/fidelity
    python -m examples.fidelity.report --records DIR --preset tiny

Models of one seed saw the same windows, so differences from the dense one are taken seed by seed.  Times of training
steps are those of `examples.fidelity.speed`, where it was run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from benchmarks.record import ROOT
from examples.fidelity import speed, variants
from examples.fidelity.presets import PRESETS
from examples.fidelity.run import RESULTS
from splagen.figure import pyplot, saved

Figures = dict[str, Any]
Study = dict[str, dict[int, Figures]]
"""Figures by label, then seed."""

ARROW = "dense → "
PARTS = {
    "residual, at order 1": ("spla1", "sparse1"),
    "residual, at order 2": ("spla2", "sparse2"),
    "order 2": ("sparse2", "sparse1"),
    "order 2, beside a residual": ("spla2", "spla1"),
    "rank 2": ("sparse2r2", "sparse2"),
    "rank 4": ("sparse2r4", "sparse2"),
    "cumulant, at rank 2": ("sparse2c2", "sparse2r2"),
    "rank 4, beside a residual": ("spla2r4", "spla2"),
}
"""What two variants differ in: the one that has it, and the one that does not."""


def load(folder: Path, preset: str) -> Study:
    """The records of a preset, labels in the order of `variants.ABOUT`, conversions last.

    Raises:
        FileNotFoundError: there are none.
        ValueError: records that cannot be compared: other text, sizes, training, sources or GPU.
    """
    found: Study = {}
    first: dict[bool, tuple[str, Path]] = {}
    for path in sorted(folder.glob(f"{preset}-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        figures: Figures = record["figures"]
        job = figures["job"]
        parts = [figures[n] for n in ("shape", "training", "text", "sources")]
        same = json.dumps([*parts, record["source_digest"], record["environment"]["gpu"]])
        other = first.setdefault(job["converted"], (same, path))
        if other[0] != same:
            what = f"{path} and {other[1]} differ in text, sizes, training, sources or GPU"
            raise ValueError(f"{what}: report them from folders of their own")
        found.setdefault((ARROW if job["converted"] else "") + job["variant"], {})[job["seed"]] = figures
    if not found:
        raise FileNotFoundError(f"no {preset}-*.json in {folder}: run examples.fidelity.run first")
    order = [prefix + name for prefix in ("", ARROW) for name in variants.ABOUT]
    return {label: found[label] for label in order if label in found}


def last(figures: Figures) -> float:
    """Validation loss after the last step, nats per byte."""
    return float(figures["validation"][-1][1])


def recall_at(length: int, name: str = "recall") -> Callable[[Figures], float]:
    """Share of questions answered, or "recall_loss", in windows of a length, the mean over depths."""
    return lambda f: statistics.fmean(f[name][f["recall_lengths"].index(length)])


def far(figures: Figures) -> tuple[float, float]:
    """Loss in the last quarter of a context, and beyond it, where no model was trained."""
    losses = figures["position"]
    context = len(losses) * figures["shape"]["context"] // figures["position_length"]
    return statistics.fmean(losses[3 * context // 4 : context]), statistics.fmean(losses[context:])


def over_seeds(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation of a sample; with one value that alone, with none nothing."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def paired(
    some: Mapping[int, Figures], others: Mapping[int, Figures], value: Callable[[Figures], float] = last
) -> list[float]:
    """Differences of a value, for each seed that both have."""
    return [value(some[s]) - value(others[s]) for s in sorted(some.keys() & others.keys())]


def closed(study: Study, label: str) -> tuple[list[float], list[float], list[float]]:
    """Gap to the dense model before and after a conversion's training, and the share that closed, for each seed.

    The dense model is trained on by as many steps.  A gap within a thousandth of a nat has no share.
    """

    def start(figures: Figures) -> float:
        return float(figures["validation"][0][1])

    dense = study.get(f"{ARROW}dense", {})
    before, after = paired(study[label], dense, start), paired(study[label], dense)
    return before, after, [1 - b / a for a, b in zip(before, after, strict=True) if abs(a) > 1e-3]


def filled(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Cells by heading, alike in every row, without the columns in which no cell has text."""
    headings = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(*headings, box=rich.box.MARKDOWN, title=title)
    for row in rows:
        table.add_row(*(row[name] for name in headings))
    return table


def quality(study: Study) -> Table:
    """Losses, size, and what else the trainings tell, of every model."""
    rows = []
    for label, runs in study.items():
        each = list(runs.values())
        late, beyond = zip(*(far(f) for f in each), strict=True)
        dense = study.get(f"{ARROW}dense" if label.startswith(ARROW) else "dense", {})

        def known(name: str, each: list[Figures] = each) -> list[float]:
            return [f[name] for f in each if f[name] is not None]

        rows.append({
            "attention": label,
            "seeds": str(len(each)),
            "parameters": f"{each[0]['parameters']:,}",
            "loss": over_seeds([last(f) for f in each]),
            "against dense": "" if label in ("dense", f"{ARROW}dense") else over_seeds(paired(runs, dense)),
            "without residual": over_seeds(known("without_residual")),
            "last quarter": over_seeds(late),
            "beyond": over_seeds(beyond),
            "step, ms": over_seeds(known("step_ms"), 1),
            "tokens/s": over_seeds(known("tokens_per_s"), 0),
            "peak, GiB": over_seeds(known("peak_gib"), 1),
        })  # fmt: skip
    return filled("Validation loss, nats per byte", rows)


def steps(speeds: Figures) -> Table:
    """Times of training steps by variant, and over the dense one's, of the figures of `examples.fidelity.speed`."""
    found: dict[str, Figures] = speeds["variants"]
    rows = []
    for name in (n for n in variants.ABOUT if n in found):
        own = found[name]
        rows.append({
            "attention": name,
            "step, ms": f"{own['step_ms']:.1f}",
            "over dense": f"{own['step_ms'] / found['dense']['step_ms']:.2f}",
            "GPU busy, ms": "" if own["gpu_ms"] is None else f"{own['gpu_ms']:.1f}",
            "tokens/s": f"{own['tokens_per_s']:,.0f}",
            "peak, GiB": "" if own["peak_gib"] is None else f"{own['peak_gib']:.1f}",
        })  # fmt: skip
    return filled("Training steps, with nothing else on the device", rows)


def retrieval(study: Study, name: str = "recall") -> Table:
    """Recall of every model, or "recall_loss", by length of the window."""
    what = {"recall": "Share of values recalled", "recall_loss": "Loss of what is asked for, nats"}
    lengths = next(iter(next(iter(study.values())).values()))["recall_lengths"]
    table = Table("attention", *(f"{n:,}" for n in lengths), box=rich.box.MARKDOWN,
                  title=f"{what[name]}, by length of the window in bytes")  # fmt: skip
    for label, runs in study.items():
        table.add_row(label, *(over_seeds([recall_at(n, name)(f) for f in runs.values()], 3) for n in lengths))
    return table


def conversions(study: Study) -> Table:
    """How much of the gap to the dense model closes."""
    table = Table("conversion", "gap before", "gap after", "share closed", box=rich.box.MARKDOWN,
                  title="Loss above the dense model's, trained on as long")  # fmt: skip
    for label in study:
        if label.startswith(ARROW) and label != f"{ARROW}dense":
            before, after, share = closed(study, label)
            table.add_row(label, over_seeds(before), over_seeds(after), over_seeds(share, 2))
    return table


def contributions(study: Study) -> Table:
    """What each part of the mechanism adds, seed by seed."""
    lengths = next(iter(next(iter(study.values())).values()))["recall_lengths"]
    table = Table("part", "seeds", "loss", *(f"recalled at {n:,}" for n in lengths), box=rich.box.MARKDOWN,
                  title="What a part adds: differences at equal seeds")  # fmt: skip
    for part, (some, other) in PARTS.items():
        if some in study and other in study:
            loss = paired(study[some], study[other])
            recalled = [paired(study[some], study[other], recall_at(n)) for n in lengths]
            table.add_row(part, str(len(loss)), over_seeds(loss), *(over_seeds(x, 3) for x in recalled))
    return table


def tables(study: Study, speeds: Figures | None = None) -> list[Table]:
    """All tables of a study, and that of `steps` where there are figures of it."""
    found = [quality(study), retrieval(study), retrieval(study, "recall_loss")]
    found += [contributions(study)] if any({*pair} <= study.keys() for pair in PARTS.values()) else []
    found += [conversions(study)] if any(label.startswith(ARROW) for label in study) else []
    return [*found, steps(speeds)] if speeds else found


def markdown(study: Study, speeds: Figures | None = None) -> str:
    """The tables as text for a page."""
    parts = []
    for made in tables(study, speeds):
        title, made.title = made.title, None
        written = StringIO()
        Console(file=written, width=1000).print(made)
        lines = [line.strip() for line in written.getvalue().splitlines() if line.strip()]
        parts.append(f"{title}:\n\n" + "\n".join(re.sub(" +", " ", line) for line in lines))
    return "\n\n".join(parts)


def mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column by column."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def plots(study: Study, folder: Path) -> list[Path]:
    """Draw loss curves, loss by position and recall by depth, means over seeds; the paths of the PNG files."""
    plt = pyplot()
    paths: list[Path] = []
    colours = plt.get_cmap("tab20")

    def finish(figure: Any, name: str) -> None:
        paths.append(saved(figure, folder / f"fidelity_{name}.png"))

    shown = list(enumerate(study.items()))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", squeeze=False)
    for i, (label, runs) in shown:
        axis = axes[0, int(label.startswith(ARROW))]
        steps = [s for s, _ in next(iter(runs.values()))["validation"]]
        axis.plot(
            steps, mean([[x for _, x in f["validation"]] for f in runs.values()]), color=colours(i % 20), label=label
        )
    for axis, title in zip(axes[0], ("from scratch", "converted"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="validation loss, nats per byte")
    # the first steps only unlearn the start: they would flatten the rest
    tops = [f["validation"][len(f["validation"]) // 4][1] for runs in study.values() for f in runs.values()]
    axes[0, 0].set_ylim(top=max(tops) * 1.02)
    for axis in axes[0]:
        if axis.lines:
            axis.legend(fontsize=7)
    finish(figure, "curves")

    figure, one = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (label, runs) in shown:
        figures = next(iter(runs.values()))
        places = [
            (b + 0.5) * figures["position_length"] / len(figures["position"]) for b in range(len(figures["position"]))
        ]
        one.plot(places, mean([f["position"] for f in runs.values()]), color=colours(i % 20), label=label)
    one.axvline(figures["shape"]["context"], color="grey", linewidth=0.8, linestyle=":")
    one.set(
        xlabel="position, bytes (dotted: end of training windows)",
        ylabel="validation loss, nats per byte",
        xscale="log",
    )
    one.legend(fontsize=7)
    finish(figure, "position")

    lengths = figures["recall_lengths"]
    figure, many = plt.subplots(1, len(lengths), figsize=(3.6 * len(lengths), 4), layout="constrained", sharey=True)
    for j, (axis, length) in enumerate(zip(many, lengths, strict=True)):
        for i, (label, runs) in shown:
            depths = mean([f["recall"][j] for f in runs.values()])
            axis.plot(figures["recall_depths"], depths, ".-", color=colours(i % 20), label=label)
        axis.set(title=f"{length:,} bytes", xlabel="depth: 0 start, 1 end", ylim=(-0.03, 1.03))
    many[0].set_ylabel("share of values recalled")
    many[0].legend(fontsize=6)
    finish(figure, "recall")
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.fidelity.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of pictures")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h200")
    parser.add_argument("--no-plots", action="store_true")
    given = parser.parse_args(arguments)
    study = load(given.records, given.preset)
    timed = speed.record_path(given.records, given.preset)
    speeds = json.loads(timed.read_text(encoding="utf-8"))["figures"] if timed.exists() else None
    console = Console(width=200)
    for made in tables(study, speeds):
        console.print(made)
    if not given.no_plots:
        for path in plots(study, given.docs):
            print(path)


if __name__ == "__main__":
    main()
