// y = B^T d and y = A^T m on vectors of channels, in registers, with no multiplication by 0 or 1 (a zero
// coefficient must not touch the data at all: 0 * NaN is NaN, and F(2x2) promises NaN exactly as eager has
// it).
//
// Points come in pairs +-p, and polynomials fall into even and odd powers, so both values of a pair cost
// little more than one: even(p) + odd(p) and even(p) - odd(p).
#pragma once

#include "vec.h"
#include "winograd_matrices.h"

namespace fused_resnet::cpu {

// sum += coefficient * v, where `first` says that the sum is still empty.
template <class V>
FR_INLINE void accumulate(V& sum, bool& first, float coefficient, V v) {
  if (coefficient == 0.0f) return;
  const V term = coefficient == 1.0f ? v : coefficient * v;
  sum = first ? term : coefficient == 1.0f ? sum + v : coefficient == -1.0f ? sum - v : sum + coefficient * v;
  first = false;
}

// out[j] = (B^T in)[j]; `in` and `out` are read and written through functions of the index.
template <class W, class V, class Load, class Store>
FR_INLINE void input_transform(Load&& in, Store&& out) {
  V d[W::kTile];
  unroll<W::kTile>([&](auto i) FR_LAMBDA { d[i] = in(i); });
  unroll<W::kTile>([&](auto row) FR_LAMBDA {
    constexpr int kRow = decltype(row)::value;
    constexpr bool kAlone = kRow == 0 || kRow == W::kTile - 1;  // the points 0 and infinity
    constexpr auto& kCoefficients = W::kInput[kRow];
    if constexpr (kAlone) {
      V sum = {};
      bool first = true;
      unroll<W::kTile>([&](auto i) FR_LAMBDA { accumulate(sum, first, float(kCoefficients[i]), d[i]); });
      out(row, sum);
    } else if constexpr (kRow % 2 == 1) {
      // Rows kRow (+p) and kRow + 1 (-p) agree in the even powers and differ in the sign of the odd ones,
      // whose common factor p is taken out: even +- p * odd.
      constexpr double kFactor = kCoefficients[W::kTile - 3];
      V even = {}, odd = {};
      bool no_even = true, no_odd = true;
      unroll<W::kTile>([&](auto i) FR_LAMBDA {
        if constexpr (decltype(i)::value % 2 == 0) {
          accumulate(even, no_even, float(kCoefficients[i]), d[i]);
        } else {
          accumulate(odd, no_odd, float(kCoefficients[i] / kFactor), d[i]);
        }
      });
      constexpr float kP = float(kFactor);
      out(row, kP == 1.0f ? even + odd : even + kP * odd);
      out(std::integral_constant<int, kRow + 1>{}, kP == 1.0f ? even - odd : even - kP * odd);
    }
  });
}

// out[i] = (A^T in)[i].
template <class W, class V, class Load, class Store>
FR_INLINE void output_transform(Load&& in, Store&& out) {
  constexpr int kPairs = (W::kTile - 2) / 2;
  V sums[kPairs], differences[kPairs];
  unroll<kPairs>([&](auto pair) FR_LAMBDA {
    const V plus = in(std::integral_constant<int, 2 * decltype(pair)::value + 1>{});
    const V minus = in(std::integral_constant<int, 2 * decltype(pair)::value + 2>{});
    sums[pair] = plus + minus;
    differences[pair] = plus - minus;
  });
  unroll<W::kM>([&](auto row) FR_LAMBDA {
    constexpr int kRow = decltype(row)::value;
    V sum = {};
    bool first = true;
    if constexpr (kRow == 0) accumulate(sum, first, 1.0f, V(in(std::integral_constant<int, 0>{})));
    if constexpr (kRow == W::kM - 1) {
      accumulate(sum, first, 1.0f, V(in(std::integral_constant<int, W::kTile - 1>{})));
    }
    unroll<kPairs>([&](auto pair) FR_LAMBDA {
      const float coefficient = float(W::kOutput[kRow][2 * decltype(pair)::value + 1]);
      accumulate(sum, first, coefficient, kRow % 2 == 0 ? sums[pair] : differences[pair]);
    });
    out(row, sum);
  });
}

// out[j] = (G in)[j], for weights that are transformed when they are needed.
template <class W, class V, class Load, class Store>
FR_INLINE void filter_transform(Load&& in, Store&& out) {
  const V g[3] = {in(std::integral_constant<int, 0>{}), in(std::integral_constant<int, 1>{}),
                  in(std::integral_constant<int, 2>{})};
  constexpr float kFirst = float(W::kFilter[0][0]);
  out(std::integral_constant<int, 0>{}, kFirst == 1.0f ? g[0] : kFirst * g[0]);
  unroll<(W::kTile - 2) / 2>([&](auto pair) FR_LAMBDA {
    // Rows kRow (+p) and kRow + 1 (-p) differ in the sign of g[1].
    constexpr int kRow = 2 * decltype(pair)::value + 1;
    constexpr auto& kCoefficients = W::kFilter[kRow];
    const V even = float(kCoefficients[0]) * g[0] + float(kCoefficients[2]) * g[2];
    out(std::integral_constant<int, kRow>{}, even + float(kCoefficients[1]) * g[1]);
    out(std::integral_constant<int, kRow + 1>{}, even - float(kCoefficients[1]) * g[1]);
  });
  out(std::integral_constant<int, W::kTile - 1>{}, g[2]);
}

}  // namespace fused_resnet::cpu
