// The launch planner in Python: part of _C, and of _C_cuda, which launches what it plans.
#pragma once

#include "python.h"

namespace fused_resnet {

void bind_planner(PyObject* module);

}  // namespace fused_resnet
