"""Time training steps of variants with nothing else on the device, the dense one always among them.

    python -m examples.fidelity.speed --variants sparse1 sparse2 spla1 spla2
    python -m examples.fidelity.speed --preset tiny --device cpu --variants spla2 --steps 3

A preset has one record, which a call for other variants adds to.  `python -m examples.fidelity.report` makes its table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from examples.fidelity import text, variants
from examples.fidelity.model import build
from examples.fidelity.presets import PRESETS, Preset, Training
from examples.fidelity.run import RESULTS, add_place, place, sources
from examples.fidelity.text import Corpus
from examples.fidelity.train import Run

Figures = dict[str, Any]

SEED = 0
ENDLESS = 1 << 20  # steps
WARM_CHUNKS = 2  # not timed: kernels are compiled and chosen in the first, and each call of Run.train leaves one out


def record_path(folder: Path, preset: str) -> Path:
    """Where the record of a preset lies; records of trainings begin with the preset's name."""
    return folder / f"speed-{preset}.json"


def full_windows(training: Training) -> Training:
    """The training without its short windows, without an end, and with one window of validation before it."""
    return replace(training, steps=ENDLESS, early_steps=0, validate_every=ENDLESS, validation_windows=1)


def step_figures(name: str, preset: Preset, corpus: Corpus, device: torch.device, steps: int) -> Figures:
    """Times and memory of a variant's training steps: of about the first `steps`, rounded up to chunks.

    step_ms is the median over chunks of milliseconds per step, of host and device together, as in a training, and
    tokens_per_s follows from it.  gpu_ms is how long kernels and copies run in a step, and peak_gib the most memory
    that a step holds: both None on a CPU.
    """
    training, gpu = full_windows(preset.training), device.type == "cuda"
    gc.collect()  # what is left of another model would count as memory of this one
    run = Run(build(variants.variant(name, preset.shape.layers), preset.shape, SEED, device), training, key="")
    _train(run, preset, corpus, 1)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    _train(run, preset, corpus, WARM_CHUNKS + math.ceil(steps / training.chunk))
    assert run.step_ms is not None
    return {
        "step_ms": run.step_ms,
        "tokens_per_s": training.batch * preset.shape.context / (run.step_ms / 1e3),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if gpu else None,
        "gpu_ms": _gpu_ms(run, preset, corpus) if gpu else None,
    }


def kept(path: Path, common: Mapping[str, Any]) -> dict[str, Figures]:
    """Figures by variant in a record whose sources, machine and `common` figures are today's; else none."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    by_variant: dict[str, Figures] = found["figures"].pop("variants")
    machine = record.environment()
    machine["date"] = found["environment"]["date"]
    same = (found["source_digest"], found["environment"], found["figures"])
    return by_variant if same == (record.source_digest(), machine, common) else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the record lacks, and write it after each variant."""
    parser = argparse.ArgumentParser(prog="python -m examples.fidelity.speed", description=__doc__.partition("\n")[0])
    add_place(parser)
    parser.add_argument("--variants", nargs="*", choices=list(variants.ABOUT), default=[], metavar="NAME")
    parser.add_argument("--steps", type=int, default=40, help="that are timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error("--steps must be at least 1")
    preset = PRESETS[given.preset]
    device, work = place(given)
    corpus = text.load(work.parent)
    common = {
        "preset": preset.name,
        "device": device.type,
        "shape": asdict(preset.shape),
        "training": asdict(replace(preset.training, early_steps=0)),
        "timed_steps": given.steps,
        "text": corpus.figures(),
        "sources": sources(),
    }
    target = record_path(given.out, preset.name)
    found = kept(target, common)
    if target.exists() and not found:
        print(f"{target} is of other sources, machine, sizes or text: begun anew", flush=True)
    for name in dict.fromkeys(["dense", *given.variants]):
        if name in found:
            print(f"{name}: there is a record", flush=True)
            continue
        found[name] = step_figures(name, preset, corpus, device, given.steps)
        record.write(target.stem, common | {"variants": found}, target.parent)
        print(f"{name}: {found[name]['step_ms']:.1f} ms  {target}", flush=True)


def _train(run: Run, preset: Preset, corpus: Corpus, chunks: int) -> None:
    """Go on until so many chunks are done."""
    run.train(corpus, preset.shape, SEED, (chunks * run.training.chunk).__le__, report=lambda line: None)


def _gpu_ms(run: Run, preset: Preset, corpus: Corpus) -> float:
    """Milliseconds per step that kernels and copies take, by torch's profiler, over one more chunk."""
    begun = run.step
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        _train(run, preset, corpus, begun // run.training.chunk + 1)
    # an optimizer marks its step on the device too, from its first kernel to its last
    events = [e for e in seen.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    return float(sum(e.self_device_time_total for e in events)) / 1e3 / (run.step - begun)


if __name__ == "__main__":
    main()
