"""Every kernel of a generated module compiled ahead of time, for GPUs that this machine does not have."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from splagen.codegen.decoding import Decoding
from splagen.codegen.index_kernels import index_kernels, schedule_of
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.packed_partition import PackedPartition
from splagen.codegen.partition import Partition
from splagen.codegen.prefill_partition import PrefillPartition
from splagen.codegen.schedule import DTYPES, TARGETS, Schedule
from splagen.codegen.sequence_partition import SequencePartition
from splagen.codegen.worker_process import ProcessEnded, ProcessTooSlow, WorkerProcess
from splagen.errors import CompileError, InputError

_GPU = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_TYPES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
    "int32": "i32",
    "int64": "i64",
    "e4m3": "fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")  # of the compiler, among the numbers of a Schedule
_INTEGERS = frozenset({"offsets", "tokens", "places", "writes", "reads", "chosen", "slots"})
_LENGTH, _KV_HEADS = 65_536, 2  # the sizes whose strides decide what the JIT would specialise on
_LENGTHS, _HEADS = (_LENGTH, 65_537), (_KV_HEADS, 1, 3, 4, 8, 16)  # all that it would
_SECONDS = 600  # for one kernel
ALIGNMENT = 16

Module: TypeAlias = Partition | SequencePartition | Decoding | PrefillPartition
Kept: TypeAlias = dict[str, Any]  # what `machine_code.machine_code` returns


@dataclass(frozen=True)
class Built:
    """One kernel compiled for one target, or the reason why not.

    `registers` and `spilled` (bytes) are per thread, `shared` bytes per program; `register_a` counts wgmma
    instructions with A in registers.  None is unknown on that target.
    """

    kernel: str
    arch: str
    dtype: str
    schedule: Schedule
    registers: int | None = None
    shared: int | None = None
    spilled: int | None = None
    register_a: int | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """True if there is machine code that the target can launch."""
        return self.error is None


def compile_module(
    path: str | Path,
    part: Module,
    *,
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = ("bf16",),
    jobs: int | None = None,
    progress: bool | None = None,
) -> list[Built]:
    """Compile the kernels that a generated module launches with the Schedules that stand in it: one row per job.

    Args:
        path: the module that was generated from `part`.
        part: its kernels.
        targets: some of sm_80, sm_90, sm_100, gfx942.
        dtypes: some of bf16, fp16, fp32.
        jobs: compilers side by side; None is one per CPU.
        progress: whether a bar is drawn on stderr; None is: if that is a terminal.

    Raises:
        InputError: an unknown target or dtype.
    """
    wanted = _wanted(path, part, targets, dtypes)
    with Compiler(path, part, min(jobs or os.cpu_count() or 1, len(wanted))) as compiler:
        futures = [compiler.submit(*w) for w in wanted]
        for _ in _shown(as_completed(futures), len(futures), progress):
            pass
        rows = [f.result() for f in futures]
    return rows + _undescribed(Path(path), part)


def keep_module(
    path: str | Path,
    part: Module,
    *,
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = ("bf16",),
    jobs: int | None = None,
    progress: bool | None = None,
) -> tuple[list[Built], list[Kept]]:
    """As `compile_module`, and what a process needs to launch each kernel for every contiguous tensor.

    Parameters of decoding (gains of norms, temperature) may be float32 beside 16-bit rows.

    A row is that of a kernel's first specialisation, or of the first one that failed.  Left out are strides from 2^31
    on: such a launch compiles.
    """
    wanted = _wanted(path, part, targets, dtypes)
    with Compiler(path, part, jobs) as compiler:
        futures = [compiler.keep(*w) for w in wanted]
        every = [f for several in futures for f in several]
        for _ in _shown(as_completed(every), len(every), progress):
            pass
        found = [[f.result() for f in several] for several in futures]
    rows = [next((row for row, _ in several if not row.ok), several[0][0]) for several in found]
    return rows + _undescribed(Path(path), part), [kept for several in found for _, kept in several]


def _wanted(
    path: str | Path, part: Module, targets: Sequence[str], dtypes: Sequence[str]
) -> list[tuple[Kernel, str, str, Schedule]]:
    _known("target", targets, TARGETS)
    _known("dtype", dtypes, DTYPES)
    schedules = _schedules(Path(path))
    chosen = [
        (k, arch, d, schedules[arch][d][k.name])
        for arch in targets
        for d in dtypes
        for k in launched(part, schedules[arch][d])
    ]
    index = _index(part)
    return chosen + [(k, arch, d, schedule_of(k)) for k in index for arch in targets for d in dtypes]


def _index(part: Module) -> Sequence[Kernel]:
    """The kernels that make the inverse index."""
    if isinstance(part, (PackedPartition, PrefillPartition)):
        return part.index
    return index_kernels(part.program, part.kernels) if isinstance(part, Partition) else ()


def launched(part: Module, schedules: Mapping[str, Schedule]) -> list[Kernel]:
    """The kernels that a module launches with these Schedules, by name: the chosen strategies', and the first ones'.

    A call falls back to the first strategy where another's parts would not fit into memory.
    """
    options = [(c, i, k) for c in part.strategies for i, option in enumerate(c.options) for k in option]
    taken = {k.name for c, i, k in options if i in (0, schedules[c.name]["strategy"])}
    idle = {k.name for _, _, k in options} - taken
    return [k for k in part.all_kernels if k.name not in idle]


class Compiler:
    """Compiles kernels of one generated module in processes side by side.

    What is compiled is what the JIT compiles for contiguous tensors, and lies in Triton's cache afterwards.
    """

    def __init__(
        self,
        path: str | Path,
        part: Module,
        jobs: int | None = None,
        kv_heads: int = _KV_HEADS,
    ) -> None:
        """`jobs` processes, None is one per CPU; `kv_heads` decide which strides the JIT finds aligned."""
        self.path, self.part, self.kv_heads = Path(path).resolve(), part, kv_heads
        self._count = jobs or os.cpu_count() or 1
        self._open = ExitStack()

    def __enter__(self) -> Compiler:
        self._run = self._open.enter_context(_workers(self._count))
        self._pool = ThreadPoolExecutor(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()

    def submit(self, kernel: Kernel, arch: str, dtype: str, schedule: Schedule) -> Future[Built]:
        """What a kernel becomes with a Schedule; a failure is a row too."""
        request = _request(self.path, self.part, kernel, arch, dtype, schedule, self.kv_heads)
        return self._pool.submit(lambda: _row(kernel, arch, dtype, schedule, self._run(request)))

    def keep(self, kernel: Kernel, arch: str, dtype: str, schedule: Schedule) -> list[Future[tuple[Built, Kept]]]:
        """The same with what a process needs to launch it, for each specialisation that contiguous tensors lead to."""
        requests: dict[str, dict[str, Any]] = {}
        wides = {self.part.wide, self.part.parameters} if isinstance(self.part, Decoding) else {self.part.wide}
        for chosen, length, kv_heads, wide in product(
            kernel.launched(schedule), _LENGTHS, _HEADS, sorted(wides, key=sorted)
        ):
            request = _request(self.path, self.part, kernel, arch, dtype, chosen, kv_heads, length, wide)
            request |= {"keep": True}
            requests.setdefault(json.dumps(request, sort_keys=True), request)

        def answer(request: dict[str, Any]) -> tuple[Built, Kept]:
            found = self._run(request)
            kept = found.pop("kept", {})
            return _row(kernel, arch, dtype, schedule, found), kept

        return [self._pool.submit(answer, r) for r in requests.values()]


def raise_if_failed(rows: Sequence[Built]) -> None:
    """Raise CompileError that lists the rows without machine code."""
    failed = [f"{r.kernel} for {r.arch} in {r.dtype} with {dict(r.schedule)}: {r.error}" for r in rows if not r.ok]
    if failed:
        raise CompileError(f"{len(failed)} of {len(rows)} kernels do not compile:\n" + "\n".join(failed))


def _known(what: str, given: Sequence[str], choices: Mapping[str, object]) -> None:
    for name in given:
        if name not in choices:
            raise InputError(f"unknown {what} {name!r}", f"one of {', '.join(choices)}")


def _row(kernel: Kernel, arch: str, dtype: str, schedule: Schedule, answer: dict[str, Any]) -> Built:
    limit = TARGETS[arch].shared_bytes
    if (answer.get("shared") or 0) > limit:
        answer["error"] = f"it needs {answer['shared']} bytes of shared memory; {arch} has {limit}"
    return Built(kernel.name, arch, dtype, schedule, **answer)


def _schedules(path: Path) -> dict[str, dict[str, dict[str, Schedule]]]:
    """The table of Schedules in the text of a generated module, which is not imported: that would import triton."""
    for statement in ast.parse(path.read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="SCHEDULES")]):
                return dict(ast.literal_eval(statement.value))
    raise InputError(f"{path} has no Schedules", hint="give a module that splagen has generated")


def _undescribed(path: Path, part: Module) -> list[Built]:
    """Kernels in the file that no Kernel describes would go unchecked: each is a failure."""
    described = [*part.all_kernels, *_index(part)]
    known = {f"{k.name}_kernel" for k in (*described, *(c for k in described for c in k.calls))}
    loose = [n for n in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE) if n not in known]
    return [
        Built(n.removesuffix("_kernel"), "", "", {}, error="not part of the partition: not compiled") for n in loose
    ]


# -- what the launcher would pass ------------------------------------------------------------------------


def _request(
    path: Path,
    part: Module,
    kernel: Kernel,
    arch: str,
    dtype: str,
    schedule: Schedule,
    kv_heads: int = _KV_HEADS,
    length: int = _LENGTH,
    wide: frozenset[str] | None = None,
) -> dict[str, Any]:
    """What a worker is asked; `wide` names inputs in float32, None is those that the part says."""
    wide = part.wide if wide is None else wide
    types: dict[str, str] = {}
    constants: dict[str, int] = {}
    aligned: list[str] = []
    for array in kernel.arrays:
        types |= {a: f"*{_TYPES[_element(array, a, wide, dtype)]}" for a in array.pointers}
        aligned += array.pointers
    for array in kernel.arrays:
        for name, stride in zip(array.stride_names, _strides(array, part, kv_heads, length), strict=True):
            types[name] = "constexpr" if stride == 1 else "i32"
            constants |= {name: 1} if stride == 1 else {}
            aligned += [name] if stride > 1 and stride % ALIGNMENT == 0 else []
    types |= {s: "constexpr" if s in kernel.fixed else "i32" for s in kernel.scalars}
    types |= dict.fromkeys(kernel.tunable, "constexpr")
    constants |= {s: part.fixed[s] for s in kernel.fixed}
    return {
        "module": str(path),
        "kernel": f"{kernel.name}_kernel",
        "types": types,
        "constants": constants | {name: schedule[name] for name in kernel.tunable},
        "aligned": aligned,
        "tunable": list(kernel.tunable),
        "unspecialised": list(kernel.unspecialised),
        "target": _GPU[arch],
        "options": {name: schedule[name] for name in _OPTIONS if name in schedule},
    }


def _element(array: Array, argument: str, wide: frozenset[str], dtype: str) -> str:
    """What a pointer argument of an array points to, in an op whose q has `dtype`."""
    if array.layout in ("plan", "routing"):
        return "int32" if argument.removesuffix("_ptr") in _INTEGERS else "float32"
    if array.dtype == "input":
        return "float32" if array.name in wide else dtype
    return array.dtype


def _strides(array: Array, part: Module, kv_heads: int, length: int) -> list[int]:
    """Strides of a contiguous array in elements, in the order of its stride names."""
    grouped = array.layout.startswith(("query", "value"))
    if isinstance(part, (Decoding, PrefillPartition)):
        grouped |= array.layout == "token_rows" and array.name not in part.key_rows
    heads = kv_heads * (part.group_size if grouped else 1)
    width = array.width[-1] if array.width else 1
    if array.name in ("logits", "dlogits") and isinstance(part, SequencePartition) and not part.by_head:
        return [width, 1]  # one router for all heads: [T, partitions]
    rows = [length * heads * width, heads * width, width]
    return rows[len(rows) - len(array.stride_names) :]


# -- worker processes ------------------------------------------------------------------------------------


@contextmanager
def _workers(count: int) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A function that has a request answered by one of `count` processes, from at most that many threads."""
    idle: SimpleQueue[WorkerProcess] = SimpleQueue()
    workers = [WorkerProcess("splagen.codegen.compile_worker") for _ in range(count)]
    for worker in workers:
        idle.put(worker)

    def run(request: dict[str, Any]) -> dict[str, Any]:
        worker = idle.get()
        try:
            return worker.ask(request, _SECONDS)
        except ProcessTooSlow:
            return {"error": f"the compiler was stopped after {_SECONDS} s: take smaller tiles or fewer stages"}
        except ProcessEnded as error:
            return {"error": "\n".join([f"the compiler ended with status {error.status}", *error.tail])}
        finally:
            idle.put(worker)

    try:
        yield run
    finally:
        for worker in workers:
            worker.close()


def _shown(items: Iterator[Any], total: int, progress: bool | None) -> Iterator[Any]:
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, "compiling", total=total, console=Console(stderr=True), transient=True))
