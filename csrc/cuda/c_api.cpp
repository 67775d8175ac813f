// Planner and launcher as a small shared library without Torch or Python: for tests of the launch path, and
// for callers of their own, who mirror the structs of plan.h and bn_plan.h.
#include <cstring>

#include "bn_launch.h"
#include "bn_plan.h"
#include "launch.h"
#include "plan.h"

#define FUSED_RESNET_API extern "C" __attribute__((visibility("default")))

using namespace fused_resnet;

// Sizes of PlanRequest, DeviceProperties, Plan and ConvParams, so that a mirror can check itself.
FUSED_RESNET_API void fused_resnet_sizes(int32_t sizes[4]) {
  sizes[0] = sizeof(PlanRequest);
  sizes[1] = sizeof(DeviceProperties);
  sizes[2] = sizeof(Plan);
  sizes[3] = sizeof(ConvParams);
}
FUSED_RESNET_API int32_t fused_resnet_kernel_count() {
  return kernel_count();
}
FUSED_RESNET_API const KernelInfo* fused_resnet_kernel_info(int32_t index) {
  return &kernel_info(index);
}
FUSED_RESNET_API int32_t fused_resnet_tensor_count() {
  return kTensorCount;
}
FUSED_RESNET_API const char* fused_resnet_tensor_name(int32_t slot) {
  return tensor_name(slot);
}
FUSED_RESNET_API int64_t fused_resnet_tensor_offset(int32_t slot) {
  return tensor_offset(slot);
}

// Each returns 0, or 1 and one sentence in `error`.
FUSED_RESNET_API int32_t fused_resnet_plan(const PlanRequest* request, const DeviceProperties* device,
                                           Plan* plan, char* error, int32_t error_bytes) {
  return make_plan(*request, *device, *plan, error, error_bytes);
}
FUSED_RESNET_API int32_t fused_resnet_query_device(DeviceProperties* device, char* error,
                                                   int32_t error_bytes) {
  return query_device(-1, *device, error, error_bytes);
}
FUSED_RESNET_API int32_t fused_resnet_launch(const Plan* plan, const void* const* addresses, void* stream,
                                             char* error, int32_t error_bytes) {
  if (check_addresses(*plan, addresses, error, error_bytes)) return 1;
  return launch_plan(*plan, bind_addresses(*plan, addresses), stream, error, error_bytes);
}

// ---- the training passes ----

// Sizes of BnRequest, BnPlan and BnParams.
FUSED_RESNET_API void fused_resnet_bn_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(BnRequest);
  sizes[1] = sizeof(BnPlan);
  sizes[2] = sizeof(BnParams);
}
FUSED_RESNET_API int32_t fused_resnet_bn_kernel_count() {
  return bn_kernel_count();
}
FUSED_RESNET_API const BnKernelInfo* fused_resnet_bn_kernel_info(int32_t index) {
  return &bn_kernel_info(index);
}
FUSED_RESNET_API int32_t fused_resnet_bn_tensor_count() {
  return kBnTensorCount;
}
FUSED_RESNET_API const char* fused_resnet_bn_tensor_name(int32_t pass, int32_t slot) {
  return bn_tensor_name(pass, slot);
}
FUSED_RESNET_API int64_t fused_resnet_bn_tensor_offset(int32_t slot) {
  return bn_tensor_offset(slot);
}
FUSED_RESNET_API int32_t fused_resnet_bn_plan(const BnRequest* request, const DeviceProperties* device,
                                              BnPlan* plan, char* error, int32_t error_bytes) {
  return make_bn_plan(*request, *device, *plan, error, error_bytes);
}
FUSED_RESNET_API int32_t fused_resnet_bn_launch(const BnPlan* plan, const void* const* addresses,
                                                void* stream, char* error, int32_t error_bytes) {
  if (check_bn_addresses(*plan, addresses, error, error_bytes)) return 1;
  return launch_bn_plan(*plan, bind_bn_addresses(*plan, addresses), stream, error, error_bytes);
}
