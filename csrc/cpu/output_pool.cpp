#include "output_pool.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <list>
#include <mutex>

#include "memory.h"

// Of torch 2.11 and newer; declared here, and weakly, because this file is compiled for 2.10. Null there.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fused_resnet::cpu {
namespace {

// In bytes. What is smaller costs the allocator little.
constexpr int64_t kLeast = int64_t{64} << 10;
// Bytes that may lie free in the pool: three outputs of a ResNet-50 at batch 8.
constexpr int64_t kKept = int64_t{128} << 20;
// A buffer serves if it is at most this many times as large as what was asked for.
constexpr int64_t kLoosest = 4;

struct Buffer {
  void* memory;
  int64_t bytes;
};

class Pool {
 public:
  // The closest fit; among equals the one given back last, which the caches may still hold.
  Buffer* take(int64_t bytes) {
    bytes = Extent(bytes).bytes;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        if ((*it)->bytes < bytes || (*it)->bytes > kLoosest * bytes) continue;
        if (best == free_.end() || (*it)->bytes < (*best)->bytes) best = it;
      }
      if (best != free_.end()) {
        Buffer* const found = *best;
        free_.erase(best);
        free_bytes_ -= found->bytes;
        return found;
      }
    }
    return new Buffer{allocate(bytes), bytes};
  }

  void give_back(Buffer* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_front(buffer);
    free_bytes_ += buffer->bytes;
    while (free_bytes_ > kKept) {
      Buffer* const oldest = free_.back();
      free_.pop_back();
      free_bytes_ -= oldest->bytes;
      std::free(oldest->memory);
      delete oldest;
    }
  }

 private:
  std::mutex mutex_;
  std::list<Buffer*> free_;  // given back last first
  int64_t free_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

}  // namespace

Tensor empty_output(int64_t n, int64_t k, int64_t p, int64_t q) {
  const int64_t bytes = n * k * p * q * int64_t(sizeof(float));
  if (torch_from_blob == nullptr || bytes < kLeast) {
    Tensor y =
        torch::stable::empty({n, k, p, q}, torch::headeronly::ScalarType::Float, std::nullopt, std::nullopt,
                             std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
    advise_huge_pages(y.mutable_data_ptr(), bytes);
    return y;
  }
  const int64_t sizes[4] = {n, k, p, q}, strides[4] = {p * q * k, 1, q * k, k};
  Buffer* const buffer = pool().take(bytes);
  AtenTensorHandle result;
  const AOTITorchError error = torch_from_blob(
      buffer->memory, 4, sizes, strides, 0, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), -1,
      &result, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { pool().give_back(static_cast<Buffer*>(context)); }, buffer);
  if (error != AOTI_TORCH_SUCCESS) {
    pool().give_back(buffer);
    TORCH_ERROR_CODE_CHECK(error);
  }
  return Tensor(result);
}

}  // namespace fused_resnet::cpu
