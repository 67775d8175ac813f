"""Planted bugs: what could go wrong in the CUDA sources, each with the test that must see it.

A mutant replaces one piece of text, which must occur exactly once in its file. Those on primitives.cuh, and those
that only interleaved blocks can show, are for the PTX interpreter; those on registers are for the gate.
"""

# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc/cuda
    find: str
    put: str
    test: str  # "host:kernel:<symbol>", "host:banks:<symbol>", "host:split", "ptx:kernel:<symbol>", "ptx:split", "static:<symbol>"


GEMM, VECTOR, GATHER, MMA = "implicit_gemm.cuh", "load_vector.cuh", "load_gather.cuh", "warp_mma.cuh"
ADDRESS, EPILOGUE, PROJECTION, SPLIT = "addressing.cuh", "epilogue.cuh", "projection.cuh", "split_k.cuh"
PRIMITIVES, PLAN, ENTRY = "primitives.cuh", "plan.cpp", "kernel_entry.cuh"
F16, F16_SMALL, F16_LARGE = "host:kernel:conv_f16_64x64", "host:kernel:conv_f16_32x32", "host:kernel:conv_f16_128x128"
GATHERED = "host:kernel:conv_gather_f16_32x32"

#: The few that CI plants in every run; `make mutants` plants all.
CI = ("no_barrier_in_a_step", "wait_one_group_less", "no_halo_rows", "residual_after_activation", "no_swizzle")

MUTANTS = (
    # ---- the pipeline
    Mutant("no_barrier_in_a_step", GEMM, "__syncthreads();\n    typename", "typename", F16),
    Mutant("wait_one_group_less", GEMM, "cp_async_wait<kAhead - 1>();", "cp_async_wait<kAhead>();", F16),
    Mutant("no_barrier_after_the_loop", GEMM, "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();", F16),
    Mutant("no_commit_in_a_step", GEMM, "loader.issue(free_stage);\n    cp_async_commit();", "loader.issue(free_stage);", F16),
    Mutant("last_step_dropped", GEMM, "remaining > 0; --remaining", "remaining > 1; --remaining", F16),
    Mutant("ring_does_not_wrap", GEMM, "if (stage == pipeline_end) stage = pipeline;", "", F16),
    Mutant("copies_into_the_stage_in_use", GEMM, "loader.issue(free_stage);", "loader.issue(stage);", F16),
    Mutant("prologue_ignores_the_steps", GEMM, "if (i < steps) loader.issue(", "loader.issue(", F16),
    # ---- halo, tails and the walk through the depth
    Mutant("no_halo_rows", VECTOR, "bits |= outside ? 1u << r : 0u;", "", F16),
    Mutant("no_halo_columns", VECTOR, "bits |= outside ? kColumnBit << s : 0u;", "", F16),
    Mutant("halo_off_by_one", VECTOR, ">= static_cast<uint32_t>(source.w)", "> static_cast<uint32_t>(source.w)", F16),
    Mutant("halo_without_dilation", VECTOR, "window.h + r * source.dilation_h", "window.h + r", F16),
    Mutant("depth_tail", VECTOR, "cursor_.position < depth_", "cursor_.position < depth_ + kDepth", F16),
    Mutant("channel_tail_of_the_weights", VECTOR, "channel < params.k ? channel : params.k - 1", "channel", F16),
    Mutant("channel_step_in_bytes", VECTOR, "chunk) * (16 / kElementBytes)", "chunk) * (8 / kElementBytes)", F16),
    Mutant("no_carry_into_the_next_tap", ADDRESS, "at.c -= size_c;\n      ++at.s;", "at.c -= size_c;", F16),
    Mutant("no_carry_into_the_next_row", ADDRESS, "at.s -= size_s;\n      ++at.r;", "at.s -= size_s;", F16),
    Mutant("stride_of_the_other_axis", ADDRESS, "* source.stride_w - source", "* source.stride_h - source", F16),
    Mutant("padding_of_the_other_axis", ADDRESS, "- source.padding_h;", "- source.padding_w;", F16),
    Mutant("gather_without_halo", GATHER, " &&\n                         static_cast<uint32_t>(w) < static_cast<uint32_t>(source_.w)", "", GATHERED),
    Mutant("gather_without_barrier", GATHER, "});\n    }\n    __syncthreads();", "});\n    }", GATHERED),
    Mutant("gather_place_in_the_chunk", GATHER, "chunk * 16 + byte_ % 16", "chunk * 16", GATHERED),
    Mutant("gather_pixel_tail", GATHER, "inside ? window.h : kOutside", "window.h", "host:kernel:conv_gather_f16_64x64"),
    # ---- shared memory and the tensor cores
    Mutant("no_swizzle", ADDRESS, "row & 7 : (row >> 1) & 3", "0 : 0", "host:banks:conv_f16_64x64"),
    Mutant("swizzle_of_half_the_rows", ADDRESS, "(row >> 1) & 3", "row & 3", "host:banks:conv_f16_128x128"),
    Mutant("b_read_without_swizzle", MMA, "(chunk_b ^ swizzle<Tile>(row_b))", "chunk_b", F16_SMALL),
    Mutant("b_fragments_exchanged", MMA, "lane / 8 % 2;", "1 - lane / 8 % 2;", F16_SMALL),
    Mutant("a_rows_of_the_other_half", MMA, "row_ * Tile::kWarpM + lane % 16", "row_ * Tile::kWarpM + lane % 8", F16_SMALL),
    Mutant("slab_twice", MMA, "^ (slab * 32), b = (stage + b_) ^ (slab * 32)", "^ (slab * 32), b = stage + b_", F16_SMALL),
    Mutant("tf32_truncated", MMA, "operands.a[i][e] = round_to_tf32(operands.a[i][e]);", ";", "host:kernel:conv_tf32_64x64"),
    # ---- the epilogue
    Mutant("residual_after_activation", EPILOGUE,
           "if (params.residual) v[i] = add_rn(v[i], unpack<kCount>(residual[b], i, params.residual_dtype));\n        v[i] = activate(v[i], params.activation);",
           "v[i] = activate(v[i], params.activation);\n        if (params.residual) v[i] = add_rn(v[i], unpack<kCount>(residual[b], i, params.residual_dtype));",
           F16),
    Mutant("residual_tail", EPILOGUE, "if (params.residual && pixel < params.pixels)", "if (params.residual)", F16),
    Mutant("pixel_tail", EPILOGUE, "if (pixel < params.pixels) {\n        store", "{\n        store", F16),
    Mutant("channel_tail", EPILOGUE, "if (channel >= params.k) return;", "", F16),
    Mutant("eps_forgotten", EPILOGUE, "add_rn(load_number(n.var, k, n.norm_dtype), n.eps)", "load_number(n.var, k, n.norm_dtype)", F16),
    Mutant("gamma_ignored", EPILOGUE, "n.weight ? load_number(n.weight, k, n.norm_dtype) : 1.0f", "1.0f", F16),
    Mutant("bias_not_scaled", EPILOGUE, "fma_rn(centred, scale, beta)", "add_rn(centred, beta)", F16),
    Mutant("relu6_is_relu", EPILOGUE, "v > 6.0f", "v > 600.0f", F16_SMALL),
    Mutant("nan_becomes_zero", EPILOGUE, "activation != kActivationNone && v < 0.0f", "activation != kActivationNone && !(v > 0.0f)",
           "host:nan"),
    Mutant("no_barrier_before_the_store", EPILOGUE, "(acc, warp, pass, staging);\n    __syncthreads();", "(acc, warp, pass, staging);", F16),
    Mutant("no_barrier_between_passes", EPILOGUE, "if (pass > 0) __syncthreads();", "", F16_LARGE),
    Mutant("pass_of_the_wrong_rows", EPILOGUE, "+ pass * kWarpRows +", "+", F16_LARGE),
    # ---- projection and split-K
    Mutant("projection_over_the_main_sum", PROJECTION, "for (int e = 0; e < 4; ++e) acc[f][e] = 0.0f;", ";", F16),
    Mutant("projection_with_the_main_scale", PROJECTION, "norm + 2 * Tile::kN * 4", "norm", F16),
    Mutant("projection_shift_forgotten", EPILOGUE, "shift[i] = add_rn(shift[i], shared_load_f32(at + 3 * Tile::kN * 4));", "", F16),
    Mutant("split_starts_at_the_projection", GEMM, "first = available < 0 ? -available : 0;", "first = 0;", F16),
    Mutant("splits_overlap", GEMM, "all_steps * (split + 1) / params.splits) - first", "all_steps * (split + 1) / params.splits) - first + 1", F16_SMALL),
    Mutant("first_to_arrive_stores", SPLIT, "before + 1 == static_cast<uint32_t>(params.splits)", "before == 0", "host:split"),
    Mutant("own_partial_sum_only", SPLIT, "--s, partial += kPartialBytes", "--s", "host:split"),
    Mutant("partial_sums_of_another_tile", SPLIT, "static_cast<int64_t>(tile) * params.splits *", "static_cast<int64_t>(tile) *", "host:split"),
    # ---- the planner
    Mutant("alignment_too_small", PLAN, "plan.alignment[kTensorX] = plan.alignment[kTensorWeight] = params.source[0].vector_bytes",
           "plan.alignment[kTensorX] = plan.alignment[kTensorWeight] = 4", F16_SMALL),
    Mutant("tiles_rounded_down", PLAN, "ceil_div(params.pixels, kernel.tile_m) * tiles_n", "(params.pixels / kernel.tile_m) * tiles_n", F16),
    Mutant("wide_stores_of_odd_rows", PLAN, "q.k % count == 0 && alignment", "alignment", F16),
    Mutant("step_of_the_tap", PLAN, "depth / source.c % source.s", "depth / source.c", F16),
    # ---- what the twin cannot show: compiled code
    Mutant("zero_fill_reads", PRIMITIVES, "valid ? kBytes : 0", "kBytes", "ptx:kernel:conv_f16_32x32"),
    Mutant("no_fence_before_arriving", PRIMITIVES,
           'uint32_t before;\n  asm volatile("fence.acq_rel.gpu;" ::: "memory");', "uint32_t before;", "ptx:split"),
    Mutant("no_fence_after_arriving", PRIMITIVES,
           '"memory");\n  asm volatile("fence.acq_rel.gpu;" ::: "memory");\n  return before;', '"memory");\n  return before;', "ptx:split"),
    Mutant("counter_not_reset", PRIMITIVES, '"r"(blocks - 1)', '"r"(blocks)', "ptx:split"),
    Mutant("arrives_before_the_others_stored", SPLIT, "__syncthreads();\n  if (threadIdx.x == 0)", "if (threadIdx.x == 0)", "ptx:split"),
    Mutant("bf16_products_as_f16", PRIMITIVES, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
           "ptx:kernel:conv_bf16_32x32"),
    # ---- what only machine code shows
    Mutant("too_many_blocks_asked_for", ENTRY, "fused_resnet::tile::kBlocks)", "fused_resnet::tile::kBlocks * 2)", "static:conv_f16_128x128"),
    Mutant("narrow_copies", VECTOR, "cp_async<16>(b + i", "cp_async<8>(b + i", "static:conv_f16_64x64"),
    Mutant("two_barriers_a_step", GEMM, "__syncthreads();\n    typename", "__syncthreads();\n    __syncthreads();\n    typename",
           "static:conv_f16_64x64"),
    Mutant("division_in_the_loop", ADDRESS, "at.position += elements;", "at.position += elements; at.r = at.position / size_c - step_r;", "static:conv_f16_128x128"),
)  # fmt: skip
