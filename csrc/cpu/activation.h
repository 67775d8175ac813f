#pragma once

namespace fused_resnet::cpu {

enum class Activation : int { kNone, kRelu, kRelu6 };

}  // namespace fused_resnet::cpu
