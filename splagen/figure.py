"""Figures of matplotlib, an optional package: the extra `plot`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from splagen.codegen.files import replace_file
from splagen.errors import InputError


def pyplot() -> Any:
    """matplotlib.pyplot, which draws to files alone.  Raises InputError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        hint = "pip install -e '.[plot]' in splagen's repository"
        raise InputError("there is no matplotlib, which draws", hint) from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def saved(figure: Any, target: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and close it; returns the path."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    pyplot().close(figure)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, drawn.getvalue())
    return target
