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
    test: str  # "host:kernel:<symbol>", "host:turing:<symbol>", "host:banks:<symbol>", "host:split", "ptx:kernel:<symbol>", "ptx:turing:<symbol>", "ptx:split", "static:<symbol>";
    # of the training passes "host:pass:<op>", "host:parts:<op>", "host:mean", "host:pass_nan:<op>", "host:stats:<symbol>", "host:stats_groups", "ptx:pass:<op>", "ptx:turing_rounding:<dtype>", "ptx:parts:<op>", "static:pass:<op>";
    # "counters:<test>", "planner:<test>" of those modules


GEMM, VECTOR, GATHER, MMA = "implicit_gemm.cuh", "load_vector.cuh", "load_gather.cuh", "warp_mma.cuh"
ADDRESS, EPILOGUE, PROJECTION, SPLIT = "addressing.cuh", "epilogue.cuh", "projection.cuh", "split_k.cuh"
PRIMITIVES, PLAN, PLAN_H, ENTRY = "primitives.cuh", "plan.cpp", "plan.h", "kernel_entry.cuh"
NUMBERS, ARRIVAL, SCHEDULE, COUNTERS = "numbers.cuh", "arrival.cuh", "schedule.cpp", "counters.cpp"
SHARED_COUNTERS = "counters:test_launches_on_one_stream_share_theirs"
CAPTURED_COUNTERS = "counters:test_each_captured_launch_gets_its_own_until_the_graph_is_gone"
WALK, REDUCE, MOMENTS, BN_PLAN, BN_LIST = (
    "bn_elementwise.cuh",
    "bn_reduce.cuh",
    "moments.cuh",
    "bn_plan.cpp",
    "bn_kernels.h",
)
STATISTICS, F16_STATS = "statistics.cuh", "host:stats:conv_f16_stats_64x64"
STATS, APPLY, SUMS, BACKWARD = "bn_stats", "bn_apply_add_relu", "bn_backward_reduce", "bn_backward_apply"
F16, F16_SMALL, F16_LARGE = "host:kernel:conv_f16_64x64", "host:kernel:conv_f16_32x32", "host:kernel:conv_f16_128x128"
GATHERED, T16 = "host:kernel:conv_gather_f16_32x32", "host:turing:conv_f16_64x64"

#: The few that CI plants in every run; `make mutants` plants all.
CI = (
    "no_barrier_in_a_step", "wait_one_group_less", "no_halo_rows", "residual_after_activation", "no_swizzle",
    "mask_bits_behind_the_end", "no_barrier_between_slots", "every_part_weighs_the_same", "parts_without_a_fence", "counters_not_zeroed",
    "graph_counts_where_the_stream_does", "registers_read_before_all_have_put",
)  # fmt: skip

MUTANTS = (
    # ---- the pipeline
    Mutant("no_barrier_in_a_step", GEMM, "__syncthreads();\n    typename", "typename", F16),
    Mutant("wait_one_group_less", GEMM, "cp_async_wait<kAhead - 1>();", "cp_async_wait<kAhead>();", F16),
    Mutant("no_barrier_after_the_loop", GEMM, "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();", F16),
    Mutant("no_commit_in_a_step", GEMM, "loader.issue(free_stage);\n    cp_async_commit();", "loader.issue(free_stage);", F16),
    Mutant("last_step_dropped", GEMM, "remaining > 0; --remaining) {\n    // One group", "remaining > 1; --remaining) {\n    // One group", F16),
    Mutant("ring_does_not_wrap", GEMM, "if (stage == pipeline_end) stage = pipeline;", "", F16),
    Mutant("copies_into_the_stage_in_use", GEMM, "loader.issue(free_stage);", "loader.issue(stage);", F16),
    Mutant("prologue_ignores_the_steps", GEMM, "if (i < steps) loader.issue(", "loader.issue(", F16),
    # ---- the pipeline of Turing
    Mutant("registers_put_before_all_have_read", GEMM, "__syncthreads();  // all have read the previous step\n", "", T16),
    Mutant("registers_read_before_all_have_put", GEMM, "loader.put(next, stage);\n    __syncthreads();", "loader.put(next, stage);", T16),
    Mutant("first_step_not_fetched", GEMM, "if (steps > 0) loader.fetch(next);", "", T16),
    Mutant("no_step_fetched_ahead", GEMM, "if (remaining > 1) loader.fetch(next);", "", T16),
    Mutant("registers_without_halo", VECTOR, "valid ? global_load_16(source) : Words4{}", "global_load_16(source)", T16),
    Mutant("weights_over_pixels", VECTOR, "(i < kPassesA ? 0 : Tile::kBytesA)", "0", T16),
    Mutant("gathered_halo_on_turing", GATHER, "valid ? global_load_u32(from) : uint32_t{0}", "global_load_u32(from)", "host:turing:conv_gather_f16_32x32"),
    Mutant("second_half_of_b_twice", PRIMITIVES, '"r"(b[half])', '"r"(b[1])', "ptx:turing:conv_f16_32x32"),
    Mutant("halves_of_a_mixed", PRIMITIVES, '"r"(a[2 * half + 1])', '"r"(a[half + 1])', "ptx:turing:conv_f16_32x32"),
    Mutant("bfloat16_cut_off_on_turing", PRIMITIVES, "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", "ptx:turing_rounding:bfloat16"),
    Mutant("float16_halves_exchanged_on_turing", PRIMITIVES, '"=h"(half[1]) : "f"(high)', '"=h"(half[1]) : "f"(low)', "ptx:turing:conv_f16_32x32"),
    Mutant("turing_plans_all_stages", PLAN_H, "capability < 80 ? kernel.turing_shared_bytes : kernel.shared_bytes", "kernel.shared_bytes", "planner:test_turing"),
    Mutant("turing_multiplies_tf32", PLAN, "q.tf32 && device.capability >= 80", "q.tf32", "planner:test_turing"),
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
    Mutant("pixel_tail", EPILOGUE, "if (pixel < params.pixels) {\n        const int", "{\n        const int", F16),
    Mutant("channel_tail", EPILOGUE, "if (channel >= params.k) return;", "", F16),
    Mutant("eps_forgotten", EPILOGUE, "add_rn(load_number(n.var, k, n.norm_dtype), n.eps)", "load_number(n.var, k, n.norm_dtype)", F16),
    Mutant("gamma_ignored", EPILOGUE, "n.weight ? load_number(n.weight, k, n.norm_dtype) : 1.0f", "1.0f", F16),
    Mutant("bias_not_scaled", EPILOGUE, "fma_rn(centred, scale, beta)", "add_rn(centred, beta)", F16),
    Mutant("relu6_is_relu", NUMBERS, "v > 6.0f", "v > 600.0f", F16_SMALL),
    Mutant("nan_becomes_zero", NUMBERS, "activation != kActivationNone && v < 0.0f", "activation != kActivationNone && !(v > 0.0f)",
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
    Mutant("first_to_arrive_stores", ARRIVAL, "before + 1 == blocks", "before == 0", "host:split"),
    Mutant("own_partial_sum_only", SPLIT, "--s, partial += kPartialBytes", "--s", "host:split"),
    Mutant("partial_sums_of_another_tile", SPLIT, "static_cast<int64_t>(tile) * params.splits *", "static_cast<int64_t>(tile) *", "host:split"),
    # ---- the planner
    Mutant("alignment_too_small", PLAN, "plan.alignment[kTensorX] = plan.alignment[kTensorWeight] = params.source[0].vector_bytes",
           "plan.alignment[kTensorX] = plan.alignment[kTensorWeight] = 4", F16_SMALL),
    Mutant("tiles_rounded_down", PLAN, "ceil_div(params.pixels, kernel.tile_m) * tiles_n", "(params.pixels / kernel.tile_m) * tiles_n", F16),
    Mutant("wide_stores_of_odd_rows", PLAN, "q.k % count == 0 && alignment", "alignment", F16),
    Mutant("step_of_the_tap", PLAN, "depth / source.c % source.s", "depth / source.c", F16),
    Mutant("negative_quotient_rounded_up", PLAN, "return room < 0 ? 0 : ", "return ", "planner:test_sizes_as_in_python"),
    Mutant("alone_on_its_sm", SCHEDULE, "in_company && blocks_per_sm", "false && blocks_per_sm", "planner:test_what_memory_bounds_does_not_run_alone_on_an_sm"),
    # ---- arrival counters across streams and graphs
    Mutant("counters_not_zeroed", COUNTERS, "status = cudaMemsetAsync(fresh, 0, bytes, own);", "", SHARED_COUNTERS),
    Mutant("counters_zeroed_too_late", COUNTERS, "if (status == cudaSuccess) status = cudaStreamSynchronize(own);", "", SHARED_COUNTERS),
    Mutant("counters_of_another_device", COUNTERS, "h.of_stream.find({device, number})", "h.of_stream.find({0, number})", SHARED_COUNTERS),
    Mutant("fewer_counters_than_asked_for", COUNTERS, "found->second.bytes >= bytes", "found->second.bytes > 0", SHARED_COUNTERS),
    Mutant("outgrown_counters_serve_another_stream", COUNTERS, "  h.of_stream[{device, number}] = piece;",
           "  if (h.of_stream.count({device, number})) h.idle[{device, h.of_stream[{device, number}].bytes}].push_back(h.of_stream[{device, number}].address);\n  h.of_stream[{device, number}] = piece;", SHARED_COUNTERS),
    Mutant("stream_by_its_handle", COUNTERS, "cudaStreamGetId(stream, &number)", "(number = reinterpret_cast<uintptr_t>(stream), cudaSuccess)",
           "counters:test_a_new_stream_with_an_old_handle_gets_its_own"),
    Mutant("graph_counts_where_the_stream_does", COUNTERS, "capture == cudaStreamCaptureStatusActive ?", "false ?", CAPTURED_COUNTERS),
    Mutant("pieces_overlap", COUNTERS, "for (int64_t at = size; at < chunk;", "for (int64_t at = 0; at < chunk;", "counters:test_what_fails_is_a_sentence_and_costs_nothing"),
    Mutant("allocation_spoils_the_capture", COUNTERS, "const RelaxedCapture relaxed;", "", "counters:test_allocating_does_not_spoil_the_capture_of_another_thread"),
    Mutant("counters_never_come_back", COUNTERS, "h.idle[{piece->device, piece->bytes}].push_back(piece->address);", "", "counters:test_captures_come_and_go_in_bounded_memory"),
    Mutant("failed_capture_loses_its_counters", COUNTERS, "if (status != cudaSuccess) cudaUserObjectRelease(owner, 1);", "", "counters:test_what_fails_is_a_sentence_and_costs_nothing"),
    # ---- what the twin cannot show: compiled code
    Mutant("zero_fill_reads", PRIMITIVES, "valid ? kBytes : 0", "kBytes", "ptx:kernel:conv_f16_32x32"),
    Mutant("no_fence_before_arriving", PRIMITIVES,
           'uint32_t before;\n  asm volatile("fence.acq_rel.gpu;" ::: "memory");', "uint32_t before;", "ptx:split"),
    Mutant("no_fence_after_arriving", PRIMITIVES,
           '"memory");\n  asm volatile("fence.acq_rel.gpu;" ::: "memory");\n  return before;', '"memory");\n  return before;', "ptx:split"),
    Mutant("counter_not_reset", PRIMITIVES, '"r"(blocks - 1)', '"r"(blocks)', "ptx:split"),
    Mutant("arrives_before_the_others_stored", ARRIVAL, "__syncthreads();\n  if (threadIdx.x == 0)", "if (threadIdx.x == 0)", "ptx:split"),
    Mutant("bf16_products_as_f16", PRIMITIVES, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
           "ptx:kernel:conv_bf16_32x32"),
    # ---- what only machine code shows
    Mutant("too_many_blocks_asked_for", ENTRY, "fused_resnet::math>())", "fused_resnet::math>() * 2)", "static:conv_f16_128x128"),
    Mutant("narrow_copies", VECTOR, "cp_async<16>(place(", "cp_async<8>(place(", "static:conv_f16_64x64"),
    Mutant("two_barriers_a_step", GEMM, "__syncthreads();\n    typename", "__syncthreads();\n    __syncthreads();\n    typename",
           "static:conv_f16_64x64"),
    Mutant("division_in_the_loop", ADDRESS, "at.position += elements;", "at.position += elements; at.r = at.position / size_c - step_r;", "static:conv_f16_128x128"),
    # ---- training: the elementwise passes
    Mutant("mask_bits_behind_the_end", WALK, "if constexpr (!kWhole) bits &= (1u << count) - 1;", "", f"host:pass:{APPLY}"),
    Mutant("a_lane_less_in_a_word", WALK, "if constexpr (kWordLanes > 2) bits |= shuffle_xor<2>(bits);", "", f"host:pass:{APPLY}"),
    Mutant("words_between_warps", BN_PLAN, "std::lcm(int64_t{p.channels}, int64_t{32})", "std::lcm(int64_t{p.channels}, int64_t{8})", f"host:pass:{APPLY}"),
    Mutant("last_packet_whole", WALK, "left < kPacket ? static_cast<int>(left) : kPacket;", "kPacket;", f"host:pass:{BACKWARD}"),
    Mutant("channels_do_not_wrap", WALK, "at + 1 == params.channels ? 0 : at + 1", "at + 1", f"host:pass:{BACKWARD}"),
    Mutant("turn_of_one_lane", WALK, "params.stride + 32 - lane;", "params.stride + 1;", f"ptx:pass:{APPLY}"),
    Mutant("turns_overlap", WALK, "at += kPacketsUnderWay * params.stride", "at += params.stride", "host:passes"),
    Mutant("nan_loses_its_gradient", WALK, "passes = !(below || above);", "passes = z > lower && !above;", f"host:pass_nan:{APPLY}"),
    Mutant("gradient_at_six", WALK, "above = z >= upper", "above = z > upper", f"host:pass:{APPLY}"),
    Mutant("no_bn_of_the_projection", WALK, "projection ? shortcut(i, v) : v", "v", f"host:pass:{APPLY}"),
    Mutant("mean_of_dz_xhat_without_invstd", WALK, "mul_rn(invstd, vector_at(bn.mean_dz_xhat, c, 0.0f))", "vector_at(bn.mean_dz_xhat, c, 0.0f)", f"host:pass:{BACKWARD}"),
    Mutant("d_y_without_the_mask", WALK, "const float dz = bits[b] >> i & 1 ?", "const float dz = true ?", f"host:pass:{BACKWARD}"),
    # ---- training: the reductions
    Mutant("no_barrier_before_the_slots", MOMENTS, "__syncthreads();\n  const int width", "const int width", f"host:pass:{SUMS}"),
    Mutant("no_barrier_between_slots", MOMENTS, "__syncthreads();\n    left = half;", "left = half;", f"host:pass:{SUMS}"),
    Mutant("odd_slot_lost", MOMENTS, "(left + 1) / 2", "left / 2", f"host:pass:{SUMS}"),
    Mutant("distance_of_the_means_forgotten", MOMENTS, "fma_rn(mul_rn(distance, distance), mine.count, mine.m2[i])", "mine.m2[i]", f"host:pass:{STATS}"),
    Mutant("merged_with_the_wrong_weight", REDUCE, "cross = mul_rn(m.count, share);", "cross = m.count;", f"host:pass:{STATS}"),
    Mutant("every_part_weighs_the_same", REDUCE, "static_cast<float>(Part<kPacket>::rows_of(params, i))", "static_cast<float>(params.rows_per_part)", f"host:pass:{STATS}"),
    Mutant("part_behind_the_end", REDUCE, "left < params.rows_per_part ? left : params.rows_per_part", "params.rows_per_part", f"host:pass:{STATS}"),
    Mutant("pivot_not_added_back", REDUCE, "bits_of(add_rn(around, mean))", "bits_of(mean)", f"host:pass:{STATS}"),
    Mutant("pivot_of_zero", REDUCE, "pivot[i] = unpack<kPacket>(first, i, dtype);\n  Moments", "pivot[i] = 0.0f;\n  Moments", f"host:pass:{STATS}"),
    Mutant("sums_of_squares", REDUCE, "m2 = fma_rn(add_rn(v[r], -mean), add_rn(v[r], -mean), m2)", "m2 = fma_rn(v[r], v[r], m2)", f"host:pass:{STATS}"),
    Mutant("own_part_only", MOMENTS, "parts + i * part_bytes", "parts + begin * part_bytes", f"host:parts:{STATS}"),
    Mutant("channels_behind_the_last", REDUCE, "reads = slot < slots.slots && channel < params.channels", "reads = slot < slots.slots", f"host:pass:{STATS}"),
    Mutant("bits_of_another_packet", REDUCE, ">> (at.index & 31)", ">> (at.index & 15)", f"host:pass:{SUMS}"),
    Mutant("sum_without_invstd", REDUCE, "mul_rn(shared_load_f32(at + (j + 1) * kPlaneBytes), invstd)", "shared_load_f32(at + (j + 1) * kPlaneBytes)", f"host:pass:{SUMS}"),
    Mutant("odd_rows_of_packets", BN_PLAN, "q.channels % kernel.packet == 0", "q.channels >= kernel.packet", f"host:pass:{STATS}"),
    Mutant("parts_without_a_fence", PRIMITIVES, 'uint32_t before;\n  asm volatile("fence.acq_rel.gpu;" ::: "memory");', "uint32_t before;", f"ptx:parts:{STATS}"),
    Mutant("parts_counter_not_reset", PRIMITIVES, '"r"(blocks - 1)', '"r"(blocks)', f"ptx:parts:{STATS}"),
    Mutant("registers_for_four_blocks", BN_LIST, "kBackwardReduce, 2, 2)", "kBackwardReduce, 4, 4)", f"static:pass:{SUMS}"),
    Mutant("packets_of_four_halves", BN_LIST, "X(prefix##_f16, pass, 8, kFloat16, 1, one)", "X(prefix##_f16, pass, 4, kFloat16, 1, one)", f"static:pass:{APPLY}"),
    # ---- the convolution with statistics
    Mutant("pixels_behind_the_last_stored", STATISTICS, "exists[b] = pixel < params.pixels;", "exists[b] = true;", F16_STATS),
    Mutant("pixels_behind_the_last_counted", STATISTICS, "if (exists[b]) sum =", "sum =", F16_STATS),
    Mutant("last_tile_whole", STATISTICS, "end == tiles ? pixels : end * Tile::kM", "end * Tile::kM", F16_STATS),
    Mutant("moments_over_the_staged_rows", STATISTICS, "__syncthreads();  // the last pass has been read: its memory now takes the moments", "", F16_STATS),
    Mutant("bias_not_added", STATISTICS, "add_rn(float_of(words.w[e]), bias[i + e])", "float_of(words.w[e])", F16_STATS),
    Mutant("mean_of_the_batch_over_all_rows", STATISTICS, "inverse = div_rn(1.0f, rows)", "inverse = 1.0f / kBatch", F16_STATS),
    Mutant("group_behind_the_end", STATISTICS, "return end < tiles ? end : tiles;", "return end;", "host:stats_groups"),
    Mutant("first_group_forgotten", STATISTICS, "kPartBytes, kPitch, 0, column.groups,", "kPartBytes, kPitch, 1, column.groups,", "host:stats_groups"),
    Mutant("groups_share_their_parts", STATISTICS, "column.group_parts + int64_t{group} * kPartBytes", "column.group_parts", "host:stats_groups"),
    Mutant("no_room_for_the_groups", PLAN, "plan.params.tiles_n * (groups + tiles) * 2", "plan.params.tiles_n * tiles * 2", F16_STATS),
    Mutant("statistics_of_a_wide_odd_row", PLAN, "q.k % count == 0 && alignment", "alignment", F16_STATS),
)  # fmt: skip
