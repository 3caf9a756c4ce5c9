// The order in which layers convert: the ladder.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace dsla {

// How far an order has come. Everything that is known is kept, so that a search goes on from here.
struct OrderState {
  std::string method;
  std::vector<double> single;   // greedy: the cost of each layer converted alone, nats per token
  std::vector<double> entropy;  // bits, by layer: the paper's measure
  std::vector<int> ladder;      // the rungs found so far
  std::vector<double> cost;     // greedy: of the first 1, 2, ... rungs together

  nlohmann::json ToJson() const;
  // kDataLoss, naming `path`, for what is no such state of L layers.
  static Expected<OrderState> FromJson(const nlohmann::json& json, int L, const std::string& path);
};

// Costs of hybrids, each with these layers converted.
using MeasureSets =
    std::function<std::vector<double>(const std::vector<std::vector<int>>& converted)>;

// Greedy: the next rung is the layer that costs least on top of those before it, among the
// `candidates` that cost least alone. One call finds one rung (the first also measures each layer
// alone). The costs are measured with the trained branches in place, not taken from the teacher:
// what a layer does for copying shows only there.
void AdvanceGreedy(OrderState& state, int L, int candidates, const MeasureSets& measure);

// Ascending by value, ties by layer.
std::vector<int> Ascending(const std::vector<double>& values);
std::vector<int> RandomOrder(int L, uint64_t seed);
// Spread evenly over depth: each next layer is the one farthest from those before it, the first and
// last layers coming late.
std::vector<int> UniformOrder(int L);

// Spearman's rank correlation of two equally long lists.
double RankCorrelation(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace dsla
