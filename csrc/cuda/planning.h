// What the two planners (plan.cpp, bn_plan.cpp) have in common. No Torch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

#include "plan.h"

namespace fused_resnet {

// A tensor's name, and where its address lies in the kernel's parameters.
struct TensorField {
  const char* name;
  size_t offset;
};

struct Refusal {
  std::string sentence;
};
template <class... Args>
[[noreturn]] void refuse(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  throw Refusal{text};
}

inline int bytes_of(int32_t dtype) {
  return dtype == kFloat32 ? 4 : 2;
}
inline bool known(int32_t dtype) {
  return dtype == kFloat16 || dtype == kBFloat16 || dtype == kFloat32;
}
inline bool has_weight(int32_t affine) {
  return affine == kAffineBoth || affine == kAffineWeight;
}
inline bool has_bias(int32_t affine) {
  return affine == kAffineBoth || affine == kAffineBias;
}

inline void check_device(const DeviceProperties& device) {
  if (device.capability < 75) refuse("cuda: needs sm_75 or newer, got sm_%d", device.capability);
  if (device.sm_count < 1) refuse("cuda: a device has at least one multiprocessor, got %d", device.sm_count);
}
inline void check_activation(int32_t activation) {
  if (activation < kActivationNone || activation > kActivationRelu6) {
    refuse("cuda: activation must be 0 (none), 1 (relu) or 2 (relu6), got %d", activation);
  }
}

// fill() makes the plan, or refuses: 0, or 1 and the sentence.
template <class Fill>
int answer(Fill&& fill, char* error, int error_bytes) {
  try {
    fill();
    return 0;
  } catch (const Refusal& refusal) {
    std::snprintf(error, error_bytes, "%s", refusal.sentence.c_str());
    return 1;
  }
}

template <class Params, int kCount>
Params with_addresses(Params params, const TensorField (&tensors)[kCount], const void* const* addresses) {
  for (int slot = 0; slot < kCount; ++slot) {
    std::memcpy(reinterpret_cast<char*>(&params) + tensors[slot].offset, &addresses[slot], sizeof(void*));
  }
  return params;
}

}  // namespace fused_resnet
