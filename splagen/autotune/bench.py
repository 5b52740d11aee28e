"""Measuring Schedules: candidates compiled side by side in processes, survivors timed in one that can be killed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from splagen.autotune.search import Lost, Measurement, Outcome, Reason, identity
from splagen.codegen.compile import Compiler
from splagen.codegen.kernel import Kernel, Splitting
from splagen.codegen.schedule import Schedule
from splagen.codegen.worker_process import ProcessDidNotStart, ProcessEnded, WorkerProcess
from splagen.errors import TuningError
from splagen.verification import Shape

WORKER, STEP_WORKER = "splagen.autotune.worker", "splagen.autotune.step_worker"
SECONDS = 60.0  # for one measurement, after which its process is killed
START_SECONDS = 300.0  # for the op's first run
MOST_SPILLED = 4096  # bytes per thread: such a kernel is never the fastest


class Bench:
    """Times kernels of a generated module at a shape (B, H, L), one at a time on the GPU.

    Attributes:
        wrong: Schedules whose results differ from the default's, or that end the process, and what was seen.
    """

    def __init__(
        self,
        module: Path,
        compiler: Compiler | None,
        dtype: str,
        arch: str,
        shape: Shape,
        alike: float = 0.0,
        worker: str = WORKER,
    ) -> None:
        """`compiler` compiles candidates before they are timed; None where kernels are interpreted, on the CPU.

        `alike`: how much neighbouring queries have in common, 0 to 1 (`worker.related`).  `worker`: the module that
        the process runs; `STEP_WORKER` for a module of decoding.
        """
        self.dtype, self.arch, device = dtype, arch, "cuda" if compiler else "cpu"
        arguments = [str(module), dtype, device, *map(str, shape), "--alike", str(alike)]
        self.compiler = compiler
        self.wrong: list[tuple[str, Schedule, str]] = []
        self.built: dict[tuple[str, frozenset[tuple[str, int]]], Lost | None] = {}
        self._gpu = threading.Lock()
        self._stopped = False
        self._worker = WorkerProcess(worker, arguments, interpreted=compiler is None, greets_in=START_SECONDS)

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._worker.close()

    def stop(self) -> None:
        """End the process; every measurement from now on fails, so that searches side by side end soon."""
        self._stopped = True
        self._worker.kill()

    def prepare(self, wanted: Sequence[tuple[Kernel, Schedule]]) -> None:
        """Compile kernels side by side; those that do not fit are lost before they are timed."""
        if self.compiler is None:
            return
        fresh = [(k, s) for k, s in wanted if (k.name, identity(s)) not in self.built]
        rows = [self.compiler.submit(k, self.arch, self.dtype, s) for k, s in fresh]
        for (kernel, schedule), future in zip(fresh, rows, strict=True):
            row = future.result()
            lost: Lost | None = None
            if row.error is not None and "shared memory" in row.error:
                lost = Lost("out of resources", row.error)
            elif row.error is not None and "CompileTimeAssertionFailure" in row.error:
                lost = Lost("compile-time assertion", row.error)
            elif row.error is not None:
                raise TuningError(f"{kernel.name} with {dict(schedule)} does not compile: {row.error}")
            elif (row.spilled or 0) > MOST_SPILLED:
                lost = Lost("out of resources", f"{row.spilled} bytes spilled per thread")
            self.built[kernel.name, identity(schedule)] = lost

    def measure(
        self,
        kernel: Kernel | Splitting,
        schedule: Schedule,
        shared: Mapping[str, int],
        repetitions: int,
        schedules: Mapping[str, Schedule] | None = None,
    ) -> Outcome:
        """Time one Schedule.  `shared`: the CHUNK of kernels that agree with this one, by name.

        Of a splitting the whole step is timed, where kernels have the `schedules` given.

        Raises:
            TuningError: the kernel failed for no reason that a Schedule explains, or the op does not run.
        """
        lost = self.built.get((kernel.name, identity(schedule)))
        if lost is not None:
            return lost
        job: dict[str, Any] = {"kernel": kernel.name, "schedule": dict(schedule), "shared": dict(shared)}
        job |= {"repetitions": repetitions, "schedules": {n: dict(s) for n, s in (schedules or {}).items()}}
        with self._gpu:
            answer = self._answer(job)
        if "lost" in answer:
            return Lost(*answer["lost"])
        if "error" in answer:
            return self._wrong(kernel, schedule, "wrong result", f"differs from the default's by {answer['error']:.1e}")
        if "crash" in answer:
            return self._wrong(kernel, schedule, "crash", answer["crash"])
        if "failed" in answer:
            raise TuningError(answer["failed"])
        return Measurement(answer["ms"], answer["spread"])

    def _wrong(self, kernel: Kernel | Splitting, schedule: Schedule, reason: Reason, message: str) -> Lost:
        self.wrong.append((kernel.name, schedule, message))
        return Lost(reason, message)

    def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._stopped:
            raise TuningError("tuning was stopped")
        try:
            answer = self._worker.ask(job, SECONDS)
        except ProcessDidNotStart as error:
            what = f"the op does not run with default Schedules: its process ended with status {error.status}"
            raise TuningError(f"{what}: {' / '.join(error.tail)}") from error
        except ProcessEnded as error:
            if self._stopped:
                raise TuningError("tuning was stopped") from error
            return {"crash": f"ended its process with status {error.status} after at most {SECONDS:.0f} s"}
        if "crash" in answer:
            self._worker.kill()
        return answer
