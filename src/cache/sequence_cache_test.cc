#include "cache/sequence_cache.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace dsla {
namespace {

constexpr int kPage = 4;
const std::vector<int> kLadder = {2, 0, 3, 1};

TEST(SequenceCacheTest, PagesFollowTheTokensOfSoftmaxLayersOnly) {
  Ledger ledger({.budget_bytes = 100000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache cache(&ledger, kLadder, kPage, 1);
  ASSERT_TRUE(cache.Reserve(9).ok());
  cache.Commit(9);
  EXPECT_TRUE(cache.is_dsla(2));
  EXPECT_EQ(cache.pages(2).size(), 0u);
  EXPECT_GE(cache.slot(2), 0);
  EXPECT_EQ(cache.TakeFreshSlots(), std::vector<int32_t>{cache.slot(2)});
  for (int layer : {0, 1, 3}) EXPECT_EQ(cache.pages(layer).size(), 3u);
  ASSERT_TRUE(cache.Reserve(3).ok());
  EXPECT_EQ(cache.page_count(), 9);  // 12 tokens still fit 3 pages
  cache.Commit(3);
  ASSERT_TRUE(cache.Reserve(1).ok());
  EXPECT_EQ(cache.page_count(), 12);
  cache.Abort();
  EXPECT_EQ(cache.page_count(), 9);
  EXPECT_EQ(cache.length(), 12);
}

TEST(SequenceCacheTest, PagesThatARaiseFreesLieTogether) {
  Ledger ledger({.budget_bytes = 100000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache cache(&ledger, kLadder, kPage, 0);
  ASSERT_TRUE(cache.Reserve(2 * kPage).ok());
  cache.Commit(2 * kPage);
  std::vector<int32_t> pages;
  for (auto layer = kLadder.rbegin(); layer != kLadder.rend(); ++layer)
    pages.insert(pages.end(), cache.pages(*layer).begin(), cache.pages(*layer).end());
  EXPECT_EQ(pages, (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST(SequenceCacheTest, TakesAsManyBytesAsIsSaid) {
  Ledger ledger({.budget_bytes = 100000, .page_bytes = 100, .slot_bytes = 150});
  const BlockSizes sizes{.layers = 4, .page_size = kPage, .page_bytes = 100, .slot_bytes = 150};
  for (int level = 0; level <= 4; ++level) {
    for (const int tokens : {1, 4, 5, 9}) {
      SequenceCache cache(&ledger, kLadder, kPage, level);
      ASSERT_TRUE(cache.Reserve(tokens).ok());
      EXPECT_EQ(ledger.used_bytes(), SequenceBytes(sizes, level, tokens));
    }
  }
  EXPECT_EQ(SequenceBytes(sizes, 0, 0), 0);
}

TEST(SequenceCacheTest, AFailedReserveLeavesNoTrace) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache cache(&ledger, kLadder, kPage, 0);
  ASSERT_TRUE(cache.Reserve(4).ok());
  cache.Commit(4);
  const Status status = cache.Reserve(9);
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(cache.page_count(), 4);
  EXPECT_EQ(ledger.used_bytes(), 400);
}

TEST(SequenceCacheTest, RaiseConvertsTheNextLayersOfTheLadderAndFreesTheirPages) {
  Ledger ledger({.budget_bytes = 100000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache cache(&ledger, kLadder, kPage, 1);
  ASSERT_TRUE(cache.Reserve(9).ok());
  cache.Commit(9);
  const int32_t old_slot = cache.slot(2);
  auto conversions = cache.BeginRaise(3);
  ASSERT_TRUE(conversions.ok());
  ASSERT_EQ(conversions->size(), 2u);
  EXPECT_EQ((*conversions)[0].layer, 0);
  EXPECT_EQ((*conversions)[1].layer, 3);
  EXPECT_FALSE(cache.is_dsla(0)) << "nothing changes before the commit";
  cache.CommitRaise();
  EXPECT_EQ(cache.level(), 3);
  EXPECT_EQ(cache.slot(2), old_slot) << "layers already converted keep their states";
  EXPECT_EQ(cache.slot(0), (*conversions)[0].slot);
  EXPECT_EQ(cache.page_count(), 3);
  EXPECT_EQ(ledger.used(BlockKind::kSlot), 3);
  EXPECT_EQ(cache.BeginRaise(2).status().message(),
            "cannot go from level 3 to 2: levels only rise, up to 4");
}

TEST(SequenceCacheTest, AnAbortedRaiseLeavesNoTrace) {
  Ledger ledger({.budget_bytes = 100000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache cache(&ledger, kLadder, kPage, 0);
  ASSERT_TRUE(cache.Reserve(9).ok());
  cache.Commit(9);
  const int64_t before = ledger.used_bytes();
  ASSERT_TRUE(cache.BeginRaise(4).ok());
  cache.AbortRaise();
  EXPECT_EQ(ledger.used_bytes(), before);
  EXPECT_EQ(cache.level(), 0);
}

// Many sequences that grow, abort, rise, move and end at random under one small budget.
TEST(SequenceCacheTest, RandomLivesKeepTheInvariants) {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Ledger ledger({.budget_bytes = 40000, .page_bytes = 100, .slot_bytes = 250});
    {
      std::vector<SequenceCache> caches;
      for (int step = 0; step < 1500; ++step) {
        const int action = static_cast<int>(random() % 6);
        if (action == 0 && caches.size() < 12) {
          caches.emplace_back(&ledger, kLadder, kPage, static_cast<int>(random() % 5));
        } else if (!caches.empty()) {
          SequenceCache& cache = caches[random() % caches.size()];
          const int level = cache.level();
          if (action <= 3) {
            const int count = static_cast<int>(random() % 40);
            if (cache.Reserve(count).ok()) {
              if (random() % 4 == 0) {
                cache.Abort();
              } else {
                cache.Commit(count);
              }
            }
          } else if (action == 4 && cache.length() > 0) {
            const int to = level + static_cast<int>(random() % (5 - level));
            if (cache.BeginRaise(to).ok()) {
              if (random() % 3 == 0) {
                cache.AbortRaise();
              } else {
                cache.CommitRaise();
              }
            }
          } else if (action == 5 && random() % 4 == 0) {
            caches.pop_back();
          }
          if (action != 5) {
            ASSERT_GE(cache.level(), level);
          }
        }
        int64_t pages = 0, slots = 0;
        std::set<int32_t> page_ids, slot_ids;
        for (const SequenceCache& cache : caches) {
          pages += cache.page_count();
          slots += cache.slot_count();
          for (int layer = 0; layer < 4; ++layer) {
            page_ids.insert(cache.pages(layer).begin(), cache.pages(layer).end());
            if (cache.slot(layer) >= 0) slot_ids.insert(cache.slot(layer));
            ASSERT_TRUE(!cache.is_dsla(layer) || cache.pages(layer).empty());
          }
        }
        ASSERT_EQ(ledger.used(BlockKind::kPage), pages);
        ASSERT_EQ(ledger.used(BlockKind::kSlot), slots);
        ASSERT_EQ(static_cast<int64_t>(page_ids.size()), pages);
        ASSERT_EQ(static_cast<int64_t>(slot_ids.size()), slots);
      }
    }
    ASSERT_EQ(ledger.used_bytes(), 0) << "ended sequences hold nothing";
  }
}

TEST(SequenceCacheTest, AnAdoptedPrefixIsSharedAndItsSlotsAreOwn) {
  Ledger ledger({.budget_bytes = 3000, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache first(&ledger, kLadder, kPage, 1);
  ASSERT_TRUE(first.Reserve(9).ok());
  first.Commit(9);
  std::vector<std::vector<int32_t>> pages(4);
  for (int layer : {0, 1, 3}) pages[layer] = {first.pages(layer)[0], first.pages(layer)[1]};
  SequenceCache second(&ledger, kLadder, kPage, 1);
  ASSERT_TRUE(second.Adopt(8, pages).ok());
  EXPECT_EQ(second.length(), 8);
  EXPECT_NE(second.slot(2), first.slot(2));
  EXPECT_TRUE(second.TakeFreshSlots().empty()) << "the caller fills them";
  EXPECT_EQ(ledger.used(BlockKind::kPage), 9);
  EXPECT_EQ(second.BytesToReserve(5), 600);
  ASSERT_TRUE(second.Reserve(5).ok());
  second.Commit(5);
  EXPECT_EQ(ledger.used(BlockKind::kPage), 15);
  // A raise and an end drop this sequence's references alone.
  ASSERT_TRUE(second.BeginRaise(2).ok());
  second.CommitRaise();
  EXPECT_EQ(ledger.references(BlockKind::kPage, first.pages(0)[0]), 1);
  EXPECT_EQ(ledger.used(BlockKind::kPage), 13);
  second.Release();
  EXPECT_EQ(ledger.used(BlockKind::kPage), 9);
  EXPECT_EQ(first.page_count(), 9);
}

TEST(SequenceCacheTest, AFailedAdoptionLeavesNoTrace) {
  Ledger ledger({.budget_bytes = 500, .page_bytes = 100, .slot_bytes = 150});
  SequenceCache first(&ledger, kLadder, kPage, 0);
  ASSERT_TRUE(first.Reserve(4).ok());
  first.Commit(4);
  std::vector<std::vector<int32_t>> pages(4);
  for (int layer : {0, 1, 3}) pages[layer] = {first.pages(layer)[0]};
  SequenceCache second(&ledger, kLadder, kPage, 1);
  EXPECT_EQ(second.Adopt(4, pages).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(second.length(), 0);
  EXPECT_EQ(ledger.references(BlockKind::kPage, first.pages(0)[0]), 1);
}

}  // namespace
}  // namespace dsla
