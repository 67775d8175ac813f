#include "training_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingPortable = TrainingImpl<4>::kernel();
}  // namespace fused_resnet::cpu
