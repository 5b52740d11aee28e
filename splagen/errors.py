"""Every exception that splagen raises on purpose: what is wrong, where, and what to do next."""

from __future__ import annotations


class SplagenError(Exception):
    """Base of all errors of splagen: a message, and optionally a hint that says what to do next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class SpecError(SplagenError):
    """A spec that asks for something wrong, contradictory or not supported."""


class ExpressionError(SpecError):
    """An expression outside the accepted list of nodes, or text that is not an expression at all."""


class ProgramError(SplagenError):
    """A Program that breaks a rule of the IR; the message quotes the equation."""


class PartitionError(SplagenError):
    """Equations that no kernel family takes."""


class ScheduleError(SplagenError):
    """A schedule that is not legal for its kernel, its sizes or the device."""


class TuningError(SplagenError):
    """A measurement that failed in a way that no Schedule explains, or a kernel of which none runs."""


class InputError(SplagenError, ValueError):
    """Tensors or shapes given to an op that do not fit its spec."""


class GeneratedFileError(SplagenError):
    """A file that would be overwritten was not written by splagen, or was edited since."""


class WrongResult(SplagenError):
    """An op or a kernel disagrees with the oracle beyond the tolerance."""


class CompileError(SplagenError):
    """A generated kernel does not compile for a target."""
