#include "tensors.h"

#include <map>
#include <mutex>

#include "../checks.h"
#include "launch.h"
#include "torch_device.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Float:
      return kFloat32;
    default:
      throw std::invalid_argument(std::string(name) + ": expected dtype float16, bfloat16 or float32");
  }
}

ScalarType scalar_type(int32_t dtype) {
  return dtype == kFloat16 ? ScalarType::Half : dtype == kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

bool dense_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
  check(on_device(t) && device_index(t) == device_index(x), name, "the CUDA device of the first argument",
        "another device");
}

const DeviceProperties& properties(int32_t device) {
  static std::mutex mutex;
  static auto& known = *new std::map<int32_t, DeviceProperties>;  // addresses stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceProperties answer;
  char error[kErrorBytes];
  if (query_device(device, answer, error, kErrorBytes)) throw std::runtime_error(error);
  return known[device] = answer;
}

}  // namespace fused_resnet
