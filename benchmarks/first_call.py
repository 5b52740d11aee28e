"""The first call of an op in a fresh process: with a build, with Triton's cache, with neither, and from a spec.

python -m benchmarks.first_call examples/specs/spla.toml [--length 8192] [--heads 16] [--out DIR]

Each process has inputs on the GPU before the clock starts: the CUDA context is there.  `first_s` is the import of
triton and of the module, and the first forward and backward, all beyond `torch_s`, the import of torch; `later_s` the
second ones.  A build runs with an empty Triton cache and no C compiler on its path.  `loaded` is a process that reads a
spec which was tuned before: `module_s` is then the import of splagen and `sg.load`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import splagen
from benchmarks.record import write
from splagen import pipeline, sequence_verification, verification
from splagen.autotune import cache
from splagen.autotune.device import this_device
from splagen.autotune.entry import Entry, now
from splagen.autotune.key import Bucket, key_of
from splagen.autotune.space import spaces
from splagen.codegen.binaries import write_build
from splagen.codegen.compile import keep_module, raise_if_failed
from splagen.kinds import oracle
from splagen.spec import Spec, read_spec, to_toml
from splagen.sse_spec import SSESpec

CALL = """
import importlib.util, json, sys, time, warnings
start = time.perf_counter()
import torch
torch_imported = time.perf_counter()

path, data = sys.argv[1:]
given = [x.to("cuda") for x in torch.load(data, weights_only=True)]
given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
(torch.zeros(64, device="cuda", requires_grad=True).sort()[0] + 1).bfloat16().float().square().mean().backward()
warnings.simplefilter("error", RuntimeWarning)

def call(op):
    o = op(*given)[0]
    torch.cuda.synchronize()
    forward = time.perf_counter()
    o.float().square().mean().backward()
    torch.cuda.synchronize()
    return forward, time.perf_counter()

def loaded(path):
    if path.endswith(".toml"):
        import splagen
        return sys.modules[splagen.load(splagen.read_spec(path)).__module__]
    found = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(found)
    sys.modules["module"] = module
    found.loader.exec_module(module)
    return module

begin = time.perf_counter()
import triton
triton_imported = time.perf_counter()
compiled = []
import triton.compiler
compile_source = triton.compiler.compile
triton.compiler.compile = lambda source, *a, **k: (compiled.append(source.name), compile_source(source, *a, **k))[1]
module = loaded(path)
imported = time.perf_counter()
forward, end = call(module.forward_op)
again = time.perf_counter()
_, later = call(module.forward_op)
print(json.dumps({
    "torch_s": torch_imported - start, "first_s": end - begin, "triton_s": triton_imported - begin,
    "module_s": imported - triton_imported, "forward_s": forward - imported, "backward_s": end - forward,
    "later_s": later - again, "compiler_calls": len(compiled), "tuned": len(getattr(module, "TUNED", ())),
}))
"""


def main() -> None:
    """Measure one spec in bf16 and print the seconds of each kind of process; --out keeps a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16, help="of queries; of values for SSE")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    spec = read_spec(arguments.spec)
    truth, length, heads = oracle(to_toml(spec)), arguments.length, arguments.heads
    if isinstance(spec, SSESpec):
        x = sequence_verification.random_inputs(truth, [length], heads, torch.bfloat16, "cpu", 0)
        names = [*truth.names, "state", "cu_seqlens"]
    else:
        x = verification.random_inputs(truth, (1, heads, length), torch.bfloat16, "cpu", 0)
        names = [a.name for a in truth.partition.inputs]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        torch.save([x[n] for n in names], folder / "inputs.pt")
        plain = pipeline.generate(spec, folder).path
        rows, kept = keep_module(plain, pipeline.kernels(spec), targets=[arguments.target])
        raise_if_failed(rows)
        build = write_build(plain, kept, folder / "out", dtypes=["bf16"])
        figures = {
            "build": [_call(build.path, folder, f"empty{i}", compiler=False) for i in range(arguments.repeat)],
            "jit": [_call(plain, folder, "jit", compiler=True)],
            "cached": [_call(plain, folder, "jit", compiler=True) for _ in range(arguments.repeat)],
        }
        _store_defaults(spec, folder, Bucket.of(spec, (1, heads, length)))
        figures["loaded"] = [_call(arguments.spec, folder, "jit", compiler=True) for _ in range(arguments.repeat)]
    rows = [{"process": name, **row} for name, found in figures.items() for row in found]
    for row in rows:
        print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    print("notes:", *build.notes)
    if arguments.out:
        settings = {"spec": spec.name, "length": length, "heads": heads, "bytes": build.size}
        print(write(f"first_call_{spec.name}", settings | {"rows": rows}, arguments.out))


def _store_defaults(spec: Spec, folder: Path, bucket: Bucket) -> None:
    """Entries as a search leaves them, with the Schedules that every other process here runs."""
    part, device = pipeline.kernels(spec), this_device()
    for kernel in part.kernels:
        default = spaces(spec, part, device, "bf16")[kernel.name].default
        key = key_of(spec, kernel, "bf16", bucket, device)
        cache.put(key, Entry(default, 1.0, 0.0, "quick", now()), folder=folder / "tuned" / "schedules")


def _call(path: Path, folder: Path, cache: str, *, compiler: bool) -> dict[str, float]:
    root = str(Path(splagen.__file__).parent.parent)
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / cache), "SPLAGEN_CACHE_DIR": str(folder / "tuned")}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    if not compiler:
        environment |= {"CC": "/bin/false"}
    command = [sys.executable, "-c", CALL, str(path.resolve()), str(folder / "inputs.pt")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{path} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
