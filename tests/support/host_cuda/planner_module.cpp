// A Python module of the planner alone: of a source tree with a bug in it (test_mutants.py).
#include "bindings_planner.h"

PYBIND11_MODULE(mutated_planner, m) {
  fused_resnet::bind_planner(m);
}
