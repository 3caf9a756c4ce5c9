#include "distill/order.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/random.h"

namespace dsla {

nlohmann::json OrderState::ToJson() const {
  return {{"method", method},
          {"single", single},
          {"entropy", entropy},
          {"ladder", ladder},
          {"cost", cost}};
}

Expected<OrderState> OrderState::FromJson(const nlohmann::json& json, int L,
                                          const std::string& path) {
  OrderState state;
  const auto numbers = [&](const char* key, auto& to) {
    if (!json.contains(key) || !json[key].is_array()) return false;
    for (const auto& value : json[key]) {
      if (!value.is_number()) return false;
      to.push_back(value.template get<typename std::decay_t<decltype(to)>::value_type>());
    }
    return true;
  };
  if (!json.is_object() || !json.contains("method") || !json["method"].is_string() ||
      !numbers("single", state.single) || !numbers("entropy", state.entropy) ||
      !numbers("ladder", state.ladder) || !numbers("cost", state.cost))
    return DataLoss("'{}' is no order of layers", path);
  state.method = json["method"];
  std::vector<bool> seen(L, false);
  for (const int l : state.ladder) {
    if (l < 0 || l >= L || seen[l]) return DataLoss("'{}': a wrong ladder", path);
    seen[l] = true;
  }
  return state;
}

void AdvanceGreedy(OrderState& state, int L, int candidates, const MeasureSets& measure) {
  if (static_cast<int>(state.single.size()) != L) {
    std::vector<std::vector<int>> sets;
    for (int l = 0; l < L; ++l) sets.push_back({l});
    state.single = measure(sets);
    return;
  }
  std::vector<int> rest;
  for (const int l : Ascending(state.single))
    if (std::find(state.ladder.begin(), state.ladder.end(), l) == state.ladder.end())
      rest.push_back(l);
  rest.resize(std::min<size_t>(rest.size(), candidates));
  std::vector<std::vector<int>> sets;
  for (const int l : rest) {
    sets.push_back(state.ladder);
    sets.back().push_back(l);
  }
  const std::vector<double> costs = measure(sets);
  const size_t best = std::min_element(costs.begin(), costs.end()) - costs.begin();
  state.ladder.push_back(rest[best]);
  state.cost.push_back(costs[best]);
}

std::vector<int> Ascending(const std::vector<double>& values) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] < values[b]; });
  return order;
}

std::vector<int> RandomOrder(int L, uint64_t seed) {
  std::vector<int> order(L);
  std::iota(order.begin(), order.end(), 0);
  Random random(seed, {0x04de4});
  for (int i = L - 1; i > 0; --i) std::swap(order[i], order[random.Between(0, i)]);
  return order;
}

std::vector<int> UniformOrder(int L) {
  std::vector<int> order;
  std::vector<bool> taken(L, false);
  while (static_cast<int>(order.size()) < L) {
    int best = -1, best_distance = -1;
    for (int l = 0; l < L; ++l) {
      if (taken[l]) continue;
      int distance = std::min(l + 1, L - l);  // the ends count as taken
      for (const int other : order) distance = std::min(distance, std::abs(l - other));
      if (distance > best_distance) best = l, best_distance = distance;
    }
    taken[best] = true;
    order.push_back(best);
  }
  return order;
}

double RankCorrelation(const std::vector<double>& a, const std::vector<double>& b) {
  const size_t n = a.size();
  DSLA_CHECK(b.size() == n);
  if (n < 2) return 0;
  const auto ranks = [](const std::vector<double>& values) {
    std::vector<double> rank(values.size());
    const std::vector<int> order = Ascending(values);
    for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<double>(i);
    return rank;
  };
  const std::vector<double> ra = ranks(a), rb = ranks(b);
  const double mean = static_cast<double>(n - 1) / 2;
  double both = 0, each = 0;
  for (size_t i = 0; i < n; ++i) {
    both += (ra[i] - mean) * (rb[i] - mean);
    each += (ra[i] - mean) * (ra[i] - mean);
  }
  return both / each;
}

}  // namespace dsla
