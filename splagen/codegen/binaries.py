"""A build on disk: a module, its machine code in a folder beside it, and a manifest that says what is what.

`NAME.py` is the generated module with `binary_loader` behind it; `NAME.build/` holds `manifest.json` and files whose
names are the SHA-256 of what is in them.  Nothing there is code that Python reads, and no name is a path: the two may
be moved together.  The manifest is written last: whatever a process meets meanwhile does not fit, and it compiles.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splagen.codegen import binary_loader
from splagen.codegen.binary_loader import MachineCode
from splagen.codegen.compile import Built, Kept, keep_module, raise_if_failed
from splagen.codegen.files import path_lock, replace_file, write_generated
from splagen.codegen.partition import Partition
from splagen.codegen.schedule import TARGETS
from splagen.codegen.sequence_partition import SequencePartition
from splagen.errors import GeneratedFileError


@dataclass(frozen=True)
class Build:
    """A module that finds its machine code beside it.

    `rows` say what the kernels use, one for each; `specialisations` counts what was compiled, `size` the bytes of all
    files.  `notes` say which compilers a process may still call.
    """

    path: Path
    folder: Path
    rows: tuple[Built, ...]
    specialisations: int
    size: int
    notes: tuple[str, ...]


def write_build(
    source: str | Path,
    part: Partition | SequencePartition,
    out: str | Path,
    *,
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = ("bf16",),
    jobs: int | None = None,
    progress: bool | None = None,
) -> Build:
    """Compile a generated module and write it with its machine code into `out`, in the place of an earlier build.

    Kept are the kernels with the Schedules that stand in the module, for every specialisation that contiguous tensors
    lead to; those of strides from 2^31 on are compiled when they are first launched.

    Args:
        source: the module that was generated from `part`.
        part: its kernels.
        out: the folder to write to.
        targets: some of sm_80, sm_90, sm_100, gfx942.
        dtypes: some of bf16, fp16, fp32.
        jobs: compilers side by side; None is one per CPU.
        progress: whether a bar is drawn on stderr; None is: if that is a terminal.

    Raises:
        InputError: an unknown target or dtype.
        CompileError: a kernel does not compile; nothing is written.
        GeneratedFileError: something that splagen did not write is in the way, or `out` cannot be written.
    """
    source, path = Path(source), Path(out) / Path(source).name
    rows, kept = keep_module(source, part, targets=targets, dtypes=dtypes, jobs=jobs, progress=progress)
    raise_if_failed(rows)
    text = module_text(source.read_text())
    manifest, files = _manifest(text, kept, dtypes)
    folder = MachineCode(path).folder
    try:
        with path_lock(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_generated(path, text)
            for name, data in files.items():
                if not (folder / name).exists() or (folder / name).read_bytes() != data:
                    replace_file(folder / name, data)
            replace_file(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            for old in folder.iterdir():
                if MachineCode.FILE.fullmatch(old.name) and old.name not in files:
                    old.unlink()
    except OSError as error:  # filelock's Timeout is one too
        raise GeneratedFileError(f"cannot write {folder}: {error}", "choose another folder") from error
    notes = tuple(dict.fromkeys(k["note"] for k in kept if k["note"]))
    return Build(path, folder, tuple(rows), len(kept), sum(map(len, files.values())), notes)


def module_text(generated: str) -> str:
    """A generated module that looks for its machine code when it is imported.

    The text goes behind the kernels: Triton knows them by their lines.
    """
    _, _, loader = Path(binary_loader.__file__).read_text().split('"""', 2)
    call = "MachineCode(Path(__file__)).attach(globals())"
    return f"{generated}\n\n# Machine code beside this module, if it fits.\n{loader}\n\n{call}\n"


def _manifest(text: str, kept: Sequence[Kept], dtypes: Sequence[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of a build and its files by name."""
    files: dict[str, bytes] = {}

    def add(path: str, suffix: str) -> str:
        data = Path(path).read_bytes()
        name = hashlib.sha256(data).hexdigest() + suffix
        files[name] = data
        return name

    kernels: dict[str, dict[str, Any]] = {}
    extensions: dict[str, dict[str, str]] = {}
    for k in kept:
        kernels.setdefault(k["kernel"], {})[k["identity"]] = {
            "metadata": add(k["metadata"], ".json"),
            "binary": add(k["binary"], Path(k["binary"]).suffix),
            "launcher": k["launcher"],
        }
        for key, found in k["extensions"].items():
            extensions[key] = {"name": found["name"], "file": add(found["path"], ".so")}
    manifest = {
        "format": MachineCode.FORMAT,
        "module": hashlib.sha256(text.encode()).hexdigest(),
        "triton": kept[0]["triton"],
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "targets": sorted({k["target"] for k in kept}),
        "dtypes": list(dtypes),
        "driver": sorted({key for k in kept for key in k["driver"]}),
        "extensions": extensions,
        "kernels": kernels,
        "files": {name: len(data) for name, data in files.items()},
    }
    return manifest, files
