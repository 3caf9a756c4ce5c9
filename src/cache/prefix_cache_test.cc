#include "cache/prefix_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>

namespace dsla {
namespace {

constexpr int kPage = 4;
constexpr int kLayers = 4;
const std::vector<int> kLadder = {2, 0, 3, 1};

class PrefixCacheTest : public testing::Test, public SlotCopier {
 protected:
  Status CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) override {
    EXPECT_EQ(from.size(), to.size());
    ++calls_;
    for (size_t i = 0; i < from.size(); ++i) {
      DSLA_RETURN_IF_ERROR(copying_());
      copies_.emplace_back(from[i], to[i]);
    }
    return Status::Ok();
  }

  SequenceCache Run(std::span<const int32_t> tokens, int level) {
    SequenceCache sequence(&ledger_, kLadder, kPage, level);
    EXPECT_TRUE(sequence.Reserve(static_cast<int>(tokens.size())).ok());
    sequence.Commit(static_cast<int>(tokens.size()));
    return sequence;
  }

  void Raise(SequenceCache* sequence, int level) {
    ASSERT_TRUE(sequence->BeginRaise(level).ok());
    sequence->CommitRaise();
  }

  void Insert(std::span<const int32_t> tokens, const LevelHistory& history,
              const SequenceCache& sequence, bool snapshot = false, std::string_view salt = "") {
    PrefixPath path;
    cache_.Insert({tokens, salt, &path}, history, sequence, snapshot);
  }

  std::vector<int32_t> Tokens(int count, int first = 0) {
    std::vector<int32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
  }

  Ledger ledger_{{.budget_bytes = 10000, .page_bytes = 100, .slot_bytes = 150}};
  std::function<Status()> copying_ = [] { return Status::Ok(); };
  std::vector<std::pair<int32_t, int32_t>> copies_;
  int calls_ = 0;
  PrefixCache cache_{&ledger_, this, {.layers = kLayers, .page_size = kPage, .adapter_id = "a"}};
};

TEST_F(PrefixCacheTest, AHitSharesWholePagesAndLeavesATokenToCompute) {
  const auto tokens = Tokens(10);
  SequenceCache first = Run(tokens, 0);
  Insert(tokens, {{0, 0}}, first);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens}).tokens, 8);
  EXPECT_EQ(cache_.Lookup({.tokens = std::span(tokens).first(9)}).tokens, 8);
  const auto hit = cache_.Lookup({.tokens = std::span(tokens).first(8)});
  EXPECT_EQ(hit.tokens, 4) << "the last prompt token is computed for its logits";
  EXPECT_EQ(hit.history, (LevelHistory{{0, 0}}));
  SequenceCache second(&ledger_, kLadder, kPage, 0);
  ASSERT_TRUE(cache_.Adopt(hit, &second).ok());
  EXPECT_EQ(second.length(), 4);
  for (int layer = 0; layer < kLayers; ++layer) {
    ASSERT_EQ(second.pages(layer).size(), 1u);
    EXPECT_EQ(second.pages(layer)[0], first.pages(layer)[0]);
    EXPECT_EQ(ledger_.references(BlockKind::kPage, second.pages(layer)[0]), 3);
  }
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 12);
  EXPECT_TRUE(copies_.empty());
}

TEST_F(PrefixCacheTest, OtherTokensSaltsAndLevelsDoNotMeet) {
  const auto tokens = Tokens(9);
  SequenceCache sequence = Run(tokens, 0);
  Insert(tokens, {{0, 0}}, sequence, false, "salt");
  EXPECT_EQ(cache_.Lookup({.tokens = tokens}).tokens, 0);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .salt = "salt"}).tokens, 8);
  auto other = tokens;
  other[5] = 99;
  EXPECT_EQ(cache_.Lookup({.tokens = other, .salt = "salt"}).tokens, 4);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .salt = "salt", .level = 2, .may_fold = false}).tokens,
            0);
  Sha256 hash;
  EXPECT_NE(RootKey(hash, "ab", "c"), RootKey(hash, "a", "bc"));
}

TEST_F(PrefixCacheTest, KeysAreMadeAsFarAsTheyAreLookedAt) {
  const auto tokens = Tokens(41);
  PrefixPath path;
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .path = &path}).tokens, 0);
  EXPECT_EQ(path.size(), 2u) << "of no tokens, and of the first page";
  Insert(std::span(tokens).first(12), {{0, 0}}, Run(std::span(tokens).first(12), 0));
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .path = &path}).tokens, 12);
  EXPECT_LE(path.size(), 1 + 2 * 3u);
}

TEST_F(PrefixCacheTest, TokensInCommonAreWholePagesOfOneSalt) {
  const auto a = Tokens(14);
  auto b = a;
  PrefixPath path_a, path_b;
  EXPECT_EQ(cache_.CommonTokens({a, "", &path_a}, {b, "", &path_b}), 12);
  PrefixPath path_c;
  EXPECT_EQ(cache_.CommonTokens({a, "", &path_a}, {b, "salt", &path_c}), 0);
  b[9] = 99;
  PrefixPath path_d;
  EXPECT_EQ(cache_.CommonTokens({a, "", &path_a}, {b, "", &path_d}), 8);
  EXPECT_EQ(cache_.CommonTokens({std::span(a).first(7), "", &path_a}, {b, "", &path_d}), 4);
}

TEST_F(PrefixCacheTest, AboveLevelZeroASequenceResumesOnlyAtASnapshot) {
  const auto tokens = Tokens(13);
  SequenceCache sequence = Run(std::span(tokens).first(8), 2);
  Insert(std::span(tokens).first(8), {{0, 2}}, sequence);
  EXPECT_EQ(cache_.entries(), 0) << "pages alone would serve nobody";
  Insert(std::span(tokens).first(8), {{0, 2}}, sequence, true);
  EXPECT_EQ(cache_.snapshots(), 1);
  ASSERT_EQ(copies_.size(), 2u);
  EXPECT_EQ(calls_, 1);
  const auto hit = cache_.Lookup({.tokens = tokens, .level = 2, .may_fold = false});
  EXPECT_EQ(hit.tokens, 8);
  EXPECT_EQ(cache_.Lookup({.tokens = std::span(tokens).first(8), .level = 2}).tokens, 0);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 1}).tokens, 0) << "levels only rise";
  copies_.clear();
  SequenceCache second(&ledger_, kLadder, kPage, 2);
  ASSERT_TRUE(cache_.Adopt(hit, &second).ok());
  EXPECT_TRUE(second.TakeFreshSlots().empty()) << "a reset would wipe the restored states";
  ASSERT_EQ(copies_.size(), 2u);
  EXPECT_EQ(calls_, 2);
  EXPECT_NE(second.slot(2), sequence.slot(2));
  EXPECT_EQ(second.pages(1).size(), 2u);
  EXPECT_TRUE(second.pages(2).empty());
}

TEST_F(PrefixCacheTest, ALevelZeroPrefixServesAHigherLevelByFolding) {
  const auto tokens = Tokens(9);
  SequenceCache sequence = Run(tokens, 0);
  Insert(tokens, {{0, 0}}, sequence);
  const auto hit = cache_.Lookup({.tokens = tokens, .level = 3});
  EXPECT_EQ(hit.tokens, 8);
  EXPECT_EQ(hit.history, (LevelHistory{{0, 0}}));
  SequenceCache second(&ledger_, kLadder, kPage, 0);
  ASSERT_TRUE(cache_.Adopt(hit, &second).ok());
  Raise(&second, 3);
  second.Release();
  EXPECT_EQ(cache_.Lookup({.tokens = tokens}).tokens, 8) << "it dropped its own references alone";
  for (int layer = 0; layer < kLayers; ++layer)
    EXPECT_EQ(ledger_.references(BlockKind::kPage, sequence.pages(layer)[0]), 2);
}

TEST_F(PrefixCacheTest, HistoriesAreKeptApartAndReplayed) {
  const auto tokens = Tokens(17);
  SequenceCache raised = Run(std::span(tokens).first(6), 0);
  Insert(std::span(tokens).first(4), {{0, 0}}, raised);
  Raise(&raised, 2);
  ASSERT_TRUE(raised.Reserve(6).ok());
  raised.Commit(6);
  const LevelHistory history = {{0, 0}, {6, 2}};
  Insert(std::span(tokens).first(12), history, raised, true);
  // A replay meets it exactly; another history only the part before the raise.
  auto hit = cache_.Lookup({.tokens = tokens, .history = history});
  EXPECT_EQ(hit.tokens, 12);
  EXPECT_EQ(hit.history, history);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .history = LevelHistory{{0, 0}, {7, 2}}}).tokens, 4);
  // A new sequence takes it at that level or above, never below, and not where levels are exact.
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 2}).tokens, 12);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 4}).tokens, 12);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 1}).tokens, 4);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 2, .may_fold = false}).tokens, 0);
}

// The raised sequence has lost the pages of the layers that converted, so the nodes it enters for
// the time before are no place to resume at level 0.
TEST_F(PrefixCacheTest, AnIncompleteNodeIsNotResumedAt) {
  const auto tokens = Tokens(13);
  SequenceCache raised = Run(std::span(tokens).first(4), 0);
  Raise(&raised, 2);
  ASSERT_TRUE(raised.Reserve(4).ok());
  raised.Commit(4);
  Insert(std::span(tokens).first(8), {{0, 0}, {4, 2}}, raised, true);
  EXPECT_EQ(cache_.entries(), 3);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 0}).tokens, 0);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 2}).tokens, 8);
  // A sequence that has them all completes the node.
  SequenceCache full = Run(std::span(tokens).first(4), 0);
  Insert(std::span(tokens).first(4), {{0, 0}}, full);
  const auto hit = cache_.Lookup({.tokens = tokens, .level = 0});
  EXPECT_EQ(hit.tokens, 4);
  SequenceCache second(&ledger_, kLadder, kPage, 0);
  ASSERT_TRUE(cache_.Adopt(hit, &second).ok());
  EXPECT_EQ(second.pages(2)[0], full.pages(2)[0]);
  EXPECT_EQ(second.pages(1)[0], raised.pages(1)[0]);
}

TEST_F(PrefixCacheTest, ReclaimTakesTheLeastRecentlyUsedLeavesFirst) {
  const auto old_tokens = Tokens(8), new_tokens = Tokens(8, 100);
  Insert(old_tokens, {{0, 0}}, Run(old_tokens, 0));
  Insert(new_tokens, {{0, 0}}, Run(new_tokens, 0));
  EXPECT_EQ(ledger_.idle_bytes(), 1600);
  EXPECT_EQ(ledger_.used_bytes(), 1600);
  ASSERT_TRUE(cache_.Reclaim(10000 - 1600 + 1));
  EXPECT_EQ(ledger_.idle_bytes(), 1200);
  const auto longer = Tokens(9), newer = Tokens(9, 100);
  EXPECT_EQ(cache_.Lookup({.tokens = longer}).tokens, 4);
  EXPECT_EQ(cache_.Lookup({.tokens = newer}).tokens, 8);
  EXPECT_FALSE(cache_.Reclaim(10001));
  EXPECT_EQ(ledger_.idle_bytes(), 1200) << "nothing is given up in vain";
  ASSERT_TRUE(cache_.Reclaim(10000));
  EXPECT_EQ(cache_.entries(), 0);
  EXPECT_EQ(ledger_.used_bytes(), 0);
}

TEST_F(PrefixCacheTest, ReclaimLeavesWhatASequenceHoldsAndTakesAllThatIsIdle) {
  const auto tokens = Tokens(12), other = Tokens(4, 50);
  SequenceCache held = Run(tokens, 0);
  Insert(tokens, {{0, 0}}, held);
  Insert(other, {{0, 0}}, Run(other, 0));  // newer, but idle
  EXPECT_EQ(ledger_.idle_bytes(), 400);
  ASSERT_TRUE(cache_.Reclaim(10000 - 1200));
  const auto longer = Tokens(13);
  EXPECT_EQ(cache_.Lookup({.tokens = longer}).tokens, 12);
  // After a raise the pages of the layer that converted are the cache's alone.
  Raise(&held, 1);
  EXPECT_EQ(ledger_.idle_bytes(), 300);
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 300));
  EXPECT_EQ(ledger_.idle_bytes(), 0);
  EXPECT_EQ(held.page_count(), 9);
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 9);
}

TEST_F(PrefixCacheTest, ASnapshotTakesIdleMemoryOnly) {
  const auto tokens = Tokens(8);
  SequenceCache sequence = Run(tokens, 2);  // 4 pages, 2 slots
  auto rest = ledger_.Reserve(90, 2);       // 10000 - 700 - 9300 = 0 free
  ASSERT_TRUE(rest.ok());
  Insert(tokens, {{0, 2}}, sequence, true);
  EXPECT_EQ(cache_.entries(), 0);
  EXPECT_TRUE(copies_.empty());
  rest->Abort();
  Insert(tokens, {{0, 2}}, sequence, true);
  EXPECT_EQ(cache_.snapshots(), 1);
  EXPECT_EQ(ledger_.idle_bytes(), 300);
  EXPECT_EQ(cache_.Blocks().size(), 6u);
}

// Memory that cannot be had, and a device that failed: at the second of two copies.
TEST_F(PrefixCacheTest, ACopyThatFailsLeavesNoTrace) {
  const auto tokens = Tokens(8), longer = Tokens(9);
  SequenceCache sequence = Run(tokens, 2);
  const int64_t used = ledger_.used_bytes();
  const auto no_memory = [this] {
    return copies_.size() == 1 ? ResourceExhausted("no memory") : Status::Ok();
  };
  const auto gone = [this]() -> Status {
    if (copies_.size() == 1) throw std::runtime_error("gone");
    return Status::Ok();
  };
  copying_ = no_memory;
  Insert(tokens, {{0, 2}}, sequence, true);
  copies_.clear();
  copying_ = gone;
  EXPECT_THROW(Insert(tokens, {{0, 2}}, sequence, true), std::runtime_error);
  EXPECT_EQ(cache_.entries(), 0);
  EXPECT_EQ(ledger_.used_bytes(), used);

  copying_ = [] { return Status::Ok(); };
  Insert(tokens, {{0, 2}}, sequence, true);
  const int64_t with_entry = ledger_.used_bytes();
  const auto hit = cache_.Lookup({.tokens = longer, .level = 2});
  ASSERT_EQ(hit.tokens, 8);
  SequenceCache second(&ledger_, kLadder, kPage, 2);
  copies_.clear();
  copying_ = no_memory;
  EXPECT_EQ(cache_.Adopt(hit, &second).message(), "no memory");
  EXPECT_EQ(second.length(), 0);
  EXPECT_EQ(ledger_.used_bytes(), with_entry);
  copies_.clear();
  copying_ = gone;
  EXPECT_THROW(static_cast<void>(cache_.Adopt(hit, &second)), std::runtime_error);
  second.Release();
  EXPECT_EQ(ledger_.used_bytes(), with_entry);
}

TEST_F(PrefixCacheTest, SnapshotsAreThinnedToDoublingDistances) {
  const auto tokens = Tokens(40);
  SequenceCache sequence(&ledger_, kLadder, kPage, 2);
  for (int end = 4; end <= 36; end += 4) {
    ASSERT_TRUE(sequence.Reserve(4).ok());
    sequence.Commit(4);
    Insert(std::span(tokens).first(end), {{0, 2}}, sequence, true);
  }
  std::vector<int> resumes;
  for (int end = 40; end > 4; end -= 4) {
    const int at = cache_.Lookup({.tokens = std::span(tokens).first(end), .level = 2}).tokens;
    if (at > 0 && (resumes.empty() || resumes.back() != at)) resumes.push_back(at);
  }
  EXPECT_EQ(cache_.snapshots(), static_cast<int64_t>(resumes.size()));
  ASSERT_GE(resumes.size(), 3u);
  EXPECT_EQ(resumes[0], 36);
  EXPECT_EQ(resumes[1], 32);
  EXPECT_LE(resumes.size(), 5u);
}

TEST_F(PrefixCacheTest, ReclaimThinsSnapshotsBeforeItGivesUpAPrefix) {
  const auto old_tokens = Tokens(41), new_tokens = Tokens(41, 100);
  for (const auto& tokens : {old_tokens, new_tokens}) {
    SequenceCache sequence(&ledger_, kLadder, kPage, 2);
    for (int end = 4; end <= 40; end += 4) {
      ASSERT_TRUE(sequence.Reserve(4).ok());
      sequence.Commit(4);
      Insert(std::span(tokens).first(end), {{0, 2}}, sequence, true);
    }
  }
  const int64_t spare = cache_.snapshots() - 2 * 2;
  ASSERT_GE(spare, 2);
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + spare * 2 * 150));
  EXPECT_EQ(cache_.snapshots(), 4) << "the last two of each";
  for (const auto& tokens : {old_tokens, new_tokens}) {
    EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 2}).tokens, 40);
    EXPECT_EQ(cache_.Lookup({.tokens = std::span(tokens).first(40), .level = 2}).tokens, 36);
  }
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 1));
  EXPECT_EQ(cache_.Lookup({.tokens = new_tokens, .level = 2}).tokens, 40);
  EXPECT_EQ(cache_.Lookup({.tokens = old_tokens, .level = 2}).tokens, 36);
}

TEST_F(PrefixCacheTest, ReclaimTakesFirstWhatOnlyLowerLevelsWouldRead) {
  const auto tokens = Tokens(13);
  {
    SequenceCache raised = Run(std::span(tokens).first(8), 0);
    Insert(std::span(tokens).first(8), {{0, 0}}, raised);
    Raise(&raised, 3);
    ASSERT_TRUE(raised.Reserve(4).ok());
    raised.Commit(4);
    Insert(std::span(tokens).first(12), {{0, 0}, {8, 3}}, raised, true);
  }
  EXPECT_EQ(cache_.Lookup({.tokens = tokens}).tokens, 8);
  // 3 layers have their states in the snapshot: two pages each of those are of no use to it.
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 600));
  EXPECT_EQ(cache_.Lookup({.tokens = tokens}).tokens, 0);
  const auto hit = cache_.Lookup({.tokens = tokens, .level = 3});
  ASSERT_EQ(hit.tokens, 12);
  SequenceCache second(&ledger_, kLadder, kPage, 3);
  ASSERT_TRUE(cache_.Adopt(hit, &second).ok());
  second.Release();
  ASSERT_TRUE(cache_.Reclaim(ledger_.config().budget_bytes));
  EXPECT_EQ(cache_.entries(), 0);
}

TEST_F(PrefixCacheTest, WhatABranchLosesItsOtherEndsForIsGivenUpThen) {
  // Two replies to a prompt that ran at level 3, the prompt's pages of level 0 among them.
  const auto prompt = Tokens(8);
  auto first = Tokens(12), second = Tokens(12);
  std::iota(second.begin() + 8, second.end(), 500);
  for (const auto& tokens : {first, second}) {
    SequenceCache raised = Run(prompt, 0);
    Insert(prompt, {{0, 0}}, raised);
    Raise(&raised, 3);
    ASSERT_TRUE(raised.Reserve(4).ok());
    raised.Commit(4);
    Insert(tokens, {{0, 0}, {8, 3}}, raised, true);
  }
  // Both need the prompt's pages, of all layers, as long as it branches.
  const int64_t used = ledger_.used(BlockKind::kPage);
  EXPECT_EQ(used, 8 + 2);
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 1));
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 8 + 1) << "the older branch";
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 1));
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 2 + 1) << "what only lower levels would read";
  const std::vector<int32_t> longer = [&] {
    auto tokens = second;
    tokens.push_back(7);
    return tokens;
  }();
  EXPECT_EQ(cache_.Lookup({.tokens = longer, .level = 3}).tokens, 12);
}

TEST_F(PrefixCacheTest, PagesThatWereForASpareSnapshotAloneGoBeforeAPrefix) {
  const auto tokens = Tokens(17);
  {
    SequenceCache sequence = Run(std::span(tokens).first(8), 1);
    Insert(std::span(tokens).first(8), {{0, 1}}, sequence, true);
    Raise(&sequence, 3);
    for (const int end : {12, 16}) {
      ASSERT_TRUE(sequence.Reserve(4).ok());
      sequence.Commit(4);
      Insert(std::span(tokens).first(end), {{0, 1}, {8, 3}}, sequence, true);
    }
  }
  EXPECT_EQ(cache_.snapshots(), 3);
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 2 * 3 + 2);
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 1));
  EXPECT_EQ(cache_.snapshots(), 2) << "that of level 1 is the third from the end";
  ASSERT_TRUE(cache_.Reclaim(ledger_.free_bytes() + 1));
  EXPECT_EQ(ledger_.used(BlockKind::kPage), 2 * 1 + 2);
  EXPECT_EQ(cache_.Lookup({.tokens = tokens, .level = 3}).tokens, 16);
}

TEST_F(PrefixCacheTest, AFullCacheIsNotLookedThroughForEveryPage) {
  Ledger ledger({.budget_bytes = 128 * 100 * 20, .page_bytes = 100, .slot_bytes = 150});
  PrefixCache cache(&ledger, this, {.layers = 1, .page_size = kPage, .adapter_id = "a"});
  const std::vector<int> ladder = {0};
  for (int i = 0; ledger.free_bytes() > 0; ++i) {
    const auto tokens = Tokens(kPage, i * kPage);
    SequenceCache sequence(&ledger, ladder, kPage, 0);
    ASSERT_TRUE(sequence.Reserve(kPage).ok());
    sequence.Commit(kPage);
    PrefixPath path;
    cache.Insert({tokens, "", &path}, LevelHistory{{0, 0}}, sequence, false);
  }
  ASSERT_TRUE(cache.Reclaim(100));
  EXPECT_EQ(ledger.free_bytes(), 100 + 20 * 100);
  ASSERT_TRUE(cache.Reclaim(2100));
  EXPECT_EQ(ledger.free_bytes(), 2100) << "there was enough";
  ASSERT_TRUE(cache.Reclaim(ledger.config().budget_bytes));
  EXPECT_EQ(cache.entries(), 0);
}

TEST_F(PrefixCacheTest, ClearGivesEverythingBack) {
  const auto tokens = Tokens(8);
  {
    SequenceCache sequence = Run(tokens, 2);
    Insert(tokens, {{0, 2}}, sequence, true);
    SequenceCache zero = Run(tokens, 0);
    Insert(tokens, {{0, 0}}, zero);
  }
  EXPECT_EQ(ledger_.idle_bytes(), ledger_.used_bytes());
  cache_.Clear();
  EXPECT_EQ(ledger_.used_bytes(), 0);
  EXPECT_EQ(cache_.entries(), 0);
}

}  // namespace
}  // namespace dsla
