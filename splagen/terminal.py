"""What every command shares: arguments, errors as exit statuses, one JSON document or a text, tables, bars.

Exit status: 0 good, 1 a wrong result, 2 a wrong request.  With --json, stdout is one JSON document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from splagen.errors import CompileError, InputError, SplagenError, WrongResult

if TYPE_CHECKING:
    from splagen.spec import Spec
    from splagen.verification import Shape

WRONG_RESULT, WRONG_REQUEST = 1, 2
INPUT = "input"  # the type of pages if nothing is said

T = TypeVar("T")
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The spec: what is computed.")]
Decode = Annotated[bool, typer.Option("--decode", help="The step of decoding: one token for each sequence of a cache.")]
PageTypeName = Annotated[
    str,
    typer.Option(metavar="input|e4m3", help="Of --decode: what pages hold, the type of q or 8 bits."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@contextmanager
def errors_as_status(as_json: bool) -> Iterator[None]:
    """Print what splagen raises as message and hint on stderr; the kind of error is the exit status."""
    try:
        yield
    except SplagenError as error:
        typer.echo(f"error: {error}", err=True)
        wrong = isinstance(error, (WrongResult, CompileError))
        if as_json and not wrong:
            typer.echo(json.dumps({"error": error.message, "hint": error.hint}))
        raise typer.Exit(WRONG_RESULT if wrong else WRONG_REQUEST) from None


def check_page_type(decode: bool, page_type: str) -> None:
    """Raise InputError for pages of something that has none."""
    if page_type != INPUT and not decode:
        raise InputError(f"--page-type {page_type} without --decode", "only decoding has pages")


def read_spec_file(path: Path) -> Spec:
    """The spec in a file; this loads sympy."""
    from splagen.spec import read_spec

    return read_spec(path)


def pick(what: str, name: str, choices: dict[str, T], *others: str) -> T:
    """The choice of a name.  Raises InputError that lists the names, and others that the caller knows itself."""
    if name not in choices:
        raise InputError(f"unknown {what} {name!r}", f"one of {', '.join([*choices, *others])}")
    return choices[name]


def read_shape(text: str) -> Shape:
    """B, H and L of "B,H,L".  Raises InputError."""
    try:
        batch, heads, length = (int(n) for n in text.split(","))
    except ValueError:
        raise InputError(f"--shape {text!r}", "three whole numbers: batch, heads, length") from None
    if min(batch, heads, length) < 1:
        raise InputError(f"--shape {text!r}", "each number is at least 1")
    return batch, heads, length


def emit(found: dict[str, Any], as_json: bool, text: Any) -> None:
    """Print the document, or else the text or table."""
    if as_json or isinstance(text, str):
        typer.echo(json.dumps(found, default=dict, allow_nan=False) if as_json else text)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(text)


def table(*columns: str) -> Any:
    """A table of rich, without a header where no column has a name."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, show_header=any(columns))
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def mark(ok: bool, word: str | None = None) -> str:
    """A coloured word: ok or WRONG unless told."""
    word = word or ("ok" if ok else "WRONG")
    colour = "green" if ok else "yellow" if word == "warning" else "bold red"
    return f"[{colour}]{word}[/{colour}]"


def progress(items: Iterable[T], title: str) -> Iterable[T]:
    """The items, with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sequence) else None
    return track(items, title, total=total, console=Console(stderr=True), transient=True)
