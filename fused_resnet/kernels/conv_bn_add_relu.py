# mypy: allow-untyped-defs
"""y = act(BN(conv(x, w)) + residual) as one implicit GEMM: M = N*P*Q pixels, N = K filters, K-loop over R*S*C.

Tensors are NHWC and KRSC, dense. The loop's only address work is one scalar step for all pointers of a tile: the
pixel offsets are fixed before it, and whether a tap falls outside the image is one bit per pixel and tap, prepared
before it as well.
"""

import triton
import triton.language as tl

from fused_resnet.kernels.epilogue import bn_scale_shift, finish_tile, reduce_split, tile_coordinates


@triton.jit
def round_tf32(a):
    """fp32 to the nearest tf32; the tensor cores would cut the low bits off instead: twice the error, and biased."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, tile: tl.constexpr):
    """acc + a @ b, accumulated in fp32."""
    if tile.precision == "upcast":  # the interpreter's bf16 dot is wrong in Triton 3.8
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif tile.precision == "tf32_rna":
        return tl.dot(round_tf32(a), round_tf32(b), acc, input_precision="tf32")
    elif tile.precision == "tensor":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def halo_bits(h0, w0, H, W, R: tl.constexpr, S: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr):
    """Bit r*S+s of each pixel says whether tap (r, s) reads inside the image."""
    columns = tl.zeros(w0.shape, tl.int32)
    for s in tl.static_range(S):
        w = w0 + s * DIL_W
        columns |= ((w >= 0) & (w < W)).to(tl.int32) << s
    bits = tl.zeros(h0.shape, tl.int32)
    for r in tl.static_range(R):
        h = h0 + r * DIL_H
        bits |= tl.where((h >= 0) & (h < H), columns, 0) << (r * S)
    return bits


@triton.jit
def implicit_gemm(x_ptr, w_ptr, n, h0, w0, k, H, W, begin, end, conv: tl.constexpr, tile: tl.constexpr):
    """Sum of K-loop steps [begin, end) of a tile; a step is tile.k channels of one tap.

    Pixel i of the tile reads image n[i], counted from x_ptr's, from row h0[i] and column w0[i] on. The product is
    computed transposed, filters by pixels: a thread's accumulators then belong to few filters, so their scale and
    shift take few registers (and no tile spills in the epilogue).
    """
    R: tl.constexpr = conv.r
    C: tl.constexpr = conv.c
    DIL_H: tl.constexpr = conv.dil_h
    DIL_W: tl.constexpr = conv.dil_w
    RUN: tl.constexpr = conv.run
    TAPS: tl.constexpr = conv.taps
    BLOCK_M: tl.constexpr = tile.m
    BLOCK_N: tl.constexpr = tile.n
    BLOCK_K: tl.constexpr = tile.k
    BLOCKS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    BITS: tl.constexpr = conv.halo == "bits"
    if conv.wide:
        n = n.to(tl.int64)
        W = W.to(tl.int64)
    c = tl.arange(0, BLOCK_K)
    x_offsets = (((n * H + h0) * W + w0) * C)[:, None] + c[None, :]
    w_offsets = k[:, None] * (R * TAPS * RUN) + c[None, :]
    if conv.fuse_s:
        column = (w0 * C)[:, None] + c[None, :]  # position in the image row
        if BITS:
            inside = halo_bits(h0, tl.zeros_like(h0), H, W, R, 1, DIL_H, 1)
    elif BITS:
        inside = halo_bits(h0, w0, H, W, R, TAPS, DIL_H, DIL_W)

    block = begin % BLOCKS
    r = begin // BLOCKS // TAPS
    s = begin // BLOCKS % TAPS
    tap_bit = 1 << (r * TAPS + s)
    x_ptr += (r * DIL_H * W + s * DIL_W) * C + block * BLOCK_K
    w_ptr += (r * TAPS + s) * RUN + block * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(begin, end, num_stages=tile.stages):
        in_c = c < RUN - block * BLOCK_K  # only looked at where RUN is no multiple of BLOCK_K
        if BITS:
            in_image = (inside & tap_bit) != 0
        elif conv.halo == "compare":
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            in_image = (h >= 0) & (h < H) & (conv.fuse_s | ((w >= 0) & (w < W)))
        if conv.fuse_s:
            position = column + block * BLOCK_K
            pixels = tl.load(
                x_ptr + x_offsets,
                other=0.0,
                mask=in_image[:, None] & in_c[None, :] & (position >= 0) & (position < W * C),
            )
        elif RUN % BLOCK_K != 0 and conv.halo != "none":
            pixels = tl.load(x_ptr + x_offsets, mask=in_image[:, None] & in_c[None, :], other=0.0)
        elif RUN % BLOCK_K != 0:
            pixels = tl.load(x_ptr + x_offsets, mask=in_c[None, :], other=0.0)
        elif conv.halo != "none":
            pixels = tl.load(x_ptr + x_offsets, mask=in_image[:, None], other=0.0)
        else:
            pixels = tl.load(x_ptr + x_offsets)
        if RUN % BLOCK_K != 0:
            filters = tl.load(w_ptr + w_offsets, mask=in_c[None, :], other=0.0)
        else:
            filters = tl.load(w_ptr + w_offsets)
        acc = dot(filters, pixels.T, acc, tile)

        block += 1
        if R * TAPS == 1:
            x_ptr += BLOCK_K
            w_ptr += BLOCK_K
        else:  # next channels of this tap, or the first ones of the next tap, or of the next filter row
            tap_done = block == BLOCKS
            row_done = tap_done & (s == TAPS - 1)
            x_ptr += tl.where(
                row_done,
                (DIL_H * W - (TAPS - 1) * DIL_W) * C - (BLOCKS - 1) * BLOCK_K,
                tl.where(tap_done, DIL_W * C - (BLOCKS - 1) * BLOCK_K, BLOCK_K),
            )
            w_ptr += tl.where(tap_done, RUN - (BLOCKS - 1) * BLOCK_K, BLOCK_K)
            tap_bit = tl.where(tap_done, tap_bit << 1, tap_bit)
            block = tl.where(tap_done, 0, block)
            s = tl.where(row_done, 0, tl.where(tap_done, s + 1, s))
            r = tl.where(row_done, r + 1, r)
    return acc.T


@triton.jit
def split_range(steps: tl.constexpr, split, SPLIT_K: tl.constexpr):
    """K-loop steps of one split. The end is a run-time number, so that LLVM does not unroll the loop away."""
    if SPLIT_K == 1:
        return 0, steps * tl.num_programs(1)
    else:
        return steps * split // SPLIT_K, steps * (split + 1) // SPLIT_K


@triton.jit
def place_tile(index, M, P, Q, conv: tl.constexpr, tile: tl.constexpr):
    """Tile `index`: its row and column of tiles, its first image, image (counted from it), row and column of every
    output pixel, and its filters. Past the end the last pixel or filter is repeated.
    """
    K: tl.constexpr = conv.k
    NUM_N: tl.constexpr = (K + tile.n - 1) // tile.n
    tile_m, tile_n = tile_coordinates(index, tl.cdiv(M, tile.m), NUM_N, tile.group_m)
    first = tile_m * tile.m
    m = tl.minimum(first + tl.arange(0, tile.m), M - 1)
    k = tile_n * tile.n + tl.arange(0, tile.n)
    if K % tile.n != 0:
        k = tl.minimum(k, K - 1)
    first_n = first // (P * Q)
    n = m // (P * Q) - first_n  # the 64-bit part of every offset is scalar: the tile's first image, or its first pixel
    return tile_m, tile_n, first_n, n, m // Q % P, m % Q, k


@triton.jit
def tail_tile(
    index,
    split,
    x_ptr,
    w_ptr,
    y_ptr,
    residual_ptr,
    bn,
    proj_x_ptr,
    proj_w_ptr,
    proj_bn,
    workspace_ptr,
    M,
    H,
    W,
    P,
    Q,
    PROJ_H,
    PROJ_W,
    conv: tl.constexpr,
    proj_conv: tl.constexpr,
    tile: tl.constexpr,
):
    """One tile, or one split of its K-loop. What lies past the end is not stored."""
    K: tl.constexpr = conv.k
    SPLIT_K: tl.constexpr = tile.split_k
    tile_m, tile_n, first_n, n, p, q, k = place_tile(index, M, P, Q, conv, tile)
    first = tile_m * tile.m

    STEPS: tl.constexpr = conv.steps(tile.k)
    begin, end = split_range(STEPS, split, SPLIT_K)
    x_ptr += first_n.to(tl.int64) * (H * W) * conv.c
    z = implicit_gemm(
        x_ptr, w_ptr, n, p * conv.stride_h - conv.pad_h, q * conv.stride_w - conv.pad_w, k, H, W, begin, end, conv, tile
    )
    if proj_conv is not None:
        PROJ_STEPS: tl.constexpr = proj_conv.steps(tile.k)
        begin, end = split_range(PROJ_STEPS, split, SPLIT_K)
        proj_x_ptr += first_n.to(tl.int64) * (PROJ_H * PROJ_W) * proj_conv.c
        proj_z = implicit_gemm(
            proj_x_ptr,
            proj_w_ptr,
            n,
            p * proj_conv.stride_h,
            q * proj_conv.stride_w,
            k,
            PROJ_H,
            PROJ_W,
            begin,
            end,
            proj_conv,
            tile,
        )
        scale, shift = bn_scale_shift(tile_n * tile.n, bn, K, tile)
        proj_scale, proj_shift = bn_scale_shift(tile_n * tile.n, proj_bn, K, tile)
        z = z * scale[None, :] + proj_z * proj_scale[None, :]

    last = True
    if SPLIT_K > 1:
        z, last = reduce_split(z, workspace_ptr, index, split, tile)
    if last:
        if proj_conv is not None:
            scale = tl.full(scale.shape, 1.0, tl.float32)
            shift += proj_shift
        else:
            scale, shift = bn_scale_shift(tile_n * tile.n, bn, K, tile)
        rows = tl.arange(0, tile.m)
        finish_tile(z, scale, shift, y_ptr, residual_ptr, first, rows, rows < M - first, tile_n * tile.n, K, tile)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "PROJ_H", "PROJ_W"])
def conv_bn_add_relu_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    residual_ptr,
    bn,
    proj_x_ptr,
    proj_w_ptr,
    proj_bn,
    workspace_ptr,
    M,
    H,
    W,
    P,
    Q,
    PROJ_H,
    PROJ_W,
    conv: tl.constexpr,
    proj_conv: tl.constexpr,
    tile: tl.constexpr,
):
    """Grid (tiles, split_k); `persistent`: (any number, split_k), whose programs take every num_programs-th tile."""
    if tile.persistent:
        num_tiles = tl.cdiv(M, tile.m) * ((conv.k + tile.n - 1) // tile.n)
        for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            tail_tile(
                tl.cast(index, tl.int32),  # the interpreter counts a loop in plain Python integers
                tl.program_id(1),
                x_ptr,
                w_ptr,
                y_ptr,
                residual_ptr,
                bn,
                proj_x_ptr,
                proj_w_ptr,
                proj_bn,
                workspace_ptr,
                M,
                H,
                W,
                P,
                Q,
                PROJ_H,
                PROJ_W,
                conv,
                proj_conv,
                tile,
            )
    else:
        tail_tile(
            tl.program_id(0),
            tl.program_id(1),
            x_ptr,
            w_ptr,
            y_ptr,
            residual_ptr,
            bn,
            proj_x_ptr,
            proj_w_ptr,
            proj_bn,
            workspace_ptr,
            M,
            H,
            W,
            P,
            Q,
            PROJ_H,
            PROJ_W,
            conv,
            proj_conv,
            tile,
        )
