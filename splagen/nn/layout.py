"""Which layers of a hybrid model are of which kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splagen.errors import InputError


def layout(
    layers: int, rest: str, *, every: Mapping[str, int] | None = None, at: Mapping[str, Sequence[int]] | None = None
) -> tuple[str, ...]:
    """The kind of each of `layers` layers, by a name that the caller chooses.

    Args:
        layers: how many.
        rest: the kind of those that nothing else names.
        every: {kind: n}, the last of every n layers: n - 1, 2n - 1, ...
        at: {kind: layers}, counted from 0.

    Raises:
        InputError: a layer out of range, or one that is claimed twice.
    """
    claims: dict[int, str] = {}
    wanted = [(kind, i) for kind, n in (every or {}).items() for i in range(n - 1, layers, n)]
    wanted += [(kind, i) for kind, places in (at or {}).items() for i in places]
    for kind, i in wanted:
        if not 0 <= i < layers:
            raise InputError(f"layer {i} of kind {kind!r} in a model of {layers} layers", f"0 to {layers - 1}")
        if claims.setdefault(i, kind) != kind:
            raise InputError(f"layer {i} is both {claims[i]!r} and {kind!r}", "give each layer one kind")
    return tuple(claims.get(i, rest) for i in range(layers))


def sse_h(layers: int = 18) -> tuple[str, ...]:
    """SSE-H (arXiv 2507.16577): a softmax layer after every five layers of SSE."""
    return layout(layers, "sse", every={"softmax": 6})


SPIKING_BRAIN_2 = layout(36, "sse_window", at={"moba": (0, 1, 2, 3, 6, 12, 17, 21, 24), "softmax": (35,)})
"""SpikingBrain2.0-5B: 26 layers of SSE beside a softmax over a window of 128, 9 of block attention, 1 of softmax."""
