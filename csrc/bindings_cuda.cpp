// The Python module `_C_cuda`: the planner, and launching on raw addresses. The operators are registered
// beside their implementations (cuda/conv_bn_add_relu.cpp and others).
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings_planner.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/workspace.h"

using namespace fused_resnet;
using python::Object;

namespace {

constexpr int kErrorBytes = 512;

// Of a Plan that `plan` has made.
Plan plan_of(PyObject* object) {
  return python::from_bytes<Plan>(Object(PyObject_GetAttrString(object, "raw")).get());
}

uintptr_t address_of(PyObject* object) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(object);
  if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw python::Raised();
  return static_cast<uintptr_t>(address);
}

PyObject* device_properties(PyObject*, PyObject* arguments, PyObject* keywords) {
  return python::answer([&] {
    static const char* names[] = {"index", nullptr};
    int index = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|i", const_cast<char**>(names), &index)) {
      throw python::Raised();
    }
    if (index < 0) {
      throw std::invalid_argument("index: expected the index of a device, got " + std::to_string(index));
    }
    DeviceProperties device;
    char error[kErrorBytes];
    if (query_device(index, device, error, kErrorBytes)) throw std::runtime_error(error);
    return python::dict({{"sm_count", device.sm_count},
                         {"capability", device.capability},
                         {"shared_bytes_per_block", device.shared_bytes_per_block},
                         {"shared_bytes_per_sm", device.shared_bytes_per_sm},
                         {"wgmma", device.wgmma}});
  });
}

PyObject* launch(PyObject*, PyObject* arguments, PyObject* keywords) {
  return python::answer([&] {
    static const char* names[] = {"plan", "addresses", "stream", "device", nullptr};
    PyObject *planned, *addresses;
    unsigned long long stream = 0;
    int device = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO!|Ki", const_cast<char**>(names), &planned,
                                     &PyDict_Type, &addresses, &stream, &device)) {
      throw python::Raised();
    }
    const Plan plan = plan_of(planned);
    const void* pointers[kTensorCount] = {};
    python::for_items(addresses, [&](const std::string& name, PyObject* address) {
      int slot = 0;
      while (slot < kTensorCount && name != tensor_name(slot)) ++slot;
      if (slot == kTensorCount) {
        throw std::invalid_argument(name + ": expected the name of a tensor of the plan");
      }
      pointers[slot] = reinterpret_cast<const void*>(address_of(address));
    });
    char error[kErrorBytes];
    if (check_addresses(plan, pointers, error, kErrorBytes)) throw std::invalid_argument(error);
    const int before = current_device();
    if (use_device(device)) throw std::runtime_error("cuda: there is no device " + std::to_string(device));
    const int failed = launch_plan(plan, bind_addresses(plan, pointers), reinterpret_cast<void*>(stream),
                                   error, kErrorBytes);
    if (before >= 0 && before != device) use_device(before);
    if (failed) throw std::runtime_error(error);
    return python::none();
  });
}

// One plan on one device, for many launches: the shortest way from Python to the kernel.
class Launcher {
 public:
  Launcher(const Plan& plan, int device) : plan_(plan), device_(device) {}

  // The addresses in the order of TensorSlot up to y, 0 where there is no tensor; the workspace is ours.
  // False, and no launch, where a tensor is there that was not planned, or one is missing or less aligned.
  bool launch(const uintptr_t (&given)[kTensorWorkspace], uintptr_t stream) const {
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

struct LauncherObject {
  PyObject_HEAD Launcher* launcher;
};

PyObject* new_launcher(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  return python::answer([&] {
    static const char* names[] = {"plan", "device", nullptr};
    PyObject* planned;
    int device;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "Oi", const_cast<char**>(names), &planned,
                                     &device)) {
      throw python::Raised();
    }
    auto launcher = std::make_unique<Launcher>(plan_of(planned), device);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    Object self(allocate(type, 0));
    reinterpret_cast<LauncherObject*>(self.get())->launcher = launcher.release();
    return self;
  });
}

void delete_launcher(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<LauncherObject*>(self)->launcher;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* launch_again(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return python::answer([&] {
    if (count != kTensorWorkspace + 1) {
      throw python::TypeError("launch: expected " + std::to_string(kTensorWorkspace + 1) +
                              " addresses, got " + std::to_string(count));
    }
    uintptr_t addresses[kTensorWorkspace];
    for (int slot = 0; slot < kTensorWorkspace; ++slot) addresses[slot] = address_of(arguments[slot]);
    const uintptr_t stream = address_of(arguments[kTensorWorkspace]);
    const Launcher& launcher = *reinterpret_cast<LauncherObject*>(self)->launcher;
    return Object(PyBool_FromLong(launcher.launch(addresses, stream)));
  });
}

PyMethodDef kLauncherMethods[] = {{"launch", python::method(launch_again), METH_FASTCALL,
                                   "Launch on addresses in the order of the tensors' slots up to y (0: none) "
                                   "and torch's current stream of the "
                                   "device, which must be the current one; False, and no launch, where one "
                                   "was not planned, is missing or less "
                                   "aligned."},
                                  {nullptr, nullptr, 0, nullptr}};
PyType_Slot kLauncherSlots[] = {
    {Py_tp_doc, const_cast<char*>("Launcher(plan, device): one plan on one device, for many launches.")},
    {Py_tp_new, reinterpret_cast<void*>(new_launcher)},
    {Py_tp_dealloc, reinterpret_cast<void*>(delete_launcher)},
    {Py_tp_methods, kLauncherMethods},
    {0, nullptr}};
PyType_Spec kLauncherType = {"fused_resnet._C_cuda.Launcher", sizeof(LauncherObject), 0, Py_TPFLAGS_DEFAULT,
                             kLauncherSlots};

PyObject* build_info(PyObject*, PyObject*) {
  return python::answer([] {
    Object info = python::dict({{"kernels", kernel_count()}});
    python::set(info, "architectures", FUSED_RESNET_ARCHITECTURES);
    python::set(info, "cudart", FUSED_RESNET_CUDART);
    python::set(info, "nvcc", FUSED_RESNET_NVCC);
    python::set(info, "compiler", __VERSION__);
    return info;
  });
}

PyMethodDef kFunctions[] = {
    {"launch", python::method(launch), METH_VARARGS | METH_KEYWORDS,
     "launch(plan, addresses, stream=0, device=0): on {tensor name: address} and a stream of a device; no "
     "synchronisation."},
    {"device_properties", python::method(device_properties), METH_VARARGS | METH_KEYWORDS,
     "device_properties(index=0): what plan() needs to know of a device."},
    {"build_info", build_info, METH_NOARGS, "Architectures, CUDA runtime and compiler of this build."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C_cuda",
                       "CUDA kernels of fused_resnet: plan, launch, and what was built.", -1, kFunctions};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  return python::answer([] {
    Object module(PyModule_Create(&kModule));
    bind_planner(module.get());
    python::add(module.get(), "Launcher", Object(PyType_FromSpec(&kLauncherType)));
    return module;
  });
}
