// What tells whether tensors are, in full, what they were.
#pragma once

#include "checksum.h"
#include "tensors.h"

namespace fused_resnet::cpu {

// The checksum of a weight: its sizes, its strides and all of its bytes, by as many threads as torch has.
Digest checksum_of(const Tensor& t);

// Whether `taken`, of fused_resnet_C::checksum for this one tensor, is the checksum of `t` now.
bool checksum_holds(const Tensor& taken, const Tensor& t);

}  // namespace fused_resnet::cpu
