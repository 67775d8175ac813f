// A call of conv_bn_add_relu on the CPU that repeats an earlier one, found and run without the interpreter.
//
// Where other data comes in between, as in a network, the interpreter's own is out of the caches: what it
// does before a convolution begins, 13 microseconds in a loop, then takes 40 at batch 1 and 100 at batch 8.
// Most of that is one miss after another, so what counts is how few places in memory are looked at.
//
// The comparisons are those of fused_resnet/ops/direct.py, which remembers the calls. Whatever is in doubt is
// not a repetition: the caller goes on as if this module were not there.
#include "repeat.h"

#include <algorithm>
#include <array>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fused_resnet {
namespace {

namespace py = pybind11;

// The arguments of repeat: x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual; eps,
// stride, padding, dilation, groups, activation, backend, cache_weights, winograd.
constexpr size_t kTensors = 8, kOptions = 9, kWeight = 1, kResidual = 7;
constexpr size_t kCallsOfWeight = 8;  // the last so many, which differ in the size of x, mostly

struct Variable {
  py::object dictionary, name, value;  // None: it is not there
};

struct Call {
  std::array<py::object, kOptions> options;
  std::vector<py::object> idle;     // functions that return false while nothing of torch's watches
  std::vector<Variable> variables;  // what else must be as it was
  std::array<py::object, kTensors> absent;
  py::object same_tensors;       // of the tensors, those of `absent` in place of None
  py::object copies, key;        // copies[key]: see fused_resnet/backends/packing.py
  py::object convolve, program;  // convolve(x, tensors, program, residual): y, or None
};

using Calls = std::vector<Call>;

// Never destroyed: at exit the interpreter is gone before static objects are. A list that has been published
// is not changed, since what is called while it is read may remember or forget calls.
std::unordered_map<PyObject*, std::shared_ptr<const Calls>>& table() {
  static auto* const calls = new std::unordered_map<PyObject*, std::shared_ptr<const Calls>>;
  return *calls;
}

// Equality of two objects of the same built-in type, which runs no code but the interpreter's own.
bool equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (!PyLong_CheckExact(a) && !PyFloat_CheckExact(a) && !PyUnicode_CheckExact(a) && !PyBytes_CheckExact(a)) {
    return false;
  }
  return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

// The same where a pair may be written as one number.
bool same_option(PyObject* remembered, PyObject* given) {
  if (!PyTuple_CheckExact(remembered)) return equal(remembered, given);
  if (PyTuple_GET_SIZE(remembered) != 2) return false;
  PyObject *first = given, *second = given;
  if (PyTuple_CheckExact(given) && PyTuple_GET_SIZE(given) == 2) {
    first = PyTuple_GET_ITEM(given, 0), second = PyTuple_GET_ITEM(given, 1);
  }
  return equal(PyTuple_GET_ITEM(remembered, 0), first) && equal(PyTuple_GET_ITEM(remembered, 1), second);
}

bool unchanged(const Variable& variable) {
  PyObject* now = PyDict_GetItemWithError(variable.dictionary.ptr(), variable.name.ptr());
  if (now == nullptr) PyErr_Clear();
  return now == nullptr ? variable.value.is_none() : equal(variable.value.ptr(), now);
}

// Whether a call without arguments or with these returns the wanted truth; errors count as no.
bool returns(bool wanted, const py::object& function, PyObject* const* arguments, size_t count) {
  PyObject* result = PyObject_Vectorcall(function.ptr(), arguments, count, nullptr);
  const int truth = result == nullptr ? -1 : PyObject_IsTrue(result);
  Py_XDECREF(result);
  if (truth < 0) PyErr_Clear();
  return truth == int(wanted);
}

bool matches(const Call& call, PyObject* const* arguments) {
  for (size_t i = 0; i < kOptions; ++i) {
    if (!same_option(call.options[i].ptr(), arguments[kTensors + i])) return false;
  }
  for (const Variable& variable : call.variables) {
    if (!unchanged(variable)) return false;
  }
  for (const py::object& function : call.idle) {
    if (!returns(false, function, nullptr, 0)) return false;
  }
  PyObject* tensors[kTensors];
  for (size_t i = 0; i < kTensors; ++i) {
    tensors[i] = arguments[i] == Py_None ? call.absent[i].ptr() : arguments[i];
  }
  return returns(true, call.same_tensors, tensors, kTensors);
}

// The copy of the weight, a tuple in this order, if it is still true as far as the weight itself tells (its
// contents are compared by the operator); else null. `copies` is empty once the weight is gone.
enum Copy { kValue, kVersion = 2, kSamples = 4, kCopySize };

py::object find_copy(const Call& call, PyObject* weight) {
  static PyObject* const of_version = PyUnicode_InternFromString("_version");
  PyObject* const found = PyDict_GetItemWithError(call.copies.ptr(), call.key.ptr());
  if (found == nullptr || !PyTuple_Check(found) || PyTuple_GET_SIZE(found) != kCopySize) return {};
  auto copy = py::reinterpret_borrow<py::object>(found);
  // A tensor without a version was one when the copy was made: -1.
  PyObject* const version = PyTuple_GET_ITEM(found, kVersion);
  const long number = PyLong_AsLong(version);
  if (number >= 0) {
    const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(weight, of_version));
    if (!now || !equal(version, now.ptr())) return {};
  }
  return PyTuple_GET_ITEM(found, kSamples) == Py_None ? py::object() : copy;
}

// The result, None where the copy is not true any more, nullptr with an exception set.
PyObject* run(const Call& call, PyObject* const* arguments) {
  const py::object copy = find_copy(call, arguments[kWeight]);
  if (!copy) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  PyObject* present[kTensors] = {PyTuple_GET_ITEM(copy.ptr(), kValue),
                                 PyTuple_GET_ITEM(copy.ptr(), kSamples)};
  size_t count = 2;
  for (size_t i = kWeight; i < kResidual; ++i) {
    if (arguments[i] != Py_None) present[count++] = arguments[i];
  }
  const auto tensors = py::reinterpret_steal<py::object>(PyList_New(Py_ssize_t(count)));
  if (!tensors) return nullptr;
  for (size_t i = 0; i < count; ++i) {
    Py_INCREF(present[i]);
    PyList_SET_ITEM(tensors.ptr(), Py_ssize_t(i), present[i]);
  }
  PyObject* const of_convolve[] = {arguments[0], tensors.ptr(), call.program.ptr(), arguments[kResidual]};
  return PyObject_Vectorcall(call.convolve.ptr(), of_convolve, 4, nullptr);
}

PyObject* repeat(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != Py_ssize_t(kTensors + kOptions)) {
    return PyErr_Format(PyExc_TypeError, "repeat: expected %zu arguments, got %zd", kTensors + kOptions,
                        count);
  }
  const auto found = table().find(arguments[kWeight]);
  if (found == table().end()) Py_RETURN_NONE;
  const std::shared_ptr<const Calls> calls = found->second;
  for (const Call& call : *calls) {
    if (matches(call, arguments)) return run(call, arguments);
  }
  Py_RETURN_NONE;
}

PyMethodDef kRepeat = {
    "repeat", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&repeat)), METH_FASTCALL,
    "The result of a call that has been remembered and that these arguments repeat, or None."};

// The newest call of a weight is looked at first.
void remember(const py::object& weight, const py::tuple& options, const py::tuple& idle,
              const py::tuple& variables, const py::tuple& absent, py::object same_tensors, py::dict copies,
              py::object key, py::object convolve, py::object program) {
  if (options.size() != kOptions || absent.size() != kTensors) {
    throw py::value_error("remember_repeat: expected 9 options and 8 absent tensors");
  }
  Call call;
  for (size_t i = 0; i < kOptions; ++i) call.options[i] = options[i];
  for (size_t i = 0; i < kTensors; ++i) call.absent[i] = absent[i];
  for (const py::handle function : idle) call.idle.push_back(py::reinterpret_borrow<py::object>(function));
  for (const py::handle variable : variables) {
    const auto [dictionary, name, value] = variable.cast<std::tuple<py::dict, py::object, py::object>>();
    call.variables.push_back({dictionary, name, value});
  }
  call.same_tensors = std::move(same_tensors);
  call.copies = std::move(copies), call.key = std::move(key);
  call.convolve = std::move(convolve), call.program = std::move(program);

  std::shared_ptr<const Calls>& place = table()[weight.ptr()];
  auto calls = std::make_shared<Calls>(1, std::move(call));
  if (place)
    calls->insert(calls->end(), place->begin(), place->begin() + std::min(place->size(), kCallsOfWeight - 1));
  const std::shared_ptr<const Calls> before = std::exchange(place, std::move(calls));  // dies last
}

// What was remembered is destroyed when the table is whole again: to destroy an object may run any code.
void forget() {
  std::unordered_map<PyObject*, std::shared_ptr<const Calls>> forgotten;
  forgotten.swap(table());
}

}  // namespace

void define_repeat(py::module_& m) {
  m.add_object("repeat", py::reinterpret_steal<py::object>(PyCFunction_New(&kRepeat, nullptr)));
  m.def("remember_repeat", &remember, "Remember a call for repeat; see fused_resnet/ops/direct.py.");
  m.def("forget_repeats", &forget, "Forget all remembered calls.");
}

}  // namespace fused_resnet
