# mypy: allow-untyped-defs
"""What every tail does with its accumulator: scale and shift from the live BN, residual, activation, one rounding at
the store.
"""

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

    Square root and division are IEEE's, so long sequences: one lane computes one filter, and the values then travel
    through shared memory to the accumulator's layout. A vector shorter than the program has threads Triton would
    rather recompute in that layout, 32 filters a thread; hence the vector is as long as there are threads, with
    repeated filters.
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
def activate(z, tile: tl.constexpr):
    """The activation of a record that has one: relu, relu6 or none; NaN stays NaN, as in eager."""
    if tile.activation != "none":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if tile.activation == "relu6":
        z = tl.minimum(z, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def round_to(z, dtype: tl.constexpr, tile: tl.constexpr):
    """z in `dtype`, to nearest even."""
    if tile.precision == "upcast" and dtype == tl.bfloat16:  # Triton 3.8's interpreter cuts the low bits off instead
        bits = z.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        z = tl.where(z == z, nearest, z)
    return z.to(dtype)


@triton.jit
def finish_columns(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K: tl.constexpr, tile: tl.constexpr):
    """y = act(scale * z + shift + residual) for some columns of a tile; the only rounding is the store's."""
    k = first_k + tl.arange(0, z.shape[1])
    offsets = rows[:, None] * K + k[None, :]
    mask = in_m[:, None] & (k < K)[None, :]
    z = z * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, round_to(activate(z, tile), y_ptr.dtype.element_ty, tile), mask=mask)


@triton.jit
def finish_tile(
    z, scale, shift, y_ptr, residual_ptr, first_pixel, rows, in_m, first_k, K: tl.constexpr, tile: tl.constexpr
):
    """The epilogue of a tile, a large one in two halves: registers then hold one half's residual, scale and shift."""
    start = first_pixel.to(tl.int64) * K  # 64-bit once: offsets inside the tile are small
    y_ptr += start
    if residual_ptr is not None:
        residual_ptr += start
    if tile.halve_epilogue:
        left, right = column_halves(z)
        left_scale, right_scale = column_halves(scale)
        left_shift, right_shift = column_halves(shift)
        finish_columns(left, left_scale, left_shift, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)
        finish_columns(right, right_scale, right_shift, y_ptr, residual_ptr, rows, in_m, first_k + tile.n // 2, K, tile)
    else:
        finish_columns(z, scale, shift, y_ptr, residual_ptr, rows, in_m, first_k, K, tile)


@triton.jit
def reduce_split(z, workspace_ptr, index, split, tile: tl.constexpr):
    """Add up the split_k partial sums of tile `index`. Returns (sum, whether this program came last and owns the
    epilogue).

    The workspace holds the tiles' counters, then partial sums. Every program publishes its partial sum and takes a
    ticket; the last one reads what the others wrote. `ordered` sums the partial tiles by their index, whoever comes
    last, so the result does not depend on timing; otherwise they are added atomically into one tile, which moves less
    data. The last program leaves the counter (and the atomic tile) zero for the next launch.
    """
    SPLIT_K: tl.constexpr = tile.split_k
    BLOCK_M: tl.constexpr = tile.m
    BLOCK_N: tl.constexpr = tile.n
    area: tl.constexpr = BLOCK_M * BLOCK_N
    counter_ptr = workspace_ptr + index
    tiles_ptr = (workspace_ptr + tile.counters).to(tl.pointer_type(tl.float32), bitcast=True)
    inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if tile.ordered:
        tile_ptr = tiles_ptr + index.to(tl.int64) * (SPLIT_K * area)
        tl.store(tile_ptr + split * area + inner, z)
    else:
        tile_ptr = tiles_ptr + index.to(tl.int64) * area
        tl.atomic_add(tile_ptr + inner, z, sem="relaxed")
    tl.debug_barrier()  # every warp's part is written before one thread releases the ticket
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if tile.ordered:
            z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in range(SPLIT_K):
                z += tl.load(tile_ptr + i * area + inner, cache_modifier=".cg")
        else:
            z = tl.load(tile_ptr + inner, cache_modifier=".cg")
            tl.debug_barrier()  # zeros are stored by other threads than those that load
            tl.store(tile_ptr + inner, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        tl.store(counter_ptr, 0)
    return z, last


@triton.jit
def tile_coordinates(index, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Grouped order: GROUP_M row tiles share their weights, NUM_N column tiles share their pixels, while both are in
    L2.
    """
    if NUM_N == 1:
        return index, index * 0
    else:
        width: tl.constexpr = GROUP_M * NUM_N
        first = index // width * GROUP_M
        size = tl.minimum(num_m - first, GROUP_M)
        return first + index % width % size, index % width // size
