"""A fast sort in the interpreter: the top-k of a case would take most of its time."""

import os

import pytest


@pytest.fixture(scope="session")
def fast_sort() -> None:
    """Make Triton's interpreter sort fast for the rest of this process; no effect on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter_sort import patch

        patch()
