// Head dim 128; the other one has a file of its own, so that both compile at once.
#include "ops/attention/cuda/prefill_hopper.cuh"

namespace dsla::cuda {
template int HopperPrefill<128>(const PrefillAttentionArgs&, const HopperPlan&, bool, Stream);
}  // namespace dsla::cuda
