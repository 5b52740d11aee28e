"""One importable module per spec for decoding: kernels, launchers, Schedules, scratch, the step and its op."""

from __future__ import annotations

import re
from dataclasses import replace

from splagen.codegen.decoding import LEAST_SPLIT, Decoding, decode_schedules
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.launchers import launcher_text
from splagen.codegen.module_holes import content_of, equations_text, head, launch_line, schedule_text, sources
from splagen.codegen.render import render
from splagen.codegen.step_rows import PageType
from splagen.errors import PartitionError
from splagen.spec import SPLASpec

FUNCTIONS = (
    *("log1p", "tanh", "dot_split", "largest_in_order", "leading_factor", "one_of", "load_both", "round_e4m3"),
    *("wait_for_earlier", "let_next_begin"),
)


def decode_module_text(part: Decoding, spec: SPLASpec, *, digest: str, spec_text: str) -> str:
    """The source of the generated module."""
    kernels = sources(part.kernels, _launcher)
    schedules = decode_schedules(part)
    geometry = part.geometry
    by_token = [a.name for a in part.tokens if a.layout == "token_rows"]
    tokens = [a.name for a in part.tokens]
    title, equations = f"{stem(spec, part.page_type)}_{digest}", equations_text(part.program.equations)
    scales = [a.name for a in part.scales]
    kept = (*part.pages, *part.states, *part.scales, *part.scratch)
    cache = ["page_table", "seqlens", "settled", *(a.name for a in kept)]
    constants: dict[str, object] = {"GROUP": geometry.group, "TILE": 1, "BLOCK": geometry.block}
    if part.budget:
        constants["BUDGET"] = part.budget
    constants["COMPILED"] = "not triton.knobs.runtime.interpret"
    return render(
        "decode_module",
        {
            **head(title, ": a few tokens per sequence", equations, spec_text, kernels, FUNCTIONS),
            "constants": constants,
            "name": spec.name,
            "op": f"{spec.name}_{digest}_{content_of(kernels, schedules)}_decode",
            "tokens": tokens,
            "by_token": by_token,
            "cache": cache,
            "mutated": [n for n in cache if n not in ("page_table", *scales)],
            "calls": "\n".join(launch_line(k.name, k.arrays) for k in part.kernels),
            "schedules": schedule_text(schedules),
            "scratch": [{"name": a.name, "shape": _shape(a, part), "dtype": _dtype(a)} for a in part.scratch],
            "first_page": part.pages[0].name,
            "page_type": part.page_type,
            "typed": cache.index(scales[0] if scales else part.pages[0].name),
            "rows": [_row(a, part) for a in part.tokens],
            "value_dim": geometry.value_dim,
            "head_dim": geometry.head_dim,
            "cell": geometry.cell,
            "selects": bool(part.budget),
            "reach": part.reach,
            "least_split": LEAST_SPLIT,
            "least_chunk": part.chunk(0),
            "full_chunk": part.fixed["CHUNK"],
            "most_chunk": part.chunk(1 << 30),
        },
    )


def stem(spec: SPLASpec, page_type: PageType) -> str:
    """The name of a module of decoding, without its digest."""
    return f"{spec.name}_decode" + ("" if page_type == "input" else f"_{page_type}")


def _launcher(kernel: Kernel) -> str:
    """The launcher of a kernel, which counts the splits of the scores or those of the attention."""
    splits = "n.SCORE_SPLITS" if kernel.template in ("decode_score", "decode_select") else "n.ATTEND_SPLITS"
    fields = {x: f"n.{x}" for x in (*kernel.scalars, "TOKENS", "B", "Hq", "Hkv", "CHUNKS")} | {"SPLITS": splits}

    def of_sizes(text: str) -> str:
        return re.sub(r"\w+", lambda word: fields.get(word[0], word[0]), text)

    inputs = {a.name: a for a in (*kernel.inputs, *kernel.outputs)}
    narrow = tuple(replace(x, over=of_sizes(x.over)) for x in kernel.narrow)
    given = replace(kernel, inputs=tuple(inputs.values()), outputs=(), narrow=narrow)
    return launcher_text(given, of_sizes(kernel.grid), _dtype, [fields[s] for s in kernel.scalars])


def _dtype(a: Array) -> str:
    return "dtype" if a.dtype == "input" else f"torch.{a.dtype}"


def _shape(a: Array, part: Decoding) -> str:
    """Host source of the shape of a scratch array."""
    width = [str(w) for w in a.width]
    if a.layout == "token_rows":
        return ", ".join(["rows", "Hq", *width])
    if a.name.endswith("_parts"):
        return ", ".join(["rows", "Hkv", "attend_splits", "GROUP.value", *width])
    match a.name:
        case "lengths":
            return "rows,"
        case "scores":
            return "rows, Hq, tokens // CELL"
        case "score_max" | "score_sum":
            return "rows, Hq, score_splits + 1"
        case "candidate_keys" | "candidate_blocks" | "candidate_places":
            return f"rows, Hkv, chunks, {part.kept}"
        case "block_indices" | "block_places":
            return f"rows, Hkv, {part.budget}"
        case "arrived":
            return "rows, Hkv"
    raise PartitionError(f"nobody allocates {a.name}")


def _row(a: Array, part: Decoding) -> dict[str, object]:
    """Name and shape of what a caller gives, as the check wants it."""
    if a.layout == "kv_head_scalars":
        return {"name": a.name, "shape": "(n.Hkv,)", "like": False, "by_token": False}
    if a.layout == "head_rows":
        return {"name": a.name, "shape": f"(n.Hq, {part.geometry.value_dim})", "like": False, "by_token": False}
    heads = "n.Hkv" if any(p.name == f"{a.name}_pages" for p in part.pages) else "n.Hq"
    width = f", {a.width[0]}" if a.width else ""
    return {"name": a.name, "shape": f"({heads}{width},)", "like": bool(a.width), "by_token": True}
