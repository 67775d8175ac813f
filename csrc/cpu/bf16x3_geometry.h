// Where the inputs of a convolution lie so that sixteen neighbouring rows of its GEMM are sixteen
// neighbouring pixels, for every tap of the filter: no input is copied once per tap, and narrow images fill
// whole tiles.
//
// With a stride, input pixels are first dealt out to phases: phase (a, b) holds the pixels whose row is a and
// whose column is b modulo the stride. Within a phase a tap is a shift. An image of a phase has P + overhang
// rows of `pitch` pixels; output pixel (n, p, q) has position (n * rows + p) * pitch + q, and its input for a
// tap lies `shift` positions further. Positions between the end of an output row and the next one are
// computed and thrown away.
//
// Zeros on both sides of a row are needed once: those at its end are those at the beginning of the next.
#pragma once

#include <algorithm>

#include "conv.h"

namespace fused_resnet::cpu {

struct Bf16x3Axis {
  int64_t size, stride, pad, taps, dilation, out;
  int64_t phases, overhang, pitch;  // pitch: from one row (image) of a phase to the next

  Bf16x3Axis(int64_t size_, int64_t stride_, int64_t pad_, int64_t taps_, int64_t dilation_, int64_t out_)
      : size(size_), stride(stride_), pad(pad_), taps(taps_), dilation(dilation_), out(out_) {
    phases = 0;
    for (int64_t tap = 0; tap < taps; ++tap) phases = std::max(phases, phase(tap) + 1);
    overhang = (taps - 1) * dilation / stride;
    // Of all phases the last has the fewest zeros in front, the first the fewest behind.
    const int64_t before = std::max<int64_t>(0, ceil_div(pad - (phases - 1), stride));
    const int64_t behind = std::max<int64_t>(0, out + overhang - ceil_div(size + pad, stride));
    pitch = out + overhang - std::min({before, behind, overhang});
  }
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  // The input row (column) at index i of a phase; outside [0, size) it is padding.
  int64_t input(int64_t i, int64_t of_phase) const { return i * stride + of_phase - pad; }
};

struct Bf16x3Geometry {
  // Positions of a row, at most: what a block reads beyond its own positions is some rows.
  static constexpr int64_t kLongestRow = 128;

  Bf16x3Axis h, w;
  int64_t n, images, row, strip;  // row, strip: positions from one to the next
  explicit Bf16x3Geometry(const ConvShape& s)
      : h(s.h, s.stride_h, s.pad_h, s.r, s.dilation_h, s.p),
        w(s.w, s.stride_w, s.pad_w, s.s, s.dilation_w, s.q),
        n(s.n) {
    set_images(1);
    const int64_t most = h.pitch > h.out ? std::min(n, kLongestRow / w.pitch) : 1;
    int64_t best = 1, least = positions();
    for (int64_t i = 2; i <= most; ++i) {
      set_images(i);
      if (positions() < least) best = i, least = positions();
    }
    set_images(best);
  }
  int64_t phases() const { return h.phases * w.phases; }
  int64_t positions() const {
    return ceil_div(n, images) * strip - (h.pitch - h.out) * row - (w.pitch - w.out);
  }
  int64_t shift(int64_t r, int64_t s) const { return h.shift(r) * row + w.shift(s); }
  int64_t largest_shift() const { return h.overhang * row + w.overhang; }

 private:
  void set_images(int64_t count) {
    images = count;
    row = images * w.pitch;
    strip = h.pitch * row;
  }
};

// A position, stepped from one to the next without divisions.
struct Position {
  const Bf16x3Geometry& geometry;
  int64_t first, n, i, j;  // first: image of the strip
  Position(const Bf16x3Geometry& g, int64_t at)
      : geometry(g),
        first(at / g.strip * g.images),
        n(first + at / g.w.pitch % g.images),
        i(at / g.row % g.h.pitch),
        j(at % g.w.pitch) {}
  void step() {
    if (++j < geometry.w.pitch) return;
    j = 0;
    if (++n < first + geometry.images) return;
    n = first;
    if (++i < geometry.h.pitch) return;
    i = 0;
    n = first += geometry.images;
  }
  bool is_output() const { return n < geometry.n && i < geometry.h.out && j < geometry.w.out; }
};

}  // namespace fused_resnet::cpu
