"""Write the Schedules that ship with splagen from records of benchmarks.tuning.

python -m benchmarks.pretuned benchmarks/results/tuning_quick.json [...]

A kernel that was searched at several lengths takes what was found at the longest.  Tables of recurrences are part of
the rules (codegen/sequence_schedule.py): their kernels must agree on numbers, and no entry of this file may break that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.tuning import CASES
from splagen import pipeline
from splagen.codegen.files import replace_file
from splagen.codegen.geometry import Geometry
from splagen.codegen.pretuned import FILE, sizes
from splagen.spec import SPLASpec


def main() -> None:
    """Read the records in order and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    records = [json.loads(path.read_text()) for path in parser.parse_args().records]
    rows = sorted((r for record in records for r in record["figures"]["rows"]), key=lambda r: r["shape"][2])
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        spec, _ = CASES[row["case"]]
        if not isinstance(spec, SPLASpec):
            continue
        part = pipeline.kernels(spec)
        geometry = Geometry.of(part.program)
        for kernel in part.kernels:
            result = row["kernels"][kernel.name]
            if result["tried"] > 1:
                found[sizes(kernel, geometry)] = result["schedule"]
    versions = {k: records[0]["environment"][k] for k in ("gpu", "triton")}
    lines = [f"  {json.dumps(name)}: {json.dumps(schedule)}" for name, schedule in sorted(found.items())]
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in versions.items())
    replace_file(FILE, "{\n" + head + ' "schedules": {\n' + ",\n".join(lines) + "\n }\n}\n")
    print(f"{len(found)} Schedules in {FILE}")


if __name__ == "__main__":
    main()
