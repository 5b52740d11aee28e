"""splagen tune: the fastest Schedules on the GPU at hand, see `splagen.autotune.tuner`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splagen import settings
from splagen.errors import WrongResult
from splagen.terminal import (
    INPUT,
    AsJson,
    Decode,
    PageTypeName,
    SpecFile,
    check_page_type,
    emit,
    errors_as_status,
    pick,
    read_shape,
    read_spec_file,
    table,
)

if TYPE_CHECKING:
    from splagen.autotune.search import Outcome, Progress
    from splagen.autotune.tuner import Tuned
    from splagen.verification import Shape


def tune_command(
    spec: SpecFile,
    shape: Annotated[
        list[str], typer.Option(metavar="B,H,L", help="Batch, heads of queries (SSE: of values), length; repeatable.")
    ],
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32", help="Of q, k and v.")] = "bf16",
    effort: Annotated[str, typer.Option(metavar="quick|full", help="How much is tried.")] = "quick",
    seconds: Annotated[
        float | None, typer.Option(min=1, help="No measurement of a shape starts later.", show_default="70 or 540")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers side by side; one per CPU.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Search again where the cache has an answer.")] = False,
    alike: Annotated[
        float, typer.Option(min=0, max=1, help="How much neighbouring queries have in common; as in text: 0.98.")
    ] = 0.0,
    decode: Decode = False,
    page_type: PageTypeName = INPUT,
    as_json: AsJson = False,
) -> None:
    """Find the fastest Schedule of every kernel on this GPU and keep them in the cache.

    With --decode, B counts sequences, and L the tokens that one may get.
    """
    with errors_as_status(as_json):
        from splagen import pipeline, tuning
        from splagen.verification import DTYPES

        made = read_spec_file(spec)
        check_page_type(decode, page_type)
        shapes = [read_shape(s) for s in shape]
        kind = pick("dtype", dtype, DTYPES)
        folder = settings.cache_dir() / "kernels"
        library = (
            pipeline.generate_decoding(made, folder, page_type=page_type) if decode else pipeline.generate(made, folder)
        )
        with _bar() as told:
            options: dict[str, Any] = {"effort": effort, "seconds": seconds, "jobs": jobs, "force": force}
            found = tuning.tune(library, shapes=shapes, dtype=kind, alike=alike, progress=told, **options)
        listing = table("B, H, L", "kernel", "default, ms", "best, ms", "±", "tried", "lost", "schedule")
        for s, tuned in zip(shapes, found, strict=True):
            for name, entry in tuned.entries.items():
                result = tuned.results.get(name)
                figures = [_ms(result.default), f"{entry.ms:.4f}"] if result else ["", f"{entry.ms:.4f}"]
                counts = [str(len(result.trials)), str(len(result.lost))] if result else ["cache", ""]
                text = " ".join(f"{k.removeprefix('num_')}={v}" for k, v in entry.schedule.items())
                listing.add_row(", ".join(map(str, s)), name, *figures, f"{entry.spread:.4f}", *counts, text)
        rows = [_document(s, t) for s, t in zip(shapes, found, strict=True)]
        emit({"name": made.name, "dtype": dtype, "shapes": rows}, as_json, listing)
        wrong = [w for t in found for w in t.wrong]
        if wrong:
            texts = "\n".join(f"{kernel} with {dict(s)}: {what}" for kernel, s, what in wrong)
            hint = "the compiler is at fault: report them with what `splagen doctor` prints"
            raise WrongResult(f"{len(wrong)} Schedules crash or give wrong results; none was chosen:\n{texts}", hint)


def _ms(outcome: Outcome) -> str:
    from splagen.autotune.search import Measurement

    return f"{outcome.ms:.4f}" if isinstance(outcome, Measurement) else outcome.reason


def _document(shape: Shape, tuned: Tuned) -> dict[str, Any]:
    rows = []
    for name, entry in tuned.entries.items():
        result = tuned.results.get(name)
        trials = [{"schedule": dict(t.schedule), **asdict(t.outcome)} for t in result.trials] if result else []
        rows.append({"kernel": name, **asdict(entry), "trials": trials})
    return {"shape": list(shape), "seconds": tuned.seconds, "kernels": rows}


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A function that shows a search's progress on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def told(p: Progress) -> None:
            best = f" best {p.best.ms:.4f} ms" if p.best else ""
            if p.kernel not in tasks:
                tasks[p.kernel] = bars.add_task(p.kernel)
            bars.update(tasks[p.kernel], description=p.kernel + best, completed=p.done, total=p.done + p.left)

        yield told
