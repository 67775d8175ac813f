// Winograd convolution F(m x m, 3 x 3): the matrices, derived from interpolation points by Cook-Toom.
//
//   Y = A^T [ (G g G^T) .* (B^T d B) ] A          d: (m+2) x (m+2) inputs, g: 3 x 3 filter, Y: m x m outputs
//
// Convolving with a 3-tap filter is multiplying polynomials; a product of degree m+1 is known from its
// values at m+2 points, one of them infinity. G and A evaluate at the points, B interpolates:
//
//   A^T[i][j] = p_j^i              G[j][k] = p_j^k / prod_{l != j} (p_j - p_l)
//   B^T[j][.] = coefficients of prod_{l != j} (x - p_l)      (the last row, infinity: of the whole product)
//
// The denominators sit in G, which is applied once, offline and in double precision.
#pragma once

#include <array>

namespace fused_resnet::cpu {

template <int kRows, int kCols>
using Matrix = std::array<std::array<double, kCols>, kRows>;

template <int kM>
struct Points;

// With 0, +-1, infinity every coefficient is 0 or +-1: F(2x2) is exact on integers, and on average more
// accurate than direct convolution, since it adds fewer terms.
template <>
struct Points<2> {
  static constexpr std::array<double, 3> kFinite = {0.0, 1.0, -1.0};
};

// The rounding error of F(4x4) depends on the points. These are a reciprocal pair, so powers grow slowly:
// about 2.2 times the rms error of direct convolution, against 4 to 5 times for the textbook's 0, +-1, +-2.
template <>
struct Points<4> {
  static constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwo = 1.41421356237309504880;
  static constexpr std::array<double, 5> kFinite = {0.0, kSqrtHalf, -kSqrtHalf, kSqrtTwo, -kSqrtTwo};
};

template <int kM_>
struct Winograd {
  static constexpr int kM = kM_;                    // outputs per tile and dimension
  static constexpr int kTile = kM + 2;              // inputs per tile and dimension
  static constexpr int kPositions = kTile * kTile;  // multiplications per tile, and GEMMs
  static constexpr int kFinite = kTile - 1;

  static constexpr double power(double base, int exponent) {
    double result = 1.0;
    for (int i = 0; i < exponent; ++i) result *= base;
    return result;
  }

  // Sums that cancel to zero leave 1e-16 behind where a point is irrational.
  static constexpr double snap(double value) { return value < 1e-12 && value > -1e-12 ? 0.0 : value; }

  static constexpr Matrix<kM, kTile> make_output() {
    Matrix<kM, kTile> at{};
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kFinite; ++j) at[i][j] = power(Points<kM>::kFinite[j], i);
    }
    at[kM - 1][kFinite] = 1.0;
    return at;
  }

  static constexpr Matrix<kTile, 3> make_filter() {
    Matrix<kTile, 3> g{};
    for (int j = 0; j < kFinite; ++j) {
      double denominator = 1.0;
      for (int l = 0; l < kFinite; ++l) {
        if (l != j) denominator *= Points<kM>::kFinite[j] - Points<kM>::kFinite[l];
      }
      for (int k = 0; k < 3; ++k) g[j][k] = power(Points<kM>::kFinite[j], k) / denominator;
    }
    g[kFinite][2] = 1.0;
    return g;
  }

  static constexpr Matrix<kTile, kTile> make_input() {
    Matrix<kTile, kTile> bt{};
    for (int j = 0; j < kTile; ++j) {
      bt[j][0] = 1.0;
      int degree = 0;
      for (int l = 0; l < kFinite; ++l) {
        if (l == j) continue;
        ++degree;  // row j times (x - p_l)
        for (int i = degree; i >= 0; --i) {
          bt[j][i] =
              snap((i > 0 ? bt[j][i - 1] : 0.0) - Points<kM>::kFinite[l] * (i < degree ? bt[j][i] : 0.0));
        }
      }
    }
    return bt;
  }

  static constexpr Matrix<kM, kTile> kOutput = make_output();   // A^T
  static constexpr Matrix<kTile, 3> kFilter = make_filter();    // G
  static constexpr Matrix<kTile, kTile> kInput = make_input();  // B^T
};

}  // namespace fused_resnet::cpu
