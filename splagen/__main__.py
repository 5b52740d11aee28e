"""python -m splagen: the command line, without an installed script."""

from splagen.cli import app

app()
