// The class fused_resnet._C.Facts: whether modules, and the dictionaries that make them up, are what they
// were.
//
// A fused block may stand for its submodules' calls only while they have their classes, no hooks, their own
// Parameters and their numbers. In Python a look at each costs 10 microseconds for a block of two
// convolutions, three times as much where the caches are cold; here the loads are independent of one another
// and overlap.
#include "facts.h"

#include <vector>

namespace fused_resnet {
namespace {

namespace py = pybind11;

// Everything is compared by identity. Each pointer owns a reference; Python's cycle collector sees them all.
class Facts {
 public:
  Facts() = default;
  Facts(const Facts&) = delete;
  Facts& operator=(const Facts&) = delete;
  ~Facts() { clear(); }

  // `object` keeps its class and its __dict__.
  void object(const py::object& object) {
    objects_.push_back({own(object), own(py::type::of(object)),
                        own(py::reinterpret_steal<py::object>(dict_of(object.ptr())))});
  }

  // dictionary[key] is `value`. None in place of the dictionary stands for the __dict__ of hold's argument.
  void item(const py::object& dictionary, const py::object& key, const py::object& value) {
    items_.push_back({dictionary.is_none() ? nullptr : own(checked(dictionary)), own(key), own(value)});
  }

  // There is no dictionary[key].
  void absent(const py::object& dictionary, const py::object& key) {
    items_.push_back({dictionary.is_none() ? nullptr : own(checked(dictionary)), own(key), nullptr});
  }

  // len(dictionary) is `size`.
  void size(const py::object& dictionary, Py_ssize_t size) {
    sizes_.push_back({own(checked(dictionary)), size});
  }

  // Whether all of it is so now.
  bool hold(const py::object& root) const {
    for (const Object& fact : objects_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(fact.object)) != fact.type) return false;
      PyObject* dictionary = dict_of(fact.object);
      Py_DECREF(dictionary);  // the object keeps it
      if (dictionary != fact.dictionary) return false;
    }
    const auto root_dictionary = py::reinterpret_steal<py::object>(dict_of(root.ptr()));
    for (size_t i = 0; i < items_.size(); ++i) {
      // A lookup waits for the dictionary, then for its table; in a network neither is in a cache.
      prefetch_table(i + kTableAhead);
      prefetch_dictionary(i + kDictionaryAhead);
      const Item& fact = items_[i];
      PyObject* dictionary = fact.dictionary == nullptr ? root_dictionary.ptr() : fact.dictionary;
      PyObject* now = PyDict_GetItemWithError(dictionary, fact.key);
      if (now == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (now != fact.value) return false;
    }
    for (const Size& fact : sizes_) {
      if (PyDict_Size(fact.dictionary) != fact.size) return false;
    }
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    for (const auto& fact : objects_) {
      Py_VISIT(fact.object);
      Py_VISIT(fact.type);
      Py_VISIT(fact.dictionary);
    }
    for (const auto& fact : items_) {
      Py_VISIT(fact.dictionary);
      Py_VISIT(fact.key);
      Py_VISIT(fact.value);
    }
    for (const auto& fact : sizes_) Py_VISIT(fact.dictionary);
    return 0;
  }

  void clear() {
    // Emptied before the references go: what they end may look here again.
    std::vector<PyObject*> owned;
    for (const auto& fact : objects_) owned.insert(owned.end(), {fact.object, fact.type, fact.dictionary});
    for (const auto& fact : items_) owned.insert(owned.end(), {fact.dictionary, fact.key, fact.value});
    for (const auto& fact : sizes_) owned.push_back(fact.dictionary);
    objects_.clear(), items_.clear(), sizes_.clear();
    for (PyObject* object : owned) Py_XDECREF(object);
  }

 private:
  struct Object {
    PyObject *object, *type, *dictionary;
  };
  struct Item {
    PyObject *dictionary, *key, *value;  // null: the root's, absent
  };
  struct Size {
    PyObject* dictionary;
    Py_ssize_t size;
  };

  static constexpr size_t kTableAhead = 8, kDictionaryAhead = 16;

  void prefetch_dictionary([[maybe_unused]] size_t i) const {
#if defined(__GNUC__)
    if (i < items_.size() && items_[i].dictionary != nullptr) __builtin_prefetch(items_[i].dictionary);
#endif
  }

  void prefetch_table([[maybe_unused]] size_t i) const {
#if defined(__GNUC__)
    if (i >= items_.size() || items_[i].dictionary == nullptr) return;
    const auto* table = reinterpret_cast<PyDictObject*>(items_[i].dictionary)->ma_keys;
    __builtin_prefetch(table);
    __builtin_prefetch(reinterpret_cast<const char*>(table) + 64);
    __builtin_prefetch(reinterpret_cast<const char*>(table) + 128);
#endif
  }

  static PyObject* own(const py::handle& object) { return object.inc_ref().ptr(); }

  static PyObject* dict_of(PyObject* object) {
    PyObject* dictionary = PyObject_GenericGetDict(object, nullptr);
    if (dictionary == nullptr) throw py::error_already_set();
    return dictionary;
  }

  static const py::object& checked(const py::object& dictionary) {
    if (!PyDict_Check(dictionary.ptr()))
      throw py::type_error("dictionary: expected a dict, got another object");
    return dictionary;
  }

  std::vector<Object> objects_;
  std::vector<Item> items_;
  std::vector<Size> sizes_;
};

void join_cycle_collector(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  // Python may look before the constructor has run.
  static constexpr auto constructed = [](PyObject* self) {
    return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
  };
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!constructed(self)) return 0;
    return py::cast<Facts&>(py::handle(self)).visit(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (constructed(self)) py::cast<Facts&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

void define_facts(py::module_& m) {
  py::class_<Facts>(
      m, "Facts", py::custom_type_setup(join_cycle_collector),
      "What a set of objects and dictionaries was, all by identity; hold(root) says whether it still is.")
      .def(py::init<>())
      .def("object", &Facts::object)
      .def("item", &Facts::item)
      .def("absent", &Facts::absent)
      .def("size", &Facts::size)
      .def("hold", &Facts::hold);
}

}  // namespace fused_resnet
