#include "counters.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace fused_resnet {
namespace {

constexpr int64_t kChunkBytes = 64 * 1024, kSmallestBytes = 256;

// Zeroed memory of one size, a power of two.
struct Piece {
  int32_t device;
  int64_t bytes;
  char* address;
};

struct Heap {
  std::mutex mutex;  // never held while CUDA is called, which may be about to call give_back
  std::map<std::pair<int32_t, int64_t>, std::vector<char*>> idle;     // by device and size
  std::map<std::pair<int32_t, unsigned long long>, Piece> of_stream;  // by device and the stream's own number
};
Heap& heap() {
  static auto& one = *new Heap;  // not freed at exit: CUDA may be gone by then, and graphs are still to go
  return one;
}

// Lets this thread allocate while it, or any other, captures: nothing here touches a stream that does.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaError_t allocate_zeroed(int64_t bytes, char** memory) {
  const RelaxedCapture relaxed;
  void* fresh = nullptr;
  cudaStream_t own = nullptr;
  if (const cudaError_t status = cudaMalloc(&fresh, bytes)) return status;
  cudaError_t status = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(fresh, 0, bytes, own);
    if (status == cudaSuccess) status = cudaStreamSynchronize(own);
    cudaStreamDestroy(own);
  }
  if (status == cudaSuccess) {
    *memory = static_cast<char*>(fresh);
  } else {
    cudaFree(fresh);
  }
  return status;
}

cudaError_t take(int64_t bytes, int32_t device, Piece& piece) {
  int64_t size = kSmallestBytes;
  while (size < bytes) size *= 2;
  piece = {device, size, nullptr};
  Heap& h = heap();
  {
    const std::lock_guard<std::mutex> lock(h.mutex);
    std::vector<char*>& idle = h.idle[{device, size}];
    if (!idle.empty()) {
      piece.address = idle.back();
      idle.pop_back();
      return cudaSuccess;
    }
  }
  const int64_t chunk = std::max(size, kChunkBytes);
  if (const cudaError_t status = allocate_zeroed(chunk, &piece.address)) return status;
  const std::lock_guard<std::mutex> lock(h.mutex);
  for (int64_t at = size; at < chunk; at += size) h.idle[{device, size}].push_back(piece.address + at);
  return cudaSuccess;
}

// Called by CUDA, from a thread of its own, when the last graph that holds the piece is gone and has run to
// its end.
void CUDART_CB give_back(void* pointer) {
  const auto* const piece = static_cast<const Piece*>(pointer);
  Heap& h = heap();
  {
    const std::lock_guard<std::mutex> lock(h.mutex);
    h.idle[{piece->device, piece->bytes}].push_back(piece->address);
  }
  delete piece;
}

cudaError_t take_for_graph(int64_t bytes, int32_t device, cudaGraph_t graph, void** counters) {
  auto* const piece = new Piece;
  if (const cudaError_t status = take(bytes, device, *piece)) {
    delete piece;
    return status;
  }
  *counters = piece->address;
  cudaUserObject_t owner = nullptr;
  cudaError_t status = cudaUserObjectCreate(&owner, piece, give_back, 1, cudaUserObjectNoDestructorSync);
  if (status != cudaSuccess) {
    give_back(piece);
    return status;
  }
  status = cudaGraphRetainUserObject(graph, owner, 1, cudaGraphUserObjectMove);
  if (status != cudaSuccess) cudaUserObjectRelease(owner, 1);
  return status;
}

cudaError_t take_for_stream(int64_t bytes, int32_t device, cudaStream_t stream, void** counters) {
  unsigned long long number =
      0;  // handles are given out again, and one of them stands for a stream per thread
  if (const cudaError_t status = cudaStreamGetId(stream, &number)) return status;
  Heap& h = heap();
  {
    const std::lock_guard<std::mutex> lock(h.mutex);
    const auto found = h.of_stream.find({device, number});
    if (found != h.of_stream.end() && found->second.bytes >= bytes) {
      *counters = found->second.address;
      return cudaSuccess;
    }
  }
  Piece piece;
  if (const cudaError_t status = take(bytes, device, piece)) return status;
  // A smaller one that it takes the place of stays out of use: launches that count in it may be under way.
  const std::lock_guard<std::mutex> lock(h.mutex);
  h.of_stream[{device, number}] = piece;
  *counters = piece.address;
  return cudaSuccess;
}

cudaError_t capture_of(cudaStream_t stream, cudaStreamCaptureStatus* status, cudaGraph_t* graph) {
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, nullptr, graph);
#else
  return cudaStreamGetCaptureInfo_v2(stream, status, nullptr, graph);
#endif
}

}  // namespace

void* counters_for(int64_t bytes, int32_t device, void* handle, char* error, int error_bytes) {
  const auto stream = static_cast<cudaStream_t>(handle);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  void* counters = nullptr;
  cudaError_t status = capture_of(stream, &capture, &graph);
  if (status == cudaSuccess && capture == cudaStreamCaptureStatusInvalidated) {
    status = cudaErrorStreamCaptureInvalidated;
  }
  if (status == cudaSuccess) {
    status = capture == cudaStreamCaptureStatusActive ? take_for_graph(bytes, device, graph, &counters)
                                                      : take_for_stream(bytes, device, stream, &counters);
  }
  if (status == cudaSuccess) return counters;
  cudaGetLastError();  // reported here, and by nothing that asks later
  std::snprintf(error, error_bytes, "cuda: arrival counters: %s", cudaGetErrorString(status));
  return nullptr;
}

}  // namespace fused_resnet
