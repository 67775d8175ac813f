#include "training_kernel.h"
#include "weight_gradient_kernel.h"

namespace fused_resnet::cpu {
constexpr TrainingKernel kTrainingPortable = TrainingImpl<4>::kernel();
using WeightGradientPortable = RegisterBlock<4, 4, 2>;
constexpr WeightGradientKernels kWeightGradientPortable = {
    WeightGradientImpl<WeightGradientPortable, Winograd<2>>::kernel(),
    WeightGradientImpl<WeightGradientPortable, Winograd<4>>::kernel()};
}  // namespace fused_resnet::cpu
