"""Host code of kernels: allocate what they write, launch them, return it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from splagen.codegen.kernel import Array, Kernel


def launcher_text(kernel: Kernel, grid: str, allocation: Callable[[Array], str], scalars: Sequence[str]) -> str:
    """The launcher of one kernel: `launch_NAME(n, schedule, inputs)`, which returns the outputs.

    Args:
        kernel: what is launched.
        grid: its grid as host source.
        allocation: the host source that allocates an output.
        scalars: what the launcher gives for `kernel.scalars`, as host source.
    """
    inputs = dict.fromkeys(a.name for a in kernel.inputs)
    lines = [f"def launch_{kernel.name}(n, schedule, {', '.join(inputs)}):"]
    for x in kernel.narrow:
        found = f'next((x for x in {x.values} if {x.over} <= x["{x.number}"]), {{}})'
        lines.append(f"    schedule = {{**schedule, **{found}}}")
    made = {a.name: allocation(a) for a in (*kernel.scratch, *kernel.outputs)}
    allocations = [f"    {name} = {text}" for name, text in made.items()]
    empty = [name for name, text in made.items() if text.startswith("torch.empty")]
    for t in kernel.tunable:
        if re.search(rf"\b{t}\b", grid + "".join(allocations)):
            lines.append(f'    {t} = schedule["{t}"]')
    lines += [f"    grid = {grid}", *allocations]
    tensors = [t for a in kernel.arrays for t in a.tensors]
    strides = [f"*{a.name}.stride()[:{len(a.stride_names)}]" for a in kernel.arrays if a.stride_names]
    lines += [
        "    launch(",
        f"        n, {kernel.name}_kernel, grid, schedule,",
        f"        ({', '.join(tensors)},),",
        f"        lambda: ({', '.join([*strides, *scalars])},),",
        *([f"        ({', '.join(empty)},),"] if empty else []),
        "    )",
    ]
    if kernel.outputs:
        lines.append(f"    return {', '.join(a.name for a in kernel.outputs)}")
    return "\n".join(lines) + "\n"
