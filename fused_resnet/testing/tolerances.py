"""The one table of tolerances. Every number is derived, none is tuned.

The bar compares three results of one call: the implementation's, eager PyTorch's in the same dtype, and the
exact one (the reference in float64 on the same inputs). Eager's own error is the natural unit: it is what a user
accepted before, it grows with the depth of the sum as it must, and it needs no constant per shape.

What leaves the order of its sums to a library (oneDNN's convolution with BN folded into its weights) is measured in
the larger of two units: eager's error and that of one accumulator for all products, computed on the same tensors
(one_accumulator.py, where the derivation stands). Eager's depends on the kernels that the library has for this
processor; the other has the same bits everywhere. Our own kernels, whose order we decide, are held to eager's alone.
"""

from __future__ import annotations

import torch

#: Half an ulp, relative: the largest error of one rounding to the dtype.
ROUNDING: dict[torch.dtype, float] = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}

#: Forward: max error <= 2 x eager's. One factor of two leaves room for another order of summation.
FORWARD_FACTOR = 2.0

#: Gradients: max error <= 3 x eager's, since two reductions (over pixels, then over the filter) follow each other.
GRADIENT_FACTOR = 3.0

#: Winograd F(4x4, 3x3) alone: rms error <= 3 x that of direct convolution (oneDNN). Its transforms multiply by
#: constants up to 4 and cancel, which costs a factor of 2.2 in rms with the interpolation points in use.
WINOGRAD_F4_RMS_FACTOR = 3.0

#: A whole network in another runtime, which orders the sums of every layer in its own way: rms error <= 10 x eager's
#: (or one rounding, where eager's is less: float64 is the exact answer itself). The errors of a network's few outputs
#: depend on each other, some five of them are independent, and of two samples of five the ratio is over 10 once in
#: 20,000. A wrong weight or layout is off by thousands.
EXPORTED_RMS_FACTOR = 10.0

#: Eager's error is a maximum over a random sample. Below this many outputs the maximum of a tiny problem may be
#: zero by luck, so the problem is drawn again until that many outputs have been seen.
OUTPUTS_SEEN = 4096
