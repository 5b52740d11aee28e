"""What the module of a build does at import: its kernels take machine code from the folder beside it.

`splagen compile --out` appends this text to the module, which needs torch and triton only; splagen itself uses it to
form the same names.  The folder holds data: a manifest, whose SHA-256 the module knows, and files named by theirs.
Where anything does not fit there is one warning, and Triton compiles when a kernel is first launched, as without a
build.
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

    BEHIND = "\n\n# Machine code beside this module, if it fits.\n"
    LARGEST = 1 << 28  # bytes of any file here
    FILE = re.compile(r"[0-9a-f]{64}\.(json|cubin|hsaco|so)")
    FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # of what is read here

    def __init__(self, module: Path, digest: str = "") -> None:
        """`digest` is that of the manifest, and with it of everything that is read here."""
        self.module, self.digest = module, digest
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
        """The manifest that this module was built with.  Raises ValueError that says what does not fit."""
        path = self.folder / "manifest.json"
        if path.stat().st_size > self.LARGEST or hashlib.sha256(data := path.read_bytes()).hexdigest() != self.digest:
            raise ValueError(f"{path.name} is damaged, or of another build")
        found: dict[str, Any] = json.loads(data)
        if found["triton"] != version:
            raise ValueError(f"it was built by triton {found['triton']}, and this is triton {version}")
        if found["module"] != self.text_digest(self.module.read_text()):
            raise ValueError(f"it was built from another text of {self.module.name}")
        return found

    @classmethod
    def text_digest(cls, text: str) -> str:
        """The digest of a generated module, without what a build puts behind it."""
        return hashlib.sha256(text.partition(cls.BEHIND)[0].encode()).hexdigest()

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
