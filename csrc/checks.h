// The one way in which C++ code refuses an argument: which one, what was expected, what was got.
// No Torch header, so that kernels built without Torch can use it; PyTorch turns the exception into a
// RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fused_resnet {

// check(weight.dim() == 4, "weight", "4 dimensions", weight.dim());  the message is made only when it is
// needed.
template <class... Got>
inline void check(bool holds, const char* argument, const char* expected, const Got&... got) {
  if (holds) return;
  std::ostringstream message;
  message << argument << ": expected " << expected << ", got ";
  (message << ... << got);
  throw std::invalid_argument(message.str());
}

}  // namespace fused_resnet
