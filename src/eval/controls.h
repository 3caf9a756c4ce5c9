// Controls: what an adapter's figures must stand beside. Each is the adapter itself with one thing
// changed, so that it runs through the same code:
//   window   no states and nothing trained: sinks and a softmax window of as many bytes as states,
//            window and sinks take together (W + states F tokens of bf16 cache)
//   zeroed   the states never get a share; window, sinks and the trained deltas stay
//   history, recency   one of the two states alone, with all of the states' share
//   bypass   the converted layers' attention gives zero
//   random-order, entropy-order, given-order   the same trained layers, converted in another order
// An adapter binds its weights to layers, whatever the ladder, so any order can be measured with
// it. But its layers were trained together along its own ladder, which favours that one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "format/adapter.h"
#include "model/hybrid_model.h"

namespace dsla {

enum class Control {
  kWindow,
  kZeroed,
  kHistory,
  kRecency,
  kBypass,
  kRandomOrder,
  kEntropyOrder,
  kGivenOrder,
};
const char* Name(Control control);
// kInvalidArgument, naming all there are, for an unknown one.
Expected<Control> ParseControl(std::string_view name);
// All that `adapter` has but kGivenOrder, which needs an order.
std::vector<Control> ControlsOf(const Adapter& adapter);

// The adapter with one of the first five changes. kInvalidArgument where the adapter lacks what the
// control leaves (no window, a single state).
Expected<std::shared_ptr<const Adapter>> ControlAdapter(const Adapter& adapter,
                                                        const ModelConfig& base, Control control);

// The adapter with another ladder. `order` names layers, each once; those that it leaves out follow
// in the adapter's own order. kInvalidArgument, naming the layer, for one that is not there or
// comes twice.
Expected<std::shared_ptr<const Adapter>> WithOrder(const Adapter& adapter,
                                                   std::span<const int> order);

std::vector<int> RandomLayerOrder(int L, uint64_t seed);

// The entropy in bits of each layer's softmax attention at the last token of each text, the mean
// over heads and texts: ascending it is the order of Ro et al. (ICML 2025). Texts fit the context;
// at least one token each.
Expected<std::vector<double>> AttentionEntropy(const ExecContext& ctx, const HybridModel& model,
                                               CachePool& pool,
                                               std::span<const std::span<const int32_t>> texts);
// Layers by ascending value, ties by number.
std::vector<int> OrderBy(std::span<const double> values);

}  // namespace dsla
