#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

// The K values of a vector in any floating-point type, as floats: its own memory where that is dense float32,
// else a copy. One value stands for all where the vector is absent.
class Channels {
 public:
  Channels(const OptionalTensor& t, const char* name, int64_t k, float otherwise) : otherwise_(otherwise) {
    if (!t.has_value()) return;
    check(t->dim() == 1 && t->size(0) == k, name, "one value per output channel", shape_of(*t),
          " for K = ", k);
    const int64_t stride = t->stride(0);
    const void* data = t->const_data_ptr();
    const ScalarType type = t->scalar_type();
    if (type == ScalarType::Float && (stride == 1 || k == 1)) {
      values_ = static_cast<const float*>(data);
    } else if (type == ScalarType::Float) {
      read(static_cast<const float*>(data), stride, k);
    } else if (type == ScalarType::BFloat16) {
      read(static_cast<const torch::headeronly::BFloat16*>(data), stride, k);
    } else {
      check(type == ScalarType::Half, name, "dtype float32, bfloat16 or float16", "another one");
      read(static_cast<const torch::headeronly::Half*>(data), stride, k);
    }
  }

  void copy_to(float* to, int64_t k) const {
    if (values_ == nullptr) {
      std::fill_n(to, k, otherwise_);
    } else {
      std::copy_n(values_, k, to);
    }
  }
  const float* values() const { return values_; }  // null where absent

 private:
  template <class T>
  void read(const T* from, int64_t stride, int64_t k) {
    copy_ = std::make_unique<float[]>(k);
    for (int64_t i = 0; i < k; ++i) copy_[i] = static_cast<float>(from[i * stride]);
    values_ = copy_.get();
  }

  float otherwise_;
  const float* values_ = nullptr;
  std::unique_ptr<float[]> copy_;
};

}  // namespace

ScaleShift::ScaleShift(const BatchNormArguments& bn, int64_t k)
    : padded_((k + 31) / 32 * 32), memory_(new float[2 * padded_]) {
  float* scale = memory_.get();
  float* shift = scale + padded_;
  std::fill(scale + k, shift, 0.0f);
  std::fill(shift + k, shift + padded_, 0.0f);
  Channels(bn.bias, "bias", k, 0.0f).copy_to(shift, k);
  if (!bn.mean.has_value()) {
    std::fill_n(scale, k, 1.0f);
    return;
  }
  Channels(bn.weight, "bn_weight", k, 1.0f).copy_to(scale, k);
  const Channels beta(bn.beta, "bn_bias", k, 0.0f), mean(bn.mean, "running_mean", k, 0.0f),
      var(bn.var, "running_var", k, 1.0f);
  const float *beta_of = beta.values(), *mean_of = mean.values(), *var_of = var.values();
  const float eps = static_cast<float>(bn.eps);
  for (int64_t i = 0; i < k; ++i) {
    scale[i] = scale[i] / std::sqrt((var_of == nullptr ? 1.0f : var_of[i]) + eps);
    shift[i] = (beta_of == nullptr ? 0.0f : beta_of[i]) + (shift[i] - mean_of[i]) * scale[i];
  }
}

Activation activation_from(int64_t code) {
  check(code >= 0 && code <= 2, "activation", "0 (none), 1 (relu) or 2 (relu6)", code);
  return static_cast<Activation>(code);
}

bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

}  // namespace fused_resnet::cpu
