"""What the layers of attention have alike."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from splagen.errors import InputError
from splagen.nn.generated import Generated
from splagen.spec import Spec


class AttentionLayer(nn.Module):
    """A layer around the op of a spec; below is what the constructor of each takes beside what is its own.

    Args:
        width: channels of x and of the result.
        heads: Hq of queries, HV of values for SSE: a multiple of the spec's group_size.
        spec: what is computed.
        eps: of the RMSNorm.
        folder: of the generated module; None is `kernels/` in splagen's cache, with tuned Schedules.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: heads do not go into groups.
    """

    def __init__(self, heads: int, spec: Spec, folder: str | Path | None) -> None:
        """Generate the kernels."""
        super().__init__()
        if heads < 1 or heads % spec.group_size:
            raise InputError(f"heads is {heads}", f"a multiple of the spec's group_size, {spec.group_size}")
        self.heads, self.folder = heads, folder
        self.generated = Generated(spec, folder)
