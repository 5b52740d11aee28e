"""A build on disk: a module, its machine code in a folder beside it, and a manifest that says what is what.

`NAME.py` is the generated module with `binary_loader` behind it; `NAME.build/` holds `manifest.json` and files whose
names are the SHA-256 of what is in them.  Nothing there is code that Python reads, and no name is a path: the two may
be moved together.  The module holds the digest of the manifest, which is written last: whatever a process meets
meanwhile does not fit, and it compiles.
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
from splagen.codegen.compile import Kept
from splagen.codegen.files import path_lock, replace_file, write_generated
from splagen.errors import GeneratedFileError


@dataclass(frozen=True)
class Build:
    """A module that finds its machine code beside it.

    `specialisations` counts the kernels, each as often as it was specialised; `size` is the bytes of all files;
    `notes` say which compilers a process may still call.
    """

    path: Path
    folder: Path
    specialisations: int
    size: int
    notes: tuple[str, ...]


def write_build(source: str | Path, kept: Sequence[Kept], out: str | Path, *, dtypes: Sequence[str]) -> Build:
    """Write a generated module with its machine code into `out`, in the place of an earlier build.

    Args:
        source: the generated module.
        kept: what `keep_module` made of it; no row of it may have failed.
        out: the folder to write to.
        dtypes: what `keep_module` was told, for the manifest.

    Raises:
        GeneratedFileError: something that splagen did not write is in the way, or `out` cannot be written.
    """
    source, path = Path(source), Path(out) / Path(source).name
    generated = source.read_text()
    manifest, files = _manifest(generated, kept, dtypes)
    text = module_text(generated, manifest)
    folder = MachineCode(path).folder
    try:
        with path_lock(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_generated(path, text)
            for name, data in files.items():
                if not (folder / name).exists() or (folder / name).read_bytes() != data:
                    replace_file(folder / name, data)
            replace_file(folder / "manifest.json", manifest)
            for old in folder.iterdir():
                if MachineCode.FILE.fullmatch(old.name) and old.name not in files:
                    old.unlink()
    except OSError as error:  # filelock's Timeout is one too
        raise GeneratedFileError(f"cannot write {folder}: {error}", "choose another folder") from error
    notes = tuple(dict.fromkeys(k["note"] for k in kept if k["note"]))
    return Build(path, folder, len(kept), sum(map(len, files.values())), notes)


def module_text(generated: str, manifest: str) -> str:
    """A generated module that looks for its machine code, that of this manifest, when it is imported.

    The text goes behind the kernels: Triton knows them by their lines.
    """
    _, _, loader = Path(binary_loader.__file__).read_text().split('"""', 2)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    call = f'MachineCode(Path(__file__), "{digest}").attach(globals())'
    return f"{generated}{MachineCode.BEHIND}{loader}\n\n{call}\n"


def _manifest(generated: str, kept: Sequence[Kept], dtypes: Sequence[str]) -> tuple[str, dict[str, bytes]]:
    """The manifest of a build as JSON, and its files by name."""
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
        "module": MachineCode.text_digest(generated),
        "triton": kept[0]["triton"],
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "targets": sorted({k["target"] for k in kept}),
        "dtypes": list(dtypes),
        "driver": sorted({key for k in kept for key in k["driver"]}),
        "extensions": extensions,
        "kernels": kernels,
        "files": {name: len(data) for name, data in files.items()},
    }
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n", files
