# mypy: allow-untyped-defs
"""y = conv(x, w) + bias with the mean and the variance of every channel of y: the tail's implicit GEMM, another
epilogue.

The statistics cost no pass over y: they are taken while the tile is in registers.
"""

import triton
import triton.language as tl

from fused_resnet.kernels.conv_bn_add_relu import implicit_gemm, place_tile, split_range
from fused_resnet.kernels.conv_bn_add_relu_tma import box_pixels, boxed_gemm, place_box
from fused_resnet.kernels.epilogue_stats import finish_tile_stats


@triton.jit
def stats_tile(index, x_ptr, w_ptr, y_ptr, bias_ptr, stats, M, H, W, P, Q, conv: tl.constexpr,
               tile: tl.constexpr):  # fmt: skip
    """One tile of m consecutive pixels."""
    tile_m, tile_n, first_n, n, p, q, k = place_tile(index, M, P, Q, conv, tile)
    STEPS: tl.constexpr = conv.steps(tile.k)
    begin, end = split_range(STEPS, 0, 1)
    x_ptr += first_n.to(tl.int64) * (H * W) * conv.c
    h0, w0 = p * conv.stride_h - conv.pad_h, q * conv.stride_w - conv.pad_w
    z = implicit_gemm(x_ptr, w_ptr, n, h0, w0, k, H, W, begin, end, conv, tile)
    first = tile_m * tile.m
    rows = tl.arange(0, tile.m)
    finish_tile_stats(z, bias_ptr, y_ptr, stats, first, rows, rows < M - first, tl.minimum(M - first, tile.m),
                      tile_m, tl.cdiv(M, tile.m), tile_n, conv.k, tile)  # fmt: skip


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def conv_bn_stats_kernel(x_ptr, w_ptr, y_ptr, bias_ptr, stats, M, H, W, P, Q, conv: tl.constexpr,
                         tile: tl.constexpr):  # fmt: skip
    """Grid: one program per tile; `persistent`: any number of programs, which take every num_programs-th tile."""
    if tile.persistent:
        num_tiles = tl.cdiv(M, tile.m) * ((conv.k + tile.n - 1) // tile.n)
        for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            index = tl.cast(index, tl.int32)  # the interpreter counts a loop in plain Python integers
            stats_tile(index, x_ptr, w_ptr, y_ptr, bias_ptr, stats, M, H, W, P, Q, conv, tile)
    else:
        stats_tile(tl.program_id(0), x_ptr, w_ptr, y_ptr, bias_ptr, stats, M, H, W, P, Q, conv, tile)


@triton.jit
def boxed_stats_tile(index, x_desc, w_desc, y_ptr, bias_ptr, stats, N, P, Q, conv: tl.constexpr,
                     tile: tl.constexpr):  # fmt: skip
    """One box of output pixels."""
    box, tile_n, n0, p0, q0 = place_box(index, N, P, Q, conv, tile)
    STEPS: tl.constexpr = conv.steps(tile.k)
    begin, end = split_range(STEPS, 0, 1)
    z = boxed_gemm(x_desc, w_desc, n0, p0 - conv.pad_h, q0 - conv.pad_w, tile_n * tile.n, begin, end, conv, tile)
    first, rows, inside = box_pixels(n0, p0, q0, N, P, Q, tile)
    count = tl.minimum(N - n0, tile.box[0]) * tl.minimum(P - p0, tile.box[1]) * tl.minimum(Q - q0, tile.box[2])
    boxes = tl.cdiv(N, tile.box[0]) * tl.cdiv(P, tile.box[1]) * tl.cdiv(Q, tile.box[2])
    finish_tile_stats(z, bias_ptr, y_ptr, stats, first, rows, inside, count, box, boxes, tile_n, conv.k, tile)


@triton.jit(do_not_specialize=["N", "P", "Q"])
def conv_bn_stats_tma_kernel(x_desc, w_desc, y_ptr, bias_ptr, stats, N, P, Q, conv: tl.constexpr,
                             tile: tl.constexpr):  # fmt: skip
    """The same with operands loaded through tensor descriptors (sm_90 and newer)."""
    if tile.persistent:
        boxes = tl.cdiv(N, tile.box[0]) * tl.cdiv(P, tile.box[1]) * tl.cdiv(Q, tile.box[2])
        num_tiles = boxes * ((conv.k + tile.n - 1) // tile.n)
        for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            index = tl.cast(index, tl.int32)  # the interpreter counts a loop in plain Python integers
            boxed_stats_tile(index, x_desc, w_desc, y_ptr, bias_ptr, stats, N, P, Q, conv, tile)
    else:
        boxed_stats_tile(tl.program_id(0), x_desc, w_desc, y_ptr, bias_ptr, stats, N, P, Q, conv, tile)
