#include "bn_plan.h"

#include <algorithm>
#include <numeric>

#include "planning.h"
#include "schedule.h"

namespace fused_resnet {
namespace {

constexpr int shared_bytes(BnPass pass, int packet, int branches) {
  const bool reduction = pass == BnPass::kStats || pass == BnPass::kBackwardReduce;
  return reduction ? bn_planes(pass, branches) * bn_plane_bytes(packet) + 16 : 0;
}
#define FUSED_RESNET_BN_KERNEL_INFO(symbol, pass, packet, dtype, branches, blocks) \
  {#symbol, BnPass::pass, packet, dtype, branches, blocks, shared_bytes(BnPass::pass, packet, branches)},
constexpr BnKernelInfo kCatalogue[] = {FUSED_RESNET_BN_KERNELS(FUSED_RESNET_BN_KERNEL_INFO)};
#undef FUSED_RESNET_BN_KERNEL_INFO

#define FUSED_RESNET_BRANCH(prefix, index)                                \
  {prefix "y", offsetof(BnParams, branch[index].y)},                      \
      {prefix "mean", offsetof(BnParams, branch[index].mean)},            \
      {prefix "invstd", offsetof(BnParams, branch[index].invstd)},        \
      {prefix "weight", offsetof(BnParams, branch[index].weight)},        \
      {prefix "bias", offsetof(BnParams, branch[index].bias)},            \
      {prefix "mean_dz", offsetof(BnParams, branch[index].mean_dz)}, {    \
    prefix "mean_dz_xhat", offsetof(BnParams, branch[index].mean_dz_xhat) \
  }
constexpr TensorField kTensors[kBnTensorCount] = {
    FUSED_RESNET_BRANCH("", 0),
    FUSED_RESNET_BRANCH("proj_", 1),
    {"residual", offsetof(BnParams, residual)},
    {"grad_out", offsetof(BnParams, grad_out)},
    {"out", offsetof(BnParams, out)},
    {"d_second", offsetof(BnParams, d_second)},
    {"mask", offsetof(BnParams, mask)},
    {"sum_dz", offsetof(BnParams, result[0])},
    {"sum_dz_xhat", offsetof(BnParams, result[1])},
    {"proj_sum_dz_xhat", offsetof(BnParams, result[2])},
    {"workspace", offsetof(BnParams, workspace)},
};
#undef FUSED_RESNET_BRANCH

// What the passes have in common, and what sets them apart.
struct Traits {
  BnPass pass;
  bool reduction, apply, backward, projection;
  explicit Traits(const BnRequest& q)
      : pass(static_cast<BnPass>(q.pass)),
        reduction(pass == BnPass::kStats || pass == BnPass::kBackwardReduce),
        apply(pass == BnPass::kApply),
        backward(pass == BnPass::kBackwardReduce || pass == BnPass::kBackwardApply),
        projection(q.proj_dtype != kAbsent) {}
  int branches() const { return projection ? 2 : 1; }
};

void check(const BnRequest& q, const DeviceProperties& device) {
  check_device(device);
  if (q.pass < 0 || q.pass > static_cast<int32_t>(BnPass::kBackwardApply)) {
    refuse("cuda: there is no training pass %d", q.pass);
  }
  if (q.channels < 1) refuse("cuda: y must have at least one channel, got %d", q.channels);
  if (q.rows < 0 || q.rows > (int64_t{1} << 62) / q.channels) {
    refuse("cuda: y must have at most 2^62 elements, got %lld pixels of %d channels",
           static_cast<long long>(q.rows), q.channels);
  }
  const Traits t(q);
  const auto absent_or_known = [&](int32_t dtype) { return dtype == kAbsent || known(dtype); };
  if (!known(q.y_dtype) || !absent_or_known(q.proj_dtype) || !absent_or_known(q.residual_dtype) ||
      ((t.apply || t.backward) && !known(q.out_dtype))) {
    refuse("cuda: activations must be float16, bfloat16 or float32");
  }
  if (t.projection && q.residual_dtype != kAbsent)
    refuse("cuda: expected a residual or a projection, got both");
  if (t.apply) check_activation(q.activation);
}

// The type of all activations of the call, or kAnyDType.
int32_t common_dtype(const BnRequest& q) {
  const Traits t(q);
  const bool second = t.apply || t.pass == BnPass::kBackwardApply;
  for (const int32_t other : {t.projection ? q.proj_dtype : q.y_dtype,
                              second && q.residual_dtype != kAbsent ? q.residual_dtype : q.y_dtype,
                              t.apply || t.backward ? q.out_dtype : q.y_dtype}) {
    if (other != q.y_dtype) return kAnyDType;
  }
  return q.y_dtype;
}

// The first of the list that can: those for one type stand before the others, single branches before two.
int choose_kernel(const BnRequest& q) {
  const Traits t(q);
  const int32_t dtype = common_dtype(q);
  const bool aligned = q.alignment > 0 && q.alignment % 16 == 0;
  for (int i = 0; i < bn_kernel_count(); ++i) {
    const BnKernelInfo& kernel = kCatalogue[i];
    if (kernel.pass != t.pass || kernel.branches < t.branches()) continue;
    if (kernel.dtype != dtype && kernel.dtype != kAnyDType) continue;
    // Elementwise passes take packets of the whole line, reductions of each row.
    const bool packets = aligned && (!t.reduction || q.channels % kernel.packet == 0);
    if (kernel.packet == 1 || packets) return i;
  }
  refuse("cuda: no kernel for this training pass");
}

// ---- grids ----

int32_t grid_size(int64_t blocks) {
  if (blocks >= (int64_t{1} << 31)) {
    refuse("cuda: a grid of %lld blocks is more than 2^31", static_cast<long long>(blocks));
  }
  return static_cast<int32_t>(blocks);
}

void plan_reduction(const BnKernelInfo& kernel, const DeviceProperties& device, BnPlan& plan) {
  BnParams& p = plan.params;
  const int64_t row_packets = p.channels / kernel.packet;
  const int64_t columns = ceil_div(row_packets, bn_max_lanes(kernel.packet));
  p.lanes = static_cast<int32_t>(ceil_div(row_packets, columns));
  const int64_t slots = kBnThreads / p.lanes;
  // Enough blocks to fill the device once, none with less than one full step of every thread.
  const int64_t fill = std::max<int64_t>(1, int64_t{device.sm_count} * kernel.blocks_per_sm / columns);
  const int64_t wanted = std::min(fill, ceil_div(p.rows, slots * kRowsUnderWay));
  p.rows_per_part = ceil_div(p.rows, wanted);
  p.parts = static_cast<int32_t>(ceil_div(p.rows, p.rows_per_part));
  plan.grid[0] = grid_size(columns * p.parts);
  plan.counter_bytes = ceil_div(columns * 4, kCounterAlignment) * kCounterAlignment;
  p.partials_offset = plan.counter_bytes;
  const int64_t partial_bytes =
      int64_t{4} * bn_planes(kernel.pass, kernel.branches) * bn_pitch(kernel.packet);
  plan.workspace_bytes = plan.counter_bytes + columns * p.parts * partial_bytes;
}

void plan_elementwise(const BnKernelInfo& kernel, const DeviceProperties& device, BnPlan& plan) {
  BnParams& p = plan.params;
  const int64_t packets = ceil_div(p.elements, 32) * (32 / kernel.packet);
  const int64_t period = std::lcm(int64_t{p.channels}, int64_t{32}) / kernel.packet;
  const int64_t fill = int64_t{device.sm_count} * kernel.blocks_per_sm * kBnThreads;
  const int64_t longest = std::max<int64_t>(1, fill / period) * period;
  const int64_t turns = ceil_div(packets, longest);  // of every thread: as even as the period allows
  p.stride = ceil_div(ceil_div(packets, turns), period) * period;
  plan.grid[0] = grid_size(ceil_div(p.stride, kBnThreads));
}

// ---- tensors ----

void fill_alignment(const BnRequest& q, const BnKernelInfo& kernel, BnPlan& plan) {
  const Traits t(q);
  const auto activation = [&](int slot, int32_t dtype) {
    plan.alignment[slot] =
        kernel.packet == 1 ? bytes_of(dtype) : std::min(16, bytes_of(dtype) * kernel.packet);
  };
  const auto vector = [&](int slot) { plan.alignment[slot] = 4; };
  const int32_t dtypes[] = {q.y_dtype, q.proj_dtype}, affine[] = {q.affine, q.proj_affine};
  for (int branch = 0; branch < t.branches(); ++branch) {
    const int slot = branch * kBnBranchTensors;
    activation(slot + kBnY, dtypes[branch]);
    if (t.pass == BnPass::kStats) continue;
    vector(slot + kBnMean);
    vector(slot + kBnInvstd);
    if (!t.reduction && has_weight(affine[branch])) vector(slot + kBnWeight);
    if (t.apply && has_bias(affine[branch])) vector(slot + kBnBias);
    if (t.pass == BnPass::kBackwardApply) {
      vector(slot + kBnMeanDz);
      vector(slot + kBnMeanDzXhat);
    }
  }
  if (t.apply && q.residual_dtype != kAbsent) activation(kBnResidual, q.residual_dtype);
  if (t.backward) activation(kBnGradOut, q.out_dtype);
  if (t.apply) activation(kBnOut, q.out_dtype);
  if (t.pass == BnPass::kBackwardApply) {
    activation(kBnOut, q.y_dtype);
    if (t.projection || q.residual_dtype != kAbsent) {
      activation(kBnSecond, t.projection ? q.proj_dtype : q.residual_dtype);
    }
  }
  if (q.mask && t.pass != BnPass::kStats) vector(kBnMask);
  if (t.reduction) {
    const int results = bn_planes(t.pass, t.branches());
    for (int i = 0; i < results; ++i) vector(kBnResult0 + i);
    if (plan.workspace_bytes) plan.alignment[kBnWorkspace] = 16;
  }
}

void fill_plan(const BnRequest& q, const DeviceProperties& device, BnPlan& plan) {
  check(q, device);
  std::memset(&plan, 0, sizeof(plan));
  const Traits t(q);
  plan.kernel = choose_kernel(q);
  const BnKernelInfo& kernel = kCatalogue[plan.kernel];
  BnParams& p = plan.params;
  p.branch[0].dtype = q.y_dtype;
  p.branch[1].dtype = t.projection ? q.proj_dtype : q.y_dtype;
  p.rows = q.rows;
  p.channels = q.channels;
  p.elements = q.rows * q.channels;
  p.branches = t.branches();
  p.activation = q.activation;
  p.out_dtype = t.apply || t.backward ? q.out_dtype : q.y_dtype;
  p.second_dtype = q.residual_dtype == kAbsent ? q.y_dtype : q.residual_dtype;
  plan.grid[1] = plan.grid[2] = 1;
  plan.block[0] = kBnThreads;
  plan.block[1] = plan.block[2] = 1;
  plan.dynamic_shared_bytes = kernel.shared_bytes;
  if (q.rows > 0) {
    if (t.reduction) {
      plan_reduction(kernel, device, plan);
    } else {
      plan_elementwise(kernel, device, plan);
    }
  }
  fill_alignment(q, kernel, plan);
}

}  // namespace

int bn_kernel_count() {
  return static_cast<int>(sizeof(kCatalogue) / sizeof(kCatalogue[0]));
}
const BnKernelInfo& bn_kernel_info(int index) {
  return kCatalogue[index];
}
const char* bn_tensor_name(int pass, int slot) {
  if (pass == static_cast<int>(BnPass::kStats) && slot == kBnMean)
    return "bn_mean";  // takes none: it is the result
  if (pass == static_cast<int>(BnPass::kStats) && slot == kBnResult0) return "mean";
  if (pass == static_cast<int>(BnPass::kStats) && slot == kBnResult1) return "var";
  if (pass == static_cast<int>(BnPass::kBackwardApply) && slot == kBnOut) return "d_y";
  return kTensors[slot].name;
}
int64_t bn_tensor_offset(int slot) {
  return static_cast<int64_t>(kTensors[slot].offset);
}

int make_bn_plan(const BnRequest& request, const DeviceProperties& device, BnPlan& plan, char* error,
                 int error_bytes) {
  return answer([&] { fill_plan(request, device, plan); }, error, error_bytes);
}

BnParams bind_bn_addresses(const BnPlan& plan, const void* const* addresses) {
  return with_addresses(plan.params, kTensors, addresses);
}

}  // namespace fused_resnet
