// The training passes on the CPU, free of Torch: one text (training_kernel.h), one instance per instruction
// set.
//
// An activation dense in channels_last is a linear array whose channel is `i % C`. The kernels read it in
// rows of `period` elements, the smallest common multiple of C and 32, so that every row starts at a word of
// the mask and at channel 0; per-channel vectors are repeated up to `period`. The last row may be partial.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

constexpr int64_t kMaskBits = 32;
// Rows after which float32 partial sums are added to the float64 ones.
constexpr int64_t kRowsPerFlush = 64;

enum class Element : int { kFloat32, kBfloat16, kFloat16 };
constexpr int kElements = 3;

// What is added to BN(y) before the activation.
enum class Second : int { kNone, kResidual, kProjection };
constexpr int kSeconds = 3;

// One BN, as vectors of `period` floats.
struct BnVectors {
  const float* mean = nullptr;
  const float* scale = nullptr;  // weight * invstd
  const float* bias = nullptr;
};

struct ApplyArgs {
  int64_t numel, period;
  const void* y;
  const void* second;  // residual or proj_y
  void* out;
  uint32_t* mask;  // may be null
  BnVectors bn, proj;
  // out = min(max(z, lower), upper); NaN stands for no bound: every comparison with it is false.
  float lower, upper;
};

struct ReduceArgs {
  int64_t numel, period;
  const void* grad_out;
  const uint32_t* mask;  // null: no activation
  const void* y;
  const void* proj_y;  // may be null
  const float* mean;
  const float* proj_mean;
};

// Gradient through one BN: scale * (dz - mean_dz - (y - mean) * slope), slope = invstd * mean(dz * xhat).
struct BackwardVectors {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* mean_dz = nullptr;
  const float* slope = nullptr;
};

struct BackwardArgs {
  int64_t numel, period;
  const void* grad_out;
  const uint32_t* mask;
  const void* y;
  const void* proj_y;
  void* d_y;
  void* d_second;  // gradient of the residual or of proj_y; may be null
  BackwardVectors bn, proj;
};

// Every function handles the rows [begin, end); null for element types that never meet.
struct TrainingKernel {
  // mean and M2 = sum (y - mean)^2 of each of the `period` columns, over full rows. Scratch: 3 periods.
  void (*stats[kElements])(const void* y, int64_t period, int64_t begin, int64_t end, float* scratch,
                           double* mean, double* m2);
  // Element types of y and of second.
  void (*apply[kElements][kElements][kSeconds])(const ApplyArgs&, int64_t begin, int64_t end);
  // Column sums of dz, dz * (y - mean) and, with a projection, dz * (proj_y - proj_mean): 2 or 3 periods, and
  // as much scratch. Element types of y (and proj_y) and of grad_out.
  void (*reduce[kElements][kElements][2])(const ReduceArgs&, int64_t begin, int64_t end, float* scratch,
                                          double* sums);
  // Element types of y and of d_second.
  void (*backward[kElements][kElements][kSeconds])(const BackwardArgs&, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const TrainingKernel kTrainingAvx512, kTrainingAvx2;
#endif
extern const TrainingKernel kTrainingPortable;

}  // namespace fused_resnet::cpu
