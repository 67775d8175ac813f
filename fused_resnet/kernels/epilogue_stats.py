# mypy: allow-untyped-defs
"""What a training convolution does with its accumulator: bias, one rounding at the store, and the statistics of what
was stored.

Every tile leaves a record of its columns: pivot, mean above the pivot, M2 (sum of squares around the mean), and the
count of its pixels. Whoever comes last in a group of tiles merges their records into one, and whoever comes last of
the groups merges those, always in their order: the result does not depend on timing, and no program has to read more
than a small share of the records. All means are differences from a pivot, so that mean >> std costs no digits.
"""

import triton
import triton.language as tl

from fused_resnet.kernels.bn_reduce import is_last, merge_parts
from fused_resnet.kernels.epilogue import round_to


@triton.jit
def column_statistics(y, in_m, count):
    """Pivot, mean above it and M2 of a tile's columns; `count` of its rows, those `in_m`, exist."""
    y = tl.where(in_m[:, None], y, 0.0)
    # Two passes over registers: the first mean is rough where mean >> std, and only a pivot for the second.
    pivot = tl.sum(y, 0) / count
    centred = tl.where(in_m[:, None], y - pivot[None, :], 0.0)
    mean = tl.sum(centred, 0) / count
    return pivot, mean, tl.sum(centred * centred, 0) - mean * mean * count


@triton.jit
def store_record(record_ptr, pivot, mean, m2, count, tile: tl.constexpr):
    """Three vectors of tile.n, and the count."""
    column_ptr = record_ptr + tl.arange(0, tile.n)
    tl.store(column_ptr, pivot)
    tl.store(column_ptr + tile.n, mean)
    tl.store(column_ptr + 2 * tile.n, m2)
    tl.store(record_ptr + 3 * tile.n, count)


@triton.jit
def merge_records(record_ptr, records, tile: tl.constexpr):
    """Pivot (the first record's), mean, M2 and count of `records` records together; others wrote them, so from L2."""
    CHUNK: tl.constexpr = tile.stats_chunk
    BLOCK_N: tl.constexpr = tile.n
    column = tl.arange(0, BLOCK_N)
    pivot = tl.load(record_ptr + column, cache_modifier=".cg")
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for first in range(0, records, CHUNK):
        i = first + tl.arange(0, CHUNK)
        valid = i < records
        inside = valid[:, None]
        at = record_ptr + i.to(tl.int64)[:, None] * tile.record + column[None, :]
        n = tl.load(record_ptr + i.to(tl.int64) * tile.record + 3 * tile.n, mask=valid, other=0.0, cache_modifier=".cg")
        # The difference of two pivots is exact, or small beside the spread of the data.
        part = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg") - pivot[None, :]
        part += tl.load(at + tile.n, mask=inside, other=0.0, cache_modifier=".cg")
        part = tl.where(inside, part, 0.0)
        part_m2 = tl.load(at + 2 * tile.n, mask=inside, other=0.0, cache_modifier=".cg")
        mean, m2 = merge_parts(mean, m2, count, part, part_m2, n)
        count += tl.sum(n, 0)
    return pivot, mean, m2, count


@triton.jit
def finish_tile_stats(z, bias_ptr, y_ptr, stats, first_pixel, rows, in_m, count, tile_m, num_m, tile_n,
                      K: tl.constexpr, tile: tl.constexpr):  # fmt: skip
    """The epilogue of tile (tile_m, tile_n) of num_m rows of tiles, `count` of whose pixels exist: y = z + bias."""
    GROUP: tl.constexpr = tile.stats_group
    column = tl.arange(0, tile.n)
    k = tile_n * tile.n + column
    in_k = k < K
    if bias_ptr is not None:
        z += tl.load(bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    stored = round_to(z, y_ptr.dtype.element_ty, tile)
    y_ptr += first_pixel.to(tl.int64) * K  # 64-bit once: offsets inside the tile are small
    tl.store(y_ptr + rows[:, None] * K + k[None, :], stored, mask=in_m[:, None] & in_k[None, :])

    groups = tl.cdiv(num_m, GROUP)
    records_ptr = stats.records + tile_n.to(tl.int64) * (num_m + groups) * tile.record
    record_ptr = records_ptr + tile_m.to(tl.int64) * tile.record
    pixels = count.to(tl.float32)
    pivot, mean, m2 = column_statistics(stored.to(tl.float32), in_m, pixels)
    store_record(record_ptr, pivot, mean, m2, pixels, tile)

    group = tile_m // GROUP
    counters_ptr = stats.counters + tile_n * (groups + 1)
    members = tl.minimum(num_m - group * GROUP, GROUP)
    if is_last(counters_ptr + 1 + group, members):
        grouped_ptr = records_ptr + num_m.to(tl.int64) * tile.record
        group_ptr = grouped_ptr + group.to(tl.int64) * tile.record
        first_ptr = records_ptr + group.to(tl.int64) * (GROUP * tile.record)
        pivot, mean, m2, total = merge_records(first_ptr, members, tile)
        store_record(group_ptr, pivot, mean, m2, total, tile)
        if is_last(counters_ptr, groups):
            pivot, mean, m2, total = merge_records(grouped_ptr, groups, tile)
            tl.store(stats.mean + k, pivot + mean, mask=in_k)
            # Of a constant channel rounding may leave M2 just below zero; NaN stays NaN.
            var = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL) / total
            tl.store(stats.var + k, var, mask=in_k)
