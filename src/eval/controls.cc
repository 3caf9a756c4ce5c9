#include "eval/controls.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/half.h"
#include "base/random.h"

namespace dsla {
namespace {

constexpr Control kAll[] = {Control::kWindow,       Control::kZeroed,    Control::kHistory,
                            Control::kRecency,      Control::kBypass,    Control::kRandomOrder,
                            Control::kEntropyOrder, Control::kGivenOrder};

// Far beyond where e^-x is zero in fp32, and exact in bf16: a logit of certainty.
constexpr float kCertain = 16384.f;

void NeverClaim(AdapterLayer& layer, const ModelConfig& base) {
  layer.claim.assign(static_cast<size_t>(base.H) * base.C, 0.f);
  layer.claim_bias.assign(base.H, -kCertain);
}

void DropDeltas(AdapterLayer& layer) {
  layer.rank = 0;
  for (std::vector<float>* delta : {&layer.q_a, &layer.q_b, &layer.o_a, &layer.o_b}) delta->clear();
}

// Gates that never let anything in: with no window the output is 0 / (0 + epsilon).
void Bypass(AdapterLayer& layer, const ModelConfig& base) {
  DropDeltas(layer);
  layer.window = layer.sinks = 0;
  layer.states = 1;
  layer.features = base.D;
  const size_t channels = static_cast<size_t>(base.Hkv) * layer.features;
  layer.gate_weight.assign(channels * base.D, 0.f);
  layer.gate_bias.assign(channels, kCertain);
  layer.mix.assign(base.H, 0.f);
  layer.claim.clear();
  layer.claim_bias.clear();
}

// The dot product of q with a key in the cache's type.
template <typename T>
double Score(std::span<const float> q, const T* k) {
  double sum = 0;
  for (size_t d = 0; d < q.size(); ++d) sum += double{q[d]} * ToFloat(k[d]);
  return sum;
}

double EntropyBits(std::span<const double> scores) {
  const double max = *std::max_element(scores.begin(), scores.end());
  double sum = 0, weighted = 0;
  for (const double s : scores) {
    const double e = std::exp(s - max);
    sum += e;
    weighted += e * (s - max);
  }
  return (std::log(sum) - weighted / sum) / std::log(2.0);
}

// Mean over heads of the entropy of queries q [H, D] over the first `tokens` cached keys.
double LayerEntropy(const ModelConfig& config, const PagedKvView& kv,
                    std::span<const int32_t> pages, int tokens, std::span<const float> q) {
  const double scale = 1 / std::sqrt(static_cast<double>(config.D));
  const int first = config.sliding_window > 0 ? std::max(0, tokens - config.sliding_window) : 0;
  std::vector<double> scores(tokens - first);
  double sum = 0;
  for (int h = 0; h < config.H; ++h) {
    const auto query = q.subspan(static_cast<size_t>(h) * config.D, config.D);
    const int64_t kv_head = h / (config.H / config.Hkv);
    for (int t = first; t < tokens; ++t) {
      const int64_t at = pages[t / kv.page_size] * kv.page_stride +
                         (kv_head * kv.page_size + t % kv.page_size) * config.D;
      scores[t - first] =
          scale * (kv.dtype == DType::kF32 ? Score(query, static_cast<const float*>(kv.k) + at)
                                           : Score(query, static_cast<const bf16*>(kv.k) + at));
    }
    sum += EntropyBits(scores);
  }
  return sum / config.H;
}

}  // namespace

const char* Name(Control control) {
  switch (control) {
    case Control::kWindow:
      return "window";
    case Control::kZeroed:
      return "zeroed";
    case Control::kHistory:
      return "history";
    case Control::kRecency:
      return "recency";
    case Control::kBypass:
      return "bypass";
    case Control::kRandomOrder:
      return "random-order";
    case Control::kEntropyOrder:
      return "entropy-order";
    case Control::kGivenOrder:
      return "given-order";
  }
  return "?";
}

Expected<Control> ParseControl(std::string_view name) {
  std::string all;
  for (const Control control : kAll) {
    if (name == Name(control)) return control;
    if (control != Control::kGivenOrder)
      all += fmt::format("{}{}", all.empty() ? "" : ", ", Name(control));
  }
  return InvalidArgument("control '{}' is not one of {}, all", name, all);
}

std::vector<Control> ControlsOf(const Adapter& adapter) {
  std::vector<Control> controls;
  const bool windows = std::all_of(adapter.layers.begin(), adapter.layers.end(),
                                   [](const AdapterLayer& layer) { return layer.window > 0; });
  const bool dual = std::all_of(adapter.layers.begin(), adapter.layers.end(),
                                [](const AdapterLayer& layer) { return layer.states == 2; });
  for (const Control control : kAll) {
    if (control == Control::kGivenOrder || (control == Control::kZeroed && !windows)) continue;
    if ((control == Control::kHistory || control == Control::kRecency) && !dual) continue;
    controls.push_back(control);
  }
  return controls;
}

Expected<std::shared_ptr<const Adapter>> ControlAdapter(const Adapter& adapter,
                                                        const ModelConfig& base, Control control) {
  auto changed = std::make_shared<Adapter>(adapter);
  for (size_t l = 0; l < changed->layers.size(); ++l) {
    AdapterLayer& layer = changed->layers[l];
    switch (control) {
      case Control::kWindow:
        layer.window += layer.states * layer.features;
        DropDeltas(layer);
        NeverClaim(layer, base);
        break;
      case Control::kZeroed:
        if (layer.window == 0)
          return InvalidArgument("control zeroed: layer {} of the adapter has no window", l);
        NeverClaim(layer, base);
        break;
      case Control::kHistory:
      case Control::kRecency:
        if (layer.states != 2)
          return InvalidArgument("control {}: layer {} of the adapter has one state", Name(control),
                                 l);
        for (int h = 0; h < base.H; ++h) {
          layer.mix[2 * h] = control == Control::kHistory ? 0 : -kCertain;
          layer.mix[2 * h + 1] = control == Control::kRecency ? 0 : -kCertain;
        }
        break;
      case Control::kBypass:
        Bypass(layer, base);
        break;
      case Control::kRandomOrder:
      case Control::kEntropyOrder:
      case Control::kGivenOrder:
        DSLA_CHECK(false);
    }
  }
  return std::shared_ptr<const Adapter>(std::move(changed));
}

Expected<std::shared_ptr<const Adapter>> WithOrder(const Adapter& adapter,
                                                   std::span<const int> order) {
  const int L = static_cast<int>(adapter.layers.size());
  auto changed = std::make_shared<Adapter>(adapter);
  changed->ladder.clear();
  std::vector<bool> taken(L, false);
  for (const int layer : order) {
    if (layer < 0 || layer >= L)
      return InvalidArgument("order: there is no layer {}, only 0 to {}", layer, L - 1);
    if (taken[layer]) return InvalidArgument("order: layer {} comes twice", layer);
    taken[layer] = true;
    changed->ladder.push_back(layer);
  }
  for (const int layer : adapter.ladder)
    if (!taken[layer]) changed->ladder.push_back(layer);
  return std::shared_ptr<const Adapter>(std::move(changed));
}

std::vector<int> RandomLayerOrder(int L, uint64_t seed) {
  std::vector<int> order(L);
  std::iota(order.begin(), order.end(), 0);
  Random random(seed, {0x04de4});
  for (int i = L - 1; i > 0; --i) std::swap(order[i], order[random.Between(0, i)]);
  return order;
}

Expected<std::vector<double>> AttentionEntropy(const ExecContext& ctx, const HybridModel& model,
                                               CachePool& pool,
                                               std::span<const std::span<const int32_t>> texts) {
  constexpr size_t kChunk = 512;
  std::vector<double> entropy(model.config().L, 0);
  for (const auto& text : texts) {
    DSLA_CHECK(!text.empty() && static_cast<int64_t>(text.size()) <= model.max_positions());
    SequenceCache cache = model.NewSequence(pool, 0);
    Buffer<float> logits;
    for (size_t begin = 0; begin + 1 < text.size(); begin += kChunk) {
      const size_t count = std::min(kChunk, text.size() - 1 - begin);
      DSLA_RETURN_IF_ERROR(model.Append(ctx, pool, cache, text.subspan(begin, count), 0, logits));
    }
    const int tokens = static_cast<int>(text.size());
    DSLA_RETURN_IF_ERROR(model.AppendVisiting(
        ctx, pool, cache, text.back(), [&](int layer, std::span<const float> q) {
          entropy[layer] +=
              LayerEntropy(model.config(), pool.pages(), cache.pages(layer), tokens, q) /
              static_cast<double>(texts.size());
        }));
  }
  return entropy;
}

std::vector<int> OrderBy(std::span<const double> values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] < values[b]; });
  return order;
}

}  // namespace dsla
