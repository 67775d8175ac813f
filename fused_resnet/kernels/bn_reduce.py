# mypy: allow-untyped-defs
"""Per-channel reductions over N*H*W: batch statistics, and the sums of BN's backward.

Program (i, j) reduces rows [j * rows, (j + 1) * rows) of channels [i * BLOCK_C, ...), publishes its partial result and
takes a ticket; the last one of a column merges the partial results in their order. One launch, and the result does
not depend on who comes last.
"""

import triton
import triton.language as tl

#: Partial results the last program reads at once: one by one, it would wait for memory each time.
PARTS = tl.constexpr(64)


@triton.jit
def is_last(counter_ptr, parts):
    """Whether this program is the last of `parts` to arrive; leaves the counter zero for the next launch."""
    tl.debug_barrier()  # every warp's part is written before one thread releases the ticket
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def row_offsets(rows, C: tl.constexpr, WIDE: tl.constexpr):
    """Where the pixels `rows` start; in 64 bits where the tensor has 2**31 elements or more."""
    if WIDE:
        return rows.to(tl.int64)[:, None] * C
    else:
        return rows[:, None] * C


@triton.jit
def partial_tile(column, i, parts, SUMS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the first sums of the parts `i` of a column lie, as [parts, channels], and which of them exist."""
    at = ((column * parts + i) * (SUMS * BLOCK_C))[:, None] + tl.arange(0, BLOCK_C)[None, :]
    return at, (i < parts)[:, None]


@triton.jit
def sum_parts(ptrs, valid):
    """The sum over the parts of a tile; written by other programs of this launch, so read from L2."""
    return tl.sum(tl.load(ptrs, mask=valid, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def bn_stats_kernel(
    y_ptr, mean_ptr, var_ptr, counter_ptr, partial_ptr, num_rows, rows_per_part,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of every channel: count, mean and M2 of each tile, merged as they come."""
    column, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < C
    # Everything is relative to the first pixel: with mean >> std, differences keep the digits that sums would lose.
    pivot = tl.load(y_ptr + c, mask=in_channels, other=0.0).to(tl.float32)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, num_rows)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = (rows < end)[:, None] & in_channels[None, :]
        y = tl.load(y_ptr + row_offsets(rows, C, WIDE) + c[None, :], mask=valid, other=0.0).to(tl.float32)
        y = tl.where(valid, y - pivot[None, :], 0.0)
        n = tl.minimum(end - first, BLOCK_M).to(tl.float32)
        tile_mean = tl.sum(y, 0) / n
        centred = tl.where(valid, y - tile_mean[None, :], 0.0)
        mean, m2 = merge(mean, m2, (first - begin).to(tl.float32), tile_mean, tl.sum(centred * centred, 0), n)
    at = (column * parts + part) * 2 * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(partial_ptr + at, mean)
    tl.store(partial_ptr + at + BLOCK_C, m2)
    if is_last(counter_ptr + column, parts):
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, parts, PARTS):
            i = first + tl.arange(0, PARTS)
            n = tl.where(i < parts, tl.minimum(num_rows - i * rows_per_part, rows_per_part), 0).to(tl.float32)
            tile, valid = partial_tile(column, i, parts, 2, BLOCK_C)
            part_mean = tl.load(partial_ptr + tile, mask=valid, other=0.0, cache_modifier=".cg")
            part_m2 = tl.load(partial_ptr + tile + BLOCK_C, mask=valid, other=0.0, cache_modifier=".cg")
            done = (first * rows_per_part).to(tl.float32)
            mean, m2 = merge_parts(mean, m2, done, part_mean, part_m2, n)
        tl.store(mean_ptr + c, pivot + mean, mask=in_channels)
        tl.store(var_ptr + c, m2 / num_rows, mask=in_channels)


@triton.jit
def merge(mean, m2, count, other_mean, other_m2, other_count):
    """Mean and M2 of two sets together (Chan's formula); `count` may be 0, `other_count` may not."""
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def merge_parts(mean, m2, count, part_mean, part_m2, n):
    """The same with the parts of a tile, [parts, channels], `n` rows each: their own mean first, then M2 around it."""
    tile_n = tl.sum(n, 0)
    tile_mean = tl.sum(part_mean * n[:, None], 0) / tile_n
    spread = part_mean - tile_mean[None, :]
    tile_m2 = tl.sum(part_m2 + spread * spread * n[:, None], 0)
    return merge(mean, m2, count, tile_mean, tile_m2, tile_n)


@triton.jit
def load_dz(grad_ptr, mask_ptr, offsets, valid, MASKED: tl.constexpr):
    """grad_out where the activation passes it, else 0; `offsets` is the element's place in NHWC order."""
    dz = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if MASKED:
        words = tl.load(mask_ptr + (offsets >> 5), mask=valid, other=0)
        dz = tl.where((words >> (offsets & 31).to(tl.int32)) & 1 == 1, dz, 0.0)
    return dz


@triton.jit
def bn_backward_reduce_kernel(
    grad_ptr, mask_ptr, y_ptr, mean_ptr, invstd_ptr, proj_y_ptr, proj_mean_ptr, proj_invstd_ptr,
    dz_ptr, dz_xhat_ptr, proj_dz_xhat_ptr, counter_ptr, partial_ptr, num_rows, rows_per_part,
    C: tl.constexpr, MASKED: tl.constexpr, PROJ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sum(dz), sum(dz * xhat) and, with a projection, the sum of dz * xhat of its BN."""
    SUMS: tl.constexpr = 3 if PROJ else 2
    column, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = c < C
    mean = tl.load(mean_ptr + c, mask=in_channels, other=0.0)
    invstd = tl.load(invstd_ptr + c, mask=in_channels, other=0.0)
    if PROJ:
        proj_mean = tl.load(proj_mean_ptr + c, mask=in_channels, other=0.0)
        proj_invstd = tl.load(proj_invstd_ptr + c, mask=in_channels, other=0.0)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, num_rows)
    sum_dz = tl.zeros((BLOCK_C,), tl.float32)
    sum_xhat = tl.zeros((BLOCK_C,), tl.float32)
    sum_proj = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = (rows < end)[:, None] & in_channels[None, :]
        offsets = row_offsets(rows, C, WIDE) + c[None, :]
        dz = load_dz(grad_ptr, mask_ptr, offsets, valid, MASKED)
        y = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        sum_dz += tl.sum(dz, 0)
        sum_xhat += tl.sum(dz * (y - mean[None, :]), 0)
        if PROJ:
            proj_y = tl.load(proj_y_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
            sum_proj += tl.sum(dz * (proj_y - proj_mean[None, :]), 0)
    at = (column * parts + part) * SUMS * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(partial_ptr + at, sum_dz)
    tl.store(partial_ptr + at + BLOCK_C, sum_xhat)
    if PROJ:
        tl.store(partial_ptr + at + 2 * BLOCK_C, sum_proj)
    if is_last(counter_ptr + column, parts):
        sum_dz = tl.zeros((BLOCK_C,), tl.float32)
        sum_xhat = tl.zeros((BLOCK_C,), tl.float32)
        sum_proj = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, parts, PARTS):
            tile, valid = partial_tile(column, first + tl.arange(0, PARTS), parts, SUMS, BLOCK_C)
            sum_dz += sum_parts(partial_ptr + tile, valid)
            sum_xhat += sum_parts(partial_ptr + tile + BLOCK_C, valid)
            if PROJ:
                sum_proj += sum_parts(partial_ptr + tile + 2 * BLOCK_C, valid)
        tl.store(dz_ptr + c, sum_dz, mask=in_channels)
        tl.store(dz_xhat_ptr + c, sum_xhat * invstd, mask=in_channels)
        if PROJ:
            tl.store(proj_dz_xhat_ptr + c, sum_proj * proj_invstd, mask=in_channels)
