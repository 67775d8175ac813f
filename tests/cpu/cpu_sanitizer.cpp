// The CPU kernels without Torch, for AddressSanitizer and UndefinedBehaviorSanitizer, and for processors that
// are only emulated.
//
// Small register blocks keep the compilation short; lanes, tails, padding, blocks and tiles go through the
// same code as the real ones (FR_LANES and FR_ROWS: others). Every array is
// allocated to its exact size, so that one float too far is found, and every result is compared with a plain
// loop on small integers, exactly for direct and F(2x2).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/bf16_block.h"
#include "cpu/bf16x3_direct.h"
#include "cpu/bf16x3_stem.h"
#include "cpu/bf16x3_winograd.h"
#include "cpu/direct_kernel.h"
#include "cpu/epilogue_kernel.h"
#include "cpu/pooled_kernel.h"
#include "cpu/weight_gradient_kernel.h"
#include "cpu/winograd_fresh.h"
#include "cpu/winograd_kernel.h"

#ifndef FR_LANES
  #define FR_LANES 8
  #define FR_ROWS 2
  #define FR_GRADIENT_ROWS 2
#endif

using namespace fused_resnet::cpu;

namespace {

// malloc rather than a vector: nothing behind the last element.
template <class T>
struct Array {
  explicit Array(int64_t count) : size(count), data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  int64_t size;
  T* data;
};
using Floats = Array<float>;

float value_of(float x) {
  return x;
}
float value_of(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t state = 1;
float small_integer() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 16) % 7 - 3);
}

template <class T>
void fill(Array<T>& a) {
  for (int64_t i = 0; i < a.size; ++i) a.data[i] = rounded<T>(small_integer());
}
template <class T>
void fill_nan(Array<T>& a) {
  for (int64_t i = 0; i < a.size; ++i) a.data[i] = rounded<T>(NAN);
}

// T: the type of the activations.
template <class T>
float expected(const ConvProblem& problem, const float* weight, int64_t n, int64_t p, int64_t q, int64_t k) {
  const ConvShape& s = problem.shape;
  float sum = 0;
  for (int64_t r = 0; r < s.r; ++r) {
    for (int64_t t = 0; t < s.s; ++t) {
      const int64_t h = p * s.stride_h + r * s.dilation_h - s.pad_h,
                    w = q * s.stride_w + t * s.dilation_w - s.pad_w;
      if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
      for (int64_t c = 0; c < s.c; ++c) {
        sum += value_of(problem.input<T>()[((n * s.h + h) * s.w + w) * s.c + c]) *
               weight[((k * s.c + c) * s.r + r) * s.s + t];
      }
    }
  }
  sum = sum * problem.scale[k] + problem.shift[k];
  if (problem.residual) sum += value_of(problem.added<T>()[((n * s.p + p) * s.q + q) * s.k + k]);
  return value_of(rounded<T>(problem.activation == Activation::kRelu && sum < 0 ? 0 : sum));
}

int failures = 0;

template <class T = float>
void run(const char* name, const ConvKernel& kernel, ConvShape s, bool residual, int threads,
         float tolerance) {
  s.p = (s.h + 2 * s.pad_h - s.dilation_h * (s.r - 1) - 1) / s.stride_h + 1;
  s.q = (s.w + 2 * s.pad_w - s.dilation_w * (s.s - 1) - 1) / s.stride_w + 1;
  Array<T> x(s.n * s.h * s.w * s.c), y(s.n * s.p * s.q * s.k), other(y.size);
  Floats weight(s.k * s.c * s.r * s.s), packed(kernel.weight_floats(s));
  Floats scale(ceil_div(s.k, 32) * 32), shift(scale.size);
  for (Floats* a : {&weight, &scale, &shift}) fill(*a);
  fill(x), fill(other), fill_nan(y);
  const int64_t stride[4] = {s.c * s.r * s.s, s.r * s.s, s.s, 1};
  kernel.pack_weights(s, weight.data, stride, 0, ceil_div(s.k, kernel.panel), packed.data);

  ConvProblem problem;
  problem.shape = s;
  problem.x = x.data, problem.weights = packed.data, problem.scale = scale.data, problem.shift = shift.data;
  problem.residual = residual ? other.data : nullptr;
  problem.y = y.data;
  problem.activation = residual ? Activation::kRelu : Activation::kNone;
  const int64_t in[3] = {s.h * s.w * s.c, s.w * s.c, s.c}, out[3] = {s.p * s.q * s.k, s.q * s.k, s.k};
  std::memcpy(problem.x_stride, in, sizeof(in));
  std::memcpy(problem.y_stride, out, sizeof(out));
  std::memcpy(problem.residual_stride, out, sizeof(out));

  const ConvPlan plan = kernel.plan(s, threads);
  const std::unique_ptr<Floats> scratch(new Floats(plan.scratch_floats));
  for (int64_t i = 0; i < plan.scratch_floats; ++i) scratch->data[i] = NAN;
  for (int64_t piece = 0; piece < plan.row_blocks * plan.k_blocks; ++piece) {
    kernel.run_piece(problem, plan, piece, scratch->data);
  }
  for (int64_t i = 0; i < y.size; ++i) {
    const int64_t k = i % s.k, q = i / s.k % s.q, p = i / s.k / s.q % s.p, n = i / s.k / s.q / s.p;
    const float want = expected<T>(problem, weight.data, n, p, q, k), got = value_of(y.data[i]);
    if (!(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)))) {
      std::printf("%s: [%ld %ld %ld %ld] got %g, expected %g\n", name, long(n), long(p), long(q), long(k),
                  got, want);
      ++failures;
      return;
    }
  }
}

void run_weight_gradient(const char* name, const WeightGradientKernel& kernel, ConvShape s, int threads,
                         float tolerance) {
  s.p = s.h + 2 * s.pad_h - 2, s.q = s.w + 2 * s.pad_w - 2;
  Floats x(s.n * s.h * s.w * s.c), grad_y(s.n * s.p * s.q * s.k);
  fill(x), fill(grad_y);
  const WeightGradientProblem problem{
      s, x.data, {s.h * s.w * s.c, s.w * s.c, s.c}, grad_y.data, {s.p * s.q * s.k, s.q * s.k, s.k}};
  const WeightGradientPlan plan = kernel.plan(s, threads);
  Floats splits(plan.splits * s.k * 9 * s.c), scratch(plan.scratch_floats);
  for (Floats* a : {&splits, &scratch}) std::fill_n(a->data, a->size, NAN);
  for (int64_t piece = 0; piece < plan.pieces(); ++piece) {
    kernel.run_piece(problem, plan, piece, splits.data, scratch.data);
  }
  for (int64_t i = 0; i < s.k * 9 * s.c; ++i) {
    const int64_t c = i % s.c, tap = i / s.c % 9, k = i / s.c / 9;
    float got = 0, want = 0;
    for (int64_t split = 0; split < plan.splits; ++split) got += splits.data[split * s.k * 9 * s.c + i];
    for (int64_t pixel = 0; pixel < s.n * s.p * s.q; ++pixel) {
      const int64_t n = pixel / s.q / s.p, h = pixel / s.q % s.p + tap / 3 - s.pad_h,
                    w = pixel % s.q + tap % 3 - s.pad_w;
      if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
      want += x.data[((n * s.h + h) * s.w + w) * s.c + c] * grad_y.data[pixel * s.k + k];
    }
    if (!(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)))) {
      std::printf("%s: weight gradient [%ld %ld %ld] got %g, expected %g\n", name, long(k), long(tap),
                  long(c), got, want);
      ++failures;
      return;
    }
  }
}

// A stem: convolution, epilogue and max pool, in parts of two rows of windows.
template <class T = float>
void run_pooled(const char* name, const PooledKernel& kernel, ConvShape s, Pool pool) {
  s.p = (s.h + 2 * s.pad_h - s.dilation_h * (s.r - 1) - 1) / s.stride_h + 1;
  s.q = (s.w + 2 * s.pad_w - s.dilation_w * (s.s - 1) - 1) / s.stride_w + 1;
  pool.p = (s.p + 2 * pool.pad_h - pool.window_h) / pool.stride_h + 1;
  pool.q = (s.q + 2 * pool.pad_w - pool.window_w) / pool.stride_w + 1;
  Array<T> x(s.n * s.h * s.w * s.c), y(s.n * pool.p * pool.q * s.k);
  Floats weight(s.k * s.c * s.r * s.s), packed(kernel.weight_floats(s));
  Floats scale(ceil_div(s.k, 32) * 32), shift(scale.size);
  for (Floats* a : {&weight, &scale, &shift}) fill(*a);
  fill(x), fill_nan(y);
  const int64_t stride[4] = {s.c * s.r * s.s, s.r * s.s, s.s, 1};
  kernel.pack_weights(s, weight.data, stride, 0, ceil_div(s.k, kernel.panel), packed.data);
  ConvProblem problem{};
  problem.shape = s;
  problem.x = x.data, problem.weights = packed.data, problem.scale = scale.data, problem.shift = shift.data;
  problem.y = y.data, problem.activation = Activation::kNone;
  const int64_t in[3] = {s.h * s.w * s.c, s.w * s.c, s.c};
  std::memcpy(problem.x_stride, in, sizeof(in));
  Floats scratch(kernel.scratch_floats(s, pool));
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t p = 0; p < pool.p; p += 2) {
      for (int64_t i = 0; i < scratch.size; ++i) scratch.data[i] = NAN;
      kernel.run(problem, pool, n, p, std::min(p + 2, pool.p), scratch.data);
    }
  }
  for (int64_t i = 0; i < y.size; ++i) {
    const int64_t k = i % s.k, q = i / s.k % pool.q, p = i / s.k / pool.q % pool.p,
                  n = i / s.k / pool.q / pool.p;
    float want = -INFINITY;
    for (int64_t h = p * pool.stride_h - pool.pad_h; h < p * pool.stride_h - pool.pad_h + pool.window_h;
         ++h) {
      for (int64_t w = q * pool.stride_w - pool.pad_w; w < q * pool.stride_w - pool.pad_w + pool.window_w;
           ++w) {
        if (h < 0 || h >= s.p || w < 0 || w >= s.q) continue;
        want = std::max(want, expected<T>(problem, weight.data, n, h, w, k));
      }
    }
    if (value_of(y.data[i]) != want) {
      std::printf("%s: pooled [%ld %ld %ld %ld] got %g, expected %g\n", name, long(n), long(p), long(q),
                  long(k), value_of(y.data[i]), want);
      ++failures;
      return;
    }
  }
}

// Small integers are exact in every type, infinity and NaN included; rounding is tested from Python.
template <class T>
void run_epilogue(Scalar scalar, uint16_t (*bits_of)(float), int lanes, EpilogueKernel kernel) {
  for (const bool channels_last : {true, false}) {
    for (const int64_t channels : {1, 3, 4, 9, 16, 21}) {
      const int64_t rows = channels_last ? 6 : 2 * channels, length = channels_last ? channels : 5;
      Floats scale(channels), shift(channels), y(rows * length), residual(y.size);
      for (Floats* a : {&scale, &shift, &y, &residual}) fill(*a);
      y.data[y.size / 2] = INFINITY, y.data[y.size - 1] = NAN;
      std::unique_ptr<T[]> in(new T[y.size]), other(new T[y.size]);
      for (int64_t i = 0; i < y.size; ++i) {
        if constexpr (sizeof(T) == sizeof(float)) {
          in[i] = y.data[i], other[i] = residual.data[i];
        } else {
          in[i].bits = bits_of(y.data[i]), other[i].bits = bits_of(residual.data[i]);
        }
      }
      kernel.run({in.get(), other.get(), scale.data, shift.data, scalar, Activation::kRelu, channels_last,
                  channels, length},
                 0, rows);
      for (int64_t i = 0; i < y.size; ++i) {
        const int64_t channel = channels_last ? i % length : i / length % channels;
        float want = y.data[i] * scale.data[channel] + shift.data[channel] + residual.data[i];
        if (want < 0) want = 0;
        bool right;
        if constexpr (sizeof(T) == sizeof(float)) {
          right = in[i] == want || (std::isnan(in[i]) && std::isnan(want));
        } else {
          right =
              in[i].bits == bits_of(want) || (std::isnan(want) && (in[i].bits & 0x7fff) > bits_of(INFINITY));
        }
        if (!right) {
          std::printf("epilogue, %d lanes, type %d: [%ld] expected %g\n", lanes, static_cast<int>(scalar),
                      long(i), want);
          ++failures;
          return;
        }
      }
    }
  }
}

uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);  // of values that are exact
}

// As in the standard: sign, exponent + 15, fraction, of values that are exact and not subnormal.
uint16_t half_bits(float value) {
  if (std::isnan(value)) return 0x7e00;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent;
  const float fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 0x3ff));
}

template <int kLanes>
void run_epilogues() {
  const EpilogueKernel kernel = EpilogueImpl<kLanes>::kernel();
  run_epilogue<float>(Scalar::kFloat, nullptr, kLanes, kernel);
  run_epilogue<BFloat16>(Scalar::kBFloat16, &bfloat16_bits, kLanes, kernel);
  run_epilogue<Half>(Scalar::kHalf, &half_bits, kLanes, kernel);
}

template <class Block, class GradientBlock>
void run_all(const char* name) {
  const ConvKernel direct = DirectImpl<Block>::kernel();
  const ConvKernel f2 = WinogradImpl<Block, Winograd<2>>::kernel(),
                   f4 = WinogradImpl<Block, Winograd<4>>::kernel();
  const ConvKernel fresh2 = FreshWinogradImpl<Block, Winograd<2>>::kernel(),
                   fresh4 = FreshWinogradImpl<Block, Winograd<4>>::kernel();
  const ConvKernel bf16x3 = Bf16x3Direct<PlainTiles, Block::kLanes, false>::kernel(),
                   fresh_bf16x3 = Bf16x3Direct<PlainTiles, Block::kLanes, true>::kernel();
  const ConvKernel bf16x3_f2 = Bf16x3Winograd<PlainTiles, Block::kLanes, Winograd<2>>::kernel(),
                   bf16x3_f4 = Bf16x3Winograd<PlainTiles, Block::kLanes, Winograd<4>>::kernel();
  using Bf16 = Bf16Block<Block::kLanes, Block::kRows, Block::kCols>;
  using Bf16Winograd = RegisterBlock<Block::kLanes, Block::kRows, Block::kCols, BFloat16>;
  const ConvKernel bf16 = DirectImpl<Bf16>::kernel(),
                   bf16_f2 = WinogradImpl<Bf16Winograd, Winograd<2>>::kernel();
  const WeightGradientKernel gradient2 = WeightGradientImpl<GradientBlock, Winograd<2>>::kernel(),
                             gradient4 = WeightGradientImpl<GradientBlock, Winograd<4>>::kernel();
  const int64_t shapes[][7] = {// n, h, w, c, k, pad_h, pad_w
                               {1, 1, 1, 1, 1, 1, 1},    {2, 5, 6, 3, 5, 1, 1},   {1, 7, 7, 17, 33, 1, 1},
                               {3, 9, 4, 20, 12, 0, 0},  {1, 3, 8, 15, 31, 2, 2}, {1, 6, 5, 8, 16, 3, 0},
                               {1, 13, 9, 32, 48, 1, 1}, {2, 8, 8, 16, 7, 1, 1},  {1, 5, 6, 72, 20, 1, 1}};
  for (const auto& a : shapes) {
    for (const int threads : {1, 3}) {
      for (const bool residual : {false, true}) {
        const ConvShape s{a[0], a[1], a[2], a[3], a[4], 3, 3, 0, 0, 1, 1, a[5], a[6], 1, 1};
        run(name, direct, s, residual, threads, 0);
        run(name, f2, s, residual, threads, 0);
        run(name, f4, s, residual, threads, 1e-3f);
        run(name, bf16x3, s, residual, threads, 0);
        run(name, fresh_bf16x3, s, residual, threads, 0);
        run(name, fresh2, s, residual, threads, 0);
        run(name, fresh4, s, residual, threads, 1e-3f);
        run(name, bf16x3_f2, s, residual, threads, 0);
        run(name, bf16x3_f4, s, residual, threads, 1e-3f);
        for (const ConvKernel& kernel : {bf16, bf16_f2}) {
          run<BFloat16>("bfloat16", kernel, s, residual, threads, 0);
        }
      }
      if (a[5] > 2 || a[6] > 2) continue;  // beyond the filter: left to torch in training
      const ConvShape s{a[0], a[1], a[2], a[3], a[4], 3, 3, 0, 0, 1, 1, a[5], a[6], 1, 1};
      run_weight_gradient(name, gradient2, s, threads, 0);
      run_weight_gradient(name, gradient4, s, threads, 1e-3f);
    }
  }
  const ConvShape others[] = {
      {2, 9, 7, 19, 37, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1},
      {2, 9, 7, 32, 64, 1, 1, 0, 0, 2, 2, 0, 0, 1, 1},
      {1, 21, 19, 3, 16, 7, 7, 0, 0, 2, 2, 3, 3, 1, 1},
      {1, 13, 11, 16, 24, 3, 3, 0, 0, 2, 1, 2, 1, 1, 2},
      {1, 9, 10, 12, 20, 5, 2, 0, 0, 3, 3, 4, 4, 1, 1},
      {11, 6, 14, 8, 20, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1},   // strips of images, the second not full
      {2, 5, 9, 320, 100, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1},  // slabs of weights beyond the cache
  };
  for (const ConvShape& s : others) {
    for (const ConvKernel& kernel : {direct, bf16x3, fresh_bf16x3}) run(name, kernel, s, true, 2, 0);
    run<BFloat16>("bfloat16", bf16, s, true, 2, 0);
  }
  const ConvShape stems[] = {
      {2, 21, 19, 3, 20, 7, 7, 0, 0, 2, 2, 3, 3, 1, 1}, {1, 9, 12, 3, 33, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1},
      {1, 12, 9, 3, 7, 3, 2, 0, 0, 3, 1, 2, 0, 2, 1},   {1, 9, 9, 1, 16, 5, 5, 0, 0, 1, 1, 2, 2, 1, 2},
      {1, 10, 11, 6, 5, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1},
  };
  for (const ConvShape& s : stems) {
    run_pooled(name, PooledImpl<Block>::kernel(), s, {3, 3, 2, 2, 1, 1, 0, 0});
    run_pooled(name, PooledImpl<Block>::kernel(), s, {2, 1, 3, 1, 0, 0, 0, 0});
    run_pooled<BFloat16>("bfloat16", PooledImpl<Bf16>::kernel(), s, {3, 3, 2, 2, 1, 1, 0, 0});
    run_pooled<BFloat16>("bfloat16", PooledImpl<Bf16>::kernel(), s, {2, 1, 3, 1, 0, 0, 0, 0});
  }
}

// The stem on matrix tiles. Small integers lose nothing in their first part.
template <int kLanes>
void run_bf16x3_stems() {
  const PooledKernel kernel = PooledRows<Bf16x3Stem<PlainTiles, kLanes>>::kernel();
  const ConvShape stems[] = {
      {2, 21, 19, 3, 20, 7, 7, 0, 0, 2, 2, 3, 3, 1, 1},  {1, 9, 80, 3, 70, 5, 7, 0, 0, 1, 1, 2, 2, 1, 1},
      {1, 12, 9, 4, 33, 3, 3, 0, 0, 3, 1, 2, 0, 1, 1},   {1, 9, 9, 1, 16, 6, 6, 0, 0, 1, 2, 2, 2, 1, 1},
      {1, 10, 150, 9, 40, 3, 3, 0, 0, 2, 2, 1, 1, 1, 1}, {1, 9, 34, 16, 96, 1, 2, 0, 0, 1, 1, 0, 0, 1, 1},
  };
  for (const ConvShape& s : stems) {
    if (!kernel.can_run(s)) std::printf("bf16x3 stem: refused\n"), ++failures;
    run_pooled("bf16x3 stem", kernel, s, {3, 3, 2, 2, 1, 1, 0, 0});
    run_pooled("bf16x3 stem", kernel, s, {2, 1, 3, 1, 0, 0, 0, 0});
  }
}

}  // namespace

int main() {
  run_all<RegisterBlock<FR_LANES, FR_ROWS, 2>, RegisterBlock<FR_LANES, FR_GRADIENT_ROWS, 2>>("kernels");
  run_bf16x3_stems<FR_LANES>();
  run_epilogues<FR_LANES>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
