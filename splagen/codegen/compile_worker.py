"""Compile kernels on request: one JSON job per line in, one JSON result per line out.

Run by `splagen.codegen.compile` in processes of their own, because Triton decides when it is imported whether
kernels are compiled or interpreted, and because a compiler that crashes must not take the caller along.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from splagen.codegen.files import import_file
from splagen.codegen.machine_code import machine_code

TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell multiprocessor


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel for one target: what it uses of the machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(imported(job["module"]), job["kernel"])
    types, constants = job["types"], job["constants"]
    if list(kernel.arg_names) != list(types):
        raise TypeError(f"its arguments are {', '.join(kernel.arg_names)}; the launcher gives {', '.join(types)}")
    # every argument that the JIT specialises has attributes, if only none: the key of Triton's cache holds them
    aligned = {
        (i,): [["tt.divisibility", 16]] if name in job["aligned"] else []
        for i, name in enumerate(types)
        if types[name] != "constexpr" and name not in job["unspecialised"]
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(*job["target"]), options=job["options"])
    seconds = time.perf_counter() - start
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        raise MemoryError(f"it needs {columns} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}")
    found = {"shared": compiled.metadata.shared, "seconds": seconds, **resources(compiled.asm)}
    return found | ({"kept": machine_code(kernel, job)} if job.get("keep") else {})


@functools.cache
def imported(path: str) -> ModuleType:
    """A generated module, imported once."""
    return import_file(Path(path))


def resources(asm: dict[str, Any]) -> dict[str, int | None]:
    """Registers and spilled bytes per thread, and wgmmas with A in registers; None where that is unknown."""
    if "cubin" in asm:
        return {**_nvidia(asm["cubin"]), "register_a": register_a_wgmmas(asm["ptx"])}
    if "amdgcn" in asm:
        return {**_amd(asm["amdgcn"]), "register_a": None}
    return {"registers": None, "spilled": None, "register_a": None}


def _nvidia(cubin: bytes) -> dict[str, int | None]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {"registers": None, "spilled": None}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def _amd(assembly: str) -> dict[str, int | None]:
    found = dict(re.findall(r"^\s*\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly, re.MULTILINE))
    registers, scratch = found.get("vgpr_count"), found.get("private_segment_fixed_size")
    return {"registers": registers and int(registers), "spilled": scratch and int(scratch)}


def register_a_wgmmas(ptx: str) -> int:
    """Count Hopper's wgmma whose first operand comes from registers: the form of the known miscompiles.

    Its operands are the accumulator in braces, then A: a descriptor in one register, or more braces.
    """
    instructions = re.findall(r"wgmma\.mma_async[^;]*;", re.sub(r"\.loc[^\n]*", "", ptx))
    return sum(len(re.findall(r"\{[^}]*\}", instruction)) > 1 for instruction in instructions)


def failure(error: BaseException) -> str:
    """The exception with its causes in one text: Triton keeps the reason in the cause."""
    texts = []
    link: BaseException | None = error
    while link is not None:
        texts.append(f"{type(link).__name__}: {link}".strip())
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(texts)


def main() -> None:
    """Answer jobs until the input ends; whatever compilers print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = build(json.loads(line))
        except Exception as error:  # every failure is a row of the report
            answer = {"error": failure(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
