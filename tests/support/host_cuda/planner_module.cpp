// A Python module of the planner alone: of a source tree with a bug in it (test_mutants.py). Its name is
// given on the command line, since pybind11 keeps one module of each name.
#include "bindings_planner.h"

PYBIND11_MODULE(MUTATED_PLANNER, m) {
  fused_resnet::bind_planner(m);
}
