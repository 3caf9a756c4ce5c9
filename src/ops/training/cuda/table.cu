#include "ops/training/cuda/training.cuh"

extern "C" const dsla::cuda::TrainingKernels* DslaTrainingKernels() {
  using namespace dsla::cuda;
  static constexpr TrainingKernels kKernels = {
      TrainingPrepare,       TrainingScan,           TrainingCausal,    TrainingMerge,
      TrainingMergeBackward, TrainingScanBackward,   TrainingGradients, TrainingRope,
      TrainingSwiGlu,        TrainingSwiGluBackward, TrainingKl,        TrainingErrorSums,
      TrainingErrorGradient};
  return &kKernels;
}
