"""What every tail does with its accumulator: scale and shift from the live BN, residual, activation, one rounding at the store."""

import triton
import triton.language as tl


@triton.jit
def column_halves(z):
    """The left and the right half of a tile's columns, or of a vector."""
    if len(z.shape) == 2:
        return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
    else:
        return tl.split(tl.permute(tl.reshape(z, (2, z.shape[0] // 2)), (1, 0)))


@triton.jit
def bn_scale_shift(first_k, bn, K: tl.constexpr, tile: tl.constexpr):
    """scale and shift, in fp32, of a tile's tile.n filters; an absent tensor (None) takes its neutral value.

    Square root and division are IEEE's, so long sequences: one lane computes one filter, and the values then travel through
    shared memory to the accumulator's layout. A vector shorter than the program has threads Triton would rather recompute in
    that layout, 32 filters a thread; hence the vector is as long as there are threads, with repeated filters.
    """
    LANES: tl.constexpr = tile.lanes
    k = tl.minimum(first_k + tl.arange(0, LANES) % tile.n, K - 1)
    scale = tl.full((LANES,), 1.0, tl.float32)
    shift = tl.zeros((LANES,), tl.float32)
    if bn.bias is not None:
        shift = tl.load(bn.bias + k).to(tl.float32)
    if bn.mean is not None:
        if bn.gamma is not None:
            scale = tl.load(bn.gamma + k).to(tl.float32)
        scale = tl.div_rn(scale, tl.sqrt_rn(tl.load(bn.var + k).to(tl.float32) + bn.eps))
        shift = (shift - tl.load(bn.mean + k).to(tl.float32)) * scale
        if bn.beta is not None:
            shift += tl.load(bn.beta + k).to(tl.float32)
    HALVINGS: tl.constexpr = tile.lane_halvings
    for _ in tl.static_range(HALVINGS):
        scale = column_halves(scale)[0]
        shift = column_halves(shift)[0]
    return scale, shift


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """relu, relu6 or none; NaN stays NaN, as in eager."""
    if ACTIVATION != "none":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        z = tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def finish_columns(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K: tl.constexpr, tile: tl.constexpr):
    """y = act(scale * z + shift + residual) for some columns of a tile; the only rounding is the store's."""
    k = first_k + tl.arange(0, z.shape[1])
    offsets = rows[:, None] * K + k[None, :]
    mask = in_m[:, None] & (k < K)[None, :]
    z = z * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, activate(z, tile.activation).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K: tl.constexpr, tile: tl.constexpr):
    """The epilogue of a tile in tile.epilogue_parts pieces: registers hold the residual, scale and shift of one at a time."""
    if tile.epilogue_parts == 1:
        finish_columns(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)
    else:
        z0, z1 = column_halves(z)
        scale0, scale1 = column_halves(scale)
        shift0, shift1 = column_halves(shift)
        if tile.epilogue_parts == 2:
            finish_columns(z0, scale0, shift0, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)
            finish_columns(z1, scale1, shift1, y_ptr, residual_ptr, rows, in_m, first_k + tile.n // 2, K, tile)
        else:
            finish_halves(z0, scale0, shift0, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)
            finish_halves(z1, scale1, shift1, y_ptr, residual_ptr, rows, in_m, first_k + tile.n // 2, K, tile)


@triton.jit
def finish_halves(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K: tl.constexpr, tile: tl.constexpr):
    z0, z1 = column_halves(z)
    scale0, scale1 = column_halves(scale)
    shift0, shift1 = column_halves(shift)
    finish_columns(z0, scale0, shift0, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)
    finish_columns(z1, scale1, shift1, y_ptr, residual_ptr, rows, in_m, first_k + z0.shape[1], K, tile)


@triton.jit
def reduce_split(z, workspace_ptr, counter_ptr, index, split, tile: tl.constexpr):
    """Add up the split_k partial sums of tile `index`. Returns (sum, whether this program came last and owns the epilogue).

    Every program publishes its partial sum and takes a ticket; the last one reads what the others wrote. `ordered` sums the
    partial tiles by their index, whoever comes last, so the result does not depend on timing; otherwise they are added
    atomically into one tile, which moves less data. The last program leaves counter (and atomic tile) zero for the next launch.
    """
    SPLIT_K: tl.constexpr = tile.split_k
    area: tl.constexpr = tile.m * tile.n
    inner = tl.arange(0, tile.m)[:, None] * tile.n + tl.arange(0, tile.n)[None, :]
    if tile.ordered:
        tile_ptr = workspace_ptr + index.to(tl.int64) * (SPLIT_K * area)
        tl.store(tile_ptr + split * area + inner, z)
    else:
        tile_ptr = workspace_ptr + index.to(tl.int64) * area
        tl.atomic_add(tile_ptr + inner, z, sem="relaxed")
    tl.debug_barrier()  # every warp's part is written before one thread releases the ticket
    last = tl.atomic_add(counter_ptr + index, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if tile.ordered:
            z = tl.zeros((tile.m, tile.n), tl.float32)
            for i in range(SPLIT_K):
                z += tl.load(tile_ptr + i * area + inner, cache_modifier=".cg")
        else:
            z = tl.load(tile_ptr + inner, cache_modifier=".cg")
            tl.debug_barrier()  # zeros are stored by other threads than those that load
            tl.store(tile_ptr + inner, tl.zeros((tile.m, tile.n), tl.float32))
        tl.store(counter_ptr + index, 0)
    return z, last


@triton.jit
def tile_coordinates(index, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Grouped order: GROUP_M row tiles share their weights, NUM_N column tiles share their pixels, while both are in L2."""
    if NUM_N == 1:
        return index, index * 0
    else:
        width: tl.constexpr = GROUP_M * NUM_N
        first = index // width * GROUP_M
        size = tl.minimum(num_m - first, GROUP_M)
        return first + index % width % size, index % width // size
