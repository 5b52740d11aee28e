"""A process that answers JSON lines, and may be killed: for compilers that crash and kernels that hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Timer
from typing import IO, Any

import splagen


class ProcessEnded(Exception):
    """The process ended in place of an answer, with this status; `tail` is the end of what it printed."""

    def __init__(self, status: int, tail: Sequence[str]) -> None:
        super().__init__(f"status {status}")
        self.status, self.tail = status, tuple(tail)


class ProcessTooSlow(ProcessEnded):
    """It was killed, since it had no answer in time."""


class ProcessDidNotStart(ProcessEnded):
    """It ended before it said its line."""


class WorkerProcess:
    """`python -m MODULE ARGUMENTS`, started when it is first asked and again after it ended."""

    def __init__(
        self, module: str, arguments: Sequence[str] = (), *, interpreted: bool = False, greets_in: float | None = None
    ) -> None:
        """`interpreted`: with Triton's interpreter; `greets_in`: it says a line first, in so many seconds."""
        self.command = [sys.executable, "-m", module, *arguments]
        self.interpreted, self.greets_in = interpreted, greets_in
        self.process: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What it answers; it is killed where that takes longer.

        Raises:
            ProcessEnded: it ended in place of an answer; ProcessTooSlow where it was killed, and ProcessDidNotStart
                where it had not said its line.
        """
        if self.process is None:
            self._log.seek(0)
            self._log.truncate()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment(),
                text=True,
            )
            if self.greets_in is not None:
                try:
                    self._exchange(self.process, None, self.greets_in)
                except ProcessEnded as error:
                    raise ProcessDidNotStart(error.status, error.tail) from None
        return self._exchange(self.process, job, seconds)

    def _exchange(
        self, process: subprocess.Popen[str], job: Mapping[str, Any] | None, seconds: float
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        late = Event()

        def stop() -> None:
            late.set()
            process.kill()

        clock = Timer(seconds, stop)
        clock.start()
        try:
            if job is not None:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        if line:
            return dict(json.loads(line))
        status = process.wait()
        self.process = None
        self._log.seek(0)
        raise (ProcessTooSlow if late.is_set() else ProcessEnded)(status, self._log.read().strip().splitlines()[-3:])

    def _environment(self) -> dict[str, str]:
        """The environment of a process that finds this splagen."""
        root = str(Path(splagen.__file__).parent.parent)
        found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        found["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return found | ({"TRITON_INTERPRET": "1"} if self.interpreted else {})

    def kill(self) -> None:
        """End the process at once; the next question starts another."""
        if process := self.process:
            process.kill()
            process.wait()
            self.process = None

    def close(self) -> None:
        """Let the process end, and forget what it printed."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
        self._log.close()
