"""splagen cache ls | explain | prune | export | import: the tuned Schedules, see `splagen.autotune.cache`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splagen.errors import InputError
from splagen.terminal import (
    INPUT,
    AsJson,
    Decode,
    PageTypeName,
    SpecFile,
    check_page_type,
    emit,
    errors_as_status,
    mark,
    pick,
    read_shape,
    read_spec_file,
    table,
)

if TYPE_CHECKING:
    from splagen.autotune.cache import Explanation
    from splagen.autotune.device import Device
    from splagen.autotune.key import Key

app = typer.Typer(no_args_is_help=True, help="List, explain, delete and exchange the Schedules that tuning found.")


@app.command(name="ls")
def list_command(as_json: AsJson = False) -> None:
    """List every tuned Schedule."""
    with errors_as_status(as_json):
        from splagen.autotune.cache import entries, schedules_dir

        found = entries()
        listing = table("kernel", "dtype", "length", "batch", "GPU", "schedule", "ms", "±", "effort")
        for s in found:
            k, e = s.key, s.entry
            sizes = [str(k.length), str(k.batch)]
            figures = [_schedule_text(e.schedule), f"{e.ms:.4f}", f"{e.spread:.4f}", e.effort]
            listing.add_row(*map(_plain, [k.kernel, k.dtype, *sizes, k.gpu, *figures]))
        listed = [{"key": asdict(s.key), "value": asdict(s.entry), "path": str(s.path)} for s in found]
        empty = f"no tuned Schedules in {schedules_dir()}"
        emit({"folder": str(schedules_dir()), "entries": listed}, as_json, listing if found else empty)


@app.command()
def explain(
    spec: SpecFile,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="One kernel; all.")] = None,
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32", help="Of q, k and v.")] = "bf16",
    shape: Annotated[
        str | None,
        typer.Option(metavar="B,H,L", help="Batch, heads of queries (SSE: of values), length; any."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Such as H200; the one that is here.")] = None,
    decode: Decode = False,
    page_type: PageTypeName = INPUT,
    as_json: AsJson = False,
) -> None:
    """Say which kernels of a spec have a tuned Schedule, and what differs where one has none."""
    with errors_as_status(as_json):
        from splagen import pipeline, tuning
        from splagen.autotune import cache, key
        from splagen.autotune.space import scheduled

        made = read_spec_file(spec)
        check_page_type(decode, page_type)
        device = device_called(gpu)
        part = pipeline.module_kernels(made, page_type if decode else None)
        kernels = {k.name: k for k in scheduled(part)}
        chosen = [pick("kernel", kernel, kernels)] if kernel else list(kernels.values())
        at = read_shape(shape) if shape else None
        at = tuning.capacity(made, at) if at and decode else at
        bucket = key.Bucket.of(made, at) if at else key.Bucket(1, 1)
        free = frozenset[str]() if shape else key.SIZES
        known = cache.entries()
        listing = table("kernel", "", "schedule", "ms", "what differs from the nearest")
        listed = []
        for k in chosen:
            asked = key.key_of(made, k, dtype, bucket, device)
            why = cache.explain(asked, free=free, known=known)
            found = why.found
            schedule, ms = (_schedule_text(found.schedule), f"{found.ms:.4f}") if found else ("", "")
            word = mark(found is not None, "hit" if found else "miss")
            listing.add_row(_plain(k.name), word, schedule, ms, _plain("" if found else _reason(asked, why)))
            listed.append({"kernel": k.name, "hit": found is not None, "key": asdict(asked), **asdict(why)})
        document = {"name": made.name, "gpu": device.name, "dtype": dtype, "kernels": listed}
        emit(document, as_json, listing)


@app.command()
def prune(
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", min=0, help="Also entries of this age.")] = None,
    other_gpus: Annotated[bool, typer.Option("--other-gpus", help="Also entries of GPUs that are not here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete entries that are damaged or of another generator or triton."""
    with errors_as_status(as_json):
        from splagen.autotune import cache, key
        from splagen.codegen.module_holes import GENERATOR

        gone = cache.prune(
            generator=GENERATOR,
            triton=key.software()["triton"],
            gpu=device_called(None).name if other_gpus else None,
            days=older_than,
            dry_run=dry_run,
        )
        listing = table("file", "why")
        for path, why in gone:
            listing.add_row(_plain(path.name), _plain(why))
        document = {"dry_run": dry_run, "pruned": [{"path": str(p), "why": why} for p, why in gone]}
        emit(document, as_json, listing if gone else "nothing to delete")


@app.command(name="export")
def export_command(
    path: Annotated[Path, typer.Argument(metavar="FILE.json", help="The file to write.")], as_json: AsJson = False
) -> None:
    """Write every tuned Schedule into one file."""
    with errors_as_status(as_json):
        from splagen.autotune.bundle import export_bundle

        count = export_bundle(path)
        emit({"path": str(path), "exported": count}, as_json, f"{count} tuned Schedules in {path}")


@app.command(name="import")
def import_command(
    path: Annotated[Path, typer.Argument(metavar="FILE.json", help="A file that export wrote.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Prefer the file's entries to faster ones here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take over the tuned Schedules of a file; of two for the same key the faster one stays."""
    with errors_as_status(as_json):
        from splagen.autotune.bundle import import_bundle

        counts = asdict(import_bundle(path, overwrite=overwrite))
        emit({"path": str(path), **counts}, as_json, ", ".join(f"{n} {what}" for what, n in counts.items()))


def device_called(name: str | None) -> Device:
    """The known device whose name holds these words, or the one that is here."""
    from splagen.autotune.device import DEVICES, this_device

    if name is None:
        try:
            return this_device()
        except InputError as error:
            raise InputError(error.message, f"--gpu NAME, of {', '.join(DEVICES)}") from None
    found = [d for d in DEVICES.values() if name.lower() in d.name.lower()]
    if len(found) != 1:
        raise InputError(f"--gpu {name!r} names {len(found)} known GPUs", f"one of {', '.join(DEVICES)}")
    return found[0]


def _reason(asked: Key, why: Explanation) -> str:
    if why.nearest is None:
        text = "the cache has no entry"
    else:
        there, here = asdict(why.nearest), asdict(asked)
        text = ", ".join(f"{n}: {_short(there[n])} there, {_short(here[n])} here" for n in why.differs)
    return f"its entry is damaged ({why.damaged}); {text}" if why.damaged else text


def _short(value: object) -> str:
    """A digest by its first letters."""
    text = str(value)
    return text[:8] if len(text) == 32 and not text.strip("0123456789abcdef") else text


def _schedule_text(schedule: Mapping[str, int]) -> str:
    from splagen.autotune.entry import RANGES

    return " ".join(f"{k.removeprefix('num_')}={schedule[k]}" for k in RANGES if k in schedule)


def _plain(text: str) -> Any:
    """A cell that is shown as it is: what comes from files has no markup."""
    from rich.text import Text

    return Text(text)
