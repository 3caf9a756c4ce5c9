#include "cache/ledger.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace dsla {
namespace {

TEST(LedgerTest, ReservationThatIsNotCommittedLeavesNoTrace) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 150});
  {
    auto reservation = ledger.Reserve(3, 2);
    ASSERT_TRUE(reservation.ok());
    EXPECT_EQ(ledger.used_bytes(), 600);
  }
  EXPECT_EQ(ledger.used_bytes(), 0);
}

TEST(LedgerTest, FailsWholeAndSaysTheFigures) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 150});
  const auto reservation = ledger.Reserve(8, 2);
  ASSERT_FALSE(reservation.ok());
  EXPECT_EQ(reservation.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(reservation.status().message(),
            "cache memory: 8 pages and 2 state slots need 1100 bytes, 1000 of 1000 are free");
  EXPECT_EQ(ledger.used_bytes(), 0);
  EXPECT_TRUE(ledger.Reserve(7, 2).ok());
}

TEST(LedgerTest, LowestIdsAreReused) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 0});
  auto reservation = ledger.Reserve(5, 0);
  ASSERT_TRUE(reservation.ok());
  reservation->Commit();
  ledger.Free(BlockKind::kPage, 3);
  ledger.Free(BlockKind::kPage, 1);
  auto again = ledger.Reserve(3, 0);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->pages(), (std::vector<int32_t>{1, 3, 5}));
}

TEST(LedgerTest, DoubleFreeIsCaught) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 0});
  ledger.Reserve(1, 0).value().Commit();
  ledger.Free(BlockKind::kPage, 0);
  EXPECT_DEATH(ledger.Free(BlockKind::kPage, 0), "check failed");
}

// Every block of the kind is free, but for `owned`, each of which exists and is there once. By
// words: it is asked after every step, and an assertion for every block takes minutes under TSan.
void ExpectFreeButFor(const Ledger& ledger, BlockKind kind, const std::vector<int32_t>& owned) {
  const auto free = ledger.free(kind);
  std::vector<uint64_t> expected(free.size());
  for (int32_t id = 0; id < ledger.capacity(kind); ++id) expected[id / 64] |= Ledger::Bit(id);
  for (const int32_t id : owned) {
    ASSERT_TRUE(id >= 0 && id < ledger.capacity(kind)) << id;
    ASSERT_TRUE(expected[id / 64] & Ledger::Bit(id)) << id << " is owned twice";
    expected[id / 64] &= ~Ledger::Bit(id);
    ASSERT_FALSE(ledger.is_free(kind, id)) << id;
  }
  EXPECT_TRUE(std::ranges::equal(expected, free));
  EXPECT_EQ(ledger.used(kind), static_cast<int64_t>(owned.size()));
}

// Thousands of random transactions against a plain model: nothing leaks, nothing is handed out
// twice, the budget holds.
TEST(LedgerTest, RandomTransactionsKeepTheInvariants) {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const LedgerConfig config{.budget_bytes = 5000, .page_bytes = 70, .slot_bytes = 190};
    Ledger ledger(config);
    std::vector<int32_t> owned[kBlockKinds];
    for (int step = 0; step < 2000; ++step) {
      const int kind = static_cast<int>(random() % 2);
      if (random() % 2 == 0) {
        const int64_t pages = random() % 12, slots = random() % 4;
        const int64_t before = ledger.used_bytes();
        auto reservation = ledger.Reserve(pages, slots);
        ASSERT_EQ(reservation.ok(), before + pages * 70 + slots * 190 <= 5000);
        if (!reservation.ok()) {
          ASSERT_EQ(ledger.used_bytes(), before);
        } else if (random() % 3 != 0) {
          owned[0].insert(owned[0].end(), reservation->pages().begin(), reservation->pages().end());
          owned[1].insert(owned[1].end(), reservation->slots().begin(), reservation->slots().end());
          reservation->Commit();
        }
      } else if (!owned[kind].empty()) {
        const size_t i = random() % owned[kind].size();
        ledger.Free(static_cast<BlockKind>(kind), owned[kind][i]);
        owned[kind].erase(owned[kind].begin() + static_cast<int64_t>(i));
      }
      for (const BlockKind kind : {BlockKind::kPage, BlockKind::kSlot})
        ExpectFreeButFor(ledger, kind, owned[static_cast<int>(kind)]);
      ASSERT_FALSE(testing::Test::HasFailure());
      ASSERT_LE(ledger.used_bytes(), config.budget_bytes);
    }
  }
}

TEST(LedgerTest, ABlockIsFreeWhenItsLastHolderIsGone) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 150});
  auto reservation = ledger.Reserve(1, 0);
  ASSERT_TRUE(reservation.ok());
  const int32_t page = reservation->pages()[0];
  reservation->Commit();
  ledger.Share(BlockKind::kPage, page);
  EXPECT_EQ(ledger.references(BlockKind::kPage, page), 2);
  EXPECT_EQ(ledger.used_bytes(), 100) << "counted once";
  ledger.Free(BlockKind::kPage, page);
  EXPECT_FALSE(ledger.is_free(BlockKind::kPage, page));
  ledger.Free(BlockKind::kPage, page);
  EXPECT_TRUE(ledger.is_free(BlockKind::kPage, page));
  EXPECT_EQ(ledger.used_bytes(), 0);
}

TEST(LedgerTest, IdleIsWhatThePrefixCacheAloneHolds) {
  Ledger ledger({.budget_bytes = 1000, .page_bytes = 100, .slot_bytes = 150});
  auto reservation = ledger.Reserve(1, 1);
  ASSERT_TRUE(reservation.ok());
  const int32_t page = reservation->pages()[0], slot = reservation->slots()[0];
  reservation->Commit();
  ledger.SetRetained(BlockKind::kSlot, slot, true);
  EXPECT_EQ(ledger.idle_bytes(), 150);
  ledger.Share(BlockKind::kPage, page);
  ledger.SetRetained(BlockKind::kPage, page, true);
  EXPECT_EQ(ledger.idle_bytes(), 150) << "a sequence holds the page too";
  ledger.Free(BlockKind::kPage, page);
  EXPECT_EQ(ledger.idle_bytes(), 250);
  EXPECT_EQ(ledger.idle(BlockKind::kPage), 1);
  EXPECT_TRUE(ledger.is_retained(BlockKind::kPage, page));
  ledger.SetRetained(BlockKind::kPage, page, false);
  EXPECT_EQ(ledger.idle_bytes(), 150);
  ledger.Free(BlockKind::kPage, page);
  EXPECT_EQ(ledger.used_bytes(), 150);
}

}  // namespace
}  // namespace dsla
