"""Draw docs/time_by_length.png and docs/roofline.png from the records of benchmarks.run: python -m benchmarks.plots.

`time_by_length`: milliseconds against L for every system of the work `whole`.  `roofline`: what every kernel of its row
at 64k does per second against its operations per byte, each tensor counted once, below what an H200 gives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings import OURS, plain
from benchmarks.floors import PEAK_BYTES, PEAK_FLOPS
from benchmarks.record import ROOT
from benchmarks.works import PASSES
from splagen.figure import pyplot, saved

RECORD = "whole"
ROOFLINE_LENGTH = 64 * 1024


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the record that are timings of the default choice.

    Raises:
        FileNotFoundError: there is no record.
    """
    path = folder / f"{RECORD}.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run python -m benchmarks.run {RECORD} first")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["figures"]["rows"]
    return plain(rows)


def lines_of(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[tuple[int, float]]]:
    """(length, ms) of one pass by the label of a system; where a system's time does not depend on KV heads, once."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda r: (r["system"] != OURS, r["kv_heads"], r["length"])):
        ours = row["system"] == OURS
        label = f"{OURS}, Hkv = {row['kv_heads']}" if ours else str(row["system"])
        line = found.setdefault(label, [])
        if f"{name}_ms" in row and row["length"] not in [length for length, _ in line]:
            line.append((row["length"], row[f"{name}_ms"]))
        if ours and f"{name}_ms" in row and "floor_ms" in row:
            floor = found.setdefault("floor", [])
            if row["length"] not in [length for length, _ in floor]:
                floor.append((row["length"], row["floor_ms"][name]))
    return {label: line for label, line in found.items() if line}


def time_by_length(rows: Sequence[dict[str, Any]], target: Path) -> Path:
    """Milliseconds against length, both logarithmic; a panel for either pass."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    colours: dict[str, str] = {}
    for panel, name in zip(panels, PASSES, strict=True):
        for label, line in lines_of(rows, name).items():
            colour = colours.setdefault(label, "grey" if label == "floor" else f"C{len(colours)}")
            lengths, times = zip(*line, strict=True)
            panel.plot(lengths, times, "--" if label == "floor" else "o-", color=colour, label=label, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("length, tokens")
        panel.set_title(name)
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    panels[0].set_ylabel("ms")
    return saved(figure, target)


def points_of(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(operations per byte, TFLOP/s) of every kernel that multiplies."""
    found = {}
    for name, ms in row["kernels_ms"].items():
        flops, moved = row["kernels_flops"][name], row["kernels_bytes"][name]
        if flops and moved and ms:
            found[name] = flops / moved, flops / ms / 1e9
    return found


def roofline(rows: Sequence[dict[str, Any]], target: Path) -> Path:
    """TFLOP/s against operations per byte, both logarithmic, under the roofs; a panel for every number of KV heads."""
    plt = pyplot()
    kept = [r for r in rows if r["system"] == OURS and "kernels_flops" in r]
    lengths = {r["length"] for r in kept}
    at = ROOFLINE_LENGTH if ROOFLINE_LENGTH in lengths else max(lengths)
    kept = sorted((r for r in kept if r["length"] == at), key=lambda r: r["kv_heads"])
    figure, panels = plt.subplots(1, len(kept), figsize=(7 * len(kept), 6), layout="constrained", squeeze=False)
    for panel, row in zip(panels[0], kept, strict=True):
        points = points_of(row)
        ridge = PEAK_FLOPS / PEAK_BYTES
        reach = [min(1.0, *(x for x, _ in points.values())) / 2, max(4 * ridge, *(x for x, _ in points.values())) * 2]
        panel.plot([reach[0], ridge, reach[1]], [reach[0] * PEAK_BYTES / 1e12, *[PEAK_FLOPS / 1e12] * 2], color="grey")
        for i, (name, (x, y)) in enumerate(sorted(points.items())):
            share = row["kernels_ms"][name] / sum(row["kernels_ms"].values())
            panel.scatter(x, y, s=20 + 600 * share, color=f"C{i % 10}", alpha=0.7)
            panel.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("operations per byte, each tensor once")
        panel.set_ylabel("TFLOP/s")
        panel.set_title(f"L = {row['length']}, Hkv = {row['kv_heads']}; area: share of the time")
        panel.grid(alpha=0.3)
    return saved(figure, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the record and write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    rows = read_rows(given.results)
    print(time_by_length(rows, given.out / "time_by_length.png"))
    print(roofline(rows, given.out / "roofline.png"))


if __name__ == "__main__":
    main()
