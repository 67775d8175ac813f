#include "training.h"
#include "training_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingPortable = TrainingImpl<4>::kernel("portable");
}  // namespace fused_resnet::cpu
