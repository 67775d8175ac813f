// The Python module `_C_cuda`: the planner, and launching on raw addresses. The operators are registered
// beside their implementations (cuda/conv_bn_add_relu.cpp and others).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings_planner.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/workspace.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

constexpr int kErrorBytes = 512;

py::dict device_properties(int index) {
  DeviceProperties device;
  char error[kErrorBytes];
  if (index < 0) throw py::value_error("index: expected the index of a device, got " + std::to_string(index));
  if (query_device(index, device, error, kErrorBytes)) throw std::runtime_error(error);
  py::dict result;
  result["sm_count"] = device.sm_count;
  result["capability"] = device.capability;
  result["shared_bytes_per_block"] = device.shared_bytes_per_block;
  result["shared_bytes_per_sm"] = device.shared_bytes_per_sm;
  result["wgmma"] = device.wgmma;
  return result;
}

void launch(const Plan& plan, const py::dict& addresses, uintptr_t stream, int device) {
  const void* pointers[kTensorCount] = {};
  for (const auto& [name, address] : addresses) {
    const std::string text = name.cast<std::string>();
    int slot = 0;
    while (slot < kTensorCount && text != tensor_name(slot)) ++slot;
    if (slot == kTensorCount) throw py::value_error(text + ": expected the name of a tensor of the plan");
    pointers[slot] = reinterpret_cast<const void*>(address.cast<uintptr_t>());
  }
  char error[kErrorBytes];
  if (check_addresses(plan, pointers, error, kErrorBytes)) throw py::value_error(error);
  const int before = current_device();
  if (use_device(device)) throw std::runtime_error("cuda: there is no device " + std::to_string(device));
  const int failed =
      launch_plan(plan, bind_addresses(plan, pointers), reinterpret_cast<void*>(stream), error, kErrorBytes);
  if (before >= 0 && before != device) use_device(before);
  if (failed) throw std::runtime_error(error);
}

// One plan on one device, for many launches: the shortest way from Python to the kernel.
class Launcher {
 public:
  Launcher(const Plan& plan, int device) : plan_(plan), device_(device) {}

  // The addresses in the order of TensorSlot up to y, 0 where there is no tensor; the workspace is ours.
  // False, and no launch, where a tensor is there that was not planned, or one is missing or less aligned.
  bool launch(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t bn_weight, uintptr_t bn_bias,
              uintptr_t running_mean, uintptr_t running_var, uintptr_t proj_x, uintptr_t proj_weight,
              uintptr_t proj_bias, uintptr_t proj_bn_weight, uintptr_t proj_bn_bias,
              uintptr_t proj_running_mean, uintptr_t proj_running_var, uintptr_t residual, uintptr_t y,
              uintptr_t stream) const {
    const uintptr_t given[kTensorWorkspace] = {x,
                                               weight,
                                               bias,
                                               bn_weight,
                                               bn_bias,
                                               running_mean,
                                               running_var,
                                               proj_x,
                                               proj_weight,
                                               proj_bias,
                                               proj_bn_weight,
                                               proj_bn_bias,
                                               proj_running_mean,
                                               proj_running_var,
                                               residual,
                                               y};
    const void* addresses[kTensorCount] = {};
    for (int slot = 0; slot < kTensorWorkspace; ++slot) {
      const int alignment = plan_.alignment[slot];
      if ((alignment == 0) != (given[slot] == 0)) return false;
      if (alignment == 0) continue;
      if (given[slot] % alignment) return false;
      addresses[slot] = reinterpret_cast<const void*>(given[slot]);
    }
    if (use_device(device_)) throw std::runtime_error("cuda: there is no device " + std::to_string(device_));
    void* const on = reinterpret_cast<void*>(stream);
    const Workspace workspace(plan_.workspace_bytes, plan_.counter_bytes, device_, on);
    ConvParams params = bind_addresses(plan_, addresses);
    workspace.bind(params);
    char error[kErrorBytes];
    if (launch_plan(plan_, params, on, error, kErrorBytes)) throw std::runtime_error(error);
    return true;
  }

 private:
  const Plan plan_;
  const int device_;
};

py::dict build_info() {
  py::dict info;
  info["architectures"] = FUSED_RESNET_ARCHITECTURES;
  info["cudart"] = FUSED_RESNET_CUDART;
  info["nvcc"] = FUSED_RESNET_NVCC;
  info["compiler"] = __VERSION__;
  info["kernels"] = kernel_count();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of fused_resnet: plan, launch, and what was built.";
  bind_planner(m);
  py::class_<Launcher>(m, "Launcher", "One plan on one device, for many launches.")
      .def(py::init<const Plan&, int>(), py::arg("plan"), py::arg("device"))
      .def(
          "launch", &Launcher::launch,
          "Launch on addresses in the order of the tensors' slots up to y (0: none) and torch's current "
          "stream "
          "of the device, which must be the current one; False, and no launch, where one was not planned, is "
          "missing or less aligned.");
  m.def("launch", &launch, py::arg("plan"), py::arg("addresses"), py::arg("stream") = 0,
        py::arg("device") = 0,
        "Launch on {tensor name: address} and a stream of a device; no synchronisation.");
  m.def("device_properties", &device_properties, py::arg("index") = 0,
        "What plan() needs to know of a device.");
  m.def("build_info", &build_info, "Architectures, CUDA runtime and compiler of this build.");
}
