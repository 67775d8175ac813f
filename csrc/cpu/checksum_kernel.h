// A checksum of memory at the speed of memory, for one instruction set: tells whether a weight is still, byte
// for byte, what a packed copy was made from.
//
// Eight lanes of 64 bits each take every eighth word. With key a number that differs from word to word,
//
//     lane[j]     = rotate(lane[j] + low32(word[j] ^ key) * high32(word[j] ^ key))
//     lane[j ^ 1] = lane[j ^ 1] + word[j]
//
// A step is a bijection of the lanes for any data, and two data that differ in one word leave different
// lanes, so a change of one word is always seen. The products and the rotation make it depend on the order as
// well: swapped filters, or changes that would cancel out in a sum, leave other lanes but for a chance of
// 2^-64. The value does not depend on the instruction set.
#pragma once

#include "checksum.h"
#include "vec.h"

namespace fused_resnet::cpu {

template <int kWords>
struct WordTypes {
  typedef uint64_t Words __attribute__((vector_size(kWords * sizeof(uint64_t))));
  typedef uint64_t Unaligned __attribute__((vector_size(kWords * sizeof(uint64_t)), aligned(1), may_alias));
};

template <int kLanes>  // of float32, as everywhere: half as many words
struct ChecksumImpl {
  static constexpr int kWords = kLanes / 2, kVectors = Digest::kLanes / kWords;
  using Words = typename WordTypes<kWords>::Words;
  using Unaligned = typename WordTypes<kWords>::Unaligned;

  static FR_INLINE Words product(Words word) {
#if defined(__x86_64__)
    // The compilers do not see that the other halves are zero, and would multiply 64 bits by 64.
    if constexpr (kLanes == 16) {
      return Words(_mm512_mul_epu32(__m512i(word), __m512i(word >> 32)));
    } else if constexpr (kLanes == 8) {
      return Words(_mm256_mul_epu32(__m256i(word), __m256i(word >> 32)));
    }
#endif
    return (word & 0xffffffffu) * (word >> 32);
  }

  static FR_INLINE Words swap_neighbours(Words word) {
#if defined(__clang__)
    if constexpr (kWords == 8) return __builtin_shufflevector(word, word, 1, 0, 3, 2, 5, 4, 7, 6);
    if constexpr (kWords == 4) return __builtin_shufflevector(word, word, 1, 0, 3, 2);
    if constexpr (kWords == 2) return __builtin_shufflevector(word, word, 1, 0);
#else
    Words neighbour;
    for (int j = 0; j < kWords; ++j) neighbour[j] = uint64_t(j ^ 1);  // a constant to the compiler
    return __builtin_shuffle(word, neighbour);
#endif
  }

  static FR_INLINE void step(Words (&lane)[kVectors], Words (&key)[kVectors], const unsigned char* data) {
    unroll<kVectors>([&](auto i) FR_LAMBDA {
      const Words word = *reinterpret_cast<const Unaligned*>(data + i * sizeof(Words));
      const Words sum = lane[i] + product(word ^ key[i]);
      lane[i] = ((sum << 27) | (sum >> 37)) + swap_neighbours(word);
      key[i] += Words{} + kStep;
    });
  }

  static void run(const unsigned char* data, int64_t bytes, Digest& digest) {
    constexpr int64_t kStripe = Digest::kLanes * sizeof(uint64_t);
    Words lane[kVectors], key[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      for (int j = 0; j < kWords; ++j) {
        const uint64_t number = uint64_t(i * kWords + j + 1);
        lane[i][j] = digest.lane[number - 1];
        key[i][j] = number * kSeed;
      }
    }
    int64_t at = 0;
    for (; at + kStripe <= bytes; at += kStripe) {
      __builtin_prefetch(data + at + 16 * kStripe);
      step(lane, key, data + at);
    }
    if (at < bytes) {
      unsigned char rest[kStripe] = {};
      std::memcpy(rest, data + at, static_cast<size_t>(bytes - at));
      step(lane, key, rest);
    }
    std::memcpy(digest.lane, lane, sizeof(lane));
  }

 private:
  // Odd, with bits all over: 2^64 divided by the golden ratio, and a prime used by many hashes.
  static constexpr uint64_t kSeed = 0x9e3779b97f4a7c15u, kStep = 0xc2b2ae3d27d4eb4fu;
};

}  // namespace fused_resnet::cpu
