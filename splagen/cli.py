"""The command line: splagen generate | show | verify | compile | doctor.

Exit status: 0 good, 1 a wrong result, 2 a wrong request.  With --json, stdout is one JSON document.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from splagen import settings
from splagen.errors import CompileError, InputError, SplagenError, WrongResult

if TYPE_CHECKING:
    from splagen.spec import Spec
    from splagen.verification import Shape

WRONG_RESULT, WRONG_REQUEST = 1, 2
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A small compiler for attention kernels: block-sparse softmax with residual linear attention.",
)

T = TypeVar("T")
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The spec: what is computed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
def generate(
    spec: SpecFile,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("kernels"),
    as_json: AsJson = False,
) -> None:
    """Write the spec's kernels and op as one Python module."""
    with _errors(as_json):
        from splagen import pipeline

        made = _read(spec)
        library = pipeline.generate(made, out)
        found = {"path": str(library.path), "module": library.path.stem, "op": made.name}
        _print(found, as_json, str(library.path))


@app.command()
def show(
    spec: SpecFile,
    after: Annotated[str | None, typer.Option(metavar="PASS", help="The program after this pass.")] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="The device code of one kernel.")] = None,
    source: Annotated[bool, typer.Option("--source", help="The whole generated module.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the spec's equations, or what becomes of them."""
    with _errors(as_json):
        from splagen import pipeline
        from splagen.codegen.render import kernel_text
        from splagen.ir.text import program_text

        made = _read(spec)
        if (after is not None) + (kernel is not None) + source > 1:
            raise InputError("--after, --kernel and --source exclude one another", "give one of them")
        found: dict[str, Any] = {"name": made.name}
        if after is not None:
            found |= {"after": after, "text": program_text(_pick("pass", after, pipeline.stages(made)))}
        elif kernel is not None:
            k = _pick("kernel", kernel, {k.name: k for k in pipeline.kernels(made).kernels})
            found |= {"kernel": k.name, "template": k.template, "text": kernel_text(k)}
        else:
            found["text"] = pipeline.source(made) if source else program_text(pipeline.program(made))
        _print(found, as_json, found["text"].rstrip("\n"))


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
    with _errors(as_json):
        import torch

        made = _read(spec)
        place = _device(device, torch.cuda.is_available())
        shapes = [_shape(s) for s in shape] if shape else None
        names = dtype or ["bf16" if place == "cuda" else "fp32"]
        dtypes = {d: getattr(torch, _pick("dtype", d, DTYPES)) for d in names}
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
                for s, d in _progress(runs, "verifying")
                for row in pipeline.verify(library, shapes=[s], dtypes=[d], device=place, seed=seed).rows
            ]
        wrong = [r for r in rows if not r.ok]
        table = _table("quantity", "B, H, L", "dtype", "error", "limit", "")
        for r in rows:
            shown = ", ".join(map(str, r.shape))
            table.add_row(r.quantity, shown, r.dtype, f"{r.error:.1e}", f"{r.limit:.0e}", _mark(r.ok))
        listed = [asdict(r) | {"error": r.error if math.isfinite(r.error) else None, "ok": r.ok} for r in rows]
        _print({"name": made.name, "device": place, "ok": not wrong, "rows": listed}, as_json, table)
        if wrong:
            raise WrongResult(f"{len(wrong)} of {len(rows)} comparisons with the oracle are beyond their limits")


@app.command(name="compile")
def compile_command(
    spec: SpecFile,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeatable; all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(metavar="|".join(DTYPES), help="Repeatable; bf16.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers side by side; one per CPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel ahead of time; no GPU is needed."""
    with _errors(as_json):
        from splagen import pipeline
        from splagen.codegen.compile import compile_module, raise_if_failed
        from splagen.codegen.schedule import TARGETS

        made = _read(spec)
        with tempfile.TemporaryDirectory() as folder:
            path = pipeline.generate(made, folder).path
            targets, dtypes = target or list(TARGETS), dtype or ["bf16"]
            rows = compile_module(path, pipeline.kernels(made), targets=targets, dtypes=dtypes, jobs=jobs)
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
        table = _table(*columns)
        for r in rows:
            schedule = " ".join(f"{k.removeprefix('num_')}={v}" for k, v in r.schedule.items())
            figures = ["" if x is None else str(x) for x in (r.registers, r.shared, r.spilled, r.register_a)]
            seconds = "" if r.seconds is None else f"{r.seconds:.1f}"
            table.add_row(r.kernel, r.arch, r.dtype, schedule, *figures, seconds, _mark(r.ok))
        listed = [asdict(r) | {"ok": r.ok} for r in rows]
        _print({"name": made.name, "ok": all(r.ok for r in rows), "rows": listed}, as_json, table)
        raise_if_failed(rows)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, GPU, known faults, folders, interpreter."""
    with _errors(as_json):
        from splagen.doctor import checks

        found = list(_progress(checks(), "looking"))
        table = _table("", "", "", "")
        for c in found:
            table.add_row(c.name, c.value, _mark(c.status == "good", c.status), c.hint or "")
        bad = [c.name for c in found if c.status == "bad"]
        _print({"ok": not bad, "checks": [asdict(c) for c in found]}, as_json, table)
        if bad:
            raise WrongResult(f"splagen cannot work here: {', '.join(bad)}")


# -- requests --------------------------------------------------------------------------------------------


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Print what splagen raises as message and hint on stderr; the kind of error is the exit status."""
    try:
        yield
    except SplagenError as error:
        typer.echo(f"error: {error}", err=True)
        wrong = isinstance(error, (WrongResult, CompileError))
        if as_json and not wrong:
            typer.echo(json.dumps({"error": error.message, "hint": error.hint}))
        raise typer.Exit(WRONG_RESULT if wrong else WRONG_REQUEST) from None


def _read(path: Path) -> Spec:
    from splagen.spec import read_spec

    return read_spec(path)


def _pick(what: str, name: str, choices: dict[str, T]) -> T:
    if name not in choices:
        raise InputError(f"unknown {what} {name!r}", f"one of {', '.join(choices)}")
    return choices[name]


def _shape(text: str) -> Shape:
    try:
        batch, heads, length = (int(n) for n in text.split(","))
    except ValueError:
        raise InputError(f"--shape {text!r}", "three whole numbers: batch, heads, length") from None
    if min(batch, heads, length) < 1:
        raise InputError(f"--shape {text!r}", "each number is at least 1")
    return batch, heads, length


def _device(name: str, gpu: bool) -> str:
    if name == "auto":
        return "cuda" if gpu else "cpu"
    _pick("device", name, {"cuda": 0, "cpu": 0})
    if name == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no GPU here", "leave --device out, or look at `splagen doctor`")
    return name


# -- output ----------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], as_json: bool, text: Any) -> None:
    """Print the document, or else the text or table."""
    if as_json or isinstance(text, str):
        typer.echo(json.dumps(found, default=dict, allow_nan=False) if as_json else text)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(text)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _mark(ok: bool, word: str | None = None) -> str:
    word = word or ("ok" if ok else "WRONG")
    colour = "green" if ok else "yellow" if word == "warning" else "bold red"
    return f"[{colour}]{word}[/{colour}]"


def _progress(items: Iterable[T], title: str) -> Iterable[T]:
    """The items, with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sequence) else None
    return track(items, title, total=total, console=Console(stderr=True), transient=True)
