#include "bindings_planner.h"

#include <cstddef>
#include <string>
#include <type_traits>

#include "cuda/bn_plan.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

constexpr int kErrorBytes = 512;

// ---- requests: keyword arguments by the names of their fields ----

enum class Kind { kInt32, kInt64, kFloat };
template <class T>
constexpr Kind kKindOf = std::is_same_v<T, float> ? Kind::kFloat
                         : sizeof(T) == 8         ? Kind::kInt64
                                                  : Kind::kInt32;
struct Field {
  const char* name;
  size_t offset;
  Kind kind;
};
#define FIELD(Request, name, member) {name, offsetof(Request, member), kKindOf<decltype(Request().member)>}
#define PLAN(name) FIELD(PlanRequest, #name, name)
#define NORM(prefix, name) FIELD(PlanRequest, #prefix #name, prefix##norm.name)
#define PASS(name) FIELD(BnRequest, #name, name)
constexpr Field kPlanFields[] = {PLAN(n),
                                 PLAN(h),
                                 PLAN(w),
                                 PLAN(c),
                                 PLAN(k),
                                 PLAN(r),
                                 PLAN(s),
                                 PLAN(stride_h),
                                 PLAN(stride_w),
                                 PLAN(padding_h),
                                 PLAN(padding_w),
                                 PLAN(dilation_h),
                                 PLAN(dilation_w),
                                 PLAN(groups),
                                 PLAN(dtype),
                                 PLAN(tf32),
                                 PLAN(residual_dtype),
                                 PLAN(activation),
                                 NORM(, bias_dtype),
                                 NORM(, norm_dtype),
                                 NORM(, affine),
                                 NORM(, eps),
                                 PLAN(projection),
                                 PLAN(proj_c),
                                 PLAN(proj_h),
                                 PLAN(proj_w),
                                 PLAN(proj_stride_h),
                                 PLAN(proj_stride_w),
                                 NORM(proj_, bias_dtype),
                                 NORM(proj_, norm_dtype),
                                 NORM(proj_, affine),
                                 NORM(proj_, eps),
                                 PLAN(alignment),
                                 PLAN(tile_m),
                                 PLAN(tile_n),
                                 PLAN(splits),
                                 PLAN(family),
                                 PLAN(statistics)};
constexpr Field kBnFields[] = {PASS(rows),       PASS(channels),  PASS(pass),           PASS(y_dtype),
                               PASS(proj_dtype), PASS(out_dtype), PASS(residual_dtype), PASS(activation),
                               PASS(mask),       PASS(affine),    PASS(proj_affine),    PASS(alignment),
                               PASS(reserved)};
#undef PASS
#undef NORM
#undef PLAN
#undef FIELD

template <int kCount>
constexpr size_t bytes_of(const Field (&fields)[kCount]) {
  size_t bytes = 0;
  for (const Field& field : fields) bytes += field.kind == Kind::kInt64 ? 8 : 4;
  return bytes;
}
static_assert(bytes_of(kPlanFields) == sizeof(PlanRequest), "a field of PlanRequest is not in the list");
static_assert(bytes_of(kBnFields) == sizeof(BnRequest), "a field of BnRequest is not in the list");

void write(char* to, Kind kind, const py::handle& value) {
  switch (kind) {
    case Kind::kInt32:
      *reinterpret_cast<int32_t*>(to) = value.cast<int32_t>();
      break;
    case Kind::kInt64:
      *reinterpret_cast<int64_t*>(to) = value.cast<int64_t>();
      break;
    case Kind::kFloat:
      *reinterpret_cast<float*>(to) = value.cast<float>();
      break;
  }
}

template <class Request, int kCount>
Request request_of(const char* function, const Field (&fields)[kCount], const py::kwargs& arguments) {
  Request request;
  for (const auto& [name, value] : arguments) {
    const std::string text = py::cast<std::string>(name);
    const Field* field = fields;
    while (field < fields + kCount && text != field->name) ++field;
    if (field == fields + kCount) throw py::type_error(std::string(function) + ": unknown argument " + text);
    try {
      write(reinterpret_cast<char*>(&request) + field->offset, field->kind, value);
    } catch (const py::cast_error&) {
      throw py::value_error(text + ": expected a number of " + (field->kind == Kind::kInt64 ? "64" : "32") +
                            " bits, got " + std::string(py::str(value)));
    }
  }
  return request;
}

PlanRequest plan_request(const py::kwargs& arguments) {
  return request_of<PlanRequest>("plan", kPlanFields, arguments);
}
BnRequest bn_request(const py::kwargs& arguments) {
  return request_of<BnRequest>("plan_training", kBnFields, arguments);
}

DeviceProperties device_of(const py::dict& device) {
  return {device["sm_count"].cast<int32_t>(), device["capability"].cast<int32_t>(),
          device["shared_bytes_per_block"].cast<int32_t>(), device["shared_bytes_per_sm"].cast<int32_t>(),
          device.contains("wgmma") ? device["wgmma"].cast<int32_t>() : 0};
}

template <class Plan, class Request>
Plan answer(int (*make)(const Request&, const DeviceProperties&, Plan&, char*, int), const Request& request,
            const py::dict& device) {
  Plan plan;
  char error[kErrorBytes];
  if (make(request, device_of(device), plan, error, kErrorBytes)) throw py::value_error(error);
  return plan;
}

template <class T>
py::bytes bytes(const T& value) {
  return py::bytes(reinterpret_cast<const char*>(&value), sizeof(value));
}

// ---- the catalogues ----

#define DEFINITION(...) "FUSED_RESNET_DEFINE_KERNEL(" #__VA_ARGS__ ")",
#define WGMMA_DEFINITION(...) "FUSED_RESNET_DEFINE_WGMMA_KERNEL(" #__VA_ARGS__ ")",
constexpr const char* kDefinitions[] = {FUSED_RESNET_KERNELS(DEFINITION)
                                            FUSED_RESNET_WGMMA_KERNELS(WGMMA_DEFINITION)};
#undef WGMMA_DEFINITION
#undef DEFINITION
#define DEFINITION(...) "FUSED_RESNET_DEFINE_BN_KERNEL(" #__VA_ARGS__ ")",
constexpr const char* kBnDefinitions[] = {FUSED_RESNET_BN_KERNELS(DEFINITION)};
#undef DEFINITION

// By Load.
constexpr const char* kLoadNames[] = {"vector", "gather", "tensor_map"};
constexpr const char* kMathNames[] = {"float16", "bfloat16", "tf32", "float32"};
// By BnPass.
constexpr const char* kPassNames[] = {"bn_stats", "bn_apply_add_relu", "bn_backward_reduce",
                                      "bn_backward_apply"};

py::dict kernel_dict(int index) {
  const KernelInfo& kernel = kernel_info(index);
  py::dict d;
  d["symbol"] = kernel.symbol;
  d["definition"] = kDefinitions[index];
  d["tile"] = std::to_string(kernel.tile_m) + "x" + std::to_string(kernel.tile_n);
  d["tile_m"] = kernel.tile_m;
  d["tile_n"] = kernel.tile_n;
  d["depth_bytes"] = kernel.depth_bytes;
  d["stages"] = kernel.stages;
  d["threads"] = kernel.threads;
  d["blocks_per_sm"] = kernel.blocks_per_sm;
  d["shared_bytes"] = kernel.shared_bytes;
  d["turing_shared_bytes"] = kernel.turing_shared_bytes;
  d["park_bytes"] = kernel.park_bytes;
  d["projection"] = kernel.projection != 0;
  d["math"] = kMathNames[static_cast<int>(kernel.math)];
  d["load"] = kLoadNames[static_cast<int>(kernel.load)];
  d["epilogue"] = kernel.epilogue == Epilogue::kTail ? "tail" : "statistics";
  return d;
}

py::dict bn_kernel_dict(int index) {
  const BnKernelInfo& kernel = bn_kernel_info(index);
  py::dict d;
  d["symbol"] = kernel.symbol;
  d["definition"] = kBnDefinitions[index];
  d["op"] = kPassNames[static_cast<int>(kernel.pass)];
  d["packet"] = kernel.packet;
  d["threads"] = kBnThreads;
  d["shared_bytes"] = kernel.shared_bytes;
  return d;
}

py::list list_of(int count, py::dict (*describe)(int)) {
  py::list kernels;
  for (int i = 0; i < count; ++i) kernels.append(describe(i));
  return kernels;
}

// ---- plans ----

const char* symbol_of(const Plan& plan) {
  return kernel_info(plan.kernel).symbol;
}
const char* symbol_of(const BnPlan& plan) {
  return bn_kernel_info(plan.kernel).symbol;
}
const char* name_of(const Plan&, int slot) {
  return tensor_name(slot);
}
const char* name_of(const BnPlan& plan, int slot) {
  return bn_tensor_name(static_cast<int>(bn_kernel_info(plan.kernel).pass), slot);
}
int64_t offset_of(const Plan&, int slot) {
  return tensor_offset(slot);
}
int64_t offset_of(const BnPlan&, int slot) {
  return bn_tensor_offset(slot);
}

py::tuple triple(const int32_t (&v)[3]) {
  return py::make_tuple(v[0], v[1], v[2]);
}

// body(slot) for every tensor that the launch has.
template <class Plan, class Body>
void for_tensors(const Plan& plan, Body&& body) {
  for (int slot = 0; slot < static_cast<int>(std::extent_v<decltype(plan.alignment)>); ++slot) {
    if (plan.alignment[slot]) body(slot);
  }
}

template <class T, size_t kCount>
py::tuple first_of(const T (&values)[kCount], int count) {
  py::tuple result(count);
  for (int i = 0; i < count; ++i) result[i] = values[i];
  return result;
}

// The parameters of cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col and the tensor's name; None: no such
// map.
py::object map_dict(const TensorMapPlan& map) {
  if (map.rank == 0) return py::none();
  py::dict d;
  d["tensor"] = tensor_name(map.slot);
  d["mode"] = map.im2col ? "im2col" : "tiled";
  d["data_type"] = map.data_type;
  d["dims"] = first_of(map.dims, map.rank);
  d["strides_bytes"] = first_of(map.strides, map.rank - 1);
  d["box"] = first_of(map.box, map.im2col ? 2 : map.rank);
  d["element_strides"] = first_of(map.element_strides, map.rank);
  if (map.im2col) {
    d["lower_corner"] = first_of(map.lower, 2);
    d["upper_corner"] = first_of(map.upper, 2);
  }
  d["interleave"] = 0;
  d["swizzle"] = kMapSwizzle128;
  d["l2_promotion"] = kMapPromotion256;
  d["oob_fill"] = 0;
  return d;
}

// Local to its module, since _C and _C_cuda have them both.
template <class Plan>
py::class_<Plan> bind_plan(py::module_& m, const char* name) {
  return py::class_<Plan>(m, name, "Everything one launch needs except addresses.", py::module_local())
      .def_property_readonly("kernel", [](const Plan& p) { return symbol_of(p); })
      .def_property_readonly("grid", [](const Plan& p) { return triple(p.grid); })
      .def_property_readonly("block", [](const Plan& p) { return triple(p.block); })
      .def_readonly("dynamic_shared_bytes", &Plan::dynamic_shared_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("counter_bytes", &Plan::counter_bytes,
                    "First bytes of the workspace: zero before the first launch.")
      .def_property_readonly(
          "argument", [](const Plan& p) { return bytes(p.params); },
          "Bytes of the kernel's only parameter, every address zero.")
      .def_property_readonly(
          "pointers",
          [](const Plan& p) {
            py::dict d;
            for_tensors(p, [&](int slot) { d[py::int_(offset_of(p, slot))] = name_of(p, slot); });
            return d;
          },
          "Offset in `argument` of each tensor's address.")
      .def_property_readonly(
          "alignment",
          [](const Plan& p) {
            py::dict d;
            for_tensors(p, [&](int slot) { d[name_of(p, slot)] = p.alignment[slot]; });
            return d;
          },
          "Bytes that each tensor's address must be a multiple of.");
}

}  // namespace

void bind_planner(py::module_& m) {
  bind_plan<Plan>(m, "Plan")
      .def_property_readonly("configuration", [](const Plan& p) { return kernel_dict(p.kernel); })
      .def_property_readonly("splits", [](const Plan& p) { return p.params.splits; })
      .def_property_readonly(
          "maps",
          [](const Plan& p) {
            py::list maps;
            if (kernel_info(p.kernel).load != Load::kTensorMap) return maps;
            for (const TensorMapPlan& map : p.maps) maps.append(map_dict(map));
            return maps;
          },
          "The tensor maps behind `argument`, one parameter each; None: 128 bytes that are not read.")
      .def_property_readonly(
          "steps",
          [](const Plan& p) {
            return p.params.source[0].steps + (p.params.sources == 2 ? p.params.source[1].steps : 0);
          },
          "Steps of the sum: splitting it further leaves blocks idle.");
  bind_plan<BnPlan>(m, "TrainingPlan");
  m.def(
      "plan",
      [](const py::dict& device, const py::kwargs& request) {
        return answer(&make_plan, plan_request(request), device);
      },
      py::arg("device"),
      "plan(device, **request) -> Plan, by the fields of PlanRequest (csrc/cuda/plan.h); ValueError with "
      "the reason.");
  m.def(
      "plan_training",
      [](const py::dict& device, const py::kwargs& request) {
        return answer(&make_bn_plan, bn_request(request), device);
      },
      py::arg("device"), "The same for a training pass, by the fields of BnRequest (csrc/cuda/bn_plan.h).");
  m.def(
      "plan_request", [](const py::kwargs& request) { return bytes(plan_request(request)); },
      "The bytes of a PlanRequest, for the C API (csrc/cuda/c_api.cpp).");
  m.def(
      "training_request", [](const py::kwargs& request) { return bytes(bn_request(request)); },
      "The bytes of a BnRequest, for the C API.");
  m.def("catalogue", [] { return list_of(kernel_count(), &kernel_dict); }, "Every kernel of a tail.");
  m.def(
      "training_catalogue", [] { return list_of(bn_kernel_count(), &bn_kernel_dict); },
      "Every kernel of a training pass.");
  m.attr("ABSENT") = int(kAbsent);
  m.attr("DTYPES") = py::dict(py::arg("float16") = int(kFloat16), py::arg("bfloat16") = int(kBFloat16),
                              py::arg("float32") = int(kFloat32));
  m.attr("ACTIVATIONS") =
      py::dict(py::arg("none") = int(kActivationNone), py::arg("relu") = int(kActivationRelu),
               py::arg("relu6") = int(kActivationRelu6));
  m.attr("FAMILIES") = py::dict(py::arg("any") = int(kFamilyAny), py::arg("mma") = int(kFamilyMma),
                                py::arg("wgmma") = int(kFamilyWgmma));
  m.attr("AFFINE") = py::dict(py::arg("none") = int(kAffineNone), py::arg("both") = int(kAffineBoth),
                              py::arg("weight") = int(kAffineWeight), py::arg("bias") = int(kAffineBias));
  py::dict passes;
  for (size_t i = 0; i < std::extent_v<decltype(kPassNames)>; ++i) passes[kPassNames[i]] = i;
  m.attr("PASSES") = passes;
}

}  // namespace fused_resnet
