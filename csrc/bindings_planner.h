// The launch planner in Python: part of _C, and of _C_cuda, which launches what it plans.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

void bind_planner(pybind11::module_& m);

}  // namespace fused_resnet
