#include "plan.h"

#include <algorithm>

#include "planning.h"
#include "schedule.h"

namespace fused_resnet {
namespace {

#define FUSED_RESNET_NORM_TENSORS(prefix, index)                         \
  {prefix "bias", offsetof(ConvParams, norm[index].conv_bias)},          \
      {prefix "bn_weight", offsetof(ConvParams, norm[index].weight)},    \
      {prefix "bn_bias", offsetof(ConvParams, norm[index].bias)},        \
      {prefix "running_mean", offsetof(ConvParams, norm[index].mean)}, { \
    prefix "running_var", offsetof(ConvParams, norm[index].var)          \
  }
constexpr TensorField kTensors[kTensorCount] = {
    {"x", offsetof(ConvParams, source[0].x)},
    {"weight", offsetof(ConvParams, source[0].weight)},
    FUSED_RESNET_NORM_TENSORS("", 0),
    {"proj_x", offsetof(ConvParams, source[1].x)},
    {"proj_weight", offsetof(ConvParams, source[1].weight)},
    FUSED_RESNET_NORM_TENSORS("proj_", 1),
    {"residual", offsetof(ConvParams, residual)},
    {"y", offsetof(ConvParams, y)},
    {"workspace", offsetof(ConvParams, workspace)},
    {"mean", offsetof(ConvParams, mean)},
    {"var", offsetof(ConvParams, var)},
};
#undef FUSED_RESNET_NORM_TENSORS

int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
// 0 where the filter is larger than the padded image: C++ would round a negative quotient up, to an output of
// one row.
int32_t out_size(int64_t size, int64_t window, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (window - 1) - 1;
  return room < 0 ? 0 : static_cast<int32_t>(room / stride + 1);
}
// -1 where one is negative; 2^60 stands for all beyond.
int64_t product(int32_t a, int32_t b, int32_t c) {
  if (std::min({a, b, c}) < 0) return -1;
  const int64_t most = int64_t{1} << 60, ab = int64_t{a} * b;
  return ab > most / std::max(c, 1) ? most : ab * c;
}

// ---- checks ----

constexpr int64_t kLimit = int64_t{1} << 30;  // every size, and every coordinate that the kernels form

void check_norm(const char* prefix, const NormRequest& norm) {
  if (norm.bias_dtype != kAbsent && !known(norm.bias_dtype)) {
    refuse("cuda: %sbias must be float16, bfloat16 or float32", prefix);
  }
  if (norm.norm_dtype != kAbsent && !known(norm.norm_dtype)) {
    refuse("cuda: the %sBN tensors must be float16, bfloat16 or float32", prefix);
  }
}

void check(const PlanRequest& q, const DeviceProperties& device) {
  check_device(device);
  if (q.groups != 1) refuse("cuda: groups must be 1, got %d", q.groups);
  if (!known(q.dtype)) refuse("cuda: dtype must be float16, bfloat16 or float32");
  if (q.dtype == kBFloat16 && device.capability < 80) {
    refuse("cuda: bfloat16 needs sm_80 or newer, got sm_%d", device.capability);
  }
  if (q.residual_dtype != kAbsent && !known(q.residual_dtype)) {
    refuse("cuda: residual must be float16, bfloat16 or float32");
  }
  if (q.projection && q.residual_dtype != kAbsent)
    refuse("cuda: expected a residual or a projection, got both");
  if (q.statistics && (q.projection || q.residual_dtype != kAbsent || q.norm.norm_dtype != kAbsent ||
                       q.activation != kActivationNone || q.splits > 1)) {
    refuse(
        "cuda: statistics are those of a convolution alone: expected no BN, addition, activation or split-K");
  }
  check_activation(q.activation);
  check_norm("", q.norm);
  check_norm("proj_", q.proj_norm);
  const struct {
    const char* name;
    int64_t value, least;
  } numbers[] = {{"n", q.n, 0},
                 {"h", q.h, 0},
                 {"w", q.w, 0},
                 {"c", q.c, 1},
                 {"k", q.k, 1},
                 {"r", q.r, 1},
                 {"s", q.s, 1},
                 {"stride", std::min(q.stride_h, q.stride_w), 1},
                 {"dilation", std::min(q.dilation_h, q.dilation_w), 1},
                 {"padding", std::min(q.padding_h, q.padding_w), 0},
                 {"largest stride", std::max(q.stride_h, q.stride_w), 1},
                 {"padded height", q.h + 2 * int64_t{q.padding_h}, 0},
                 {"padded width", q.w + 2 * int64_t{q.padding_w}, 0},
                 {"dilated filter height", int64_t{q.dilation_h} * q.r, 1},
                 {"dilated filter width", int64_t{q.dilation_w} * q.s, 1},
                 {"filter size times c", product(q.r, q.s, q.c), 1}};
  for (const auto& number : numbers) {
    if (number.value < number.least || number.value > kLimit) {
      refuse("cuda: %s must be between %lld and 2^30, got %lld", number.name,
             static_cast<long long>(number.least), static_cast<long long>(number.value));
    }
  }
  const int32_t p = out_size(q.h, q.r, q.stride_h, q.padding_h, q.dilation_h);
  const int32_t width = out_size(q.w, q.s, q.stride_w, q.padding_w, q.dilation_w);
  if (p < 1 || width < 1) {  // as Problem.checked() in Python
    refuse("x: %dx%d is too small for a %dx%d filter with padding (%d, %d) and dilation (%d, %d)", q.h, q.w,
           q.r, q.s, q.padding_h, q.padding_w, q.dilation_h, q.dilation_w);
  }
  if (const int64_t pixels = product(q.n, p, width); pixels > kLimit) {
    refuse("cuda: batch times output pixels must be at most 2^30, got %lld", static_cast<long long>(pixels));
  }
  if (!q.projection) return;
  if (q.proj_c < 1 || q.proj_h < 1 || q.proj_w < 1 || std::min(q.proj_stride_h, q.proj_stride_w) < 1 ||
      std::max({q.proj_c, q.proj_h, q.proj_w, q.proj_stride_h, q.proj_stride_w}) > kLimit) {
    refuse("cuda: the sizes of proj_x must be between 1 and 2^30");
  }
  const int32_t proj_p = out_size(q.proj_h, 1, q.proj_stride_h, 0, 1);
  const int32_t proj_q = out_size(q.proj_w, 1, q.proj_stride_w, 0, 1);
  if (proj_p != p || proj_q != width) {
    refuse("proj_x: its projection is %dx%d, expected %dx%d", proj_p, proj_q, p, width);
  }
}

// ---- params ----

int widest_load(int64_t row_bytes, int alignment) {
  int width = 16;
  while (row_bytes % width || alignment % width) width /= 2;
  return width;
}

void fill_source(ConvSource& source, int32_t h, int32_t w, int32_t c, int element_bytes, int alignment) {
  source.h = h;
  source.w = w;
  source.c = c;
  source.x_stride_w = c;
  source.x_stride_h = int64_t{w} * c;
  source.x_stride_n = int64_t{h} * w * c;
  source.depth = source.r * source.s * c;
  source.vector_bytes = std::max(element_bytes, widest_load(int64_t{c} * element_bytes, alignment));
}

void fill_steps(ConvSource& source, int depth) {  // `depth` elements a step
  source.steps = static_cast<int32_t>(ceil_div(source.depth, depth));
  source.step_c = depth % source.c;
  source.step_s = depth / source.c % source.s;
  source.step_r = depth / source.c / source.s;
}

void fill_norm(ChannelNorm& norm, const NormRequest& request) {
  norm.eps = request.eps;
  norm.norm_dtype = request.norm_dtype == kAbsent ? kFloat32 : request.norm_dtype;
  norm.conv_bias_dtype = request.bias_dtype == kAbsent ? kFloat32 : request.bias_dtype;
}

// What VectorLoad keeps in 32 bits: 15 taps a side, and offsets within a window.
bool suits_vector_load(const ConvSource& source) {
  const int64_t span = (source.r - 1) * source.dilation_h * source.x_stride_h +
                       (source.s - 1) * source.dilation_w * source.x_stride_w + source.c;
  return source.vector_bytes == 16 && source.r <= 15 && source.s <= 15 && span < (int64_t{1} << 31) &&
         source.dilation_h * source.x_stride_h < (int64_t{1} << 31);
}

Math math_of(const PlanRequest& q, const DeviceProperties& device) {
  if (q.dtype == kFloat16) return Math::kFloat16;
  if (q.dtype == kBFloat16) return Math::kBFloat16;
  return q.tf32 && device.capability >= 80 ? Math::kTensorFloat32
                                           : Math::kFloat32;  // may be rounded, need not
}

Epilogue epilogue_of(const PlanRequest& q) {
  return q.statistics ? Epilogue::kStatistics : Epilogue::kTail;
}

// Everything that does not depend on the tile.
ConvParams fill_params(const PlanRequest& q) {
  ConvParams params;
  std::memset(&params, 0, sizeof(params));
  const int element_bytes = bytes_of(q.dtype), alignment = std::max(q.alignment, element_bytes);
  ConvSource& main = params.source[0];
  main.r = q.r;
  main.s = q.s;
  main.stride_h = q.stride_h;
  main.stride_w = q.stride_w;
  main.padding_h = q.padding_h;
  main.padding_w = q.padding_w;
  main.dilation_h = q.dilation_h;
  main.dilation_w = q.dilation_w;
  fill_source(main, q.h, q.w, q.c, element_bytes, alignment);
  fill_norm(params.norm[0], q.norm);
  params.sources = 1;
  if (q.projection) {
    ConvSource& proj = params.source[1];
    proj.r = proj.s = proj.dilation_h = proj.dilation_w = 1;
    proj.stride_h = q.proj_stride_h;
    proj.stride_w = q.proj_stride_w;
    fill_source(proj, q.proj_h, q.proj_w, q.proj_c, element_bytes, alignment);
    fill_norm(params.norm[1], q.proj_norm);
    params.sources = 2;
  }
  params.p = out_size(q.h, q.r, q.stride_h, q.padding_h, q.dilation_h);
  params.q = out_size(q.w, q.s, q.stride_w, q.padding_w, q.dilation_w);
  params.k = q.k;
  params.pixels = q.n * params.p * params.q;
  params.activation = q.activation;
  params.residual_dtype = q.residual_dtype == kAbsent ? q.dtype : q.residual_dtype;
  // The type torch.result_type gives: that of both, or float32.
  params.y_dtype = params.residual_dtype == q.dtype ? q.dtype : kFloat32;
  const int count = params.y_dtype == kFloat32 ? 4 : 8;  // one 16-byte store of y
  const bool whole = q.k % count == 0 && alignment % 16 == 0;
  params.y_vector = whole ? count : 1;
  return params;
}

// ---- the plan ----

// The families that may run the request. A forced tile or split is one of the mma.sync family, whose tiles
// and splits they were before there was another.
Candidates candidates_of(const PlanRequest& q, const DeviceProperties& device, const ConvParams& params) {
  bool vector = true;
  for (int i = 0; i < params.sources; ++i) vector = vector && suits_vector_load(params.source[i]);
  const bool forced = q.tile_m || q.tile_n || q.splits;
  const bool wgmma = device.wgmma && !q.statistics && q.splits <= 1 && tensor_maps_take(params, q.dtype, q.n);
  if (q.family == kFamilyWgmma && !device.wgmma) {
    refuse("cuda: wgmma needs sm_90, a build for it and a driver that encodes tensor maps, got sm_%d",
           device.capability);
  }
  if (q.family == kFamilyWgmma && !wgmma) {
    refuse(
        "cuda: wgmma takes 16-bit tensors, c and k that are multiples of 8, windows that a tensor map "
        "describes "
        "and no split-K, got c %d and k %d",
        q.c, q.k);
  }
  return {math_of(q, device), vector ? Load::kVector : Load::kGather, epilogue_of(q),
          q.family != kFamilyWgmma,
          wgmma && (q.family == kFamilyWgmma || (q.family == kFamilyAny && !forced))};
}

[[noreturn]] void refuse_tile(const PlanRequest& q, const Candidates& candidates,
                              const DeviceProperties& device) {
  std::string tiles;
  bool exists = q.tile_m == 0 && q.tile_n == 0;
  const Load load = candidates.mma ? Load::kVector : Load::kTensorMap;
  for (int i = 0; i < kernel_count(); ++i) {
    const KernelInfo& kernel = kernel_info(i);
    if (kernel.math != candidates.math || kernel.load != load || kernel.epilogue != candidates.epilogue ||
        !shared_bytes_on(kernel, device.capability) || (q.projection && !kernel.projection)) {
      continue;
    }
    const std::string name = std::to_string(kernel.tile_m) + "x" + std::to_string(kernel.tile_n);
    tiles += (tiles.empty() ? "" : ", ") + name;
    exists = exists || (kernel.tile_m == q.tile_m && kernel.tile_n == q.tile_n);
  }
  if (!exists) refuse("cuda: tile must be one of %s, got %dx%d", tiles.c_str(), q.tile_m, q.tile_n);
  refuse(
      "cuda: tile %dx%d needs more than the %d bytes of shared memory that a block of this device may have",
      q.tile_m, q.tile_n, device.shared_bytes_per_block);
}

void fill_alignment(const PlanRequest& q, Plan& plan) {
  const ConvParams& params = plan.params;
  const auto norm = [&](int first, const NormRequest& request) {  // slots: bias, weight, bias, mean, var
    if (request.bias_dtype != kAbsent) plan.alignment[first] = bytes_of(request.bias_dtype);
    if (request.norm_dtype == kAbsent) return;
    const bool present[] = {has_weight(request.affine), has_bias(request.affine), true, true};
    for (int i = 0; i < 4; ++i) plan.alignment[first + 1 + i] = present[i] ? bytes_of(request.norm_dtype) : 0;
  };
  plan.alignment[kTensorX] = plan.alignment[kTensorWeight] = params.source[0].vector_bytes;
  norm(kTensorBias, q.norm);
  if (q.projection) {
    plan.alignment[kTensorProjX] = plan.alignment[kTensorProjWeight] = params.source[1].vector_bytes;
    norm(kTensorProjBias, q.proj_norm);
  }
  if (q.residual_dtype != kAbsent)
    plan.alignment[kTensorResidual] = bytes_of(params.residual_dtype) * params.y_vector;
  plan.alignment[kTensorY] = bytes_of(params.y_dtype) * params.y_vector;
  if (plan.workspace_bytes) plan.alignment[kTensorWorkspace] = 16;
  if (q.statistics) plan.alignment[kTensorMean] = plan.alignment[kTensorVar] = 4;
}

// Counters and partial results of the columns of tiles; statistics.cuh has the layout.
void fill_statistics(const KernelInfo& kernel, Plan& plan) {
  const int64_t tiles = ceil_div(plan.params.pixels, kernel.tile_m), groups = ceil_div(tiles, kGroupTiles);
  plan.counter_bytes = round_up(plan.params.tiles_n * (groups + 1) * 4, kCounterAlignment);
  plan.params.partials_offset = plan.counter_bytes;
  plan.workspace_bytes = plan.counter_bytes + plan.params.tiles_n * (groups + tiles) * 2 * kernel.tile_n * 4;
}

void fill_plan(const PlanRequest& q, const DeviceProperties& device, Plan& plan) {
  check(q, device);
  std::memset(&plan, 0, sizeof(plan));
  plan.params = fill_params(q);
  ConvParams& params = plan.params;
  if (q.splits < 0 || q.splits > 65535) refuse("cuda: splitk must be between 1 and 65535, got %d", q.splits);
  const Candidates candidates = candidates_of(q, device, params);
  const Forced forced = {q.tile_m, q.tile_n, q.statistics ? 1 : q.splits};
  const Schedule choice = choose_schedule(params, q.residual_dtype != kAbsent, candidates, device, forced);
  if (choice.kernel < 0) refuse_tile(q, candidates, device);
  const KernelInfo& kernel = kernel_info(choice.kernel);
  plan.kernel = choice.kernel;
  const bool wgmma = kernel.load == Load::kTensorMap;
  for (int i = 0; i < params.sources; ++i) {
    ConvSource& source = params.source[i];
    fill_steps(source, kernel.depth_bytes / bytes_of(q.dtype));
    if (wgmma) source.steps = tensor_map_steps(source);
  }
  if (wgmma) fill_tensor_maps(params, q.dtype, q.n, kernel.tile_m, kernel.tile_n, plan.maps);
  const int64_t tiles_n = ceil_div(params.k, kernel.tile_n);
  const int64_t tiles = ceil_div(params.pixels, kernel.tile_m) * tiles_n;
  if (tiles >= (int64_t{1} << 31))
    refuse("cuda: a grid of %lld tiles is more than 2^31", static_cast<long long>(tiles));
  params.tiles_n = static_cast<int32_t>(tiles_n);
  params.splits = static_cast<int32_t>(choice.splits);
  plan.grid[0] = static_cast<int32_t>(wgmma ? std::min<int64_t>(tiles, device.sm_count) : tiles);
  plan.grid[1] = params.splits;
  plan.grid[2] = 1;
  plan.block[0] = kernel.threads;
  plan.block[1] = plan.block[2] = 1;
  plan.dynamic_shared_bytes =
      shared_bytes_on(kernel, device.capability) + (params.sources == 2 ? kernel.park_bytes : 0);
  if (params.splits > 1) {
    plan.counter_bytes = round_up(tiles * 4, kCounterAlignment);
    params.partials_offset = plan.counter_bytes;
    const int64_t partial_bytes = int64_t{kernel.tile_m} * kernel.tile_n * 4;
    if (tiles * params.splits > (int64_t{1} << 48) / partial_bytes) {
      refuse("cuda: the partial sums of %lld tiles, each split %d times, take more than 2^48 bytes",
             static_cast<long long>(tiles), params.splits);
    }
    plan.workspace_bytes = plan.counter_bytes + tiles * params.splits * partial_bytes;
  }
  if (q.statistics && tiles > 0) fill_statistics(kernel, plan);
  fill_alignment(q, plan);
}

}  // namespace

const char* tensor_name(int slot) {
  return kTensors[slot].name;
}
int64_t tensor_offset(int slot) {
  return static_cast<int64_t>(kTensors[slot].offset);
}

int make_plan(const PlanRequest& request, const DeviceProperties& device, Plan& plan, char* error,
              int error_bytes) {
  return answer([&] { fill_plan(request, device, plan); }, error, error_bytes);
}

ConvParams bind_addresses(const Plan& plan, const void* const* addresses) {
  return with_addresses(plan.params, kTensors, addresses);
}

}  // namespace fused_resnet
