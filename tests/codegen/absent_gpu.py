"""Run in a process of its own: launch a generated module's kernels, by its own launchers, on a GPU that is not there.

    python absent_gpu.py MODULE.py CAPABILITY ARCH DTYPE KV_HEADS [KV_HEADS ...]

Triton's JIT decides what to compile; tensors lie on the CPU, and a launch does nothing.  Prints one JSON document:
the kernels launched, those that Triton's compiler was asked for, programs started (ptxas, a C compiler), warnings.
"""

import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.driver import driver

from splagen.codegen.files import import_file

LENGTHS = (80, 77)
launched: list[str] = []
compiled: list[str] = []
started: list[str] = []


class Driver:
    """What the JIT asks of a driver; a launcher is looked for as the real one does it, but not loaded."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda *a: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        launch=None,
    )

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        if hasattr(nvidia, "make_launcher"):  # later ones need none of a kernel's own
            nvidia.CudaLauncher(source, metadata)
        return lambda *a: launched.append(source.name)


class Loaded:
    """Stands for an extension module."""

    def __getattr__(self, name: str) -> None:
        return None


def watch(arch: int) -> None:
    driver.set_active(Driver(arch))
    triton.knobs.nvidia.libcuda_path = "/nowhere"
    build._load_module_from_path = lambda name, path: Loaded()
    compile_source, start = triton.compiler.compile, subprocess.Popen.__init__

    def counted(source: Any, *rest: Any, **named: Any) -> Any:
        compiled.append(source.name)
        return compile_source(source, *rest, **named)

    def begun(self: Any, command: Any, *rest: Any, **named: Any) -> None:
        started.append(Path(command if isinstance(command, str) else command[0]).name)
        start(self, command, *rest, **named)

    triton.compiler.compile = counted
    subprocess.Popen.__init__ = begun  # type: ignore[method-assign]
    torch.empty = torch.zeros  # type: ignore[assignment]  # outputs that nothing wrote are read as indices


def launch_all(module: Any, arch: str, dtype: str, length: int, heads: int, strategies: Sequence[int] = ()) -> None:
    """Every launcher of a module, forward and backward (and step), for so many positions and key heads.

    Of strategies those that are asked for, else the first and those that the Schedules choose.
    """
    from splagen import sequence_verification, verification
    from splagen.kinds import oracle

    if hasattr(module, "scratch"):
        launch_step(module, arch, dtype, length, heads)
        return
    truth = oracle(module.SPEC)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    schedules = module.SCHEDULES[arch][dtype]
    if hasattr(module, "step"):
        heads *= truth.spec.group_size
        given = sequence_verification.random_inputs(truth, [length], heads, kind, "cpu", 0)
        arguments = [given[n] for n in (*truth.names, "state", "cu_seqlens")]
        outputs = ("o", "final", *(["balance"] if "dbalance" in given else []))
        module.forward(schedules, *arguments)
        module.backward(schedules, *arguments, *(given[f"d{n}"] for n in outputs))
        one = sequence_verification.random_inputs(truth, [1, 1], heads, kind, "cpu", 0)
        module.step(schedules, *(one[n] for n in truth.names), one["state"], torch.arange(2, dtype=torch.int32))
        return
    part = truth.partition
    shape = (1, heads * module.GROUP.value, length)
    given = verification.random_inputs(truth, shape, kind, "cpu", 0)
    inputs = [given[a.name] for a in part.inputs]
    names = [a.name for a in (*part.outputs, *part.saved)]
    for strategy in strategies or sorted({0, *(schedules[c.name]["strategy"] for c in part.strategies)}):
        chosen = {**schedules, **{c.name: {"strategy": strategy} for c in part.strategies}}
        found = dict(
            zip([a.name for a in part.inputs] + names, [*inputs, *module.forward(chosen, *inputs)], strict=True)
        )
        kept = [found[a.name] for a in part.residuals]
        module.backward(chosen, *inputs, *kept, *(given[a.name] for a in part.cotangents))


def launch_step(module: Any, arch: str, dtype: str, length: int, heads: int) -> None:
    """A step of decoding on a cache; gains of norms in float32 and in the dtype of q."""
    from splagen.codegen.decoding import decoding
    from splagen.paged_cache import SPLACache
    from splagen.spec import from_toml

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    spec: Any = from_toml(module.SPEC)
    library: Any = SimpleNamespace(spec=spec, module=module, part=decoding(spec, module.PAGE_TYPE))
    cache = SPLACache(library, sequences=2, kv_heads=heads, tokens=length, dtype=kind, device="cpu")
    group, width = module.GROUP.value, library.spec.head_dim
    rows = [torch.zeros(2, n, width, dtype=kind) for n in (heads * group, heads, heads)]
    for gains in (torch.float32, kind):
        parameters = [torch.zeros(heads * group, width, dtype=gains) for _ in cache.part.tokens[3:]]
        module.step(module.SCHEDULES[arch][dtype], *rows, *parameters, *cache.tensors(module.SPEC), rows[0].clone())


def valid_routes(module: Any) -> None:
    """Nothing has routed a token: give each the first partitions, so that the plan's indices lie in range."""
    plan = getattr(module, "routed_plan", None)

    def routed(n: Any, whole: Any, ends: Any, eta: Any, writes: Any, reads: Any, chosen: Any) -> Any:
        writes[:, : module.CHOICES] = 1
        chosen.copy_(torch.arange(module.CHOICES).expand_as(chosen))
        return plan(n, whole, ends, eta, writes, reads, chosen)

    if plan is not None:
        module.routed_plan = routed


def main(path: Path, gpu: int, arch: str, dtype: str, heads: list[int]) -> None:
    watch(gpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        module = import_file(path)
        imported = time.perf_counter() - start
        valid_routes(module)
        for length, count in itertools.product(LENGTHS, heads):
            launch_all(module, arch, dtype, length, count)
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    print(
        json.dumps(
            {"launched": launched, "compiled": compiled, "started": started, "warnings": told, "import": imported}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], [int(x) for x in sys.argv[5:]])
