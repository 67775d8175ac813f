// U = G g G^T of one panel of filters, in double precision and rounded once. In inference this happens once;
// in training the weights are new in every step, so it is vectorised over the output channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"
#include "winograd_matrices.h"

namespace fused_resnet::cpu {

template <int kLanes>
struct DoubleTypes {
  static constexpr int kHalf = kLanes / 2;  // doubles in a vector register
  typedef double Double __attribute__((vector_size(kHalf * sizeof(double))));
  typedef float Float __attribute__((vector_size(kHalf * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(kHalf * sizeof(float)), aligned(4), may_alias));
};

// Block: for its lanes, and so that each set of kernels has its own.
template <class Block, class W>
struct FilterTransform {
  static constexpr int kLanes = Block::kLanes;
  static constexpr int kHalf = DoubleTypes<kLanes>::kHalf, kTile = W::kTile;
  static constexpr int kStep = 16;  // input channels at a time
  using Double = typename DoubleTypes<kLanes>::Double;
  using Float = typename DoubleTypes<kLanes>::Float;
  using Unaligned = typename DoubleTypes<kLanes>::Unaligned;

  // out[i] = (G in)[i]; coefficients 0 and 1 cost nothing.
  template <class Load, class Store>
  static FR_INLINE void transform(Load&& in, Store&& out) {
    unroll<kTile>([&](auto i) FR_LAMBDA {
      Double sum = {};
      unroll<3>([&](auto k) FR_LAMBDA {
        constexpr double kCoefficient = W::kFilter[decltype(i)::value][decltype(k)::value];
        if constexpr (kCoefficient == 1.0) {
          sum += in(k);
        } else if constexpr (kCoefficient != 0.0) {
          sum += kCoefficient * in(k);
        }
      });
      out(i, sum);
    });
  }

  // kHalf filters at `g`, [9][kStep][kLanes], to [position] at `u`.
  static FR_INLINE void transform_filters(const float* g, float* u, int64_t u_position) {
    Double taps[3][3], half[kTile][3];
    unroll<9>([&](auto i) FR_LAMBDA {
      const Float tap = *reinterpret_cast<const Unaligned*>(g + i * kStep * kLanes);
      taps[i / 3][i % 3] = __builtin_convertvector(tap, Double);
    });
    unroll<3>([&](auto s) FR_LAMBDA {
      transform([&](auto r) FR_LAMBDA { return taps[r][s]; },
                [&](auto i, Double value) FR_LAMBDA { half[i][s] = value; });
    });
    unroll<kTile>([&](auto i) FR_LAMBDA {
      transform([&](auto s) FR_LAMBDA { return half[i][s]; },
                [&](auto j, Double value) FR_LAMBDA {
                  float* to = u + (i * kTile + j) * u_position;
                  *reinterpret_cast<Unaligned*>(to) = __builtin_convertvector(value, Float);
                });
    });
  }

  // The `k_count` <= panel filters at `weight` (strides of K, C, R and S) to [c_padded][panel] for each
  // position, u_position floats apart; what pads the channels is zero.
  static void pack_panel(const float* weight, const int64_t stride[4], int64_t k_count, int64_t c_count,
                         int64_t c_padded, int64_t panel, float* out, int64_t u_position) {
    alignas(64) float g[9 * kStep * kLanes];  // taps of kStep x kLanes filters, output channels innermost
    for (int64_t k = 0; k < panel; k += kLanes) {
      const int64_t lanes = std::clamp<int64_t>(k_count - k, 0, kLanes);
      if (lanes < kLanes) std::fill_n(g, 9 * kStep * kLanes, 0.0f);
      for (int64_t c = 0; c < c_count; c += kStep) {
        const int64_t channels = std::min<int64_t>(c_count - c, kStep);
        const float* from = weight + k * stride[0] + c * stride[1];
        for (int tap = 0; tap < 9; ++tap) {
          gather(from + tap / 3 * stride[2] + tap % 3 * stride[3], stride[0], stride[1], lanes, channels,
                 g + tap * kStep * kLanes);
        }
        for (int64_t i = 0; i < channels; ++i) {
          float* to = out + (c + i) * panel + k;
          transform_filters(g + i * kLanes, to, u_position);
          transform_filters(g + i * kLanes + kHalf, to + kHalf, u_position);
        }
      }
    }
    for (int position = 0; position < W::kPositions; ++position) {
      float* rest = out + position * u_position + c_count * panel;
      std::fill_n(rest, (c_padded - c_count) * panel, 0.0f);
    }
  }

  // to[c][k], reading along whichever of the two is contiguous.
  static FR_INLINE void gather(const float* from, int64_t k_stride, int64_t c_stride, int64_t k_count,
                               int64_t c_count, float* to) {
    if (k_stride == 1) {
      for (int64_t c = 0; c < c_count; ++c) std::copy_n(from + c * c_stride, k_count, to + c * kLanes);
      return;
    }
    for (int64_t k = 0; k < k_count; ++k) {
      for (int64_t c = 0; c < c_count; ++c) to[c * kLanes + k] = from[k * k_stride + c * c_stride];
    }
  }
};

}  // namespace fused_resnet::cpu
