"""What the module of a build does at import: its kernels take machine code from the folder beside it.

`splagen compile --out` appends this text to the module, which needs torch and triton only; splagen itself uses it to
form the same names.  The folder holds data: a manifest and files named by the SHA-256 of what is in them.  Where
anything does not fit there is one warning, and Triton compiles when a kernel is first launched, as without a build.
"""

import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


class MachineCode:
    """The machine code beside one module, and where it came from.

    A kernel asks here before it asks Triton's compiler.  Triton's own cache is no place for it: forming a key there
    reads all of Triton's library, which takes longer than everything else at a first launch.
    """

    FORMAT = 1
    LARGEST = 1 << 28  # bytes of any file here
    DIGEST = re.compile(r"[0-9a-f]{64}")
    FILE = re.compile(r"[0-9a-f]{64}\.(json|cubin|hsaco|so)")
    EXTENSION = re.compile(r"[A-Za-z_]\w*")
    FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # of what is read here

    def __init__(self, module: Path) -> None:
        self.module = module
        self.folder = module.with_suffix(".build")
        self.manifest: dict[str, Any] = {}
        self.warned = False

    @staticmethod
    def identity(target: Any, signature: Any, constants: Any, attributes: Any, options: Any) -> str:
        """A digest of what a kernel is specialised to, and of what changes the compiler; not of its source."""
        from triton._C.libtriton import get_cache_invalidating_env_vars

        chosen = {name: str(x) for name, x in vars(options).items() if name != "extern_libs"}  # paths of this machine
        tables = (signature, constants, attributes, chosen, get_cache_invalidating_env_vars())
        parts = [sorted((str(name), str(x)) for name, x in table.items()) for table in tables]
        return hashlib.sha256(repr([MachineCode.target_name(target), *parts]).encode()).hexdigest()

    @staticmethod
    def target_name(target: Any) -> str:
        """The name of a GPU's architecture in a manifest: "cuda 90"."""
        return f"{target.backend} {target.arch}"

    def attach(self, namespace: dict[str, Any]) -> None:
        """Let the module's kernels look here first; nothing happens where kernels are interpreted."""
        import triton

        if triton.knobs.runtime.interpret:
            return
        try:
            self.manifest = self.read_manifest(triton.__version__)
            if self.manifest["python"] != sysconfig.get_config_var("EXT_SUFFIX"):
                if self.manifest["extensions"]:
                    self.warn(f"it was built by Python with {self.manifest['python']}: launchers need a C compiler")
                self.manifest["extensions"] = {}
            for name in self.manifest["driver"]:
                self.seed(name)
            for name, entries in self.manifest["kernels"].items():
                self.serve(namespace[name], entries)
        except self.FAILURES as error:
            self.warn(error)

    def read_manifest(self, version: str) -> dict[str, Any]:
        """The manifest, every name in it checked.  Raises ValueError that says what does not fit."""
        path = self.folder / "manifest.json"
        if path.stat().st_size > self.LARGEST:
            raise ValueError(f"{path.name} is too large")
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} is damaged") from error
        fields = {
            "format",
            "module",
            "triton",
            "python",
            "targets",
            "dtypes",
            "driver",
            "extensions",
            "kernels",
            "files",
        }
        if not isinstance(found, dict) or found.get("format") != self.FORMAT or found.keys() != fields:
            raise ValueError(f"{path.name} is not one that this module can read")
        if found["triton"] != version:
            raise ValueError(f"it was built by triton {found['triton']}, and this is triton {version}")
        if found["module"] != hashlib.sha256(self.module.read_bytes()).hexdigest():
            raise ValueError(f"it was built from another text of {self.module.name}")
        files, extensions = found["files"], found["extensions"]
        entries = [entry for kernel in found["kernels"].values() for entry in kernel.items()]
        if not (
            all(self.FILE.fullmatch(name) and 0 <= size <= self.LARGEST for name, size in files.items())
            and all(
                self.DIGEST.fullmatch(name) and entry.keys() == {"metadata", "binary", "launcher"}
                for name, entry in entries
            )
            and all(entry[part] in files for _, entry in entries for part in ("metadata", "binary"))
            and all(entry["launcher"] in (None, *extensions) for _, entry in entries)
            and all(name in extensions for name in found["driver"])
            and all(self.DIGEST.fullmatch(key) and self.EXTENSION.fullmatch(x["name"]) for key, x in extensions.items())
            and all(x["file"] in files for x in extensions.values())
        ):
            raise ValueError(f"{path.name} is damaged")
        return found

    def read(self, name: str) -> bytes:
        """The bytes of a listed file.  Raises ValueError where they are not those of its name."""
        path = self.folder / name
        if path.stat().st_size != self.manifest["files"][name]:
            raise ValueError(f"{name} has another size than it was written with")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise ValueError(f"{name} is damaged")
        return data

    def seed(self, key: str) -> None:
        """Put an extension module of Triton's driver where Triton looks before it calls a C compiler."""
        from triton.runtime.cache import get_cache_manager

        if found := self.manifest["extensions"].get(key):
            name = found["name"] + self.manifest["python"]
            place = get_cache_manager(key)
            if place.get_file(name) is None:
                place.put(self.read(found["file"]), name)

    def serve(self, kernel: Any, entries: dict[str, dict[str, Any]]) -> None:
        """Let a kernel look here where it would compile."""
        compile_kernel: Callable[..., Any] = kernel._do_compile

        def do_compile(
            key: Any,
            signature: Any,
            device: Any,
            constants: Any,
            options: Any,
            attributes: Any,
            *rest: Any,
            **more: Any,
        ) -> Any:
            kept, _, target, *_ = kernel.device_caches[device]
            found = self.find(kernel, entries, target, signature, constants, attributes, options)
            if found is None:
                return compile_kernel(key, signature, device, constants, options, attributes, *rest, **more)
            kept[key] = found
            return found

        kernel._do_compile = do_compile

    def find(
        self,
        kernel: Any,
        entries: dict[str, Any],
        target: Any,
        signature: Any,
        constants: Any,
        attributes: Any,
        options: Any,
    ) -> Any:
        """The compiled kernel, or None."""
        from triton import knobs
        from triton.compiler import ASTSource, CompiledKernel

        if knobs.compilation.always_compile or knobs.compilation.override or knobs.compilation.dump_ir:
            return None
        if self.target_name(target) not in self.manifest["targets"]:
            built = ", ".join(self.manifest["targets"])
            self.warn(f"it was built for {built}, and this GPU is {self.target_name(target)}")
            return None
        entry = entries.get(self.identity(target, signature, constants, attributes, options))
        if entry is None:
            return None
        try:
            metadata = json.loads(self.read(entry["metadata"]))
            self.read(entry["binary"])
            if entry["launcher"]:
                self.seed(entry["launcher"])
            group = {name: str(self.folder / name) for name in (entry["metadata"], entry["binary"])}
            return CompiledKernel(ASTSource(kernel, signature, constants, attributes), group, metadata["hash"])
        except self.FAILURES as error:
            self.warn(error)
            return None

    def warn(self, reason: str | Exception) -> None:
        """Say once why Triton compiles although there is a build."""
        if not self.warned:
            self.warned = True
            reason = reason if isinstance(reason, (str, OSError, ValueError)) else repr(reason)
            text = f"{self.folder} is not used: {reason}; Triton compiles kernels when they are first launched"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
