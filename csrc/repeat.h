#pragma once

#include <pybind11/pybind11.h>

namespace fused_resnet {

// repeat, remember_repeat and forget_repeats; see repeat.cpp.
void define_repeat(pybind11::module_& m);

}  // namespace fused_resnet
