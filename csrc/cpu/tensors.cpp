#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;

// A vector of K channels in any floating-point type, as floats; `otherwise` where it is absent.
std::vector<float> channels(const OptionalTensor& t, const char* name, int64_t k, float otherwise) {
  std::vector<float> values(static_cast<size_t>((k + 31) / 32 * 32), 0.0f);
  if (!t.has_value()) {
    std::fill_n(values.begin(), k, otherwise);
    return values;
  }
  check(t->dim() == 1 && t->size(0) == k, name, "one value per output channel", shape_of(*t), " for K = ", k);
  const int64_t stride = t->stride(0);
  const auto read = [&](const auto* from) {
    for (int64_t i = 0; i < k; ++i) values[i] = static_cast<float>(from[i * stride]);
  };
  const void* data = t->const_data_ptr();
  switch (t->scalar_type()) {
    case ScalarType::Float:
      read(static_cast<const float*>(data));
      break;
    case ScalarType::BFloat16:
      read(static_cast<const torch::headeronly::BFloat16*>(data));
      break;
    case ScalarType::Half:
      read(static_cast<const torch::headeronly::Half*>(data));
      break;
    default:
      check(false, name, "dtype float32, bfloat16 or float16", "another one");
  }
  return values;
}

}  // namespace

ScaleShift::ScaleShift(const BatchNormArguments& bn, int64_t k) {
  shift = channels(bn.bias, "bias", k, 0.0f);
  if (!bn.mean.has_value()) {
    scale = channels(std::nullopt, "bn_weight", k, 1.0f);
    return;
  }
  scale = channels(bn.weight, "bn_weight", k, 1.0f);
  const std::vector<float> beta = channels(bn.beta, "bn_bias", k, 0.0f);
  const std::vector<float> mean = channels(bn.mean, "running_mean", k, 0.0f);
  const std::vector<float> var = channels(bn.var, "running_var", k, 1.0f);
  const float eps = static_cast<float>(bn.eps);
  for (int64_t i = 0; i < k; ++i) {
    scale[i] = scale[i] / std::sqrt(var[i] + eps);
    shift[i] = beta[i] + (shift[i] - mean[i]) * scale[i];
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
