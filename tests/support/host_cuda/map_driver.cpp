// A driver that only encodes tensor maps, for csrc/cuda/encode_maps.cpp: a map holds what it was made from,
// and the calls are counted.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/encode_maps.h"

using namespace fused_resnet;

namespace {

long encoded = 0;
bool present = true;

CUresult encode(CUtensorMap* map, void* address, CUtensorMapDataType type, cuuint32_t rank,
                const cuuint64_t* dims, const cuuint32_t* box, const cuuint32_t* strides, int im2col) {
  ++encoded;
  std::memset(map, 0, sizeof(*map));
  uint64_t words[16] = {reinterpret_cast<uintptr_t>(address), rank, static_cast<uint64_t>(type),
                        static_cast<uint64_t>(im2col)};
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[4 + i] = dims[i];
    words[12 + i] = strides[i];
  }
  words[8] = box[0];
  words[9] = box[1];
  std::memcpy(map, words, sizeof(words));
  return reinterpret_cast<uintptr_t>(address) % 16 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
               const cuuint64_t* dims, const cuuint64_t*, const cuuint32_t* box, const cuuint32_t* strides,
               CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return encode(map, address, type, rank, dims, box, strides, 0);
}
CUresult im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* dims, const cuuint64_t*, const int*, const int*, cuuint32_t channels,
                cuuint32_t pixels, const cuuint32_t* strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const cuuint32_t box[] = {channels, pixels};
  return encode(map, address, type, rank, dims, box, strides, 1);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  const bool tile = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = !present ? nullptr : tile ? reinterpret_cast<void*>(&tiled) : reinterpret_cast<void*>(&im2col);
  *result = present ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                        cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 12000, flags, result);
}
API cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

API void test_driver(int is_there) {
  present = is_there;
}
API int test_can_encode() {
  return maps_can_be_encoded();
}
API long test_encoded() {
  return encoded;
}
// The maps of a launch of `request` on an H100 with these addresses, by slot.
API int test_maps(const PlanRequest* request, const void* const* addresses, TensorMap* maps, char* error,
                  int error_bytes) {
  const DeviceProperties device = {132, 90, 232448, 233472, 1};
  Plan plan;
  if (make_plan(*request, device, plan, error, error_bytes)) return 1;
  const ConvParams params = bind_addresses(plan, addresses);
  for (int i = 0; i < kMapCount; ++i) {
    if (encode_map(plan.maps[i], params, maps[i], error, error_bytes)) return 1;
  }
  return 0;
}
