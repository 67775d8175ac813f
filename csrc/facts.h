// Facts about Python objects, compared on each call of a fused block.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

// Adds the class Facts to the module.
void define_facts(pybind11::module_& m);

}  // namespace fused_resnet
