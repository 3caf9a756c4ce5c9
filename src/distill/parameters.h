// The trained parameters of an adapter as one array: layer after layer, each layer's tensors one
// after another in the order of the adapter format. That the low-rank deltas come first matters:
// they have a learning rate of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/adapter.h"
#include "format/config.h"

namespace dsla {

// What a converted layer computes. Only kDsla can be served; the others are controls, trained and
// measured beside it.
enum class Operator {
  kDsla,    // the project's: window, sinks and states that can be folded out of a KV cache
  kWindow,  // exact attention over window and sinks alone
  kPaper,   // that of Ro et al. (ICML 2025): gates from the layer's input through a low rank,
            // neither feature map nor denominator nor RoPE, K and V with deltas of their own
};
constexpr int kPaperGateRank = 16;  // gated linear attention's (Yang et al., ICML 2024)

// What all layers of a trained adapter share.
struct AdapterSettings {
  int window = 332;              // W, tokens; 0: the states alone
  int sinks = 4;                 // S, tokens; 0 if window is 0
  int states = 1;                // 1: history alone; 2: history and recency
  int features_per_channel = 1;  // F = this times D: 1 or 2
  int rank = 48;                 // r of the low-rank deltas on W_q and W_o; 0: none
  double gate_floor = -2.25;     // smallest log gate
  Operator op = Operator::kDsla;

  friend bool operator==(const AdapterSettings&, const AdapterSettings&) = default;
};

// Half-lives in tokens, log-spaced over the channels, that the gates start with. Behind a window of
// some hundred tokens a state that forgets within a few says little.
struct HalfLives {
  double history_min = 256, history_max = 8192;
  double recency_min = 8, recency_max = 512;
};

struct ParameterTensor {
  std::string name;  // the suffix in the adapter format: q_a, phi_k, ...
  std::vector<int64_t> shape;
  int64_t offset = 0, size = 0;  // in the layer's row
};

class ParameterLayout {
 public:
  // Errors: kInvalidArgument for settings outside the adapter format.
  static Expected<ParameterLayout> Create(const ModelConfig& config,
                                          const AdapterSettings& settings);

  const AdapterSettings& settings() const { return settings_; }
  const std::vector<ParameterTensor>& tensors() const { return tensors_; }
  int layers() const { return layers_; }
  int64_t row() const { return row_; }            // parameters of one layer
  int64_t low_rank() const { return low_rank_; }  // the first of them: low-rank deltas
  int64_t size() const { return layers_ * row_; }
  const ParameterTensor* Find(const std::string& name) const;  // null: not with these settings

  // The start: maps are the identity, the deltas' outer halves zero (so the layer starts as the
  // teacher's projections), gates depend on their bias alone and spread over `half_lives`, shuffled
  // over the channels with `seed`; claims are zero and are set from a first batch.
  std::vector<float> Start(const HalfLives& half_lives, uint64_t seed) const;

  // Of Operator::kDsla alone, as FromAdapter.
  Adapter ToAdapter(std::span<const float> values) const;
  // The values of an adapter with exactly these settings in every layer; kInvalidArgument, naming
  // the setting and `path`, for another.
  Expected<std::vector<float>> FromAdapter(const Adapter& adapter, const std::string& path) const;

 private:
  AdapterLayer EmptyLayer() const;
  void Add(const std::string& name, std::vector<int64_t> shape);

  AdapterSettings settings_;
  std::vector<ParameterTensor> tensors_;
  int layers_ = 0;
  int64_t row_ = 0, low_rank_ = 0;
  int64_t C_ = 0, H_ = 0, Hkv_ = 0, D_ = 0;
};

// The bias b with logsigmoid(b) / 16 = -ln 2 / half_life: a gate that halves a state in so many
// tokens.
double GateBias(double half_life);

}  // namespace dsla
