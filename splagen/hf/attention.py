"""The attention implementation "splagen": the op of the spec that `config.splagen` holds as TOML."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from splagen.errors import InputError, SpecError
from splagen.nn.branches import Branches
from splagen.nn.generated import Generated
from splagen.nn.rotary import rotated
from splagen.spec import SPLASpec, from_toml

NAME = "splagen"
CARRIED = "splagen_layer"  # attribute of the keys that a layer of a SplagenCache returns: that layer


def register() -> None:
    """Make "splagen" a value of `attn_implementation`; twice is once."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, no_mask)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> SPLASpec:
    spec = from_toml(text)
    if not isinstance(spec, SPLASpec):
        raise SpecError(f"config.splagen is a spec of kind {spec.kind!r}", "models of transformers take SPLA")
    return spec


def spec_of(config: Any) -> SPLASpec:
    """The spec of a model's config.

    Raises:
        InputError: the config has none.
        SpecError: it is not one of SPLA.
    """
    text = getattr(config, NAME, None)
    if not isinstance(text, str):
        raise InputError("config.splagen is missing", "set it to splagen.to_toml(spec), or call splagen.hf.convert")
    return _parsed(text)


def no_mask(
    *,
    attention_mask: Tensor | None = None,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **_: Any,
) -> None:
    """No mask is made: a causal op needs none where the queries are the last of the positions.

    Raises:
        InputError: a 2D mask hides a token (padding), or a cache gives keys of positions behind the queries.
    """
    last = torch.as_tensor(q_offset + q_length == kv_offset + kv_length)
    hint = "take a DynamicCache, or a splagen.hf.SplagenCache"
    _demand(last, "the cache gives all positions that it has room for (StaticCache)", hint)
    if attention_mask is not None:
        hint = "pad nothing: one sequence at a time, or sequences of one length"
        _demand(attention_mask.bool().all(), "attention_mask hides tokens, which splagen does not support", hint)


def _demand(condition: Tensor, what: str, hint: str) -> None:
    """Raise InputError unless the condition holds; inside a compiled graph the device raises."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"{what}: {hint}")
    elif not bool(condition):
        raise InputError(what, hint)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a model's attention module calls: o [B, L, Hq, E] of q [B, Hq, L, D] and k, v [B, Hkv, S, ...], S >= L.

    The L queries are the last of the S positions: with a cache of keys and values the op runs over all S, and queries
    of the past, on which nothing depends, are zeros.  With a `SplagenCache` k and v are those of the L new positions.
    Branches with rows of their own get q and k with the rotation taken back.

    Raises:
        InputError: a mask, dropout, a window or a soft cap; a scale that is not the spec's; positions that do not rise
            by one; learned inputs that nobody attached.
    """
    generated, learned = _parts(module)
    spec = generated.spec
    assert isinstance(spec, SPLASpec)
    _check(module, spec, attention_mask, scaling, dropout, others)
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] > 1:
        steps = position_ids[:, 1:] - position_ids[:, :-1]
        _demand((steps == 1).all(), "position_ids do not rise by one", "packed sequences are not supported")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer = getattr(key, CARRIED, None)
    past = layer.get_seq_length() if layer is not None else k.shape[1] - q.shape[1]
    if layer is None and past:
        q = torch.cat([q.new_zeros(q.shape[0], past, *q.shape[2:]), q], 1)
    start = past if layer is not None else 0
    inputs = {"q": q, "k": k, "v": v} | _unrotated(module, spec, q, k, start) | learned(q)
    if layer is not None:
        return layer.attend(inputs), None
    return generated.op(**inputs)[:, past:], None


def _parts(module: nn.Module) -> tuple[Generated, Any]:
    """The op of a module and what gives its learned inputs."""
    generated = getattr(module, "splagen_generated", None)
    if isinstance(generated, Generated):
        return generated, module.splagen
    spec = spec_of(module.config)
    if _learns(spec):
        what = f"combine {spec.combine!r} has learned inputs that this model has not"
        raise InputError(what, "call splagen.hf.attach(model) once after the model is made")
    return Generated(spec), lambda _: {}


@functools.lru_cache(maxsize=64)
def _learns(spec: SPLASpec) -> bool:
    return bool(list(Branches(spec, spec.group_size, device="meta").parameters()))


def _check(
    module: nn.Module,
    spec: SPLASpec,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    others: Mapping[str, Any],
) -> None:
    if mask is not None:
        raise InputError(
            "a mask tensor reached attention", "splagen takes causal attention without a mask of one's own"
        )
    if dropout:
        raise InputError(f"attention dropout is {dropout}", "set config.attention_dropout to 0")
    for name in ("sliding_window", "softcap", "s_aux", "sinks"):
        if others.get(name) is not None:
            raise InputError(f"attention has {name} = {others[name]}", "convert only models of plain causal attention")
    if scaling is not None and abs(scaling - spec.scale) > 1e-6 * scaling:
        raise InputError(
            f"the model's scale is {scaling}, the spec's {spec.scale}", f"set scale = {scaling} in the spec"
        )
    if not getattr(module, "is_causal", True) or not spec.causal:
        raise InputError("attention is not causal", "splagen.hf takes causal language models and causal specs")


def _unrotated(module: nn.Module, spec: SPLASpec, q: Tensor, k: Tensor, start: int) -> dict[str, Tensor]:
    """Rows of their own for branches that ask for them: before RoPE, which is taken back (it is orthogonal)."""
    own = [b for b, part in (("m", spec.select), ("r", spec.linear)) if part and part.own_rows]
    if not own:
        return {}
    theta = rope_theta(module.config)
    positions = -torch.arange(start, start + k.shape[1], device=k.device)
    q, k = rotated(q, positions, theta), rotated(k, positions, theta)
    return {f"q_{b}": q for b in own} | {f"k_{b}": k for b in own}


def rope_theta(config: Any) -> float:
    """The base of a config's RoPE.  Raises InputError for any other than the plain one over the whole head."""
    given = getattr(config, "rope_parameters", None)
    found = given if isinstance(given, dict) else {}
    if found.get("rope_type") != "default" or found.get("partial_rotary_factor", 1.0) != 1.0:
        what = f"own_rows asks for rows before RoPE, and this model's is {given}"
        raise InputError(what, 'only rope_type "default" can be taken back: leave own_rows out of the spec')
    return float(found["rope_theta"])
