# mypy: allow-untyped-defs
"""Whether Triton's interpreter works at all with the NumPy beside it, found out by a kernel of one loop."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def count(out_ptr, n):
    total = tl.load(out_ptr)
    for _ in range(n):
        total += 1
    tl.store(out_ptr, total)


@functools.cache
def why_not() -> str | None:
    """None where it does, else the sentence. (Triton 3.6 makes a loop's bound a number in a way NumPy 2.5 refuses.)"""
    import numpy

    out = torch.zeros(1, dtype=torch.int32)
    try:
        count[(1,)](out, 3)
    except Exception as error:  # the interpreter's own type, around NumPy's
        if "only 0-dimensional arrays" not in str(error):
            raise
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__}: only "
            "0-dimensional arrays can be converted to Python scalars"
        )
    assert out.item() == 3
    return None
