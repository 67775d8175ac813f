// The operators fused_resnet_C::cuda_bn_*: the four passes of a training tail on torch's current stream.
// Tensors come canonical (backends/training/base.py) and outputs allocated; as with the convolution, nothing
// but the kernel reaches the stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../checks.h"
#include "bn_launch.h"
#include "bn_plan.h"
#include "tensors.h"
#include "torch_device.h"
#include "workspace.h"

namespace fused_resnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One BN's tensors; what a pass does not take stays null.
struct Branch {
  const Tensor* y = nullptr;
  const Tensor *mean = nullptr, *invstd = nullptr, *weight = nullptr, *bias = nullptr;
  const Tensor *mean_dz = nullptr, *mean_dz_xhat = nullptr;
};

const Tensor* pointer(const OptionalTensor& t) {
  return t.has_value() ? &*t : nullptr;
}

// The request and the addresses of one call, collected and checked tensor by tensor.
class Call {
 public:
  Call(BnPass pass, const Tensor& y) : y_(y), device_(check_y(y)) {
    request_.pass = static_cast<int32_t>(pass);
    request_.rows = y.size(0) * y.size(2) * y.size(3);
    request_.channels = static_cast<int32_t>(y.size(1));
    request_.y_dtype = request_.out_dtype = dtype_of(y, "y");
  }

  // Returns its dtype, or kAbsent.
  int32_t activation(int slot, const Tensor* t) {
    if (t == nullptr) return kAbsent;
    const char* const name = bn_tensor_name(request_.pass, slot);
    check(t->dim() == 4 && t->size(0) == y_.size(0) && t->size(1) == y_.size(1) && t->size(2) == y_.size(2) &&
              t->size(3) == y_.size(3) && dense_channels_last(*t),
          name, "the shape of y, dense in channels_last", "another tensor");
    check_same_device(*t, y_, name);
    address(slot, t->data_ptr());
    address_bits_ |= reinterpret_cast<uintptr_t>(t->data_ptr());
    return dtype_of(*t, name);
  }

  void vector(int slot, const Tensor* t) {
    if (t == nullptr) return;
    const char* const name = bn_tensor_name(request_.pass, slot);
    check(t->dim() == 1 && t->numel() == request_.channels && (t->numel() < 2 || t->stride(0) == 1) &&
              t->scalar_type() == ScalarType::Float,
          name, "one float32 per channel, dense", "another tensor");
    check_same_device(*t, y_, name);
    address(slot, t->data_ptr());
  }

  void branch(int index, const Branch& bn) {
    const int first = index * kBnBranchTensors;
    const int32_t dtype = activation(first + kBnY, bn.y);
    if (index == 1) request_.proj_dtype = dtype;
    const Tensor* const vectors[] = {bn.mean, bn.invstd, bn.weight, bn.bias, bn.mean_dz, bn.mean_dz_xhat};
    for (int i = 0; i < 6; ++i) vector(first + kBnMean + i, vectors[i]);
    int32_t& affine = index == 0 ? request_.affine : request_.proj_affine;
    affine = bn.weight != nullptr ? (bn.bias != nullptr ? kAffineBoth : kAffineWeight)
             : bn.bias != nullptr ? kAffineBias
                                  : kAffineNone;
  }

  void mask(const Tensor* t) {
    if (t == nullptr) return;
    check(t->scalar_type() == ScalarType::Int && t->numel() == (y_.numel() + 31) / 32, "mask",
          "one int32 for 32 elements of y", t->numel(), " numbers");
    check(t->is_contiguous(), "mask", "a dense tensor", "other strides");
    check_same_device(*t, y_, "mask");
    address(kBnMask, t->data_ptr());
    request_.mask = 1;
  }

  BnRequest& request() { return request_; }

  void launch() {
    const DeviceGuard guard(device_);
    request_.alignment = static_cast<int32_t>(address_bits_ & (~address_bits_ + 1));
    const BnPlan& plan = remembered_plan(request_, device_, &make_bn_plan);
    void* const stream = current_stream(device_);
    const Workspace workspace(plan.workspace_bytes, plan.counter_bytes, device_, stream);
    address(kBnWorkspace, workspace.counters());
    char error[kErrorBytes];
    if (check_bn_addresses(plan, addresses_, error, kErrorBytes)) throw std::invalid_argument(error);
    BnParams params = bind_bn_addresses(plan, addresses_);
    workspace.bind(params);
    if (launch_bn_plan(plan, params, stream, error, kErrorBytes)) throw std::runtime_error(error);
  }

 private:
  static int32_t check_y(const Tensor& y) {
    check(y.dim() == 4 && on_device(y), "y", "a CUDA tensor of 4 dimensions", y.dim(), " dimensions");
    check(y.size(1) < (int64_t{1} << 31), "y", "fewer than 2^31 channels", y.size(1));
    return device_index(y);
  }
  void address(int slot, const void* p) { addresses_[slot] = p; }

  const Tensor& y_;
  const int32_t device_;
  BnRequest request_;
  const void* addresses_[kBnTensorCount] = {};
  uintptr_t address_bits_ = 16;  // of all activations
};

void bn_stats(Tensor y, Tensor mean, Tensor var) {
  Call call(BnPass::kStats, y);
  call.branch(0, {&y});
  call.vector(kBnResult0, &mean);
  call.vector(kBnResult1, &var);
  call.launch();
}

void bn_apply(Tensor y, Tensor mean, Tensor invstd, OptionalTensor weight, OptionalTensor bias,
              OptionalTensor residual, OptionalTensor proj_y, OptionalTensor proj_mean,
              OptionalTensor proj_invstd, OptionalTensor proj_weight, OptionalTensor proj_bias,
              int64_t activation, Tensor out, OptionalTensor mask) {
  Call call(BnPass::kApply, y);
  call.branch(0, {&y, &mean, &invstd, pointer(weight), pointer(bias)});
  if (proj_y) {
    call.branch(1, {pointer(proj_y), pointer(proj_mean), pointer(proj_invstd), pointer(proj_weight),
                    pointer(proj_bias)});
  }
  call.request().residual_dtype = call.activation(kBnResidual, pointer(residual));
  call.request().out_dtype = call.activation(kBnOut, &out);
  call.request().activation = static_cast<int32_t>(activation);
  call.mask(pointer(mask));
  call.launch();
}

void bn_backward_reduce(Tensor grad_out, OptionalTensor mask, Tensor y, Tensor mean, Tensor invstd,
                        OptionalTensor proj_y, OptionalTensor proj_mean, OptionalTensor proj_invstd,
                        Tensor sum_dz, Tensor sum_dz_xhat, OptionalTensor proj_sum_dz_xhat) {
  Call call(BnPass::kBackwardReduce, y);
  call.branch(0, {&y, &mean, &invstd});
  if (proj_y) call.branch(1, {pointer(proj_y), pointer(proj_mean), pointer(proj_invstd)});
  call.request().out_dtype = call.activation(kBnGradOut, &grad_out);
  call.mask(pointer(mask));
  call.vector(kBnResult0, &sum_dz);
  call.vector(kBnResult1, &sum_dz_xhat);
  call.vector(kBnResult2, pointer(proj_sum_dz_xhat));
  call.launch();
}

void bn_backward_apply(Tensor grad_out, OptionalTensor mask, Tensor y, Tensor mean, Tensor invstd,
                       OptionalTensor weight, Tensor mean_dz, Tensor mean_dz_xhat, OptionalTensor proj_y,
                       OptionalTensor proj_mean, OptionalTensor proj_invstd, OptionalTensor proj_weight,
                       OptionalTensor proj_mean_dz, OptionalTensor proj_mean_dz_xhat, Tensor d_y,
                       OptionalTensor d_second) {
  Call call(BnPass::kBackwardApply, y);
  call.branch(0, {&y, &mean, &invstd, pointer(weight), nullptr, &mean_dz, &mean_dz_xhat});
  if (proj_y) {
    call.branch(1, {pointer(proj_y), pointer(proj_mean), pointer(proj_invstd), pointer(proj_weight), nullptr,
                    pointer(proj_mean_dz), pointer(proj_mean_dz_xhat)});
  }
  call.request().out_dtype = call.activation(kBnGradOut, &grad_out);
  check(dtype_of(d_y, "d_y") == call.request().y_dtype, "d_y", "the dtype of y", "another");
  call.activation(kBnOut, &d_y);
  const int32_t second = call.activation(kBnSecond, pointer(d_second));
  if (proj_y) {
    check(second == call.request().proj_dtype, "d_second", "a tensor of the dtype of proj_y", "another");
  } else {
    call.request().residual_dtype = second;
  }
  call.mask(pointer(mask));
  call.launch();
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_C, m) {
  m.def("cuda_bn_stats(Tensor y, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "cuda_bn_apply(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? proj_y, Tensor? proj_mean, Tensor? proj_invstd, Tensor? proj_weight, Tensor? proj_bias, "
      "int activation, Tensor(a!) out, Tensor(b!)? mask) -> ()");
  m.def(
      "cuda_bn_backward_reduce(Tensor grad_out, Tensor? mask, Tensor y, Tensor mean, Tensor invstd, "
      "Tensor? proj_y, Tensor? proj_mean, Tensor? proj_invstd, Tensor(a!) sum_dz, Tensor(b!) sum_dz_xhat, "
      "Tensor(c!)? proj_sum_dz_xhat) -> ()");
  m.def(
      "cuda_bn_backward_apply(Tensor grad_out, Tensor? mask, Tensor y, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor mean_dz, Tensor mean_dz_xhat, Tensor? proj_y, Tensor? proj_mean, "
      "Tensor? proj_invstd, Tensor? proj_weight, Tensor? proj_mean_dz, Tensor? proj_mean_dz_xhat, "
      "Tensor(a!) d_y, Tensor(b!)? d_second) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("cuda_bn_stats", TORCH_BOX(&fused_resnet::bn_stats));
  m.impl("cuda_bn_apply", TORCH_BOX(&fused_resnet::bn_apply));
  m.impl("cuda_bn_backward_reduce", TORCH_BOX(&fused_resnet::bn_backward_reduce));
  m.impl("cuda_bn_backward_apply", TORCH_BOX(&fused_resnet::bn_backward_apply));
}
