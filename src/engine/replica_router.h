// ReplicaRouter: which of several engines, each with a prefix cache of its own, gets a request. It
// remembers which prefixes it has sent where and what each engine still has to do. No locks, no
// clock: the caller has them.
//
// It takes the engine at which the request adds to the least cost, in tokens:
//   2 * the prompt's tokens that it would have to compute: the client waits for them, and so does
//       everybody who is served beside it
//   + those of the prompts before it that are still to be computed
//   + 1/2 * what its sequences hold, which each of their steps reads, a sequence counting as
//       kRowTokens more than its prompt
// So a known prefix attracts until the engine that has it has so much more to do that computing it
// anew elsewhere is the smaller evil. Among equal costs it takes the least loaded engine, then the
// one that was taken longest ago.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dsla {

struct RouterOptions {
  int replicas = 1;                      // at most ReplicaRouter::kMostReplicas
  int block_tokens = 64;                 // of the engines' pages; 0: they have no prefix cache
  size_t most_blocks = size_t{1} << 18;  // that are remembered, about
};

// A request as the router sees it.
struct RoutedPrompt {
  std::vector<uint64_t> blocks;  // whole blocks, each named by salt and all tokens up to its end
  int64_t tokens = 0;
  bool reads_prefixes = true;  // otherwise it computes all, and leaves its prefix behind
};

class ReplicaRouter {
 public:
  static constexpr int kMostReplicas = 64;
  static constexpr int64_t kRowTokens = 256;

  explicit ReplicaRouter(const RouterOptions& options);

  // Where a request is, and what it adds to the load there.
  struct Place {
    int replica = 0;
    int64_t computes = 0;  // tokens of its prompt, until Begin
    int64_t holds = 0;     // tokens
  };

  // Among the replicas that `may` have it, at least one. From now on its prefix is known there.
  Place Take(const RoutedPrompt& prompt, const std::vector<bool>& may);
  void Begin(Place& place);      // its prompt is computed
  void End(const Place& place);  // it has left

 private:
  struct Load {
    int64_t computes = 0, holds = 0;
    uint64_t taken = 0;  // when, by count
  };
  using Mask = uint64_t;  // a bit for each replica

  // Tokens of the prompt's prefix that each replica has.
  std::vector<int64_t> Known(const RoutedPrompt& prompt) const;
  Mask Find(uint64_t block) const;
  void Remember(const RoutedPrompt& prompt, int replica);

  const RouterOptions options_;
  std::vector<Load> loads_;
  uint64_t taken_ = 0;
  // Two generations: when the young one is full, it takes the place of the old one. What is used is
  // written to the young one again.
  std::unordered_map<uint64_t, Mask> young_, old_;
};

// Names for the whole blocks of a prompt, the same for equal salts and beginnings. Takes as long as
// SHA-256 of it.
std::vector<uint64_t> BlocksOf(std::span<const int32_t> prompt, std::string_view salt,
                               int block_tokens);

}  // namespace dsla
