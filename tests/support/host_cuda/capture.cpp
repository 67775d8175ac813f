// The part of the CUDA runtime that graphs are captured with, and its rules, for tests without a GPU:
// streams, captures, the user objects of graphs. With ABOVE_STAND_IN the rest comes from the PTX
// interpreter's stand-in, whose functions are wrapped (-Wl,--wrap=...); without, memory is the host's and
// nothing can be launched.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#undef cudaStreamGetCaptureInfo

#ifdef ABOVE_STAND_IN
  #define WRAPPED(name) __wrap_##name
  #define REAL(name) __real_##name
extern "C" {
cudaError_t __real_cudaMalloc(void**, size_t);
cudaError_t __real_cudaMemsetAsync(void*, int, size_t, cudaStream_t);
cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
}
#else
  #define WRAPPED(name) name
  #define REAL(name) real_##name
namespace {
cudaError_t real_cudaMalloc(void** p, size_t n) {
  *p = std::malloc(n);
  std::memset(*p, 0xff, n);
  return cudaSuccess;
}
cudaError_t real_cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) {
  std::memset(p, value, n);
  return cudaSuccess;
}
}  // namespace
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Object {
  void* pointer;
  cudaHostFn_t destroy;
};
struct Graph {
  std::vector<Object*> owned;
  bool invalidated = false;
};
struct Capture {
  Graph* graph;
  bool blocking;  // the stream was not made with cudaStreamNonBlocking
};

std::mutex mutex;
std::map<cudaStream_t, Capture> captures;
std::map<cudaStream_t, unsigned long long> numbers;
std::set<void*> under_way;  // memory whose memset no stream has been waited for
std::map<const void*, std::set<int>> attributes;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
long next_handle = 0x1000, mallocs = 0, captured_memsets = 0, failures_to_come = 0;
unsigned long long next_number = 1;
cudaError_t last = cudaSuccess;

cudaError_t failed(cudaError_t error) {
  last = error;
  return error;
}
void invalidate() {
  for (auto& [stream, capture] : captures) capture.graph->invalidated = true;
}
// As a call that CUDA names potentially unsafe.
bool forbidden() {
  if (captures.empty() || mode == cudaStreamCaptureModeRelaxed) return false;
  invalidate();
  return true;
}

}  // namespace

// ---- what the tests steer

API void test_begin_capture(cudaStream_t stream, int blocking) {
  const std::lock_guard<std::mutex> lock(mutex);
  captures[stream] = {new Graph, blocking != 0};
}
// The graph, or null where the capture was spoiled.
API void* test_end_capture(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  Graph* const graph = captures.at(stream).graph;
  captures.erase(stream);
  return graph->invalidated ? nullptr : graph;
}
// On a thread of its own, as CUDA does it.
API void test_destroy_graph(void* pointer) {
  auto* const graph = static_cast<Graph*>(pointer);
  std::thread([graph] {
    for (Object* object : graph->owned) {
      object->destroy(object->pointer);
      delete object;
    }
    delete graph;
  }).join();
}
// The handle now stands for another stream.
API void test_recreate_stream(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  numbers.erase(stream);
}
API void test_fail(int count) {
  failures_to_come = count;
}
API long test_mallocs() {
  return mallocs;
}
API long test_captured_memsets() {
  return captured_memsets;
}
API long test_unfinished_memsets() {
  return static_cast<long>(under_way.size());
}
// The most values that any one kernel's shared memory was set to.
API long test_attribute_values() {
  size_t most = 0;
  for (const auto& [function, values] : attributes) most = values.size() > most ? values.size() : most;
  return static_cast<long>(most);
}

// ---- the runtime

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                         unsigned long long*, cudaGraph_t* graph, const cudaGraphNode_t**,
                                         const cudaGraphEdgeData**, size_t*) {
  const std::lock_guard<std::mutex> lock(mutex);
  *status = cudaStreamCaptureStatusNone;
  const auto found = captures.find(stream);
  if (found != captures.end()) {
    const bool invalid = found->second.graph->invalidated;
    *status = invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    if (!invalid) *graph = reinterpret_cast<cudaGraph_t>(found->second.graph);
    return cudaSuccess;
  }
  for (const auto& [other, capture] : captures) {
    if (stream == nullptr && capture.blocking) return failed(cudaErrorStreamCaptureImplicit);
  }
  return cudaSuccess;
}
API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* number) {
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned long long& own = numbers[stream];
  if (own == 0) own = next_number++;
  *number = own;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* exchanged) {
  std::swap(mode, *exchanged);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                     unsigned count, unsigned flags) {
  if (count != 1 || flags != cudaUserObjectNoDestructorSync) return failed(cudaErrorInvalidValue);
  *object = reinterpret_cast<cudaUserObject_t>(new Object{pointer, destroy});
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t handle, unsigned) {
  auto* const object = reinterpret_cast<Object*>(handle);
  object->destroy(object->pointer);
  delete object;
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                          unsigned flags) {
  if (count != 1 || flags != cudaGraphUserObjectMove) return failed(cudaErrorInvalidValue);
  if (failures_to_come > 0 && failures_to_come--) return failed(cudaErrorMemoryAllocation);
  reinterpret_cast<Graph*>(graph)->owned.push_back(reinterpret_cast<Object*>(object));
  return cudaSuccess;
}
API cudaError_t WRAPPED(cudaMalloc)(void** p, size_t n) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (forbidden()) return failed(cudaErrorStreamCaptureUnsupported);
  if (failures_to_come > 0 && failures_to_come--) return failed(cudaErrorMemoryAllocation);
  ++mallocs;
  return REAL(cudaMalloc)(p, n);
}
API cudaError_t WRAPPED(cudaMemsetAsync)(void* p, int value, size_t n, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  captured_memsets += captures.count(stream);
  under_way.insert(p);
  return REAL(cudaMemsetAsync)(p, value, n, stream);
}
API cudaError_t WRAPPED(cudaStreamCreateWithFlags)(cudaStream_t* stream, unsigned flags) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (flags != cudaStreamNonBlocking) return failed(cudaErrorInvalidValue);
  *stream = reinterpret_cast<cudaStream_t>(next_handle++);
  return cudaSuccess;
}
API cudaError_t WRAPPED(cudaStreamSynchronize)(cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (captures.count(stream)) return invalidate(), failed(cudaErrorStreamCaptureUnsupported);
  under_way.clear();
  return cudaSuccess;
}
#ifdef ABOVE_STAND_IN
API cudaError_t WRAPPED(cudaFuncSetAttribute)(const void* function, cudaFuncAttribute attribute, int value) {
  attributes[function].insert(value);
  return REAL(cudaFuncSetAttribute)(function, attribute, value);
}
#else
API cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureImplicit:
      return "an implicit dependency on a capture";
    case cudaErrorStreamCaptureInvalidated:
      return "the capture was invalidated";
    default:
      return "another error";
  }
}
  #include "cuda/counters.h"
API void* test_counters(long bytes, int device, cudaStream_t stream, char* error, int error_bytes) {
  return fused_resnet::counters_for(bytes, device, stream, error, error_bytes);
}
#endif
