"""The product that Triton kernels share; importing this file imports triton."""

import triton
import triton.language as tl

__all__ = ["dot"]


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b in float32. UPCAST: whether an interpreter runs it; float32 is three TF32 passes."""
    # the interpreter multiplies bfloat16 as if it were integers
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)
