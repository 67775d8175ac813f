// The Python module `_C_cuda`: the planner, the kernel catalogue, and launching on raw addresses. The
// operator is registered beside its implementation (cuda/conv_bn_add_relu.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/workspace.h"

namespace py = pybind11;
using namespace fused_resnet;

namespace {

constexpr int kErrorBytes = 512;

// The keyword arguments of plan(), by the names of PlanRequest.
struct Field {
  const char* name;
  size_t offset;
  int default_value;
  bool is_float = false;
};
#define FIELD(name, default_value) {#name, offsetof(PlanRequest, name), default_value}
const Field kFields[] = {
    FIELD(n, 1),
    FIELD(h, 0),
    FIELD(w, 0),
    FIELD(c, 0),
    FIELD(k, 0),
    FIELD(r, 3),
    FIELD(s, 3),
    FIELD(stride_h, 1),
    FIELD(stride_w, 1),
    FIELD(padding_h, 0),
    FIELD(padding_w, 0),
    FIELD(dilation_h, 1),
    FIELD(dilation_w, 1),
    FIELD(groups, 1),
    FIELD(dtype, kFloat16),
    FIELD(tf32, 0),
    FIELD(residual_dtype, kAbsent),
    FIELD(activation, kActivationRelu),
    FIELD(projection, 0),
    FIELD(proj_c, 0),
    FIELD(proj_h, 0),
    FIELD(proj_w, 0),
    FIELD(proj_stride_h, 1),
    FIELD(proj_stride_w, 1),
    FIELD(alignment, 16),
    FIELD(tile_m, 0),
    FIELD(tile_n, 0),
    FIELD(splits, 0),
    FIELD(statistics, 0),
    {"bias_dtype", offsetof(PlanRequest, norm.bias_dtype), kAbsent},
    {"norm_dtype", offsetof(PlanRequest, norm.norm_dtype), kAbsent},
    {"affine", offsetof(PlanRequest, norm.affine), 1},
    {"eps", offsetof(PlanRequest, norm.eps), 0, true},
    {"proj_bias_dtype", offsetof(PlanRequest, proj_norm.bias_dtype), kAbsent},
    {"proj_norm_dtype", offsetof(PlanRequest, proj_norm.norm_dtype), kAbsent},
    {"proj_affine", offsetof(PlanRequest, proj_norm.affine), 1},
    {"proj_eps", offsetof(PlanRequest, proj_norm.eps), 0, true},
};
#undef FIELD

PlanRequest request_of(const py::kwargs& arguments) {
  PlanRequest request = {};
  char* const base = reinterpret_cast<char*>(&request);
  size_t used = 0;
  for (const Field& field : kFields) {
    const bool given = arguments.contains(field.name);
    used += given;
    if (field.is_float) {
      *reinterpret_cast<float*>(base + field.offset) = given ? arguments[field.name].cast<float>() : 0.0f;
    } else {
      *reinterpret_cast<int32_t*>(base + field.offset) =
          given ? arguments[field.name].cast<int32_t>() : field.default_value;
    }
  }
  if (used != arguments.size()) {
    for (const auto& [name, value] : arguments) {
      bool known = false;
      for (const Field& field : kFields) known = known || name.cast<std::string>() == field.name;
      if (!known) throw py::type_error("plan: unknown argument " + name.cast<std::string>());
    }
  }
  return request;
}

DeviceProperties device_of(const py::dict& device) {
  return {device["sm_count"].cast<int32_t>(), device["capability"].cast<int32_t>(),
          device["shared_bytes_per_block"].cast<int32_t>(), device["shared_bytes_per_sm"].cast<int32_t>()};
}

Plan plan(const py::dict& device, const py::kwargs& arguments) {
  Plan result;
  char error[kErrorBytes];
  if (make_plan(request_of(arguments), device_of(device), result, error, kErrorBytes))
    throw py::value_error(error);
  return result;
}

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

constexpr const char* kMathNames[] = {"float16", "bfloat16", "tf32", "float32"};

py::dict kernel_dict(const KernelInfo& kernel) {
  py::dict d;
  d["symbol"] = kernel.symbol;
  d["tile"] = std::to_string(kernel.tile_m) + "x" + std::to_string(kernel.tile_n);
  d["tile_m"] = kernel.tile_m;
  d["tile_n"] = kernel.tile_n;
  d["depth_bytes"] = kernel.depth_bytes;
  d["stages"] = kernel.stages;
  d["threads"] = kernel.threads;
  d["blocks_per_sm"] = kernel.blocks_per_sm;
  d["shared_bytes"] = kernel.shared_bytes;
  d["park_bytes"] = kernel.park_bytes;
  d["math"] = kMathNames[static_cast<int>(kernel.math)];
  d["load"] = kernel.load == Load::kVector ? "vector" : "gather";
  d["epilogue"] = kernel.epilogue == Epilogue::kTail ? "tail" : "statistics";
  return d;
}

py::list catalogue() {
  py::list kernels;
  for (int i = 0; i < kernel_count(); ++i) kernels.append(kernel_dict(kernel_info(i)));
  return kernels;
}

py::dict build_info() {
  py::dict info;
  info["architectures"] = FUSED_RESNET_ARCHITECTURES;
  info["cudart"] = FUSED_RESNET_CUDART;
  info["nvcc"] = FUSED_RESNET_NVCC;
  info["compiler"] = __VERSION__;
  info["kernels"] = kernel_count();
  return info;
}

py::tuple triple(const int32_t (&v)[3]) {
  return py::make_tuple(v[0], v[1], v[2]);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of fused_resnet: plan, launch, and what was built.";
  py::class_<Plan>(m, "Plan", "Everything one launch needs except addresses.")
      .def_property_readonly("kernel", [](const Plan& p) { return kernel_info(p.kernel).symbol; })
      .def_property_readonly("configuration",
                             [](const Plan& p) { return kernel_dict(kernel_info(p.kernel)); })
      .def_property_readonly("grid", [](const Plan& p) { return triple(p.grid); })
      .def_property_readonly("block", [](const Plan& p) { return triple(p.block); })
      .def_readonly("dynamic_shared_bytes", &Plan::dynamic_shared_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("counter_bytes", &Plan::counter_bytes,
                    "First bytes of the workspace: zero before the first launch.")
      .def_property_readonly("splits", [](const Plan& p) { return p.params.splits; })
      .def_property_readonly(
          "steps",
          [](const Plan& p) {
            return p.params.source[0].steps + (p.params.sources == 2 ? p.params.source[1].steps : 0);
          },
          "Steps of the sum: splitting it further leaves blocks idle.")
      .def_property_readonly(
          "argument",
          [](const Plan& p) { return py::bytes(reinterpret_cast<const char*>(&p.params), sizeof(p.params)); },
          "Bytes of the kernel's only parameter, every address zero.")
      .def_property_readonly(
          "pointers",
          [](const Plan& p) {
            py::dict d;
            for (int i = 0; i < kTensorCount; ++i) {
              if (p.alignment[i]) d[py::int_(tensor_offset(i))] = tensor_name(i);
            }
            return d;
          },
          "Offset in `argument` of each tensor's address.")
      .def_property_readonly(
          "alignment",
          [](const Plan& p) {
            py::dict d;
            for (int i = 0; i < kTensorCount; ++i) {
              if (p.alignment[i]) d[tensor_name(i)] = p.alignment[i];
            }
            return d;
          },
          "Bytes that each tensor's address must be a multiple of.");
  py::class_<Launcher>(m, "Launcher", "One plan on one device, for many launches.")
      .def(py::init<const Plan&, int>(), py::arg("plan"), py::arg("device"))
      .def(
          "launch", &Launcher::launch,
          "Launch on addresses in the order of the tensors' slots up to y (0: none) and torch's current "
          "stream "
          "of the device, which must be the current one; False, and no launch, where one was not planned, is "
          "missing or less aligned.");
  m.def("plan", &plan, py::arg("device"),
        "plan(device, **request) -> Plan, by the fields of PlanRequest (csrc/cuda/plan.h); ValueError with "
        "the reason.");
  m.def("launch", &launch, py::arg("plan"), py::arg("addresses"), py::arg("stream") = 0,
        py::arg("device") = 0,
        "Launch on {tensor name: address} and a stream of a device; no synchronisation.");
  m.def("catalogue", &catalogue, "Every kernel that was built.");
  m.def("device_properties", &device_properties, py::arg("index") = 0,
        "What plan() needs to know of a device.");
  m.def("build_info", &build_info, "Architectures, CUDA runtime and compiler of this build.");
  m.attr("DTYPES") = py::dict(py::arg("float16") = int(kFloat16), py::arg("bfloat16") = int(kBFloat16),
                              py::arg("float32") = int(kFloat32));
  m.attr("ACTIVATIONS") =
      py::dict(py::arg("none") = int(kActivationNone), py::arg("relu") = int(kActivationRelu),
               py::arg("relu6") = int(kActivationRelu6));
}
