// The CPU's training ops: fused_resnet_C::cpu_bn_*. Arguments come checked and in canonical form from
// fused_resnet/ops/training.py (activations dense in channels_last, vectors float32), outputs allocated.
#include "training.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "isa.h"
#include "scalars.h"

namespace fused_resnet::cpu {

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The instruction set the training ops use; tests switch it.
const char*& active_isa() {
  static const char* isa = kernels().vectors;
  return isa;
}

const TrainingKernel& active_kernel() {
#if defined(__x86_64__)
  if (std::strcmp(active_isa(), "avx512") == 0) return kTrainingAvx512;
  if (std::strcmp(active_isa(), "avx2") == 0) return kTrainingAvx2;
#endif
  return kTrainingPortable;
}

// Elements a task should have at least, so that starting it costs little beside it.
constexpr int64_t kGrain = 32768;
constexpr int64_t kMaxChunks = 64;

int element_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return static_cast<int>(Element::kFloat32);
    case ScalarType::BFloat16:
      return static_cast<int>(Element::kBfloat16);
    default:
      check(t.scalar_type() == ScalarType::Half, "activations", "float32, bfloat16 or float16",
            "another dtype");
      return static_cast<int>(Element::kFloat16);
  }
}

const float* floats(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

const void* data(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// The linear view of an activation: see training.h.
struct Rows {
  int64_t numel, channels, period;

  explicit Rows(const Tensor& y) : numel(y.numel()), channels(y.size(1)) {
    period = std::lcm(channels, kMaskBits);
  }
  int64_t full() const { return numel / period; }
  int64_t all() const { return (numel + period - 1) / period; }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / period); }
};

// The vector f(channel), repeated up to `period`.
template <class F>
std::vector<float> per_column(const Rows& rows, const F& f) {
  std::vector<float> v(static_cast<size_t>(rows.period));
  for (int64_t c = 0; c < rows.channels; ++c) v[c] = f(c);
  for (int64_t i = rows.channels; i < rows.period; ++i) v[i] = v[i - rows.channels];
  return v;
}

std::vector<float> per_column(const Rows& rows, const float* values) {
  return per_column(rows, [values](int64_t c) { return values[c]; });
}

struct Bn {
  std::vector<float> mean, scale, bias;

  Bn(const Rows& rows, const float* mean_c, const float* invstd, const float* weight, const float* bias_c)
      : mean(per_column(rows, mean_c)),
        scale(per_column(rows,
                         [=](int64_t c) { return weight == nullptr ? invstd[c] : weight[c] * invstd[c]; })),
        bias(per_column(rows, [=](int64_t c) { return bias_c == nullptr ? 0.0f : bias_c[c]; })) {}

  BnVectors vectors() const { return {mean.data(), scale.data(), bias.data()}; }
};

struct BackwardBn {
  std::vector<float> mean, scale, mean_dz, slope;

  BackwardBn(const Rows& rows, const float* mean_c, const float* invstd, const float* weight,
             const float* mean_dz_c, const float* mean_dz_xhat)
      : mean(per_column(rows, mean_c)),
        scale(per_column(rows,
                         [=](int64_t c) { return weight == nullptr ? invstd[c] : weight[c] * invstd[c]; })),
        mean_dz(per_column(rows, mean_dz_c)),
        slope(per_column(rows, [=](int64_t c) { return invstd[c] * mean_dz_xhat[c]; })) {}

  BackwardVectors vectors() const { return {mean.data(), scale.data(), mean_dz.data(), slope.data()}; }
};

// Work cut into chunks by its size alone, so that sums do not depend on the number of threads.
struct Chunks {
  int64_t rows, count, per_chunk;

  Chunks(int64_t rows, int64_t period) : rows(rows) {
    const int64_t wanted = std::clamp<int64_t>(rows * period / (2 * kGrain), 1, kMaxChunks);
    per_chunk = (rows + wanted - 1) / std::max<int64_t>(wanted, 1);
    count = per_chunk == 0 ? 0 : (rows + per_chunk - 1) / per_chunk;
  }

  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        f(chunk, chunk * per_chunk, std::min(rows, (chunk + 1) * per_chunk));
      }
    });
  }
};

// ---------------------------------------------------------------- statistics

// count, mean and M2 of every channel, merged one by one in a fixed order (Chan).
struct Moments {
  std::vector<double> mean, m2;
  std::vector<int64_t> count;

  explicit Moments(int64_t channels) : mean(channels, 0.0), m2(channels, 0.0), count(channels, 0) {}

  void merge(int64_t c, int64_t n, double other_mean, double other_m2) {
    const int64_t total = count[c] + n;
    const double share = static_cast<double>(n) / static_cast<double>(total);
    const double delta = other_mean - mean[c];
    mean[c] += delta * share;
    m2[c] += other_m2 + delta * delta * share * static_cast<double>(count[c]);
    count[c] = total;
  }
};

float value_at(const Tensor& y, int64_t i) {
  float value = 0.0f;
  switch (static_cast<Element>(element_of(y))) {
    case Element::kFloat32:
      return static_cast<const float*>(y.const_data_ptr())[i];
    case Element::kBfloat16: {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(y.const_data_ptr())[i]} << 16;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
    case Element::kFloat16:
      return half_to_float<1>(static_cast<const uint16_t*>(y.const_data_ptr())[i]);
  }
  return value;
}

void bn_stats(const Tensor& y, Tensor mean, Tensor var) {
  const Rows rows(y);
  const auto stats = active_kernel().stats[element_of(y)];
  const Chunks chunks(rows.full(), rows.period);
  const int64_t period = rows.period;
  std::vector<double> partial(static_cast<size_t>(2 * period * std::max<int64_t>(chunks.count, 1)));
  const void* y_data = y.const_data_ptr();
  chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(3 * period));
    double* out = partial.data() + 2 * period * chunk;
    stats(y_data, period, begin, end, scratch.data(), out, out + period);
  });

  Moments moments(rows.channels);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const double* chunk_mean = partial.data() + 2 * period * chunk;
    const int64_t n = std::min(chunks.rows, (chunk + 1) * chunks.per_chunk) - chunk * chunks.per_chunk;
    for (int64_t i = 0; i < period; ++i)
      moments.merge(i % rows.channels, n, chunk_mean[i], chunk_mean[period + i]);
  }
  // What is left of a partial last row, element by element: fewer than `period` elements.
  for (int64_t i = rows.full() * period; i < rows.numel; ++i) {
    moments.merge(i % rows.channels, 1, value_at(y, i), 0.0);
  }

  auto* mean_out = static_cast<float*>(mean.mutable_data_ptr());
  auto* var_out = static_cast<float*>(var.mutable_data_ptr());
  for (int64_t c = 0; c < rows.channels; ++c) {
    mean_out[c] = static_cast<float>(moments.mean[c]);
    var_out[c] = static_cast<float>(moments.m2[c] / static_cast<double>(moments.count[c]));
  }
}

// ---------------------------------------------------------------- forward

void bn_apply(const Tensor& y, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
              const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& proj_y,
              const OptionalTensor& proj_mean, const OptionalTensor& proj_invstd,
              const OptionalTensor& proj_weight, const OptionalTensor& proj_bias, double lower, double upper,
              Tensor out, OptionalTensor mask) {
  const Rows rows(y);
  const Bn bn(rows, floats(mean), floats(invstd), floats(weight), floats(bias));
  std::optional<Bn> proj;
  if (proj_y.has_value()) {
    proj.emplace(rows, floats(proj_mean), floats(proj_invstd), floats(proj_weight), floats(proj_bias));
  }
  const OptionalTensor& second = proj_y.has_value() ? proj_y : residual;
  const Second kind = proj_y.has_value()     ? Second::kProjection
                      : residual.has_value() ? Second::kResidual
                                             : Second::kNone;
  const ApplyArgs args{
      rows.numel,
      rows.period,
      y.const_data_ptr(),
      second.has_value() ? second->const_data_ptr() : y.const_data_ptr(),  // not read where absent
      out.mutable_data_ptr(),
      mask.has_value() ? static_cast<uint32_t*>(mask->mutable_data_ptr()) : nullptr,
      bn.vectors(),
      proj.has_value() ? proj->vectors() : BnVectors{},
      static_cast<float>(lower),
      static_cast<float>(upper),
  };
  const int second_element = second.has_value() ? element_of(*second) : element_of(y);
  const auto apply = active_kernel().apply[element_of(y)][second_element][static_cast<int>(kind)];
  torch::stable::parallel_for(0, rows.all(), rows.grain(),
                              [&](int64_t begin, int64_t end) { apply(args, begin, end); });
}

// ---------------------------------------------------------------- backward

const uint32_t* mask_words(const OptionalTensor& mask) {
  return static_cast<const uint32_t*>(data(mask));
}

void bn_backward_reduce(const Tensor& grad_out, const OptionalTensor& mask, const Tensor& y,
                        const Tensor& mean, const Tensor& invstd, const OptionalTensor& proj_y,
                        const OptionalTensor& proj_mean, const OptionalTensor& proj_invstd, Tensor sum_dz,
                        Tensor sum_dz_xhat, OptionalTensor proj_sum_dz_xhat) {
  const Rows rows(y);
  const bool projection = proj_y.has_value();
  const std::vector<float> mean_columns = per_column(rows, floats(mean));
  const std::vector<float> proj_columns =
      projection ? per_column(rows, floats(proj_mean)) : std::vector<float>();
  const ReduceArgs args{rows.numel,         rows.period,  grad_out.const_data_ptr(), mask_words(mask),
                        y.const_data_ptr(), data(proj_y), mean_columns.data(),       proj_columns.data()};
  const auto reduce = active_kernel().reduce[element_of(y)][element_of(grad_out)][projection ? 1 : 0];
  const Chunks chunks(rows.all(), rows.period);
  const int64_t columns = (projection ? 3 : 2) * rows.period;
  std::vector<double> partial(static_cast<size_t>(columns * chunks.count));
  chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(columns));
    reduce(args, begin, end, scratch.data(), partial.data() + chunk * columns);
  });

  // sum over chunks and over the repetitions of a channel, in order
  const auto total = [&](int64_t which, int64_t c) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const double* columns_of_chunk = partial.data() + chunk * columns + which * rows.period;
      for (int64_t i = c; i < rows.period; i += rows.channels) sum += columns_of_chunk[i];
    }
    return sum;
  };
  auto* dz_out = static_cast<float*>(sum_dz.mutable_data_ptr());
  auto* xhat_out = static_cast<float*>(sum_dz_xhat.mutable_data_ptr());
  auto* proj_out = projection ? static_cast<float*>(proj_sum_dz_xhat->mutable_data_ptr()) : nullptr;
  for (int64_t c = 0; c < rows.channels; ++c) {
    dz_out[c] = static_cast<float>(total(0, c));
    xhat_out[c] = static_cast<float>(total(1, c) * floats(invstd)[c]);
    if (projection) proj_out[c] = static_cast<float>(total(2, c) * floats(proj_invstd)[c]);
  }
}

void bn_backward_apply(const Tensor& grad_out, const OptionalTensor& mask, const Tensor& y,
                       const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                       const Tensor& mean_dz, const Tensor& mean_dz_xhat, const OptionalTensor& proj_y,
                       const OptionalTensor& proj_mean, const OptionalTensor& proj_invstd,
                       const OptionalTensor& proj_weight, const OptionalTensor& proj_mean_dz,
                       const OptionalTensor& proj_mean_dz_xhat, Tensor d_y, OptionalTensor d_second) {
  const Rows rows(y);
  const BackwardBn bn(rows, floats(mean), floats(invstd), floats(weight), floats(mean_dz),
                      floats(mean_dz_xhat));
  std::optional<BackwardBn> proj;
  if (proj_y.has_value()) {
    proj.emplace(rows, floats(proj_mean), floats(proj_invstd), floats(proj_weight), floats(proj_mean_dz),
                 floats(proj_mean_dz_xhat));
  }
  const Second kind = proj_y.has_value()     ? Second::kProjection
                      : d_second.has_value() ? Second::kResidual
                                             : Second::kNone;
  const BackwardArgs args{
      rows.numel,
      rows.period,
      grad_out.const_data_ptr(),
      mask_words(mask),
      y.const_data_ptr(),
      data(proj_y),
      d_y.mutable_data_ptr(),
      d_second.has_value() ? d_second->mutable_data_ptr() : nullptr,
      bn.vectors(),
      proj.has_value() ? proj->vectors() : BackwardVectors{},
  };
  const int second_element = d_second.has_value() ? element_of(*d_second) : element_of(y);
  const auto backward = active_kernel().backward[element_of(y)][second_element][static_cast<int>(kind)];
  torch::stable::parallel_for(0, rows.all(), rows.grain(),
                              [&](int64_t begin, int64_t end) { backward(args, begin, end); });
}

// The name of the instruction set in use, after switching to `isa` where this processor has it; tests run
// each.
std::string training_isa(const std::string& isa) {
  if (const Kernels* found = kernels_for(isa.c_str())) active_isa() = found->vectors;
  return active_isa();
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  m.impl("cpu_bn_stats", TORCH_BOX(&fused_resnet::cpu::bn_stats));
  m.impl("cpu_bn_apply", TORCH_BOX(&fused_resnet::cpu::bn_apply));
  m.impl("cpu_bn_backward_reduce", TORCH_BOX(&fused_resnet::cpu::bn_backward_reduce));
  m.impl("cpu_bn_backward_apply", TORCH_BOX(&fused_resnet::cpu::bn_backward_apply));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_training_isa", TORCH_BOX(&fused_resnet::cpu::training_isa));
}
