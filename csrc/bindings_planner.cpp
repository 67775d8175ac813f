#include "bindings_planner.h"

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/bn_plan.h"
#include "cuda/plan.h"

namespace fused_resnet {
namespace {

using python::Object;
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

void write(char* to, const Field& field, PyObject* value) {
  if (field.kind == Kind::kFloat) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw python::Raised();
    *reinterpret_cast<float*>(to) = static_cast<float>(number);
  } else if (field.kind == Kind::kInt64) {
    *reinterpret_cast<int64_t*>(to) = python::integer(value, 64, field.name);
  } else {
    *reinterpret_cast<int32_t*>(to) = static_cast<int32_t>(python::integer(value, 32, field.name));
  }
}

template <class Request, int kCount>
Request request_of(const char* function, const Field (&fields)[kCount], PyObject* arguments) {
  Request request;
  python::for_items(arguments, [&](const std::string& name, PyObject* value) {
    const Field* field = fields;
    while (field < fields + kCount && name != field->name) ++field;
    if (field == fields + kCount) {
      throw python::TypeError(std::string(function) + ": unknown argument " + name);
    }
    write(reinterpret_cast<char*>(&request) + field->offset, *field, value);
  });
  return request;
}

PlanRequest plan_request(PyObject* arguments) {
  return request_of<PlanRequest>("plan", kPlanFields, arguments);
}
BnRequest bn_request(PyObject* arguments) {
  return request_of<BnRequest>("plan_training", kBnFields, arguments);
}

DeviceProperties device_of(PyObject* device) {
  const auto property = [&](const char* name) {
    const Object number(PyObject_GetItem(device, python::value(name).get()));
    return static_cast<int32_t>(python::integer(number.get(), 32, name));
  };
  const Object with_wgmma(PyObject_CallMethod(device, "get", "si", "wgmma", 0));
  const auto wgmma = static_cast<int32_t>(python::integer(with_wgmma.get(), 32, "wgmma"));
  return {property("sm_count"), property("capability"), property("shared_bytes_per_block"),
          property("shared_bytes_per_sm"), wgmma};
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

Object kernel_dict(int index) {
  const KernelInfo& kernel = kernel_info(index);
  Object d = python::dict({{"tile_m", kernel.tile_m},
                           {"tile_n", kernel.tile_n},
                           {"depth_bytes", kernel.depth_bytes},
                           {"stages", kernel.stages},
                           {"threads", kernel.threads},
                           {"blocks_per_sm", kernel.blocks_per_sm},
                           {"shared_bytes", kernel.shared_bytes},
                           {"turing_shared_bytes", kernel.turing_shared_bytes},
                           {"park_bytes", kernel.park_bytes}});
  python::set(d, "projection", Object(PyBool_FromLong(kernel.projection)));
  python::set(d, "symbol", kernel.symbol);
  python::set(d, "definition", kDefinitions[index]);
  python::set(d, "tile", std::to_string(kernel.tile_m) + "x" + std::to_string(kernel.tile_n));
  python::set(d, "math", kMathNames[static_cast<int>(kernel.math)]);
  python::set(d, "load", kLoadNames[static_cast<int>(kernel.load)]);
  python::set(d, "epilogue", kernel.epilogue == Epilogue::kTail ? "tail" : "statistics");
  return d;
}

Object bn_kernel_dict(int index) {
  const BnKernelInfo& kernel = bn_kernel_info(index);
  Object d = python::dict(
      {{"packet", kernel.packet}, {"threads", kBnThreads}, {"shared_bytes", kernel.shared_bytes}});
  python::set(d, "symbol", kernel.symbol);
  python::set(d, "definition", kBnDefinitions[index]);
  python::set(d, "op", kPassNames[static_cast<int>(kernel.pass)]);
  return d;
}

Object list_of(int count, Object (*describe)(int)) {
  Object kernels(PyList_New(0));
  for (int i = 0; i < count; ++i) python::append(kernels, describe(i));
  return kernels;
}

// ---- tensor maps ----

template <class T, size_t kCount>
Object first_of(const T (&values)[kCount], int count) {
  Object result(PyTuple_New(count));
  for (int i = 0; i < count; ++i)
    python::check(PyTuple_SetItem(result.get(), i, python::value(values[i]).release()));
  return result;
}

// The parameters of cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col and the tensor's name; None: no such
// map.
Object map_of(const TensorMapPlan& map) {
  if (map.rank == 0) return python::none();
  Object d = python::dict({{"data_type", map.data_type},
                           {"interleave", 0},
                           {"swizzle", kMapSwizzle128},
                           {"l2_promotion", kMapPromotion256},
                           {"oob_fill", 0}});
  python::set(d, "tensor", tensor_name(map.slot));
  python::set(d, "mode", map.im2col ? "im2col" : "tiled");
  python::set(d, "dims", first_of(map.dims, map.rank));
  python::set(d, "strides_bytes", first_of(map.strides, map.rank - 1));
  python::set(d, "box", first_of(map.box, map.im2col ? 2 : map.rank));
  python::set(d, "element_strides", first_of(map.element_strides, map.rank));
  if (map.im2col) {
    python::set(d, "lower_corner", first_of(map.lower, 2));
    python::set(d, "upper_corner", first_of(map.upper, 2));
  }
  return d;
}

Object maps_of(const Plan& plan) {
  Object maps(PyList_New(0));
  if (kernel_info(plan.kernel).load != Load::kTensorMap) return maps;
  for (const TensorMapPlan& map : plan.maps) python::append(maps, map_of(map));
  return maps;
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

Object triple(const int32_t (&v)[3]) {
  return Object(Py_BuildValue("iii", v[0], v[1], v[2]));
}

// body(slot) for every tensor that the launch has.
template <class Plan, class Body>
void for_tensors(const Plan& plan, Body&& body) {
  for (int slot = 0; slot < static_cast<int>(std::extent_v<decltype(plan.alignment)>); ++slot) {
    if (plan.alignment[slot]) body(slot);
  }
}

// Everything one launch needs except addresses, by name; the plan itself is behind what has an index.
PyStructSequence_Field kPlanNames[] = {
    {"kernel", "symbol"},
    {"grid", nullptr},
    {"block", nullptr},
    {"dynamic_shared_bytes", nullptr},
    {"workspace_bytes", nullptr},
    {"counter_bytes", "First bytes of the workspace: zero before the first launch."},
    {"argument", "Bytes of the kernel's only parameter, every address zero."},
    {"pointers", "Offset in `argument` of each tensor's address."},
    {"alignment", "Bytes that each tensor's address must be a multiple of."},
    {"configuration", "The kernel's row of the catalogue; None for a training pass."},
    {"splits", "How many blocks share the sum of one tile; None for a training pass."},
    {"steps", "Steps of the sum: splitting it further leaves blocks idle. None for a training pass."},
    {"maps",
     "The tensor maps behind `argument`, one parameter each; None: 128 bytes that are not read. None for a "
     "training pass."},
    {"raw", "The plan, for this module's own functions."},
    {nullptr, nullptr}};
constexpr int kPlanIndexed = 13;

PyTypeObject* plan_type() {
  static PyStructSequence_Desc description = {
      "fused_resnet.Plan", "Everything one launch needs except addresses.", kPlanNames, kPlanIndexed};
  static PyTypeObject* type = PyStructSequence_NewType(&description);
  if (!type) throw python::Raised();
  return type;
}

template <class Plan>
Object plan_object(const Plan& plan) {
  Object pointers = python::dict(), alignment = python::dict();
  for_tensors(plan, [&](int slot) {
    const Object offset = python::value(offset_of(plan, slot));
    python::check(PyDict_SetItem(pointers.get(), offset.get(), python::value(name_of(plan, slot)).get()));
    python::set(alignment, name_of(plan, slot), plan.alignment[slot]);
  });
  Object result(PyStructSequence_New(plan_type()));
  Py_ssize_t index = 0;
  const auto put = [&](Object item) { PyStructSequence_SetItem(result.get(), index++, item.release()); };
  put(python::value(symbol_of(plan)));
  put(triple(plan.grid));
  put(triple(plan.block));
  put(python::value(plan.dynamic_shared_bytes));
  put(python::value(plan.workspace_bytes));
  put(python::value(plan.counter_bytes));
  put(python::bytes(plan.params));
  put(std::move(pointers));
  put(std::move(alignment));
  if constexpr (std::is_same_v<Plan, fused_resnet::Plan>) {
    const ConvParams& params = plan.params;
    put(kernel_dict(plan.kernel));
    put(python::value(params.splits));
    put(python::value(params.source[0].steps + (params.sources == 2 ? params.source[1].steps : 0)));
    put(maps_of(plan));
  } else {
    while (index < kPlanIndexed) put(python::none());
  }
  put(python::bytes(plan));
  return result;
}

// ---- the module's functions ----

template <class Plan, class Request>
PyObject* planned(PyObject* arguments, PyObject* keywords, Request (*read)(PyObject*),
                  int (*make)(const Request&, const DeviceProperties&, Plan&, char*, int)) {
  return python::answer([&] {
    PyObject* device = nullptr;
    if (!PyArg_ParseTuple(arguments, "O", &device)) throw python::Raised();
    Plan plan;
    char error[kErrorBytes];
    if (make(read(keywords), device_of(device), plan, error, kErrorBytes)) throw std::invalid_argument(error);
    return plan_object(plan);
  });
}

PyObject* plan(PyObject*, PyObject* arguments, PyObject* keywords) {
  return planned<Plan>(arguments, keywords, &plan_request, &make_plan);
}
PyObject* plan_training(PyObject*, PyObject* arguments, PyObject* keywords) {
  return planned<BnPlan>(arguments, keywords, &bn_request, &make_bn_plan);
}
PyObject* plan_request_bytes(PyObject*, PyObject*, PyObject* keywords) {
  return python::answer([&] { return python::bytes(plan_request(keywords)); });
}
PyObject* training_request_bytes(PyObject*, PyObject*, PyObject* keywords) {
  return python::answer([&] { return python::bytes(bn_request(keywords)); });
}
PyObject* catalogue(PyObject*, PyObject*) {
  return python::answer([] { return list_of(kernel_count(), &kernel_dict); });
}
PyObject* training_catalogue(PyObject*, PyObject*) {
  return python::answer([] { return list_of(bn_kernel_count(), &bn_kernel_dict); });
}

constexpr int kKeywords = METH_VARARGS | METH_KEYWORDS;
PyMethodDef kFunctions[] = {
    {"plan", python::method(plan), kKeywords,
     "plan(device, **request) -> Plan, by the fields of PlanRequest (csrc/cuda/plan.h); ValueError with the "
     "reason."},
    {"plan_training", python::method(plan_training), kKeywords,
     "The same for a training pass, by the fields of BnRequest (csrc/cuda/bn_plan.h)."},
    {"plan_request", python::method(plan_request_bytes), kKeywords,
     "The bytes of a PlanRequest, for the C API (csrc/cuda/c_api.cpp)."},
    {"training_request", python::method(training_request_bytes), kKeywords,
     "The bytes of a BnRequest, for the C API."},
    {"catalogue", catalogue, METH_NOARGS, "Every kernel of a tail."},
    {"training_catalogue", training_catalogue, METH_NOARGS, "Every kernel of a training pass."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_planner(PyObject* module) {
  python::check(PyModule_AddFunctions(module, kFunctions));
  python::add(module, "ABSENT", int(kAbsent));
  python::add(module, "DTYPES",
              python::dict({{"float16", kFloat16}, {"bfloat16", kBFloat16}, {"float32", kFloat32}}));
  python::add(
      module, "ACTIVATIONS",
      python::dict({{"none", kActivationNone}, {"relu", kActivationRelu}, {"relu6", kActivationRelu6}}));
  python::add(module, "FAMILIES",
              python::dict({{"any", kFamilyAny}, {"mma", kFamilyMma}, {"wgmma", kFamilyWgmma}}));
  python::add(
      module, "AFFINE",
      python::dict(
          {{"none", kAffineNone}, {"both", kAffineBoth}, {"weight", kAffineWeight}, {"bias", kAffineBias}}));
  const Object passes = python::dict();
  for (size_t i = 0; i < std::extent_v<decltype(kPassNames)>; ++i) python::set(passes, kPassNames[i], i);
  python::check(PyModule_AddObjectRef(module, "PASSES", passes.get()));
}

}  // namespace fused_resnet
