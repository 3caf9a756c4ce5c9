#include "engine/replica_router.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <set>

namespace dsla {
namespace {

constexpr int kBlock = 4;

std::vector<int32_t> Tokens(int count, int32_t first = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

RoutedPrompt Prompt(const std::vector<int32_t>& tokens, std::string_view salt = "") {
  return {.blocks = BlocksOf(tokens, salt, kBlock), .tokens = static_cast<int64_t>(tokens.size())};
}

class ReplicaRouterTest : public ::testing::Test {
 protected:
  using Place = ReplicaRouter::Place;
  explicit ReplicaRouterTest(int replicas = 2)
      : router_({.replicas = replicas, .block_tokens = kBlock}),
        all_(static_cast<size_t>(replicas), true) {}
  Place Take(const std::vector<int32_t>& tokens) { return router_.Take(Prompt(tokens), all_); }
  // Comes and goes.
  int Visit(const std::vector<int32_t>& tokens) {
    const Place place = Take(tokens);
    router_.End(place);
    return place.replica;
  }

  ReplicaRouter router_;
  std::vector<bool> all_;
};

TEST(BlocksOf, NameAllTokensUpToTheirEnd) {
  const auto blocks = BlocksOf(Tokens(11), "", kBlock);
  EXPECT_EQ(blocks.size(), 2u) << "whole ones";
  EXPECT_EQ(BlocksOf(Tokens(8), "", kBlock), blocks);
  EXPECT_NE(BlocksOf(Tokens(8), "salt", kBlock), blocks);
  std::vector<int32_t> other = Tokens(11);
  other[0] = 99;
  EXPECT_NE(BlocksOf(other, "", kBlock)[1], blocks[1]) << "the second has the same tokens";
  EXPECT_TRUE(BlocksOf(Tokens(11), "", 0).empty()) << "there is no prefix cache";
}

TEST_F(ReplicaRouterTest, TheLeastLoadedAndByTurnsWhereNoneIs) {
  EXPECT_EQ(Visit(Tokens(8, 100)), 0);
  EXPECT_EQ(Visit(Tokens(8, 200)), 1) << "taken longest ago";
  EXPECT_EQ(Visit(Tokens(8, 300)), 0);
  const Place large = Take(Tokens(2000, 1000));
  EXPECT_EQ(large.replica, 1);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Take(Tokens(8, 4000 + 8 * i)).replica, 0);
  router_.End(large);
  EXPECT_EQ(Take(Tokens(8, 5000)).replica, 1) << "which has nothing left";
}

TEST_F(ReplicaRouterTest, AKnownPrefixAttracts) {
  EXPECT_EQ(Visit(Tokens(400)), 0);
  EXPECT_EQ(Visit(Tokens(8, 9000)), 1);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Visit(Tokens(402 + i)), 0) << "whoever was taken last";
  const Place place = Take(Tokens(402));
  EXPECT_EQ(place.computes, 2) << "the rest";
  router_.End(place);
  EXPECT_EQ(Take(Tokens(400)).computes, 1) << "the last token's logits are not cached";
}

TEST_F(ReplicaRouterTest, AnotherSaltKnowsNothing) {
  Visit(Tokens(400));
  const Place place = router_.Take(Prompt(Tokens(400), "salt"), all_);
  EXPECT_EQ(place.replica, 1);
  EXPECT_EQ(place.computes, 400);
}

TEST_F(ReplicaRouterTest, WhoReadsNoPrefixGoesByLoad) {
  EXPECT_EQ(Visit(Tokens(400)), 0);
  RoutedPrompt prompt = Prompt(Tokens(400));
  prompt.reads_prefixes = false;
  const Place place = router_.Take(prompt, all_);
  EXPECT_EQ(place.replica, 1);
  EXPECT_EQ(place.computes, 400);
  router_.End(place);
  EXPECT_EQ(Take(Tokens(404)).computes, 4) << "but leaves one behind";
}

// Of n replies to one prompt the second starts from the first one's prefix; the engines share many.
TEST_F(ReplicaRouterTest, ManyOfOnePrefixAreSpread) {
  std::vector<int> count(2);
  EXPECT_EQ(Take(Tokens(4000)).replica, 0);
  EXPECT_EQ(Take(Tokens(4000)).replica, 0);
  for (int i = 0; i < 30; ++i) ++count[static_cast<size_t>(Take(Tokens(4000)).replica)];
  EXPECT_NEAR(count[0], count[1], 2);
}

TEST_F(ReplicaRouterTest, ALoadedReplicaLosesItsPrefix) {
  EXPECT_EQ(Visit(Tokens(400)), 0);
  EXPECT_EQ(Visit(Tokens(8, 9000)), 1);
  Place large = Take(Tokens(700, 2000));
  ASSERT_EQ(large.replica, 0);
  EXPECT_EQ(Take(Tokens(401)).replica, 1) << "700 tokens come before it: more than it saves";
  router_.Begin(large);
  EXPECT_EQ(large.computes, 0);
}

TEST_F(ReplicaRouterTest, WhoMayNotGetsNone) {
  EXPECT_EQ(Visit(Tokens(400)), 0);
  for (int i = 0; i < 3; ++i) {
    const Place place = router_.Take(Prompt(Tokens(400)), {false, true});
    EXPECT_EQ(place.replica, 1) << "a prefix that is out of reach";
  }
}

TEST(ReplicaRouter, ForgetsTheOldest) {
  ReplicaRouter router({.replicas = 2, .block_tokens = kBlock, .most_blocks = 8});
  const std::vector<bool> all{true, true};
  const auto computes = [&](int32_t first) {
    const ReplicaRouter::Place place = router.Take(Prompt(Tokens(9, first)), all);
    router.End(place);
    return place.computes;
  };
  EXPECT_EQ(computes(0), 9);
  EXPECT_EQ(computes(0), 1);
  for (int32_t first = 100; first < 700; first += 100) {
    EXPECT_EQ(computes(first), 9);
    EXPECT_EQ(computes(0), 1) << "in use";
  }
  EXPECT_EQ(computes(100), 9) << "long ago";
}

// Whatever comes: no replica gets far more than the others, and at the end nothing is left.
TEST(ReplicaRouter, RandomLoadIsBalanced) {
  constexpr int kReplicas = 4;
  ReplicaRouter router({.replicas = kReplicas, .block_tokens = kBlock});
  const std::vector<bool> all(kReplicas, true);
  std::mt19937 random(7);
  std::vector<ReplicaRouter::Place> running;
  std::vector<int64_t> computed(kReplicas), alone(kReplicas);
  for (int i = 0; i < 4000; ++i) {
    const int document = static_cast<int>(random() % 40);
    std::vector<int32_t> tokens = Tokens(200 + 10 * document, 10000 * document);
    for (int k = 0; k < 10; ++k) tokens.push_back(static_cast<int32_t>(random() % 1000000));
    const ReplicaRouter::Place place = router.Take(Prompt(tokens), all);
    computed[static_cast<size_t>(place.replica)] += place.computes;
    alone[static_cast<size_t>(place.replica)] += static_cast<int64_t>(tokens.size());
    running.push_back(place);
    if (running.size() < 64) continue;
    const size_t ends = random() % running.size();
    router.Begin(running[ends]);
    router.End(running[ends]);
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(ends));
  }
  const auto total = std::accumulate(alone.begin(), alone.end(), int64_t{0});
  for (int r = 0; r < kReplicas; ++r) EXPECT_NEAR(alone[r], total / kReplicas, total / 20) << r;
  EXPECT_LT(std::accumulate(computed.begin(), computed.end(), int64_t{0}), total / 5)
      << "most is found";
  for (const ReplicaRouter::Place& place : running) router.End(place);
  std::set<int> turns;
  for (int r = 0; r < kReplicas; ++r) {
    const ReplicaRouter::Place place = router.Take(Prompt(Tokens(3, r)), all);
    turns.insert(place.replica);
    router.End(place);
  }
  EXPECT_EQ(turns.size(), 4u) << "none has anything left";
}

}  // namespace
}  // namespace dsla
