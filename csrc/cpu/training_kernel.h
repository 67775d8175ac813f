// The four training passes, templates over the number of lanes (the instruction set) and the element types.
// Every pass reads and writes each activation once, in order; per-channel vectors and partial sums stay in
// the first-level cache.
#pragma once

#include <cstring>
#include <type_traits>

#include "finish.h"
#include "training.h"
#include "training_elements.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct TrainingImpl {
  using V = Vec<kLanes>;
  static constexpr int kVectors = kMaskBits / kLanes;  // vectors per word of the mask

  static FR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // ---- statistics: two passes over a few rows at a time, merged in float64

  template <class Y>
  static void stats(const void* y, int64_t period, int64_t begin, int64_t end, float* scratch, double* mean,
                    double* m2) {
    const auto* first = static_cast<const Y*>(y) + begin * period;
    float *pivot = scratch, *sum = pivot + period, *squares = sum + period;
    int64_t merged = 0;
    for (int64_t row = begin; row < end; row += kRowsPerFlush) {
      const int64_t rows = smaller(kRowsPerFlush, end - row);
      const auto* block = first + (row - begin) * period;
      // Around the block's first row, then, from the cache, around the block's mean: nothing cancels, neither
      // where mean >> std nor where the first row is an outlier.
      for (int64_t i = 0; i < period; i += kLanes) {
        store<kLanes>(pivot + i, load<kLanes>(block + i));
      }
      std::memset(sum, 0, static_cast<size_t>(2 * period) * sizeof(float));
      for (int64_t r = 1; r < rows; ++r) {
        const auto* line = block + r * period;
        for (int64_t i = 0; i < period; i += kLanes) {
          const V d = load<kLanes>(line + i) - load<kLanes>(pivot + i);
          store<kLanes>(sum + i, load<kLanes>(sum + i) + d);
        }
      }
      const float inverse_rows = 1.0f / static_cast<float>(rows);
      for (int64_t i = 0; i < period; i += kLanes) {
        store<kLanes>(pivot + i, load<kLanes>(pivot + i) + load<kLanes>(sum + i) * inverse_rows);
        store<kLanes>(sum + i, V{});
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto* line = block + r * period;
        for (int64_t i = 0; i < period; i += kLanes) {
          const V d = load<kLanes>(line + i) - load<kLanes>(pivot + i);
          store<kLanes>(sum + i, load<kLanes>(sum + i) + d);
          store<kLanes>(squares + i, load<kLanes>(squares + i) + d * d);
        }
      }
      merge_block(pivot, period, rows, merged, mean, m2);
      merged += rows;
    }
  }

  // Chan's update of (merged, mean, m2) by a block given as pivot, sum, squares.
  static void merge_block(const float* block, int64_t period, int64_t rows, int64_t merged, double* mean,
                          double* m2) {
    const float *pivot = block, *sum = pivot + period, *squares = sum + period;
    const double share = static_cast<double>(rows) / static_cast<double>(merged + rows);
    const double inverse_rows = 1.0 / static_cast<double>(rows);
    const double cross = share * static_cast<double>(merged);
    for (int64_t i = 0; i < period; ++i) {
      const double s = sum[i];
      const double block_mean = pivot[i] + s * inverse_rows;
      const double rounded_m2 = squares[i] - s * s * inverse_rows;
      const double block_m2 = rounded_m2 < 0.0 ? 0.0 : rounded_m2;
      const double before = merged == 0 ? block_mean : mean[i];
      const double delta = block_mean - before;
      mean[i] = before + delta * share;
      m2[i] = (merged == 0 ? 0.0 : m2[i]) + block_m2 + delta * delta * cross;
    }
  }

  // ---- forward

  // The element type of y + second: float where either is, else their common 16-bit type.
  template <class Y, class S, Second kSecond>
  using Sum = std::conditional_t<std::is_same_v<Y, float> || kSecond == Second::kNone, Y, S>;

  template <class Y, class S, Second kSecond>
  struct Apply {
    using Out = Sum<Y, S, kSecond>;

    static FR_INLINE V normalise(V y, const BnVectors& bn, int64_t i) {
      return (y - load<kLanes>(bn.mean + i)) * load<kLanes>(bn.scale + i) + load<kLanes>(bn.bias + i);
    }

    // 32 elements at column i; returns their word of the mask.
    static FR_INLINE uint32_t word(const ApplyArgs& a, const Y* y, const S* second, Out* out, int64_t i) {
      uint32_t bits = 0;
      unroll<kVectors>([&](auto v) FR_LAMBDA {
        constexpr int64_t kOffset = v * kLanes;
        V z = normalise(load<kLanes>(y + kOffset), a.bn, i + kOffset);
        if constexpr (kSecond != Second::kNone) {
          const V other = load<kLanes>(second + kOffset);
          z += kSecond == Second::kProjection ? normalise(other, a.proj, i + kOffset) : other;
        }
        const V lower = V{} + a.lower, upper = V{} + a.upper;
        // NaN fails every comparison: it is kept, and so is its gradient, as in eager PyTorch.
        bits |= bits_of_lanes<kLanes>(~((z <= lower) | (z >= upper))) << kOffset;
        store<kLanes>(out + kOffset, at_most(at_least(z, lower), upper));
      });
      return bits;
    }

    static void run(const ApplyArgs& a, int64_t begin, int64_t end) {
      const auto* y = static_cast<const Y*>(a.y);
      const auto* second = static_cast<const S*>(a.second);
      auto* out = static_cast<Out*>(a.out);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * a.period;
        const int64_t count = smaller(a.period, a.numel - first);
        int64_t i = 0;
        for (; i + kMaskBits <= count; i += kMaskBits) {
          const int64_t at = first + i;
          const uint32_t bits = word(a, y + at, second + at, out + at, i);
          if (a.mask != nullptr) a.mask[at / kMaskBits] = bits;
        }
        if (i < count) tail(a, y + first + i, second + first + i, out + first + i, first + i, i, count - i);
      }
    }

    static void tail(const ApplyArgs& a, const Y* y, const S* second, Out* out, int64_t at, int64_t i,
                     int64_t left) {
      Y y_copy[kMaskBits] = {};
      S second_copy[kMaskBits] = {};
      Out out_copy[kMaskBits];
      std::memcpy(y_copy, y, static_cast<size_t>(left) * sizeof(Y));
      if constexpr (kSecond != Second::kNone)
        std::memcpy(second_copy, second, static_cast<size_t>(left) * sizeof(S));
      const uint32_t bits = word(a, y_copy, second_copy, out_copy, i);
      std::memcpy(out, out_copy, static_cast<size_t>(left) * sizeof(Out));
      if (a.mask != nullptr) a.mask[at / kMaskBits] = bits & ((1u << left) - 1u);
    }
  };

  // ---- backward

  template <class G>
  static FR_INLINE V masked(const G* grad_out, uint32_t bits) {
    const V dz = load<kLanes>(grad_out);
    return lanes_of_bits<kLanes>(bits) ? dz : V{};
  }

  static FR_INLINE uint32_t word_at(const uint32_t* mask, int64_t at) {
    return mask == nullptr ? ~0u : mask[at / kMaskBits];
  }

  // G: grad_out's element type; with a projection, proj_y has y's.
  template <class Y, class G, bool kProjection>
  struct Reduce {
    static constexpr int kSums = kProjection ? 3 : 2;

    static FR_INLINE void add(float* sum, V v) { store<kLanes>(sum, load<kLanes>(sum) + v); }

    static FR_INLINE void word(const ReduceArgs& a, const G* grad_out, uint32_t bits, const Y* y,
                               const Y* proj_y, int64_t i, float* sums) {
      unroll<kVectors>([&](auto v) FR_LAMBDA {
        constexpr int64_t kOffset = v * kLanes;
        const int64_t column = i + kOffset;
        const V dz = masked(grad_out + kOffset, bits >> kOffset);
        add(sums + column, dz);
        const V centred = load<kLanes>(y + kOffset) - load<kLanes>(a.mean + column);
        add(sums + a.period + column, dz * centred);
        if constexpr (kProjection) {
          const V other = load<kLanes>(proj_y + kOffset) - load<kLanes>(a.proj_mean + column);
          add(sums + 2 * a.period + column, dz * other);
        }
      });
    }

    static void run(const ReduceArgs& a, int64_t begin, int64_t end, float* partial, double* sums) {
      const auto* grad_out = static_cast<const G*>(a.grad_out);
      const auto* y = static_cast<const Y*>(a.y);
      const auto* proj_y = static_cast<const Y*>(a.proj_y);
      const int64_t columns = kSums * a.period;
      std::memset(partial, 0, static_cast<size_t>(columns) * sizeof(float));
      std::memset(sums, 0, static_cast<size_t>(columns) * sizeof(double));
      for (int64_t row = begin; row < end; ++row) {
        if ((row - begin) % kRowsPerFlush == 0) flush(partial, columns, sums);
        const int64_t first = row * a.period;
        const int64_t count = smaller(a.period, a.numel - first);
        int64_t i = 0;
        for (; i + kMaskBits <= count; i += kMaskBits) {
          const int64_t at = first + i;
          word(a, grad_out + at, word_at(a.mask, at), y + at, proj_y + at, i, partial);
        }
        if (i < count) tail(a, grad_out, y, proj_y, first + i, i, count - i, partial);
      }
      flush(partial, columns, sums);
    }

    static void tail(const ReduceArgs& a, const G* grad_out, const Y* y, const Y* proj_y, int64_t at,
                     int64_t i, int64_t left, float* sums) {
      G g_copy[kMaskBits] = {};
      Y y_copy[kMaskBits] = {}, proj_copy[kMaskBits] = {};
      std::memcpy(g_copy, grad_out + at, static_cast<size_t>(left) * sizeof(G));
      std::memcpy(y_copy, y + at, static_cast<size_t>(left) * sizeof(Y));
      if constexpr (kProjection) std::memcpy(proj_copy, proj_y + at, static_cast<size_t>(left) * sizeof(Y));
      word(a, g_copy, word_at(a.mask, at) & ((1u << left) - 1u), y_copy, proj_copy, i, sums);
    }

    static void flush(float* partial, int64_t columns, double* sums) {
      for (int64_t i = 0; i < columns; ++i) sums[i] += partial[i];
      std::memset(partial, 0, static_cast<size_t>(columns) * sizeof(float));
    }
  };

  // S: element type of d_second, which is the residual's or proj_y's.
  template <class Y, class S, Second kSecond>
  struct Backward {
    using G = Sum<Y, S, kSecond>;

    static FR_INLINE V through(V dz, V y, const BackwardVectors& bn, int64_t i) {
      const V centred = y - load<kLanes>(bn.mean + i);
      const V inner = dz - load<kLanes>(bn.mean_dz + i) - centred * load<kLanes>(bn.slope + i);
      return load<kLanes>(bn.scale + i) * inner;
    }

    static FR_INLINE void word(const BackwardArgs& a, const G* grad_out, uint32_t bits, const Y* y,
                               const S* proj_y, Y* d_y, S* d_second, int64_t i) {
      unroll<kVectors>([&](auto v) FR_LAMBDA {
        constexpr int64_t kOffset = v * kLanes;
        const V dz = masked(grad_out + kOffset, bits >> kOffset);
        const V d = through(dz, load<kLanes>(y + kOffset), a.bn, i + kOffset);
        store<kLanes>(d_y + kOffset, d);
        if constexpr (kSecond == Second::kResidual) store<kLanes>(d_second + kOffset, dz);
        if constexpr (kSecond == Second::kProjection) {
          const V other = through(dz, load<kLanes>(proj_y + kOffset), a.proj, i + kOffset);
          store<kLanes>(d_second + kOffset, other);
        }
      });
    }

    static void run(const BackwardArgs& a, int64_t begin, int64_t end) {
      const auto* grad_out = static_cast<const G*>(a.grad_out);
      const auto* y = static_cast<const Y*>(a.y);
      const auto* proj_y = static_cast<const S*>(a.proj_y);
      auto* d_y = static_cast<Y*>(a.d_y);
      auto* d_second = static_cast<S*>(a.d_second);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * a.period;
        const int64_t count = smaller(a.period, a.numel - first);
        int64_t i = 0;
        for (; i + kMaskBits <= count; i += kMaskBits) {
          const int64_t at = first + i;
          word(a, grad_out + at, word_at(a.mask, at), y + at, proj_y + at, d_y + at, d_second + at, i);
        }
        if (i < count) tail(a, first + i, i, count - i);
      }
    }

    static void tail(const BackwardArgs& a, int64_t at, int64_t i, int64_t left) {
      const size_t n = static_cast<size_t>(left);
      G g_copy[kMaskBits] = {};
      Y y_copy[kMaskBits] = {}, d_y_copy[kMaskBits];
      S proj_copy[kMaskBits] = {}, d_second_copy[kMaskBits];
      std::memcpy(g_copy, static_cast<const G*>(a.grad_out) + at, n * sizeof(G));
      std::memcpy(y_copy, static_cast<const Y*>(a.y) + at, n * sizeof(Y));
      if constexpr (kSecond == Second::kProjection)
        std::memcpy(proj_copy, static_cast<const S*>(a.proj_y) + at, n * sizeof(S));
      word(a, g_copy, word_at(a.mask, at), y_copy, proj_copy, d_y_copy, d_second_copy, i);
      std::memcpy(static_cast<Y*>(a.d_y) + at, d_y_copy, n * sizeof(Y));
      if constexpr (kSecond != Second::kNone)
        std::memcpy(static_cast<S*>(a.d_second) + at, d_second_copy, n * sizeof(S));
    }
  };

  // ---- the table

  template <class Y, class S>
  static constexpr void fill(TrainingKernel& k, Element y_element, Element s_element) {
    const int y = static_cast<int>(y_element), s = static_cast<int>(s_element);
    k.apply[y][s][0] = Apply<Y, S, Second::kNone>::run;
    k.apply[y][s][1] = Apply<Y, S, Second::kResidual>::run;
    k.apply[y][s][2] = Apply<Y, S, Second::kProjection>::run;
    k.reduce[y][s][0] = Reduce<Y, S, false>::run;
    k.reduce[y][s][1] = Reduce<Y, S, true>::run;
    k.backward[y][s][0] = Backward<Y, S, Second::kNone>::run;
    k.backward[y][s][1] = Backward<Y, S, Second::kResidual>::run;
    k.backward[y][s][2] = Backward<Y, S, Second::kProjection>::run;
  }

  // A constant expression: no code compiled for this instruction set runs while the library is loaded.
  static constexpr TrainingKernel kernel() {
    TrainingKernel k{};
    k.stats[static_cast<int>(Element::kFloat32)] = stats<float>;
    k.stats[static_cast<int>(Element::kBfloat16)] = stats<BFloat16>;
    k.stats[static_cast<int>(Element::kFloat16)] = stats<Half>;
    fill<float, float>(k, Element::kFloat32, Element::kFloat32);
    fill<BFloat16, BFloat16>(k, Element::kBfloat16, Element::kBfloat16);
    fill<Half, Half>(k, Element::kFloat16, Element::kFloat16);
    // Mixed precision whose shortcut stayed float32, and the reverse.
    fill<BFloat16, float>(k, Element::kBfloat16, Element::kFloat32);
    fill<Half, float>(k, Element::kFloat16, Element::kFloat32);
    fill<float, BFloat16>(k, Element::kFloat32, Element::kBfloat16);
    fill<float, Half>(k, Element::kFloat32, Element::kFloat16);
    return k;
  }
};

}  // namespace fused_resnet::cpu
