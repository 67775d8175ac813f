// A Python module of the planner alone: of a source tree with a bug in it (test_mutants.py). Its name is
// given on the command line, since Python keeps one module of each name.
#include "bindings_planner.h"

#define NAMED(prefix, name) prefix##name
#define INIT(name) NAMED(PyInit_, name)

namespace {
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "a mutated planner", nullptr, -1, nullptr};
}

PyMODINIT_FUNC INIT(MUTATED_PLANNER)() {
  return fused_resnet::python::answer([] {
    fused_resnet::python::Object module(PyModule_Create(&kModule));
    fused_resnet::bind_planner(module.get());
    return module;
  });
}
