"""From kernels to text: Jinja templates filled with holes, keys checked in both directions."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2 import meta

import splagen
from splagen.codegen.kernel import Array, Kernel
from splagen.errors import PartitionError
from splagen.ir.text import equation_text


def template_directory() -> Path:
    """Where the templates lie: beside the modules in an installed package, at the top of a checkout."""
    package = Path(splagen.__file__).parent
    for place in (package / "templates", package.parent / "templates"):
        if place.is_dir():
            return place
    raise PartitionError(f"no templates beside {package}", hint="reinstall splagen")


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja environment of every template: an undefined hole is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_directory()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(template: str, holes: Mapping[str, object]) -> str:
    """Fill a template.  Raises PartitionError if its variables and the holes are not the same set."""
    declared = _variables(template)
    if declared != holes.keys():
        missing, unused = sorted(declared - holes.keys()), sorted(holes.keys() - declared)
        raise PartitionError(f"template {template}: holes without a value {missing}, values without a hole {unused}")
    text = environment().get_template(f"{template}.jinja").render(dict(holes))
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text)).rstrip() + "\n"


@functools.cache
def _variables(template: str) -> frozenset[str]:
    """The holes of a template."""
    source = (template_directory() / f"{template}.jinja").read_text(encoding="utf-8")
    return frozenset(meta.find_undeclared_variables(environment().parse(source)))


@functools.lru_cache(maxsize=512)
def kernel_text(kernel: Kernel) -> str:
    """Device code of one kernel, behind that of the kernels that it calls."""
    pointers = [name for a in kernel.arrays for name in a.pointers]
    strides = [name for a in kernel.arrays for name in a.stride_names]
    scalars = [f"{s}: tl.constexpr" if s in kernel.fixed else s for s in kernel.scalars]
    place = {"batch": kernel.batch, "number": kernel.number}
    holes = {
        **{name: place[name] for name in place.keys() & _variables(kernel.template)},
        "doc": "\n    ".join(equation_text(eq) for eq in kernel.covers) + "\n    ",
        **kernel.holes,
        "name": f"{kernel.name}_kernel",
        "arguments": ",\n    ".join([*pointers, *strides, *scalars]),
    }
    unspecialised = ", ".join(f'"{s}"' for s in kernel.unspecialised)
    body = re.sub(r"\n{3,}", "\n\n", render(kernel.template, holes))
    called = [f"{kernel_text(k)}\n\n" for k in kernel.calls]
    return "".join([*called, f"@triton.jit(do_not_specialize=[{unspecialised}])\n", without_unused(body)])


def without_unused(function: str) -> str:
    """A function's source without assignments that nothing reads: a hole may leave an index or a mask unread."""
    nodes = list(ast.walk(ast.parse(function)))
    reads = [(n.id, n.lineno) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    writes = [
        ({getattr(t, "id", None) for t in _targets(node)}, node.lineno)  # None: a target that is no name
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.lineno == node.end_lineno
    ]
    dead: set[int] = set()
    while True:
        read = {None, *(name for name, line in reads if line not in dead)}
        found = {line for names, line in writes if not names & read} - dead
        if not found:
            lines = function.splitlines(keepends=True)
            return "".join(line for i, line in enumerate(lines, 1) if i not in dead)
        dead |= found


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def unique(*groups: Sequence[Array]) -> list[Array]:
    """Arrays in order, each name once."""
    return list({a.name: a for group in groups for a in group}.values())
