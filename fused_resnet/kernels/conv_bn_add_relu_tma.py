# mypy: allow-untyped-defs
"""The tail with its operands loaded through tensor descriptors (TMA; sm_90 and newer).

A tile of M is a box of output pixels, tile.box = (images, rows, columns). What a tap reads of it is then a box of the
input, shifted by the tap: one instruction of one thread copies it, and fills the halo with zeros, for nothing is read
outside the image. See plan.py for the shapes where this holds.
"""

import triton
import triton.language as tl

from fused_resnet.kernels.conv_bn_add_relu import dot, split_range
from fused_resnet.kernels.epilogue import bn_scale_shift, finish_tile, reduce_split, tile_coordinates


@triton.jit
def boxed_gemm(x_desc, w_desc, n, h0, w0, first_k, begin, end, conv: tl.constexpr, tile: tl.constexpr):
    """Sum of K-loop steps [begin, end) of the tile whose first pixel reads image n from row h0 and column w0 on.

    Computed transposed, filters by pixels, as in implicit_gemm, and for one more reason: the box of pixels has to be
    reshaped, and Triton uses a reshaped operand where it was copied to, in shared memory, only when it is the
    transposed right one; as the left one it would go through registers.
    """
    S: tl.constexpr = conv.s
    DIL_H: tl.constexpr = conv.dil_h
    DIL_W: tl.constexpr = conv.dil_w
    BLOCK_M: tl.constexpr = tile.m
    BLOCK_N: tl.constexpr = tile.n
    BLOCK_K: tl.constexpr = tile.k
    BLOCKS: tl.constexpr = conv.c // BLOCK_K
    block = begin % BLOCKS
    h = h0 + begin // BLOCKS // S * DIL_H
    w = w0 + begin // BLOCKS % S * DIL_W
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(begin, end, num_stages=tile.stages):
        pixels = x_desc.load([n, h, w, block * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
        filters = w_desc.load([first_k, step * BLOCK_K])
        acc = dot(filters, pixels.T, acc, tile)
        block += 1
        tap_done = block == BLOCKS
        row_done = tap_done & (w == w0 + (S - 1) * DIL_W)
        h = tl.where(row_done, h + DIL_H, h)
        w = tl.where(row_done, w0, tl.where(tap_done, w + DIL_W, w))
        block = tl.where(tap_done, 0, block)
    return acc.T


@triton.jit
def place_box(index, N, P, Q, conv: tl.constexpr, tile: tl.constexpr):
    """Tile `index`: its box and its column of tiles, and the box's first image, row and column of output pixels."""
    NUM_N: tl.constexpr = (conv.k + tile.n - 1) // tile.n
    boxes_w = tl.cdiv(Q, tile.box[2])
    boxes_h = tl.cdiv(P, tile.box[1])
    box, tile_n = tile_coordinates(index, tl.cdiv(N, tile.box[0]) * boxes_h * boxes_w, NUM_N, tile.group_m)
    n0 = box // (boxes_h * boxes_w) * tile.box[0]
    p0 = box // boxes_w % boxes_h * tile.box[1]
    q0 = box % boxes_w * tile.box[2]
    return box, tile_n, n0, p0, q0


@triton.jit
def box_pixels(n0, p0, q0, N, P, Q, tile: tl.constexpr):
    """A box's first output pixel, all of them counted from it, and which of them exist."""
    i = tl.arange(0, tile.m)
    n = i // (tile.box[1] * tile.box[2])
    p = i // tile.box[2] % tile.box[1]
    q = i % tile.box[2]
    inside = (n < N - n0) & (p < P - p0) & (q < Q - q0)
    first = (n0 * P + p0).to(tl.int64) * Q + q0
    return first, (n * P + p) * Q + q, inside


@triton.jit
def boxed_tile(index, split, x_desc, w_desc, y_ptr, residual_ptr, bn, proj_x_desc, proj_w_desc, proj_bn, workspace_ptr,
               N, P, Q, conv: tl.constexpr, proj_conv: tl.constexpr, tile: tl.constexpr):  # fmt: skip
    """One box of output pixels by tile.n filters, or one split of its K-loop."""
    K: tl.constexpr = conv.k
    SPLIT_K: tl.constexpr = tile.split_k
    _, tile_n, n0, p0, q0 = place_box(index, N, P, Q, conv, tile)
    first_k = tile_n * tile.n

    STEPS: tl.constexpr = conv.steps(tile.k)
    begin, end = split_range(STEPS, split, SPLIT_K)
    z = boxed_gemm(x_desc, w_desc, n0, p0 - conv.pad_h, q0 - conv.pad_w, first_k, begin, end, conv, tile)
    if proj_conv is not None:  # its stride is in the descriptor: proj_x is seen as the pixels that the projection reads
        PROJ_STEPS: tl.constexpr = proj_conv.steps(tile.k)
        begin, end = split_range(PROJ_STEPS, split, SPLIT_K)
        proj_z = boxed_gemm(proj_x_desc, proj_w_desc, n0, p0, q0, first_k, begin, end, proj_conv, tile)
        scale, shift = bn_scale_shift(first_k, bn, K, tile)
        proj_scale, proj_shift = bn_scale_shift(first_k, proj_bn, K, tile)
        z = z * scale[None, :] + proj_z * proj_scale[None, :]

    last = True
    if SPLIT_K > 1:
        z, last = reduce_split(z, workspace_ptr, index, split, tile)
    if last:
        if proj_conv is not None:
            scale = tl.full(scale.shape, 1.0, tl.float32)
            shift += proj_shift
        else:
            scale, shift = bn_scale_shift(first_k, bn, K, tile)
        first, rows, inside = box_pixels(n0, p0, q0, N, P, Q, tile)
        finish_tile(z, scale, shift, y_ptr, residual_ptr, first, rows, inside, first_k, K, tile)


@triton.jit(do_not_specialize=["N", "P", "Q"])
def conv_bn_add_relu_tma_kernel(x_desc, w_desc, y_ptr, residual_ptr, bn, proj_x_desc, proj_w_desc, proj_bn,
                                workspace_ptr, N, P, Q, conv: tl.constexpr, proj_conv: tl.constexpr,
                                tile: tl.constexpr):  # fmt: skip
    """Grid (tiles, split_k); `persistent`: (any number, split_k), whose programs take every num_programs-th tile."""
    if tile.persistent:
        boxes = tl.cdiv(N, tile.box[0]) * tl.cdiv(P, tile.box[1]) * tl.cdiv(Q, tile.box[2])
        num_tiles = boxes * ((conv.k + tile.n - 1) // tile.n)
        for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            index = tl.cast(index, tl.int32)  # the interpreter counts a loop in plain Python integers
            boxed_tile(index, tl.program_id(1), x_desc, w_desc, y_ptr, residual_ptr, bn, proj_x_desc, proj_w_desc,
                       proj_bn, workspace_ptr, N, P, Q, conv, proj_conv, tile)  # fmt: skip
    else:
        boxed_tile(tl.program_id(0), tl.program_id(1), x_desc, w_desc, y_ptr, residual_ptr, bn, proj_x_desc,
                   proj_w_desc, proj_bn, workspace_ptr, N, P, Q, conv, proj_conv, tile)  # fmt: skip
