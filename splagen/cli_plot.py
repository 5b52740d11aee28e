"""splagen plot selection: which blocks queries choose, and how much of their attention these hold, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splagen.errors import InputError
from splagen.terminal import AsJson, SpecFile, emit, errors_as_status, read_spec_file, table

if TYPE_CHECKING:
    from splagen.block_attention import Coverage
    from splagen.spec import SPLASpec

app = typer.Typer(no_args_is_help=True, help="Pictures of what a spec does with the rows of a model.")

KINDS = {"not seen": "white", "not chosen": "#d9d9d9", "chosen": "#d95f02", "forced": "#1f5a99"}  # blocks, by colour


@app.callback()
def _pictures() -> None:
    """A group of commands, of which there is one so far."""


@app.command()
def selection(
    spec: SpecFile,
    qk: Annotated[
        Path, typer.Option(metavar="FILE.pt", help="torch.save of a dict: q [1, L, Hq, D] and k [1, L, Hkv, D].")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture; the numbers go to FILE.json beside it.")],
    head: Annotated[int | None, typer.Option(min=0, help="One KV head; all of them.", show_default=False)] = None,
    tiles: Annotated[
        int, typer.Option(min=1, help="Queries (tiles of them) that are drawn, spread evenly over the sequence.")
    ] = 512,
    as_json: AsJson = False,
) -> None:
    """Draw the blocks that every query chooses for q and k of a model, and the attention that they hold.

    The choice is that of the definition in float64, on the CPU.
    """
    with errors_as_status(as_json):
        from splagen.block_attention import coverage
        from splagen.codegen.files import replace_file
        from splagen.figure import pyplot, saved
        from splagen.qk_file import read_qk

        if out.suffix.lower() != ".png":
            raise InputError(f"--out {out} is no PNG", "a path that ends in .png")
        made = read_spec_file(spec)
        if made.kind != "spla":
            raise InputError(f"{made.name} is a spec of {made.kind}, which selects no blocks", "give a spec of SPLA")
        pyplot()  # before the work
        q, k = read_qk(qk)
        found = coverage(made, q, k, head=head, tiles=tiles)
        numbers = _document(made, found, head or 0, q.shape[1])
        try:
            saved(_drawn(made, found, head or 0, q.shape[1]), out)
            replace_file(out.with_suffix(".json"), json.dumps(numbers, allow_nan=False))
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}", "give a folder that can be written to") from error
        listing = table("KV head", "forced", "forced and chosen", "best choice")
        for row in numbers["heads"]:
            shares = (row["mean"][name] for name in ("forced", "covered", "best"))
            listing.add_row(str(row["head"]), *(f"{x:.4f}" for x in shares))
        emit({"path": str(out), **numbers}, as_json, listing)
        if not as_json:
            typer.echo(str(out))


def _document(spec: SPLASpec, found: Coverage, first: int, length: int) -> dict[str, Any]:
    """Positions, and for each KV head the chosen blocks and the shares at these positions and in the mean."""
    assert spec.select is not None
    heads = []
    for h, free in enumerate(found.free):
        shares = {"forced": found.forced_share[h], "covered": found.covered[h], "best": found.best[h]}
        row: dict[str, Any] = {"head": first + h, "mean": {n: float(x.mean()) for n, x in shares.items()}}
        row |= {n: x.tolist() for n, x in shares.items()}
        heads.append(row | {"chosen": [of_tile.nonzero().flatten().tolist() for of_tile in free]})
    sizes = {"length": length, "block_size": spec.select.block_size, "tile": spec.select.tile}
    return {"name": spec.name, **sizes, "positions": found.positions.tolist(), "heads": heads}


def _drawn(spec: SPLASpec, found: Coverage, first: int, length: int) -> Any:
    """A figure with two panels for each KV head: the kinds of blocks, and shares of attention, by position."""
    from splagen.figure import pyplot

    plt = pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    heads, blocks = len(found.free), found.far.shape[1]
    shape = {"figsize": (10, 4 * heads + 0.6), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(heads, 2, width_ratios=[3, 2], **shape)
    for h, (left, right) in enumerate(panels):
        kinds = (
            found.far.int() + found.free[h].int() + 3 * found.forced.int()
        )  # places in KINDS: forced blocks are never far
        extent = (-0.5, blocks - 0.5, length, 0)
        colours = ListedColormap([*KINDS.values()])
        left.imshow(kinds.numpy(), colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest", extent=extent)
        left.set_ylabel(f"KV head {first + h}\nposition of the query")
        lines = {"forced": found.forced_share[h], "forced and chosen": found.covered[h], "best choice": found.best[h]}
        styles = ({"color": KINDS["forced"]}, {"color": KINDS["chosen"]}, {"color": "grey", "linestyle": ":"})
        for (name, shares), style in zip(lines.items(), styles, strict=True):
            right.plot(shares.numpy(), found.positions.numpy(), label=name, **style)
        right.set_xlim(0, 1.02)
        right.grid(alpha=0.3)
    panels[-1][0].set_xlabel("block of keys")
    panels[-1][1].set_xlabel("share of the attention of all keys")
    legend = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in KINDS.items()]
    panels[0][0].legend(handles=legend, loc="upper right", fontsize=8)
    panels[0][1].legend(loc="lower left", fontsize=8)
    assert spec.select is not None
    what = f"{spec.select.budget} chosen blocks of {spec.select.block_size}"
    each = "query" if spec.select.tile == 1 else f"tile of {spec.select.tile} queries"
    figure.suptitle(f"{spec.name}: {what} for each {each}, L = {length}", fontsize=10)
    return figure
