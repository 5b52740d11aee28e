"""What a process needs to launch a kernel without a compiler: the files, and the names they are looked up by."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splagen.codegen.binary_loader import MachineCode

_C_COMPILER = "a machine's first process with Triton calls a C compiler for Triton's driver: "


def machine_code(kernel: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The files of one specialisation of a kernel, as Triton itself compiles it for a launch.

    The launch is one of tensors that are not there, on a GPU that is not there: Triton decides what to specialise on.
    `extensions` are modules of Triton's driver, by their key in its cache; `note` says why some of them are missing.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget(*job["target"])
    driver.set_active(_AbsentGPU(target))
    kernel.device_caches.clear()
    compile_kernel = kernel._do_compile
    asked: list[str] = []

    def do_compile(
        key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, *rest: Any
    ) -> Any:
        asked.append(MachineCode.identity(target, signature, constants, attributes, options))
        return compile_kernel(key, signature, device, constants, options, attributes, *rest)

    kernel._do_compile = do_compile
    try:
        pointers = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        pointers |= {"i32": torch.int32, "i64": torch.int64, "fp8e4nv": torch.float8_e4m3fn}
        compiled = kernel.warmup(
            *(_argument(job, name, pointers) for name in job["types"] if name not in job["tunable"]),
            **{name: job["constants"][name] for name in job["tunable"]} | job["options"],
            grid=(1,),
        )
    finally:
        del kernel._do_compile
    files = {Path(p).suffix: str(p) for p in compiled.metadata_group.values()}
    found: dict[str, Any] = {
        "kernel": job["kernel"],
        "triton": triton.__version__,
        "target": MachineCode.target_name(target),
        "identity": asked[0],
        "metadata": files[".json"],
        "binary": files[".cubin" if target.backend == "cuda" else ".hsaco"],
        "launcher": None,
        "driver": [],
        "extensions": {},
        "note": None,
    }
    return found | (_extensions(compiled) if target.backend == "cuda" else {"note": _C_COMPILER + "AMD's is not kept"})


def _extensions(compiled: Any) -> dict[str, Any]:
    try:
        modules, launchers = _driver_modules(), _launcher_modules(compiled)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return {"note": f"{_C_COMPILER}here it failed: {error}"}
    return {
        "driver": list(modules),
        "launcher": next(iter(launchers), None),
        "extensions": modules | launchers,
        "note": None if modules else f"{_C_COMPILER}its name holds the folder of libcuda.so.1, which is not here",
    }


def _argument(job: dict[str, Any], name: str, pointers: dict[str, Any]) -> Any:
    """An argument of a launch with the type and the divisors that a job gives it."""
    kind = job["types"][name]
    if kind.startswith("*"):
        return pointers[kind[1:]]
    if kind == "constexpr":
        return job["constants"][name]
    return 48 if name in job["aligned"] else 49


class _AbsentGPU:
    """As much of a driver of Triton as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


# -- what Triton's driver compiles for itself ------------------------------------------------------------


@functools.cache
def _driver_modules() -> dict[str, dict[str, str]]:
    """The module through which the driver speaks to a GPU, where its key does not depend on this machine."""
    from triton.backends.nvidia import driver as nvidia

    if not _compiles_launchers():
        try:
            nvidia.library_dirs()
        except Exception:  # the key holds the folder of the GPU's own library, and there is none
            return {}
    with _recorded() as found:
        nvidia.CudaUtils()
    return found


def _launcher_modules(compiled: Any) -> dict[str, dict[str, str]]:
    """The launcher of a kernel's signature, where this Triton compiles one; later ones have one launcher for all."""
    from triton.backends.nvidia import driver as nvidia

    if not _compiles_launchers():
        return {}
    with _recorded() as found:
        nvidia.CudaLauncher(compiled.src, compiled.metadata)
    return found


def _compiles_launchers() -> bool:
    from triton.backends.nvidia import driver as nvidia

    return hasattr(nvidia, "make_launcher")


@contextmanager
def _recorded() -> Iterator[dict[str, dict[str, str]]]:
    """The extension modules that Triton compiles or finds meanwhile, by key; none is loaded, as that needs a GPU."""
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    found: dict[str, dict[str, str]] = {}
    keys: list[str] = []
    open_place, load = build.get_cache_manager, build._load_module_from_path

    def opened(key: str) -> Any:
        keys.append(key)
        return open_place(key)

    def loaded(name: str, path: str) -> Any:
        found[keys[-1]] = {"name": name, "path": path}
        return _Anything()

    build.get_cache_manager, build._load_module_from_path = opened, loaded
    try:
        nvidia.library_dirs()
    except Exception:
        knobs.nvidia.libcuda_path = str(_library_of_names())
    try:
        yield found
    finally:
        build.get_cache_manager, build._load_module_from_path = open_place, load


class _Anything:
    """Stands for a module that is not loaded: it has every name."""

    def __getattr__(self, name: str) -> None:
        return None


@functools.cache
def _library_of_names() -> Path:
    """A folder with a libcuda.so.1 that has the names of the real one: enough to link against."""
    from triton.backends.nvidia import driver as nvidia

    here = Path(nvidia.__file__).parent
    texts = [path.read_text() for path in (here / "driver.c", here / "driver.py")]
    names = sorted({name for text in texts for name in re.findall(r"\b(cu[A-Z]\w*)\s*\(", text)})
    folder = Path(tempfile.mkdtemp(prefix="splagen-libcuda-"))
    source = folder / "names.c"
    source.write_text("\n".join(f"void {name}(void) {{}}" for name in names) + "\n")
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder
