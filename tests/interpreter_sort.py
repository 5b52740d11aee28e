"""Make sort, topk and bitonic_merge fast in Triton's interpreter.

They reduce by exclusive or, which the interpreter walks in Python; it is exact, so only the time changes.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps


def patch() -> None:
    """Replace the reduction for the rest of this process."""
    apply = ReduceOps.apply_impl
    if getattr(apply, "fast", False):
        return

    def fast(self, inputs):  # type: ignore[no-untyped-def]
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return apply(self, inputs)
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        data = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        out = self.to_tensor(data, x.dtype)
        return (out,) if isinstance(inputs, tuple) else out

    fast.fast = True  # type: ignore[attr-defined]
    ReduceOps.apply_impl = fast
