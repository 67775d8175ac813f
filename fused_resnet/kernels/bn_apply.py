# mypy: allow-untyped-defs
"""The elementwise passes of a training tail over the linear NHWC order: 32 elements share a word of the mask."""

import triton
import triton.language as tl

from fused_resnet.kernels.bn_reduce import load_dz


@triton.jit
def element_offsets(numel, WORDS: tl.constexpr, WIDE: tl.constexpr):
    """The first word of this program, its elements as [WORDS, 32], and which of them exist."""
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    words = first * WORDS + tl.arange(0, WORDS)
    offsets = words[:, None] * 32 + tl.arange(0, 32)[None, :]
    return words, offsets, offsets < numel


@triton.jit
def channel(ptr, c, valid):
    """A per-channel vector at channels `c`."""
    return tl.load(ptr + c, mask=valid, other=0.0)


@triton.jit
def normalise(y, c, valid, mean_ptr, invstd_ptr, weight_ptr, bias_ptr):
    """weight * (y - mean) * invstd + bias; the mean first, so that mean >> std does not cancel."""
    scale = channel(invstd_ptr, c, valid)
    if weight_ptr is not None:
        scale *= channel(weight_ptr, c, valid)
    z = (y - channel(mean_ptr, c, valid)) * scale
    if bias_ptr is not None:
        z += channel(bias_ptr, c, valid)
    return z


@triton.jit
def bn_apply_add_relu_kernel(
    y_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, second_ptr,
    proj_mean_ptr, proj_invstd_ptr, proj_weight_ptr, proj_bias_ptr, out_ptr, mask_ptr, numel,
    C: tl.constexpr, SECOND: tl.constexpr, ACTIVATION: tl.constexpr,
    WORDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = act(BN(y) + second); SECOND says whether `second` is absent, a residual or goes through its own BN."""
    words, offsets, valid = element_offsets(numel, WORDS, WIDE)
    c = (offsets % C).to(tl.int32)
    y = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    z = normalise(y, c, valid, mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    if SECOND != "none":
        second = tl.load(second_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if SECOND == "projection":
            second = normalise(second, c, valid, proj_mean_ptr, proj_invstd_ptr, proj_weight_ptr, proj_bias_ptr)
        z += second
    # Comparisons with NaN are false: NaN is kept and so is its gradient, as in eager PyTorch.
    if mask_ptr is not None:
        dropped = z <= 0.0
        if ACTIVATION == "relu6":
            dropped = dropped | (z >= 6.0)
        bits = tl.where(valid & (dropped == 0), 1, 0) << tl.arange(0, 32)[None, :]
        tl.store(mask_ptr + words, tl.sum(bits, 1), mask=words < (numel + 31) // 32)
    if ACTIVATION != "none":
        z = tl.where(z < 0.0, 0.0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z > 6.0, 6.0, z)
    tl.store(out_ptr + offsets, z.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def through_bn(dz, y, c, valid, mean_ptr, invstd_ptr, weight_ptr, mean_dz_ptr, mean_dz_xhat_ptr):
    """weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat))."""
    invstd = channel(invstd_ptr, c, valid)
    xhat = (y - channel(mean_ptr, c, valid)) * invstd
    inner = dz - channel(mean_dz_ptr, c, valid) - xhat * channel(mean_dz_xhat_ptr, c, valid)
    if weight_ptr is not None:
        invstd *= channel(weight_ptr, c, valid)
    return invstd * inner


@triton.jit
def bn_backward_apply_kernel(
    grad_ptr, mask_ptr, y_ptr, mean_ptr, invstd_ptr, weight_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    proj_y_ptr, proj_mean_ptr, proj_invstd_ptr, proj_weight_ptr, proj_mean_dz_ptr, proj_mean_dz_xhat_ptr,
    d_y_ptr, d_second_ptr, numel,
    C: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d_y, and the gradient of the residual or of the projection's convolution output."""
    _, offsets, valid = element_offsets(numel, WORDS, WIDE)
    c = (offsets % C).to(tl.int32)
    dz = load_dz(grad_ptr, mask_ptr, offsets, valid, MASKED)
    y = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    d_y = through_bn(dz, y, c, valid, mean_ptr, invstd_ptr, weight_ptr, mean_dz_ptr, mean_dz_xhat_ptr)
    tl.store(d_y_ptr + offsets, d_y.to(d_y_ptr.dtype.element_ty), mask=valid)
    if SECOND == "residual":
        tl.store(d_second_ptr + offsets, dz.to(d_second_ptr.dtype.element_ty), mask=valid)
    if SECOND == "projection":
        proj_y = tl.load(proj_y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        d_proj = through_bn(
            dz, proj_y, c, valid, proj_mean_ptr, proj_invstd_ptr, proj_weight_ptr, proj_mean_dz_ptr,
            proj_mean_dz_xhat_ptr,
        )  # fmt: skip
        tl.store(d_second_ptr + offsets, d_proj.to(d_second_ptr.dtype.element_ty), mask=valid)
