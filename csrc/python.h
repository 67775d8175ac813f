// Python's stable ABI, as far as our modules need it: one module serves every Python from 3.10 on.
//
// Owned references, values to and from Python, and C++ exceptions as Python's: std::invalid_argument is a
// ValueError, TypeError a TypeError, Raised what Python has raised itself, anything else a RuntimeError.
#pragma once

#ifndef Py_LIMITED_API
  #define Py_LIMITED_API 0x030a0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace fused_resnet::python {

struct Raised {};
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {
    if (!owned) throw Raised();
  }
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object& operator=(Object&&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

inline void check(int status) {
  if (status < 0) throw Raised();
}

template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
Object value(T number) {
  return Object(PyLong_FromLongLong(number));
}
inline Object value(const char* text) {
  return Object(PyUnicode_FromString(text));
}
inline Object value(const std::string& text) {
  return value(text.c_str());
}
inline Object value(Object object) {
  return object;
}
inline Object none() {
  Py_INCREF(Py_None);
  return Object(Py_None);
}

template <class T>
Object bytes(const T& from) {
  static_assert(std::is_trivially_copyable_v<T>);
  return Object(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&from), sizeof(from)));
}

// What `bytes` made of a T.
template <class T>
T from_bytes(PyObject* object) {
  static_assert(std::is_trivially_copyable_v<T>);
  char* data = nullptr;
  Py_ssize_t size = 0;
  check(PyBytes_AsStringAndSize(object, &data, &size));
  if (size != sizeof(T)) throw std::invalid_argument("expected the bytes of another structure");
  T result;
  __builtin_memcpy(static_cast<void*>(&result), data, sizeof(T));
  return result;
}

template <class T>
void set(const Object& dict, const char* key, T&& item) {
  check(PyDict_SetItemString(dict.get(), key, value(std::forward<T>(item)).get()));
}

template <class T>
void add(PyObject* module, const char* name, T&& item) {
  Object object = value(std::forward<T>(item));
  check(PyModule_AddObjectRef(module, name, object.get()));
}

inline Object dict(std::initializer_list<std::pair<const char*, int64_t>> items = {}) {
  Object made(PyDict_New());
  for (const auto& [key, number] : items) set(made, key, number);
  return made;
}

template <class T>
void append(const Object& list, T&& item) {
  check(PyList_Append(list.get(), value(std::forward<T>(item)).get()));
}

inline std::string text_of(PyObject* object) {
  const Object text(PyObject_Str(object));
  const char* data = PyUnicode_AsUTF8AndSize(text.get(), nullptr);
  if (!data) throw Raised();
  return data;
}

// An integer of so many bits; std::invalid_argument with `name` for anything else.
inline int64_t integer(PyObject* object, int bits, const std::string& name) {
  const long long number = PyLong_AsLongLong(object);
  const bool failed = number == -1 && PyErr_Occurred();
  if (failed || (bits == 32 && number != static_cast<int32_t>(number))) {
    PyErr_Clear();
    throw std::invalid_argument(name + ": expected a number of " + std::to_string(bits) + " bits, got " +
                                text_of(object));
  }
  return number;
}

// body(name, object) for each item of a dict; null is an empty one.
template <class Body>
void for_items(PyObject* items, Body&& body) {
  PyObject *key, *item;
  Py_ssize_t position = 0;
  while (items && PyDict_Next(items, &position, &key, &item)) body(text_of(key), item);
}

// What a function of a module returns: the object that `body` makes, or null with Python's error set.
template <class Body>
PyObject* answer(Body&& body) noexcept {
  try {
    return body().release();
  } catch (const Raised&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// For PyMethodDef, whose functions are all of one type there.
template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fused_resnet::python
