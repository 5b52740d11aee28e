"""Write the tables of README.md, docs/results.md and docs/what_binds.md from the records of measurements.

Between `<!-- results:begin NAME: COLUMN ... -->` and `<!-- results:end -->` stand the rows of
benchmarks/results/NAME.json, or its figures where it has no rows; without columns all of them.  NAME/LIST has those of
another list in it.  A number in a dict of a row is the column errors.o or forward.ms, and errors.max is the largest.
A missing record is named there.  NAME byte_lm stands for the models in examples/results/, NAME fidelity for the study
in examples/results/fidelity/, fidelity_metrics for that of metrics alone, NAME selection_recall for its record, NAME
pictures for what benchmarks.plots draws.  From the repository root:

    python -m benchmarks.readme_tables            # rewrites them
    python -m benchmarks.readme_tables --check    # exit status 1 if that would change it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/what_binds.md")
SECTION = re.compile(r"(<!-- results:begin (\w+(?:/\w+)?)(?:: ([\w. ]+?))? -->\n).*?(<!-- results:end -->)", re.DOTALL)
UNITS = ("ms", "us", "s", "gib", "mib", "kib", "tflops")
SPELLED = {"us": "µs", "gib": "GiB", "mib": "MiB", "kib": "KiB", "tflops": "TFLOP/s"}
PICTURES = {
    "docs/time_by_length.png": "Time against length",
    "docs/roofline.png": "Kernels under the roofs of an H200",
}  # benchmarks/plots.py
KINDS = ("dense", "sparse", "spla", "spla_residual")  # examples/byte_lm.py


def updated(text: str, root: Path = ROOT) -> str:
    """Return a page's text with every section rendered from the records under `root`."""

    def filled(found: re.Match[str]) -> str:
        begin, name, columns, end = found.groups()
        return f"{begin}{section(name, (columns or '').split(), root)}\n{end}"

    return SECTION.sub(filled, text)


def section(name: str, columns: Sequence[str], root: Path) -> str:
    """Return the markdown of one section."""
    if own := {f.__name__: f for f in (byte_lm, fidelity, fidelity_metrics, selection_recall, pictures)}.get(name):
        return own(root)
    name, _, listed = name.partition("/")
    path = root / "benchmarks/results" / f"{name}.json"
    record = _read(path)
    if record is None:
        return f"*No record `{path.relative_to(root).as_posix()}` yet.*"
    figures = _flat(record.get("figures", record))
    rows = [_flat(row) for row in figures.pop(listed or "rows", [])]
    if not rows and not listed:
        kept = {k: v for k, v in figures.items() if k in columns or not columns}
        rows, columns = [{"quantity": _heading(k), "value": v} for k, v in kept.items()], []
    return f"{table(_telling(rows, columns), columns)}\n\n{_source([path], [record], root)}"


def _telling(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """The rows that have a measured number, or the reason why they have none, in one of the columns; or else all."""

    def tells(row: Mapping[str, Any], column: str) -> bool:
        return isinstance(row.get(column), float) or ("reason" in column and bool(row.get(column)))

    return [row for row in rows if any(tells(row, c) for c in columns)] or rows


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `errors.o` in place of a dict of numbers, and `errors.max`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": x for inner, x in value.items()}
            numbers = [x for x in value.values() if isinstance(x, (int, float))]
            flat |= {f"{key}.max": max(numbers)} if numbers else {}
        else:
            flat[key] = value
    return flat


def pictures(root: Path) -> str:
    """Return what benchmarks.plots has drawn."""
    found = {path: title for path, title in PICTURES.items() if (root / path).exists()}
    lines = [f"![{title}]({path})" for path, title in found.items()]
    return "\n\n".join(lines) or "*No pictures yet: python -m benchmarks.plots.*"


def byte_lm(root: Path) -> str:
    """Return final losses of the byte-level models, relative to dense, and their curves."""
    folder = root / "examples/results"
    records = {kind: _read(folder / f"byte_lm_{kind}.json") for kind in KINDS}
    found = {kind: r for kind, r in records.items() if r is not None}
    if not found:
        return "*No record `examples/results/byte_lm_*.json` yet.*"
    rows, dense = [], None
    for kind, record in found.items():
        figures = record["figures"]
        step, loss = figures["validation"][-1]
        if kind == "dense":
            dense = loss
        rows.append(
            {
                "attention": kind,
                "steps": step,
                "held-out loss, nats per byte": f"{loss:.4f}",
                "against dense": f"{100 * (loss / dense - 1):+.1f} %" if dense and kind != "dense" else "",
                "seconds": round(figures["seconds"]),
            }
        )
    picture = folder / "byte_lm.png"
    drawn = f"![Loss curves]({picture.relative_to(root).as_posix()})\n\n" if picture.exists() else ""
    paths = [folder / f"byte_lm_{kind}.json" for kind in found]
    return f"{table(rows)}\n\n{drawn}{_source(paths, list(found.values()), root)}"


def fidelity(root: Path) -> str:
    """Return the tables of the study on real text, its step times too where they were taken."""
    return _study(root / "examples/results/fidelity", root)


def fidelity_metrics(root: Path) -> str:
    """Return the tables of the study of metrics, whose models were trained from one state of the sources."""
    return _study(root / "examples/results/fidelity_metrics", root)


def _study(folder: Path, root: Path) -> str:
    from examples.fidelity import report, speed

    paths = sorted(folder.glob("h200-*.json"))
    if not paths:
        return f"*No records `{folder.relative_to(root).as_posix()}/h200-*.json` yet.*"
    records = [record for path in paths if (record := _read(path))]
    timed = speed.record_path(folder, "h200")
    speeds = _read(timed)
    tables = report.markdown(report.load(folder, "h200"), speeds and speeds["figures"])
    sources = [_source([folder / "h200-*.json"], records, root)]
    sources += [_source([timed], [speeds], root)] if speeds else []
    return "\n\n".join([tables, *sources])


def selection_recall(root: Path) -> str:
    """Return what blocks hold that each metric chooses, against the best choice, a table for each layer."""
    path = root / "benchmarks/results/selection_recall.json"
    record = _read(path)
    if record is None:
        return f"*No record `{path.relative_to(root).as_posix()}` yet.*"
    rows = [row for row in record["figures"]["rows"] if row["metric"] != "best"]
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        found: dict[str, dict[str, Any]] = {}
        unions: dict[str, float] = {}
        for row in (r for r in rows if r["source"] == source and (r["block"] == 64 or r["budget"] == 8)):
            of_metric = found.setdefault(row["metric"], {"metric": row["metric"]})
            of_metric[f"{row['budget']} blocks of {row['block']}"] = f"{row['of_best']:.3f}"
            if (row["block"], row["budget"]) == (64, 8):
                unions[row["metric"]] = row["union"]
        listed = [of_metric | {"union of 8 blocks of 64": unions[name]} for name, of_metric in found.items()]
        parts.append(f"{source}:\n\n{table(listed)}")
    return "\n\n".join([*parts, _source([path], [record], root)])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return rows as a markdown table of the columns, by default all; numbers to the right."""
    present = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, (list, dict)))
    columns = columns or list(present)
    right = [all(isinstance(row.get(c) or 0, (int, float)) for row in rows) for c in columns]
    lines = [
        [_heading(c) for c in columns],
        ["---:" if r else "---" for r in right],
        *([_number(row.get(c, "")) for c in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(key: str) -> str:
    if key.endswith(".max"):
        return f"largest {key.removesuffix('.max').removesuffix('s')}"
    words = ["time", key] if key in UNITS else re.split("[._]", key)
    units = [w for w in words[1:] if w in UNITS]
    named = " ".join(w for w in words if w not in units)
    return ", ".join([named, *(SPELLED.get(u, u) for u in units)])


def _number(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int():
            return f"{value:,}".replace(",", " ")
    return str(value).partition("\n")[0].replace("|", "\\|")


def _source(paths: Sequence[Path], records: Sequence[Mapping[str, Any]], root: Path) -> str:
    """Where the figures come from: files, machines, days and sources."""
    found: dict[str, None] = {}
    for record in records:
        machine = record.get("environment", {})
        parts = [
            machine.get("gpu"),
            *(f"{p} {machine[p]}" for p in ("driver", "torch", "triton") if machine.get(p)),
        ]
        parts += [str(machine["date"])[:10]] if machine.get("date") else []
        parts += [f"sources {record['source_digest'][:8]}"] if record.get("source_digest") else []
        found[", ".join(str(p) for p in parts if p) or "machine unknown"] = None
    files = ", ".join(f"`{path.relative_to(root).as_posix()}`" for path in paths)
    return f"{files}: {'; '.join(found)}."


def _read(path: Path) -> dict[str, Any] | None:
    """The record, or None where there is none; a damaged one raises ValueError with its path."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; measure again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no record; measure again")
    return found


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is behind")
    given = parser.parse_args()
    behind = False
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after == before:
            continue
        behind = True
        if given.check:
            print(f"{path.name} is behind the records: run python -m benchmarks.readme_tables")
        else:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path}")
    return int(behind and given.check)


if __name__ == "__main__":
    sys.exit(main())
