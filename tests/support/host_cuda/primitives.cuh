// The host twin of csrc/cuda/primitives.cuh: the same functions, executed by the fibers of runtime.h.
//
// Every memory access and tensor instruction is one operation of the warp, so that it is checked (bounds,
// alignment, permissions) and counted (sectors, bank conflicts) as the request a GPU would make of it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_cuda/runtime.h"

namespace fused_resnet {

constexpr bool kAmpere = !FUSED_RESNET_HOST_TURING;

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

inline uint32_t bits_of(float v) {
  return __builtin_bit_cast(uint32_t, v);
}
inline float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

// Not zero, as it need not be on a GPU (static shared memory comes first).
constexpr uint32_t kSharedBase = 1024;
inline uint32_t shared_base() {
  return kSharedBase;
}

// Keeps nvcc from computing a value anew: nothing to do here.
template <class T>
inline void keep(T&) {}

inline void enter_epilogue() {
  host_cuda::set_phase(1);
}

namespace host {

using host_cuda::Access;
using host_cuda::Warp;

template <class Operands>
Operands& operands(Warp& warp, int lane) {
  return *static_cast<Operands*>(host_cuda::warp_operands(warp, lane));
}

template <class Body>
void each_lane(uint32_t mask, Body body) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) body(__builtin_ctz(rest));
}

// ---- plain loads and stores
template <class T>
struct Move {
  uintptr_t address;  // global: the pointer; shared: the offset in the block's memory
  T value;
};

template <class T, bool kStore>
void shared_execute(Warp& warp, uint32_t mask) {
  Access lanes[32];
  each_lane(mask, [&](int lane) {
    auto& move = operands<Move<T>>(warp, lane);
    lanes[lane] = {move.address, sizeof(T)};
    unsigned char* place = host_cuda::shared_base() + move.address;
    if (kStore) {
      memcpy(place, &move.value, sizeof(T));
    } else {
      memcpy(&move.value, place, sizeof(T));
    }
  });
  host_cuda::count_shared(lanes, mask, sizeof(T));
}
template <class T, bool kStore>
void global_execute(Warp& warp, uint32_t mask) {
  Access lanes[32];
  each_lane(mask, [&](int lane) {
    auto& move = operands<Move<T>>(warp, lane);
    lanes[lane] = {move.address, sizeof(T)};
    if (kStore) {
      memcpy(reinterpret_cast<void*>(move.address), &move.value, sizeof(T));
    } else {
      memcpy(&move.value, reinterpret_cast<const void*>(move.address), sizeof(T));
    }
  });
  host_cuda::count_global(lanes, mask, kStore);
}

inline uint32_t offset_of(uint32_t address, uint32_t bytes) {
  return host_cuda::shared_offset(host_cuda::shared_base() + (address - kSharedBase), bytes);
}

template <class T>
T shared_load(uint32_t address) {
  static constexpr host_cuda::WarpOp op{"ld.shared", false, shared_execute<T, false>};
  Move<T> move{offset_of(address, sizeof(T)), {}};
  host_cuda::perform(op, &move);
  return move.value;
}
template <class T>
void shared_store(uint32_t address, const T& value) {
  static constexpr host_cuda::WarpOp op{"st.shared", false, shared_execute<T, true>};
  Move<T> move{offset_of(address, sizeof(T)), value};
  host_cuda::perform(op, &move);
}
template <class T>
T global_load(const void* p) {
  static constexpr host_cuda::WarpOp op{"ld.global", false, global_execute<T, false>};
  host_cuda::check_global(p, sizeof(T), false);
  Move<T> move{reinterpret_cast<uintptr_t>(p), {}};
  host_cuda::perform(op, &move);
  return move.value;
}
template <class T>
void global_store(void* p, const T& value) {
  static constexpr host_cuda::WarpOp op{"st.global", false, global_execute<T, true>};
  host_cuda::check_global(p, sizeof(T), true);
  Move<T> move{reinterpret_cast<uintptr_t>(p), value};
  host_cuda::perform(op, &move);
}

// ---- cp.async
struct Copy {
  uint32_t destination;
  const void* source;
  bool valid;
};
template <int kBytes>
void copy_execute(Warp& warp, uint32_t mask) {
  Access from[32], to[32];
  each_lane(mask, [&](int lane) {
    const auto& copy = operands<Copy>(warp, lane);
    from[lane] = {reinterpret_cast<uintptr_t>(copy.source), copy.valid ? uint32_t{kBytes} : 0u};
    to[lane] = {copy.destination, kBytes};
  });
  host_cuda::count_global(from, mask, false);
  host_cuda::count_shared(to, mask, kBytes);
}

// ---- shuffles
struct Shuffle {
  uint32_t value, result;
};
template <int kMask>
void shuffle_execute(Warp& warp, uint32_t) {
  for (int lane = 0; lane < 32; lane++) {
    operands<Shuffle>(warp, lane).result = operands<Shuffle>(warp, lane ^ kMask).value;
  }
}

// ---- matrices
struct Ldmatrix {
  uint32_t offset;
  uint32_t* r;
};
inline void ldmatrix_execute(Warp& warp, uint32_t) {
  for (int matrix = 0; matrix < 4; matrix++) {
    Access rows[32];
    uint32_t bits[32];
    for (int row = 0; row < 8; row++) {
      const uint32_t offset = operands<Ldmatrix>(warp, 8 * matrix + row).offset;
      rows[row] = {offset, 16};
      memcpy(&bits[4 * row], host_cuda::shared_base() + offset, 16);
    }
    for (int lane = 0; lane < 32; lane++) operands<Ldmatrix>(warp, lane).r[matrix] = bits[lane];
    host_cuda::count_shared(rows, 0xff, 16);
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// Eight words along the depth as floats.
struct Half {
  static constexpr int kPerWord = 2;
  static void unpack(const uint32_t (&words)[8], float* out) {
    _Float16 values[16];
    memcpy(values, words, sizeof values);
    for (int i = 0; i < 16; i++) out[i] = static_cast<float>(values[i]);
  }
};
struct Bfloat {
  static constexpr int kPerWord = 2;
  static void unpack(const uint32_t (&words)[8], float* out) {
    for (int i = 0; i < 16; i++) out[i] = float_of(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
};
struct TensorFloat {  // the tensor core ignores the 13 low bits
  static constexpr int kPerWord = 1;
  static void unpack(const uint32_t (&words)[8], float* out) {
    for (int i = 0; i < 8; i++) out[i] = float_of(words[i] & 0xffffe000u);
  }
};

// m16n8k16 for 16-bit elements, m16n8k8 for tf32: with g = lane / 4, t = lane % 4, e elements in a word,
// word i of A holds row g + 8 * (i % 2), columns e * (t + 4 * (i / 2)) and up; word i of B the rows e * (t +
// 4 * i) and up of column g; D rows g and g + 8, columns 2t and 2t + 1. Products are exact in fp32.
template <class Format>
void mma_execute(Warp& warp, uint32_t) {
  constexpr int e = Format::kPerWord, depth = 8 * e;
  using Columns = float __attribute__((vector_size(32)));
  uint32_t a_words[16][8], b_words[8][8];  // [row of A or column of B][word along the depth]
  Columns d[16], b[depth];
  for (int lane = 0; lane < 32; lane++) {
    const auto& mma = operands<Mma>(warp, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      a_words[g + 8 * (i % 2)][t + 4 * (i / 2)] = mma.a[i];
      d[g + 8 * (i / 2)][2 * t + i % 2] = mma.d[i];
    }
    for (int i = 0; i < 2; i++) b_words[g][t + 4 * i] = mma.b[i];
  }
  for (int column = 0; column < 8; column++) {
    float row[depth];
    Format::unpack(b_words[column], row);
    for (int k = 0; k < depth; k++) b[k][column] = row[k];
  }
  for (int row = 0; row < 16; row++) {
    float a[depth];
    Format::unpack(a_words[row], a);
    for (int k = 0; k < depth; k++) d[row] += a[k] * b[k];
  }
  for (int lane = 0; lane < 32; lane++) {
    float* out = operands<Mma>(warp, lane).d;
    for (int i = 0; i < 4; i++) out[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
  host_cuda::statistics().mma++;
}
template <class Format>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static constexpr host_cuda::WarpOp op{"mma.sync", true, mma_execute<Format>};
  Mma operands{d, a, {b0, b1}};
  host_cuda::perform(op, &operands);
}

}  // namespace host

// ---- shared memory
inline float shared_load_f32(uint32_t address) {
  return host::shared_load<float>(address);
}
inline uint32_t shared_load_u32(uint32_t address) {
  return host::shared_load<uint32_t>(address);
}
inline Words4 shared_load_16(uint32_t address) {
  return host::shared_load<Words4>(address);
}
inline void shared_store_u16(uint32_t address, uint16_t v) {
  host::shared_store(address, v);
}
inline void shared_store_u32(uint32_t address, uint32_t v) {
  host::shared_store(address, v);
}
inline void shared_store_f32(uint32_t address, float v) {
  host::shared_store(address, v);
}
inline void shared_store_f32x2(uint32_t address, float v0, float v1) {
  host::shared_store(address, std::array<float, 2>{v0, v1});
}
inline void shared_store_8(uint32_t address, const Words2& v) {
  host::shared_store(address, v);
}
inline void shared_store_16(uint32_t address, const Words4& v) {
  host::shared_store(address, v);
}

template <int kBytes>
void cp_async(uint32_t destination, const void* source, bool valid) {
  static constexpr host_cuda::WarpOp op{"cp.async", false, host::copy_execute<kBytes>};
  host::Copy copy{host::offset_of(destination, kBytes), source, valid};
  if (valid) host_cuda::check_global(source, kBytes, false);
  host_cuda::perform(op, &copy);
  host_cuda::copy_async(copy.destination, source, kBytes, valid ? kBytes : 0);
}
inline void cp_async_commit() {
  host_cuda::commit_copies();
}
template <int kPending>
void cp_async_wait() {
  host_cuda::wait_copies(kPending);
}

template <int kMask>
uint32_t shuffle_xor(uint32_t v) {
  static constexpr host_cuda::WarpOp op{"shfl.sync", true, host::shuffle_execute<kMask>};
  host::Shuffle operands{v, 0};
  host_cuda::perform(op, &operands);
  return operands.result;
}

// ---- tensor cores
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  static constexpr host_cuda::WarpOp op{"ldmatrix", true, host::ldmatrix_execute};
  host::Ldmatrix operands{host::offset_of(address, 16), r};
  host_cuda::perform(op, &operands);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::mma<host::Half>(d, a, b0, b1);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::mma<host::Bfloat>(d, a, b0, b1);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::mma<host::TensorFloat>(d, a, b0, b1);
}
inline uint32_t round_to_tf32(uint32_t v) {
  const bool finite = (v & 0x7f800000u) != 0x7f800000u;
  return (finite ? v + 0x1000u : v) & 0xffffe000u;
}

// ---- arithmetic
inline float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float add_rn(float a, float b) {
  return a + b;
}
inline float mul_rn(float a, float b) {
  return a * b;
}
inline float div_rn(float a, float b) {
  return a / b;
}
inline float sqrt_rn(float a) {
  return std::sqrt(a);
}

// ---- 16-bit floating point
inline float f16_to_f32(uint16_t v) {
  return static_cast<float>(__builtin_bit_cast(_Float16, v));
}
inline float bf16_to_f32(uint16_t v) {
  return float_of(static_cast<uint32_t>(v) << 16);
}
inline uint32_t pack_f16x2(float low, float high) {
  const auto half = [](float v) {
    return static_cast<uint32_t>(__builtin_bit_cast(uint16_t, static_cast<_Float16>(v)));
  };
  return half(low) | half(high) << 16;
}
inline uint32_t pack_bf16x2(float low, float high) {
  const auto bfloat = [](float v) {
    const uint32_t bits = bits_of(v);
    if (v != v) return uint32_t{0x7fff};
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return bfloat(low) | bfloat(high) << 16;
}

// ---- global memory
inline uint16_t global_load_u16(const void* p) {
  return host::global_load<uint16_t>(p);
}
inline uint32_t global_load_u32(const void* p) {
  return host::global_load<uint32_t>(p);
}
inline Words2 global_load_8(const void* p) {
  return host::global_load<Words2>(p);
}
inline Words4 global_load_16(const void* p) {
  return host::global_load<Words4>(p);
}
inline void global_store_u16(void* p, uint16_t v) {
  host::global_store(p, v);
}
inline void global_store_u32(void* p, uint32_t v) {
  host::global_store(p, v);
}
inline void global_store_8(void* p, const Words2& v) {
  host::global_store(p, v);
}
inline void global_store_16(void* p, const Words4& v) {
  host::global_store(p, v);
}

// ---- between blocks. Blocks run one after another here, in random order; orderings that only interleaved
// blocks can break are ptxi's part of the proof.
inline Words4 workspace_load_16(const void* p) {
  return host::global_load<Words4>(p);
}
inline uint32_t arrive(uint32_t* counter, uint32_t blocks) {
  host_cuda::check_global(counter, 4, true);
  const uint32_t before = *counter;
  *counter = before >= blocks - 1 ? 0 : before + 1;
  return before;
}

}  // namespace fused_resnet
