"""What follows from the rows of a record: where an op becomes faster than dense attention, and what odd groups cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

Rows: TypeAlias = Sequence[dict[str, Any]]

OURS, DENSE = "splagen", "dense cuDNN"
ODD_GROUP_LIMIT = 1.4  # time of a group size over that of the next power of two, at equal KV heads
TOTALS = {"forward": ("forward_ms",), "forward and backward": ("forward_ms", "backward_ms")}


def plain(rows: Rows) -> list[dict[str, Any]]:
    """The timed rows of the works as they are listed: the op's own choice of strategy, blocks that nothing relates."""
    listed = ("random", "by metric")
    return [r for r in rows if "forward_ms" in r and "strategy" not in r and r.get("selection", "random") in listed]


def crossovers(rows: Rows) -> list[dict[str, Any]]:
    """For every number of KV heads the length from which the op takes no longer than dense attention does.

    Between two measured lengths times are taken to be powers of the length.  A text where it lies outside of them.
    Only of works with one variant.
    """
    found = []
    timed = [r for r in plain(rows) if "variant" not in r]
    for kv_heads in sorted({r["kv_heads"] for r in timed if r["system"] == OURS}):
        for name, columns in TOTALS.items():
            times: dict[str, dict[int, float]] = {OURS: {}, DENSE: {}}
            for r in timed:
                if r["system"] in times and r["kv_heads"] == kv_heads and all(c in r for c in columns):
                    times[r["system"]][r["length"]] = sum(r[c] for c in columns)
            lengths = sorted(times[OURS].keys() & times[DENSE].keys())
            if len(lengths) > 1:
                ratios = [times[OURS][length] / times[DENSE][length] for length in lengths]
                row = {"kv_heads": kv_heads, "pass": name, "length": _crossing(lengths, ratios)}
                found.append(row | {"times_faster_at_the_longest": 1 / ratios[-1]})
    return found


def times_dense(rows: Rows) -> list[dict[str, Any]]:
    """The op's time over that of dense attention with as many KV heads as query heads, by length, where both are there.

    Dense attention is the same for every variant of a work and stands beside the first alone.
    """
    timed = plain(rows)
    beside = {(r["kv_heads"], r["length"]): r for r in timed if r["system"] == DENSE}
    found = []
    for r in timed:
        dense = beside.get((r["kv_heads"], r["length"]))
        if r["system"] != OURS or dense is None:
            continue
        both = [n for n in ("forward", "backward") if f"{n}_ms" in r and f"{n}_ms" in dense]
        label = {name: r[name] for name in ("variant", "kv_heads", "length") if name in r}
        found.append({**label, "ratio": {n: r[f"{n}_ms"] / dense[f"{n}_ms"] for n in both}})
    return found


def _crossing(lengths: Sequence[int], ratios: Sequence[float]) -> int | str:
    """Where the ratio falls to 1 for good."""
    slow = [i for i, ratio in enumerate(ratios) if ratio > 1]
    if not slow:
        return f"at most {lengths[0]}"
    if slow[-1] == len(lengths) - 1:
        return f"beyond {lengths[-1]}"
    (a, b), (x, y) = (lengths[slow[-1] : slow[-1] + 2], ratios[slow[-1] : slow[-1] + 2])
    share = math.log(x) / (math.log(x) - math.log(y))
    return round(math.exp(math.log(a) + share * (math.log(b) - math.log(a))))


def odd_groups(rows: Rows) -> list[dict[str, Any]]:
    """Time at a group size over that at the next power of two, at equal KV heads and length."""
    found = []
    ours = {(r["kv_heads"], r["length"], r["group_size"]): r for r in plain(rows) if r["system"] == OURS}
    for (kv_heads, length, group), row in sorted(ours.items()):
        power = 1 << (group - 1).bit_length()
        beside = ours.get((kv_heads, length, power))
        if power == group or beside is None:
            continue
        ratios = {n: row[f"{n}_ms"] / beside[f"{n}_ms"] for n in ("forward", "backward") if f"{n}_ms" in row}
        within = all(ratio <= ODD_GROUP_LIMIT for ratio in ratios.values())
        sizes = {"kv_heads": kv_heads, "length": length, "group_size": group, "beside": power}
        found.append({**sizes, "ratio": ratios, "within_limit": within})
    return found
