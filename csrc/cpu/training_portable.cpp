#include "training_kernel.h"
#include "weight_gradient_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingPortable = TrainingImpl<4>::kernel();
constexpr WeightGradientKernel kWeightGradientPortable =
    WeightGradientImpl<RegisterBlock<4, 4, 2>, Winograd<2>>::kernel();
}  // namespace fused_resnet::cpu
