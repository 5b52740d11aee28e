"""The command line: splagen generate | show | verify | tune | compile | cache | plot | doctor.

Exit status: 0 good, 1 a wrong result, 2 a wrong request.  With --json, stdout is one JSON document.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from splagen import cli_cache, cli_cost, cli_plot, cli_tune, settings
from splagen.errors import InputError, WrongResult
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
    progress,
    read_shape,
    read_spec_file,
    table,
)

if TYPE_CHECKING:
    from splagen.pipeline import Library
    from splagen.spec import Spec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Packed: TypeAlias = Annotated[bool, typer.Option("--packed", help="The op on packed sequences (cu_seqlens).")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A small compiler for attention kernels: block-sparse softmax with residual linear attention.",
)

app.command(name="tune")(cli_tune.tune_command)
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_plot.app, name="plot")


@app.command()
def generate(
    spec: SpecFile,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("kernels"),
    decode: Decode = False,
    page_type: PageTypeName = INPUT,
    packed: Packed = False,
    as_json: AsJson = False,
) -> None:
    """Write the spec's kernels and op as one Python module."""
    with errors_as_status(as_json):
        made = read_spec_file(spec)
        check_page_type(decode, page_type)
        library = _library(made, out, page_type if decode else None, packed)
        found = {"path": str(library.path), "module": library.path.stem, "op": library.op_name}
        emit(found, as_json, str(library.path))


@app.command()
def show(
    spec: SpecFile,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="The program after this pass; cost: what its kernels cost.")
    ] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="The device code of one kernel.")] = None,
    source: Annotated[bool, typer.Option("--source", help="The whole generated module.")] = False,
    shape: Annotated[
        str | None, typer.Option(metavar="B,H,L", help="Of cost: batch, heads of queries (SSE: of values), length.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES), help="Of cost: bf16.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Of cost: such as H100; H200.")] = None,
    decode: Decode = False,
    page_type: PageTypeName = INPUT,
    as_json: AsJson = False,
) -> None:
    """Print the spec's equations, or what becomes of them."""
    with errors_as_status(as_json):
        from splagen import pipeline
        from splagen.codegen.render import kernel_text
        from splagen.ir.text import program_text

        made = read_spec_file(spec)
        check_page_type(decode, page_type)
        if (after is not None) + (kernel is not None) + source > 1:
            raise InputError("--after, --kernel and --source exclude one another", "give one of them")
        if after == "cost":
            cli_cost.show_cost(made, shape, dtype, gpu, page_type if decode else None, as_json)
            return
        if shape or dtype or gpu:
            raise InputError("--shape, --dtype and --gpu belong to the table of costs", "add --after cost")
        if after is not None and decode:
            raise InputError(f"--after {after} beside --decode", "take cost, or leave --decode out")
        found: dict[str, Any] = {"name": made.name}
        part = pipeline.decode_kernels(made, page_type) if decode else None
        if after is not None:
            found |= {"after": after, "text": program_text(pick("pass", after, pipeline.stages(made), "cost"))}
        elif kernel is not None:
            k = pick("kernel", kernel, {k.name: k for k in (part or pipeline.kernels(made)).all_kernels})
            found |= {"kernel": k.name, "template": k.template, "text": kernel_text(k)}
        elif part is not None:
            found["text"] = pipeline.decode_source(made, page_type) if source else program_text(part.program)
        else:
            found["text"] = pipeline.source(made) if source else program_text(pipeline.program(made))
        emit(found, as_json, found["text"].rstrip("\n"))


@app.command()
def verify(
    spec: SpecFile,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="B,H,L", help="Batch, heads of queries (SSE: of values), length; repeatable."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="|".join(DTYPES), help="Repeatable; fp32, on a GPU bf16.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cuda, cpu (Triton's interpreter), or auto: a GPU if there is one.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the generated op with the oracle: outputs, gradients, selection, packed sequences."""
    with errors_as_status(as_json):
        import torch

        made = read_spec_file(spec)
        place = _device(device, torch.cuda.is_available())
        shapes = [read_shape(s) for s in shape] if shape else None
        names = dtype or ["bf16" if place == "cuda" else "fp32"]
        dtypes = {d: getattr(torch, pick("dtype", d, DTYPES)) for d in names}
        if place == "cpu":
            if "bf16" in dtypes:
                hint = "use fp32 or fp16, or a GPU"
                raise InputError("bfloat16 is wrong in Triton's interpreter", hint)
            settings.interpret()
        from splagen import pipeline

        with tempfile.TemporaryDirectory() as folder:
            library = pipeline.generate(made, folder)
            runs = [(s, d) for d in dtypes.values() for s in shapes or pipeline.default_shapes(made, place)]
            rows = [
                row
                for s, d in progress(runs, "verifying")
                for row in pipeline.verify(library, shapes=[s], dtypes=[d], device=place, seed=seed).rows
            ]
        wrong = [r for r in rows if not r.ok]
        listing = table("quantity", "B, H, L", "dtype", "error", "limit", "")
        for r in rows:
            shown = ", ".join(map(str, r.shape))
            listing.add_row(r.quantity, shown, r.dtype, f"{r.error:.1e}", f"{r.limit:.0e}", mark(r.ok))
        listed = [asdict(r) | {"error": r.error if math.isfinite(r.error) else None, "ok": r.ok} for r in rows]
        emit({"name": made.name, "device": place, "ok": not wrong, "rows": listed}, as_json, listing)
        if wrong:
            raise WrongResult(f"{len(wrong)} of {len(rows)} comparisons with the oracle are beyond their limits")


@app.command(name="compile")
def compile_command(
    spec: SpecFile,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeatable; all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(metavar="|".join(DTYPES), help="Repeatable; bf16.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers side by side; one per CPU.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the module with its machine code here: it runs without a compiler.")
    ] = None,
    decode: Decode = False,
    page_type: PageTypeName = INPUT,
    packed: Packed = False,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel ahead of time; no GPU is needed."""
    with errors_as_status(as_json):
        from splagen import pipeline
        from splagen.codegen.binaries import Build, write_build
        from splagen.codegen.compile import compile_module, keep_module, raise_if_failed
        from splagen.codegen.schedule import TARGETS, WITHOUT_E4M3

        made = read_spec_file(spec)
        check_page_type(decode, page_type)
        if packed and out is not None:
            hint = "leave --out away: the module of `splagen generate --packed` compiles at its first call"
            raise InputError("no build of packed sequences is written", hint)
        with tempfile.TemporaryDirectory() as folder:
            path = _library(made, Path(folder), page_type if decode else None, packed).path
            kernels = pipeline.module_kernels(made, page_type if decode else None, packed=packed)
            able = [t for t in TARGETS if page_type == INPUT or t not in WITHOUT_E4M3]
            targets, dtypes = target or able, dtype or ["bf16"]
            build: Build | None = None
            if out is None:
                rows = compile_module(path, kernels, targets=targets, dtypes=dtypes, jobs=jobs)
            else:
                rows, kept = keep_module(path, kernels, targets=targets, dtypes=dtypes, jobs=jobs)
                build = write_build(path, kept, out, dtypes=dtypes) if all(r.ok for r in rows) else None
        columns = (
            "kernel",
            "target",
            "dtype",
            "schedule",
            "registers",
            "shared",
            "spilled",
            "RS wgmma",
            "s",
            "",
        )
        listing = table(*columns)
        for r in rows:
            schedule = " ".join(f"{k.removeprefix('num_')}={v}" for k, v in r.schedule.items())
            figures = ["" if x is None else str(x) for x in (r.registers, r.shared, r.spilled, r.register_a)]
            seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
            listing.add_row(r.kernel, r.arch, r.dtype, schedule, *figures, seconds, mark(r.ok))
        listed = [asdict(r) | {"ok": r.ok} for r in rows]
        found: dict[str, Any] = {"name": made.name, "ok": all(r.ok for r in rows), "rows": listed}
        if build is not None:
            found |= {"path": str(build.path), "build": str(build.folder), "notes": build.notes}
            found |= {"specialisations": build.specialisations, "bytes": build.size}
        emit(found, as_json, listing)
        raise_if_failed(rows)
        if build is not None and not as_json:
            typer.echo(f"{build.path}\n{build.folder}: {build.specialisations} kernels, {build.size / 2**20:.1f} MiB")
            for note in build.notes:
                typer.echo(f"note: {note}", err=True)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, GPU, known faults, folders, interpreter."""
    with errors_as_status(as_json):
        from splagen.doctor import checks

        found = list(progress(checks(), "looking"))
        listing = table("", "", "", "")
        for c in found:
            listing.add_row(c.name, c.value, mark(c.status == "good", c.status), c.hint or "")
        bad = [c.name for c in found if c.status == "bad"]
        emit({"ok": not bad, "checks": [asdict(c) for c in found]}, as_json, listing)
        if bad:
            raise WrongResult(f"splagen cannot work here: {', '.join(bad)}")


def _library(made: Spec, out: Path, page_type: str | None, packed: bool) -> Library:
    """The generated module of the op, on packed sequences or not, or of decoding with pages of a type."""
    from splagen import pipeline

    if page_type is not None and packed:
        raise InputError("--decode and --packed exclude one another", "give one of them")
    if page_type is None:
        return pipeline.generate_packed(made, out) if packed else pipeline.generate(made, out)
    return pipeline.generate_decoding(made, out, page_type=page_type)


# -- requests --------------------------------------------------------------------------------------------


def _device(name: str, gpu: bool) -> str:
    if name == "auto":
        return "cuda" if gpu else "cpu"
    pick("device", name, {"cuda": 0, "cpu": 0})
    if name == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no GPU here", "leave --device out, or look at `splagen doctor`")
    return name
