"""What is computed for SSE: the frozen, validated spec of linear attention over sparsely chosen states.

Its TOML form, `kind = "sse"`, and its digest are those of every spec: see `splagen.spec`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from splagen.errors import SpecError
from splagen.fields import identifier, is_a, one_of, placed, positive_number, whole
from splagen.library import FeatureMap, silu, softmax
from splagen.library import feature_map as make_feature_map
from splagen.spec import Numerics

__all__ = ["PARTS", "Router", "SSESpec"]


@dataclass(frozen=True)
class Router:
    """Which of the sparse states a token writes and reads, and with what weight (SSE, arXiv 2507.16577).

    The logits are an input; the largest are chosen, of equal ones the lowest partition.  A partition that a token
    does not write neither takes its value nor decays.  The choice has no gradient, the weight has.

    Attributes:
        partitions: N, the sparse states per value head, 1 to 64; the shared state comes on top.
        writers: partitions that a token writes, 1 to N.
        readers: partitions that a token reads, 1 to N; None is writers.
        gate: what is multiplied by the partition's weight: the key ("write"), the query ("read"), "both", "none".
        normalise: the weight is the softmax of the logits over "all" partitions, or over the "selected" ones,
            which writers and readers then share.
        scope: one choice for all heads ("token"), or one for each key head ("head").
    """

    partitions: int = 4
    writers: int = 1
    readers: int = None  # type: ignore[assignment]
    gate: Literal["both", "write", "read", "none"] = "both"
    normalise: Literal["all", "selected"] = "all"
    scope: Literal["token", "head"] = "token"

    def __post_init__(self) -> None:
        whole("router.partitions", self.partitions, 1, 64)
        whole("router.writers", self.writers, 1, self.partitions)
        if self.readers is None:
            object.__setattr__(self, "readers", self.writers)
        whole("router.readers", self.readers, 1, self.partitions)
        one_of("router.gate", self.gate, ("both", "write", "read", "none"))
        one_of("router.normalise", self.normalise, ("all", "selected"))
        one_of("router.scope", self.scope, ("token", "head"))
        if self.normalise == "selected" and self.readers != self.writers:
            what = f"router.normalise is 'selected' with router.readers {self.readers}, router.writers {self.writers}"
            raise SpecError(what, 'one selection must serve both: as many readers as writers, or normalise "all"')


@dataclass(frozen=True)
class SSESpec:
    """Linear attention over a shared state and sparsely chosen ones: SSE, arXiv 2507.16577.

    Each value head keeps states S [K, V].  A token decays S, adds φ_k(k)ᵀ v, and reads scale · φ_q(q) S, its own
    write included; the outputs of the states that it reads are added.  The shared and the sparse states have
    queries, keys and decays of their own, and one v.

    Fields given as None are filled in, so `dataclasses.replace` of head_dim keeps value_dim and scale, and of
    backbone keeps k_map and gate_site.

    Attributes:
        name: of the op and of its module, an identifier.
        head_dim: K of q and k, a multiple of 4 from 16 to 256.
        value_dim: V of v and o, likewise; None is head_dim.
        group_size: value heads per key head, 1 to 64.
        backbone: decay of a state, an input as natural logarithm: "none"; "constant" per value head; "scalar" per
            token and value head; "vector" per token, key head and key feature (GLA); "delta", the gated delta
            rule (GDN) with a scalar decay, which subtracts what the state already holds under k.
        gate_site: for "delta" whether the router's weight multiplies q and k before their l2norm, which cancels
            it ("pre_norm": the published checkpoints), or after ("post_norm", what None fills in).  None for the
            other backbones.
        shared: whether there is a state that every token writes and reads.
        router: the choice among sparse states, or None for the shared state alone: plain linear attention.
        q_map: φ_q of q, as many features as head_dim; a name or a formula is converted.
        k_map: φ_k of k, likewise; None is softmax, and silu for "delta", which takes the l2norm of φ_q(q) and
            φ_k(k) itself, whatever the maps are.
        scale: factor of o; None is head_dim ** -0.5.
        form: how partitions are computed, with equal results: "sorted" gathers each partition's tokens, and
            needs writers == readers; "masked" runs every partition over every token; "routed" shares one q·k
            among all partitions, which "vector" and "delta" do not allow, and carries their states together:
            few partitions.
        numerics: how the arithmetic rounds.
    """

    kind: ClassVar[Literal["sse"]] = "sse"

    name: str = "sse"
    head_dim: int = 128
    value_dim: int = None  # type: ignore[assignment]
    group_size: int = 1
    backbone: Literal["none", "constant", "scalar", "vector", "delta"] = "vector"
    gate_site: Literal["pre_norm", "post_norm"] | None = None
    shared: bool = True
    router: Router | None = Router()
    q_map: FeatureMap = silu
    k_map: FeatureMap = None  # type: ignore[assignment]
    scale: float = None  # type: ignore[assignment]
    form: Literal["sorted", "masked", "routed"] = "sorted"
    numerics: Numerics = field(default_factory=Numerics)

    def __post_init__(self) -> None:
        identifier("name", self.name)
        whole("head_dim", self.head_dim, 16, 256, 4)
        one_of("backbone", self.backbone, ("none", "constant", "scalar", "vector", "delta"))
        delta = self.backbone == "delta"
        for key, value in (
            ("value_dim", self.head_dim),
            ("gate_site", "post_norm" if delta else None),
            ("k_map", silu if delta else softmax),
            ("scale", self.head_dim**-0.5),
        ):
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        whole("value_dim", self.value_dim, 16, 256, 4)
        whole("group_size", self.group_size, 1, 64)
        if self.gate_site is not None and not delta:
            what = f"gate_site is {self.gate_site!r} with backbone {self.backbone!r}"
            raise SpecError(what, 'None (leave it out): only backbone "delta" normalises q and k')
        one_of("gate_site", self.gate_site, ("pre_norm", "post_norm") if delta else (None,))
        one_of("shared", self.shared, (False, True))
        is_a("router", self.router, (Router, type(None)), "Router(), or None for the shared state alone")
        if self.router is None and not self.shared:
            raise SpecError("shared is False and router is None: there is no state", "set shared, or give a Router()")
        for key in ("q_map", "k_map"):
            object.__setattr__(self, key, _row_map(key, getattr(self, key), self.head_dim))
        object.__setattr__(self, "scale", positive_number("scale", self.scale, "None is head_dim ** -0.5"))
        one_of("form", self.form, ("sorted", "masked", "routed"))
        if self.form == "sorted" and self.router is not None and self.router.readers != self.router.writers:
            what = f"router.readers is {self.router.readers} and router.writers {self.router.writers}"
            raise SpecError(f"{what} with form 'sorted'", 'form "masked" supports it, or set readers to writers')
        if self.form == "routed" and self.backbone in ("vector", "delta"):
            hint = 'form "sorted" supports it; "routed" takes backbone "none", "constant" and "scalar"'
            raise SpecError(f"backbone is {self.backbone!r} with form 'routed'", hint)
        is_a("numerics", self.numerics, (Numerics,), "Numerics()")


PARTS: dict[str, type[Any]] = {"router": Router, "q_map": FeatureMap, "k_map": FeatureMap, "numerics": Numerics}
"""What the tables of an SSE file are."""


def _row_map(path: str, source: FeatureMap, head_dim: int) -> FeatureMap:
    try:
        made = make_feature_map(source)
    except SpecError as error:
        raise placed(path, error) from None
    if made.signs != 1:
        what = f"{path} is {made.name}, which has {made.width(head_dim)} features of a row of {head_dim}"
        raise SpecError(what, "a map with signs 1: silu, softmax, topk_softmax(k), relu, identity")
    if made.topk is not None and made.topk > head_dim:
        raise SpecError(f"{path}.topk is {made.topk} with head_dim {head_dim}", f"at most {head_dim}")
    return made
