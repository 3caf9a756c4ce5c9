#include "engine/replica_router.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "cache/prefix_key.h"

namespace dsla {

ReplicaRouter::ReplicaRouter(const RouterOptions& options)
    : options_(options), loads_(static_cast<size_t>(options.replicas)) {
  DSLA_CHECK(options.replicas >= 1 && options.replicas <= kMostReplicas);
}

ReplicaRouter::Place ReplicaRouter::Take(const RoutedPrompt& prompt, const std::vector<bool>& may) {
  DSLA_CHECK(may.size() == loads_.size());
  const std::vector<int64_t> known = Known(prompt);
  Place best{.replica = -1};
  std::tuple<int64_t, int64_t, uint64_t> least;
  for (size_t r = 0; r < loads_.size(); ++r) {
    if (!may[r]) continue;
    const Load& load = loads_[r];
    const int64_t computes = prompt.tokens - known[r];
    const int64_t loaded = 2 * load.computes + load.holds;  // in halves of tokens, as the cost
    const std::tuple cost{4 * computes + loaded, loaded, load.taken};
    if (best.replica >= 0 && cost >= least) continue;
    least = cost;
    best = {
        .replica = static_cast<int>(r), .computes = computes, .holds = prompt.tokens + kRowTokens};
  }
  DSLA_CHECK(best.replica >= 0);
  Remember(prompt, best.replica);
  Load& load = loads_[static_cast<size_t>(best.replica)];
  load.computes += best.computes;
  load.holds += best.holds;
  load.taken = ++taken_;
  return best;
}

void ReplicaRouter::Begin(Place& place) {
  loads_[static_cast<size_t>(place.replica)].computes -= std::exchange(place.computes, 0);
}

void ReplicaRouter::End(const Place& place) {
  Load& load = loads_[static_cast<size_t>(place.replica)];
  load.computes -= place.computes;
  load.holds -= place.holds;
}

std::vector<int64_t> ReplicaRouter::Known(const RoutedPrompt& prompt) const {
  std::vector<int64_t> known(loads_.size(), 0);
  if (!prompt.reads_prefixes) return known;
  Mask having = ~Mask{0};  // all blocks so far
  for (size_t i = 0; i < prompt.blocks.size(); ++i) {
    having &= Find(prompt.blocks[i]);
    if (having == 0) break;
    const int64_t tokens = static_cast<int64_t>(i + 1) * options_.block_tokens;
    for (size_t r = 0; r < known.size(); ++r) {
      if ((having >> r & 1) != 0) known[r] = std::min(tokens, prompt.tokens - 1);
    }
  }
  return known;
}

ReplicaRouter::Mask ReplicaRouter::Find(uint64_t block) const {
  if (const auto found = young_.find(block); found != young_.end()) return found->second;
  const auto found = old_.find(block);
  return found == old_.end() ? 0 : found->second;
}

void ReplicaRouter::Remember(const RoutedPrompt& prompt, int replica) {
  for (const uint64_t block : prompt.blocks) {
    const Mask mask = Find(block) | Mask{1} << replica;
    if (young_.size() >= options_.most_blocks / 2 && !young_.contains(block)) {
      old_ = std::move(young_);
      young_ = {};
    }
    young_[block] = mask;
  }
}

std::vector<uint64_t> BlocksOf(std::span<const int32_t> prompt, std::string_view salt,
                               int block_tokens) {
  if (block_tokens == 0) return {};
  const size_t size = static_cast<size_t>(block_tokens);
  std::vector<uint64_t> blocks(prompt.size() / size);
  Sha256 hash;
  PrefixKey key = RootKey(hash, /*adapter_id=*/"", salt);
  for (size_t i = 0; i < blocks.size(); ++i) {
    key = NextKey(hash, key, prompt.subspan(i * size, size));
    std::memcpy(&blocks[i], key.data(), sizeof(uint64_t));
  }
  return blocks;
}

}  // namespace dsla
