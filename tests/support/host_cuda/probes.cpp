// Small kernels that do one thing a GPU would not forgive, or that show one property of the twin; two warps
// and 256 bytes of shared memory each. tests/cuda/test_host_cuda.py says what must come of them.
#include "cuda/primitives.cuh"

struct Probe {
  const float* x;  // 64 numbers, read only
  float* y;        // 64 numbers
  int which;
};

static void probe(const Probe& p) {
  using namespace fused_resnet;
  const uint32_t mine = shared_base() + threadIdx.x * 4, sixteen = shared_base() + threadIdx.x % 16 * 16;
  float* const out = p.y + threadIdx.x;
  uint32_t r[4];
  switch (p.which) {
    case 0:  // past the end of a tensor
      host::global_load<float>(p.x + 64);
      return;
    case 1:
      host::global_load<uint32_t>(reinterpret_cast<const char*>(p.x) + 2);
      return;
    case 2:
      host::global_store<float>(const_cast<float*>(p.x), 1.0f);
      return;
    case 3:  // past the end of the block's shared memory
      shared_load_f32(shared_base() + 256);
      return;
    case 4:
      shared_load_f32(shared_base() + 2);
      return;
    case 5:  // two barriers where a GPU has one
      if (threadIdx.x % 2) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      return;
    case 6:
      if (threadIdx.x != 5) ldmatrix_x4(r, shared_base());
      return;
    case 7:  // nobody waits for the copy
      cp_async<16>(sixteen, p.x, true);
      return;
    case 8:  // shared memory that nobody wrote
      host::global_store(out, shared_load_f32(mine));
      return;
    case 9:  // read while the copy may still be under way
      shared_store_f32(mine, 1.0f);
      cp_async<4>(mine, p.x + threadIdx.x, true);
      cp_async_commit();
      cp_async_wait<1>();
      host::global_store(out, shared_load_f32(mine));
      cp_async_wait<0>();
      return;
    case 10:
      cp_async<4>(mine, p.x + threadIdx.x, true);
      cp_async_commit();
      cp_async_wait<0>();
      host::global_store(out, shared_load_f32(mine));
      return;
    case 11:  // zero fill does not read its source
      cp_async<4>(mine, nullptr, false);
      cp_async_commit();
      cp_async_wait<0>();
      host::global_store(out, shared_load_f32(mine));
      return;
    case 12:  // the other warp's data without a barrier: NaN in some order of the warps
      shared_store_f32(mine, 1.0f);
      host::global_store(out, shared_load_f32(shared_base() + (threadIdx.x ^ 32) * 4));
      return;
    case 13:  // one column of a matrix of 8 rows of 32 bytes: every second row meets the bank of another
      if (threadIdx.x < 32) ldmatrix_x4(r, shared_base() + threadIdx.x % 8 * 32);
      return;
    case 14:  // every second float: twice the sectors
      if (threadIdx.x < 32) host::global_store(out, host::global_load<float>(p.x + threadIdx.x * 2));
      return;
    case 15: {  // past the end of an array of the thread's own: for AddressSanitizer
      volatile float own[4] = {};
      volatile unsigned at = 4 + threadIdx.x % 4;
      own[at] = 1.0f;
      host::global_store(out, own[0] + own[at]);
      return;
    }
  }
}

extern "C" __attribute__((visibility("default"))) void host_entry(const void* parameters) {
  probe(*static_cast<const Probe*>(parameters));
}
