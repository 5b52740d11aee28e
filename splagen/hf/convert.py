"""From a dense checkpoint of transformers to SPLA, and back from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from splagen.errors import InputError, SpecError
from splagen.hf.attention import NAME, rope_theta, spec_of
from splagen.nn.branches import Branches
from splagen.nn.generated import Generated
from splagen.spec import SPLASpec, to_toml

M = TypeVar("M", bound=nn.Module)
UNCHANGED = ("none", "add", "rms_residual", "gate")


def spec_for(model: PreTrainedModel, **fields: Any) -> SPLASpec:
    """A spec with the head_dim and group_size of a model, to be converted to it.

    Args:
        model: a causal language model.
        fields: of `SPLASpec`; combine is "rms_residual" if it is left out, and "none" with `linear=None`.

    Raises:
        SpecError: a field that `SPLASpec` refuses.
    """
    config = model.config
    heads = config.num_attention_heads
    sizes = {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "group_size": heads // config.num_key_value_heads,
    }
    combine = "none" if fields.get("linear", True) is None else "rms_residual"
    return SPLASpec(**{**sizes, "combine": combine, **fields})


def convert(model: M, spec: SPLASpec, *, folder: str | Path | None = None) -> M:
    """Replace the attention of a dense causal model by a spec of SPLA, in place; returns the model.

    The function stays as it is while no block is left out: up to block_size (sinks + local + 1 + budget) tokens, or
    below `dense_below`.  Beyond, "rms_residual" (gain 0) and "gate" (gates 1 and 0) start as block-sparse
    attention, "none" is that, and "add" adds the residual at once.

    Args:
        model: a causal language model whose attention goes through transformers' attention interface, such as Llama
            and Qwen3.
        spec: what it becomes; head_dim, group_size and scale are the model's.
        folder: of the generated module; None is `kernels/` in splagen's cache, with tuned Schedules.

    Raises:
        SpecError: a combination that changes the function at once, or sizes that are not the model's.
        InputError: a model without such attention, or with windows.
    """
    if spec.combine not in UNCHANGED:
        what = f"combine is {spec.combine!r}, which norms what dense attention gives: the model's function would change"
        raise SpecError(what, 'use "rms_residual" to start from a dense checkpoint; attach() takes any for a new model')
    return attach(model, spec, folder=folder)


def attach(model: M, spec: SPLASpec | None = None, *, folder: str | Path | None = None) -> M:
    """Give a model the spec (None is the one in its config) and its attention modules their learned inputs, in place.

    For a new model, of which every combination is a start.  The learned inputs are parameters `splagen.*` of each
    attention module, at the start values of `splagen.nn.Branches`; gates are a number per head.

    Raises:
        SpecError: sizes that are not the model's.
        InputError: a model without attention that can be replaced, or with windows, or without a spec.
    """
    config: Any = model.config
    spec = spec_of(config) if spec is None else spec
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "num_key_value_groups") and hasattr(m, "layer_idx")]
    if not modules or not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        what = f"{type(model).__name__} has no attention that goes through transformers' attention interface"
        raise InputError(what, "convert a causal language model such as Llama or Qwen3")
    if any((part and part.own_rows) for part in (spec.select, spec.linear)):
        rope_theta(config)
    for module in modules:
        _check(module, spec)
    made = Generated(spec, folder)
    for module in modules:
        weight = next(module.parameters())
        heads = config.num_attention_heads
        module.splagen = Branches(spec, heads, device=weight.device, dtype=weight.dtype)
        module.splagen_generated = made
    config.splagen = to_toml(spec)
    model.set_attn_implementation(NAME)
    return model


def _check(module: Any, spec: SPLASpec) -> None:
    for field, wanted in (("head_dim", module.head_dim), ("group_size", module.num_key_value_groups)):
        if getattr(spec, field) != wanted:
            raise SpecError(f"{field} is {getattr(spec, field)}, the model's {wanted}", f"set {field} = {wanted}")
    if abs(spec.scale - module.scaling) > 1e-6 * module.scaling:
        raise SpecError(f"scale is {spec.scale}, the model's {module.scaling}", f"set scale = {module.scaling}")
    if spec.value_dim != spec.head_dim:
        raise SpecError(f"value_dim is {spec.value_dim} with head_dim {spec.head_dim}", "leave value_dim out")
    if not spec.causal:
        raise SpecError("causal is False", "a causal language model needs causal = true")
    if getattr(module, "sliding_window", None) is not None:
        what = f"layer {module.layer_idx} attends within a window of {module.sliding_window}"
        raise InputError(what, "convert models of which every layer attends to all of the past")


def from_pretrained(folder: str | Path, **options: Any) -> Any:
    """Load what `save_pretrained` of a converted model wrote, with its learned inputs.

    Args:
        folder: on this machine, with safetensors files.
        options: as for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: the folder's config has no spec, or learned inputs are missing.
    """
    from safetensors import safe_open

    model = attach(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME, **options))
    wanted = {n: p for n, p in model.named_parameters() if f".{NAME}." in n}
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {n: tensors.get_tensor(n) for n in tensors.keys() if n in wanted}  # noqa: SIM118
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"{folder} lacks {missing[0]}", "save a converted model with save_pretrained")
    with torch.no_grad():
        for name, x in found.items():
            wanted[name].copy_(x)
    return model
