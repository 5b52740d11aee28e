"""What a field of a spec may hold; each function takes the field's path and its value."""

from __future__ import annotations

import json
import keyword
import math
from typing import Any

from splagen.errors import SpecError


def whole(path: str, value: object, low: int, high: int | None = None, step: int = 1) -> None:
    """A whole number from low to high, None is any, and a multiple of step; True is none.  Raises SpecError."""
    if type(value) is not int or value < low or (high is not None and value > high) or value % step:
        span = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        raise SpecError(f"{path} is {value!r}", span + (f", a multiple of {step}" if step > 1 else ""))


def one_of(path: str, value: object, choices: tuple[object, ...]) -> None:
    """One of the choices, of the same type: True is not 1.  Raises SpecError."""
    if not any(type(value) is type(c) and value == c for c in choices):
        listed = ", ".join("None (leave it out)" if c is None else json.dumps(c) for c in choices)
        raise SpecError(f"{path} is {value!r}", f"one of {listed}")


def is_a(path: str, value: object, kinds: tuple[type, ...], hint: str) -> None:
    """An instance of one of the kinds.  Raises SpecError with the hint."""
    if not isinstance(value, kinds):
        raise SpecError(f"{path} is {value!r}", hint)


def positive_number(path: str, value: Any, hint: str) -> float:
    """The number as a float, above 0 and finite.  Raises SpecError with the hint."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise SpecError(f"{path} is {value!r}", f"a positive finite number; {hint}")
    return float(value)


def identifier(path: str, value: object) -> None:
    """An identifier in ASCII that is no keyword: it stands in generated text as it is.  Raises SpecError."""
    if not (isinstance(value, str) and value.isascii() and value.isidentifier()) or keyword.iskeyword(value):
        raise SpecError(f"{path} is {value!r}", "an identifier in ASCII such as spla_64")


def placed(path: str, error: SpecError) -> SpecError:
    """The error of a feature map, which does not know its place, with that place."""
    return type(error)(path + error.message.removeprefix("feature_map"), error.hint)
