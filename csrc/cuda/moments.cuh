// Sums, and count/mean/M2 triples, of many threads merged in a fixed order: first the rows of a block's
// threads in shared memory, then the blocks' partial results by the last of them to arrive.
//
// Threads stand as `slots` rows of `lanes`, each thread with kCount neighbouring channels: thread t has lane
// t % lanes and slot t / lanes, so its numbers lie at t * kCount of a plane of shared memory.
#pragma once

#include "arrival.cuh"
#include "primitives.cuh"

namespace fused_resnet {

struct Slots {
  int lanes, slots;

  __device__ __forceinline__ Slots(int lanes, int threads) : lanes(lanes), slots(threads / lanes) {}
  __device__ __forceinline__ bool has(int thread) const { return thread < lanes * slots; }
};

// Count, mean and M2 (the sum of squared distances from the mean) of what one thread has seen.
template <int kCount>
struct Moments {
  float count, mean[kCount], m2[kCount];

  __device__ __forceinline__ void clear() {
    count = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) mean[i] = m2[i] = 0.0f;
  }
};

// Chan's formula, for adding n more values of `mean` and `m2` to `count` values: share = n / (count + n),
// cross = count * share.
__device__ __forceinline__ void merge_moments(float& mean, float& m2, float other_mean, float other_m2,
                                              float share, float cross) {
  const float delta = add_rn(other_mean, -mean);
  mean = fma_rn(delta, share, mean);
  m2 = add_rn(m2, fma_rn(mul_rn(delta, delta), cross, other_m2));
}

template <int kCount>
__device__ __forceinline__ void put(uint32_t plane, const Slots& slots, const float (&v)[kCount]) {
  if (!slots.has(threadIdx.x)) return;
  const uint32_t at = plane + threadIdx.x * kCount * 4;
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      shared_store_16(at + i * 4, {bits_of(v[i]), bits_of(v[i + 1]), bits_of(v[i + 2]), bits_of(v[i + 3])});
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared_store_f32(at + i * 4, v[i]);
  }
}

// Adds the slots of kPlanes planes; slot 0 of each then holds the sums, for every thread to read. The order
// of the additions depends on the number of slots alone.
template <int kThreads, int kPlanes>
__device__ __forceinline__ void add_slots(uint32_t plane, uint32_t plane_bytes, const Slots& slots,
                                          int count) {
  __syncthreads();
  const int width = slots.lanes * count;
#pragma unroll 1
  for (int left = slots.slots; left > 1;) {
    const int half = (left + 1) / 2;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll 1
      for (int i = threadIdx.x; i < (left - half) * width; i += kThreads) {
        const uint32_t at = plane + p * plane_bytes + i * 4;
        shared_store_f32(at, add_rn(shared_load_f32(at), shared_load_f32(at + half * width * 4)));
      }
    }
    __syncthreads();
    left = half;
  }
}

// Merges the moments of all threads, `total` values in each channel: slot 0 of the first plane then holds
// `total` times the means, slot 0 of the second one the M2. First the mean of all, then M2 around it: nothing
// cancels.
template <int kThreads, int kCount>
__device__ __forceinline__ void merge_slots(const Moments<kCount>& mine, float total, uint32_t plane,
                                            uint32_t plane_bytes, const Slots& slots) {
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = mul_rn(mine.mean[i], mine.count);
  put<kCount>(plane, slots, v);
  add_slots<kThreads, 1>(plane, plane_bytes, slots, kCount);
  if (slots.has(threadIdx.x)) {
    const uint32_t sums = plane + threadIdx.x % slots.lanes * kCount * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float distance = add_rn(mine.mean[i], -div_rn(shared_load_f32(sums + i * 4), total));
      v[i] = fma_rn(mul_rn(distance, distance), mine.count, mine.m2[i]);
    }
    put<kCount>(plane + plane_bytes, slots, v);
  }
  add_slots<kThreads, 1>(plane + plane_bytes, plane_bytes, slots, kCount);
}

// ---- partial results in the workspace: [column][part][plane][pitch] ----

// Publishes slot 0 of kPlanes planes, `width` numbers each (what follows them up to a multiple of 4 is stored
// too, and ignored).
template <int kPlanes>
__device__ __forceinline__ void publish(char* partial, int pitch, int width, uint32_t plane,
                                        uint32_t plane_bytes) {
  const int quads = (width + 3) / 4, p = threadIdx.x / quads, quad = threadIdx.x % quads;
  if (p < kPlanes) {
    global_store_16(partial + (p * pitch + quad * 4) * 4,
                    shared_load_16(plane + p * plane_bytes + quad * 16));
  }
}

// Threads that read partial results: quads of channels by groups of parts, so that a part is read 16 bytes a
// lane and many parts at a time.
struct Quads {
  Slots slots;
  int group, quad;

  __device__ __forceinline__ Quads(int width, int threads) : slots((width + 3) / 4, threads) {
    group = static_cast<int>(threadIdx.x) / slots.lanes;
    quad = static_cast<int>(threadIdx.x) - group * slots.lanes;
  }
  // Of the parts [begin, end) this thread reads every slots-th from here on.
  __device__ __forceinline__ int first(int begin, int end) const {
    return group < slots.slots ? begin + group : end;
  }
};

// Merges the parts [begin, end) of `width` channels: `parts` is what part 0 published, part_bytes apart from
// the next, count_of(part) the number of its values, `total` that of all of them. All threads; the result is
// as merge_slots leaves it.
template <int kThreads, class Count>
__device__ __forceinline__ void merge_parts(const char* parts, int64_t part_bytes, int pitch, int begin,
                                            int end, Count count_of, float total, int width, uint32_t plane,
                                            uint32_t plane_bytes) {
  const Quads quads(width, kThreads);
  Moments<4> sums;
  sums.clear();
#pragma unroll 1
  for (int i = quads.first(begin, end); i < end; i += quads.slots.slots) {
    const char* const from = parts + i * part_bytes + quads.quad * 16;
    const Words4 mean = workspace_load_16(from), m2 = workspace_load_16(from + pitch * 4);
    const float n = count_of(i);
    const float total_n = add_rn(sums.count, n), share = div_rn(n, total_n),
                cross = mul_rn(sums.count, share);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      merge_moments(sums.mean[e], sums.m2[e], div_rn(float_of(mean.w[e]), n), float_of(m2.w[e]), share,
                    cross);
    }
    sums.count = total_n;
  }
  merge_slots<kThreads>(sums, total, plane, plane_bytes, quads.slots);
}

}  // namespace fused_resnet
