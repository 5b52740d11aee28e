"""Train variants on real text, measure them, and convert the dense one; goes on where it stopped.

    python -m examples.fidelity.run --variants dense sparse1 spla2 --seeds 0 1 2 --seconds 500
    python -m examples.fidelity.run --convert sparse1 spla2 --seeds 0 1 2 --seconds 500
    python -m examples.fidelity.run --preset tiny --variants dense spla2 --device cpu

Each variant and seed writes a record of its own; `python -m examples.fidelity.report` makes tables and pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from examples.fidelity import recall, text, variants
from examples.fidelity.model import Decoder, build, parameters
from examples.fidelity.presets import PRESETS, Evaluation, Preset, Shape
from examples.fidelity.text import Corpus
from examples.fidelity.train import Run, by_position, key_of, on, weights
from splagen import settings

RESULTS = Path(__file__).resolve().parents[1] / "results" / "fidelity"
SOFTMAX = [name for name in variants.ABOUT if not {"linear", "gla", "gdn", "sse"} & set(name.split("_"))]


@dataclass(frozen=True)
class Job:
    """One model: trained from scratch as a variant, or from the weights of the trained dense one."""

    variant: str
    seed: int
    converted: bool = False

    @property
    def name(self) -> str:
        """In names of files."""
        return f"{'dense-to-' if self.converted else ''}{self.variant}-seed{self.seed}"


OF_A_TRAINING = ("model", "presets", "recall", "run", "text", "train", "variants")


def sources() -> str:
    """sha256 of the files of this study that a training goes through; a record's digest of splagen lacks them."""
    files = [Path(__file__).with_name(f"{name}.py") for name in OF_A_TRAINING]
    return hashlib.sha256(b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


@torch.no_grad()
def recalled(model: Decoder, corpus: Corpus, shape: Shape, given: Evaluation, length: int) -> list[tuple[float, float]]:
    """Share of questions that are answered in windows of `length` bytes, and nats of a value, at each depth."""
    device = next(model.parameters()).device
    at_once = max(1, 4 * shape.context // length)
    found: list[tuple[float, float]] = []
    for depth in given.depths:
        rows = on(recall.questions(corpus.validation, length, depth, given.samples, given.distractors), device)
        right, loss = 0.0, 0.0
        for some in torch.split(rows, at_once):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(some)[0]
            answered, nats = recall.answers(logits, some)
            right, loss = right + answered.sum().item(), loss + nats.sum().item()
        found.append((right / given.samples, loss / given.samples))
    return found


@torch.no_grad()
def without_residual(model: Decoder, corpus: Corpus, shape: Shape, windows: int) -> float | None:
    """Validation loss of the trained model with every gain of a residual at 0; None if it has none."""
    device = next(model.parameters()).device
    gains = [p for n, p in model.named_parameters() if n.endswith(".branches.gamma_r")]
    if not gains:
        return None
    kept = [p.clone() for p in gains]
    for p in gains:
        p.zero_()
    loss = by_position(model, corpus.validation, shape.context, windows, device).mean().item()
    for p, x in zip(gains, kept, strict=True):
        p.copy_(x)
    return loss


def evaluated(model: Decoder, corpus: Corpus, shape: Shape, given: Evaluation) -> dict[str, Any]:
    """What is measured of a trained model: loss by position, recall by length and depth."""
    device = next(model.parameters()).device
    length = given.position_contexts * shape.context
    each = by_position(model, corpus.validation, length, given.position_windows, device)
    lengths = [int(x * shape.context) for x in given.lengths]
    each_length = [recalled(model, corpus, shape, given, n) for n in lengths]
    return {
        "position": [x.mean().item() for x in each.chunk(given.buckets)],
        "position_length": length,
        "recall": [[share for share, _ in found] for found in each_length],
        "recall_loss": [[nats for _, nats in found] for found in each_length],
        "recall_lengths": lengths,
        "recall_depths": given.depths,
    }


def model_of(job: Job, preset: Preset, device: torch.device, work: Path) -> Decoder:
    """The model of a job before its first step.

    Raises:
        FileNotFoundError: a conversion before the dense model is trained.
        ValueError: weights that do not fit.
    """
    model = build(variants.variant(job.variant, preset.shape.layers), preset.shape, job.seed, device)
    if job.converted:
        dense = work / f"{Job('dense', job.seed).name}.pt"
        if not dense.exists():
            raise FileNotFoundError(f"no {dense}: train with --variants dense --seeds {job.seed} first")
        missing, unexpected = model.load_state_dict(weights(dense), strict=False)
        if unexpected or any(".branches." not in n for n in missing):
            raise ValueError(f"dense weights do not fit {job.variant}: {[*unexpected, *missing][:3]}")
    return model


def pursue(
    job: Job,
    preset: Preset,
    corpus: Corpus,
    device: torch.device,
    *,
    work: Path,
    out: Path,
    late: Callable[[], bool],
    compiled: bool = False,
    shared: bool = False,
    report: Callable[[str], None] = print,
) -> Path | None:
    """Take a job as far as time allows; the path of its record when it is finished, else None.

    On a `shared` device the record has no times.

    Raises:
        FileNotFoundError, ValueError: see `model_of`, and a checkpoint of another study.
    """
    training = preset.conversion if job.converted else preset.training
    key = key_of(job=asdict(job), shape=asdict(preset.shape), training=asdict(training), text=corpus.digest)
    checkpoint = work / f"{job.name}.pt"
    target = out / f"{preset.name}-{job.name}.json"
    model = model_of(job, preset, device, work)
    run = Run(model, training, key)
    if checkpoint.exists():
        run.load(checkpoint)
    if not run.done:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = preset.training.steps if job.converted else 0  # a conversion sees new text
        run.train(
            corpus, preset.shape, job.seed, lambda step: late(),
            checkpoint=checkpoint, first_batch=first, compiled=compiled, report=report,
        )  # fmt: skip
    if not run.done or late():
        return None
    tokens = training.batch * preset.shape.context
    step_ms = None if shared else run.step_ms
    figures = {
        "job": asdict(job),
        "preset": preset.name,
        "shape": asdict(preset.shape),
        "training": asdict(training),
        "text": corpus.figures(),
        "sources": sources(),
        "parameters": parameters(model),
        "compiled": compiled,
        "loss": run.loss,
        "validation": run.validation,
        "without_residual": without_residual(model, corpus, preset.shape, training.validation_windows),
        "step_ms": step_ms,
        "tokens_per_s": tokens / (step_ms / 1e3) if step_ms else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    return record.write(target.stem, figures | evaluated(model, corpus, preset.shape, preset.evaluation), target.parent)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The arguments that `place` reads."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h200")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--work", type=Path, help="folder of text and checkpoints; default: in splagen's cache")


def place(given: argparse.Namespace) -> tuple[torch.device, Path]:
    """The device, and the folder of checkpoints of a preset, beside which the text lies."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, (given.work or settings.cache_dir() / "fidelity") / given.preset


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit status 0 if everything is finished, 3 if time ran out."""
    parser = argparse.ArgumentParser(prog="python -m examples.fidelity.run", description=__doc__.partition("\n")[0])
    add_place(parser)
    parser.add_argument("--variants", nargs="*", choices=list(variants.ABOUT), default=[], metavar="NAME")
    parser.add_argument("--convert", nargs="*", choices=SOFTMAX, default=[], metavar="NAME", help="dense to these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of training from scratch, in place of the preset's")
    parser.add_argument("--conversion-steps", type=int, help="of a conversion, in place of the preset's")
    parser.add_argument("--shared", action="store_true", help="others use the GPU too: leave times out of records")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so many; call again")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--list", action="store_true", help="print the variants")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds
    if given.list:
        print("\n".join(f"{name:12} {about}" for name, about in variants.ABOUT.items()))
        return 0
    if not given.variants and not given.convert:
        parser.error("nothing to do: give --variants, --convert or --list")
    preset = PRESETS[given.preset]
    for option, part, steps in (
        ("--steps", "training", given.steps),
        ("--conversion-steps", "conversion", given.conversion_steps),
    ):
        if steps is not None and steps < 1:
            parser.error(f"{option} must be at least 1")
        if steps:
            preset = replace(preset, **{part: replace(getattr(preset, part), steps=steps)})
    device, work = place(given)
    corpus = text.load(work.parent)
    print(f"text {corpus.digest[:16]}: {len(corpus.train)} + {len(corpus.validation)} bytes", flush=True)
    jobs = [Job(v, s) for s in given.seeds for v in given.variants]
    jobs += [Job(v, s, converted=True) for s in given.seeds for v in given.convert]
    unfinished = 0
    for job in jobs:
        if (given.out / f"{preset.name}-{job.name}.json").exists():
            print(f"{job.name}: there is a record", flush=True)
            continue
        if time.monotonic() >= end:
            unfinished += 1
            continue
        path = pursue(
            job, preset, corpus, device, work=work, out=given.out, compiled=given.compile, shared=given.shared,
            late=lambda: time.monotonic() >= end,
            report=partial(_print, job.name),
        )  # fmt: skip
        unfinished += path is None
        print(f"{job.name}: {path or 'to be continued'}", flush=True)
    return 3 if unfinished else 0


def _print(name: str, line: str) -> None:
    print(f"{name}  {line}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
