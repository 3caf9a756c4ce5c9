#include "cache/cache_pool.h"

#include <gtest/gtest.h>

#include <cstring>
#include <iterator>
#include <map>
#include <new>
#include <set>
#include <vector>

namespace dsla {
namespace {

CacheGeometry SmallGeometry() {
  return {.page_size = 64, .Hkv = 3, .D = 64, .kv_dtype = DType::kBF16, .slot_bytes = 100000};
}

TEST(CachePoolTest, BlocksAreWholeMemoryPagesAndDoNotOverlap) {
  auto pool = CachePool::Create(SmallGeometry(), int64_t{4} << 20);
  ASSERT_TRUE(pool.ok());
  EXPECT_EQ(pool->geometry().page_bytes(), 2 * 3 * 64 * 64 * 2);
  EXPECT_EQ(pool->slots().slot_bytes, 102400);
  const PagedKvView view = pool->pages();
  EXPECT_EQ(static_cast<std::byte*>(view.v) - static_cast<std::byte*>(view.k), 3 * 64 * 64 * 2);
  EXPECT_EQ(view.page_stride * 2, pool->geometry().page_bytes());
}

TEST(CachePoolTest, BlocksAreCopiedAndCleared) {
  auto pool = CachePool::Create(SmallGeometry(), int64_t{4} << 20);
  ASSERT_TRUE(pool.ok());
  auto reserved = pool->ledger().Reserve(0, 6);
  ASSERT_TRUE(reserved.ok());
  const std::vector<int32_t>& ids = reserved->slots();
  pool->Touch(BlockKind::kSlot, ids);
  const auto slot = [&](size_t i) {
    return static_cast<std::byte*>(pool->slots().base) + ids[i] * pool->slots().slot_bytes;
  };
  const auto size = static_cast<size_t>(pool->slots().slot_bytes);
  for (size_t i = 0; i < ids.size(); ++i) std::memset(slot(i), static_cast<int>(i) + 1, size);
  pool->CopyBlocks(BlockKind::kSlot, std::span(ids).first(2), std::span(ids).subspan(3, 2));
  pool->ZeroBlocks(BlockKind::kSlot, std::span(ids).subspan(1, 2));
  const int want[] = {1, 0, 0, 1, 2, 6};
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(slot(i)[0], static_cast<std::byte>(want[i])) << i;
    EXPECT_EQ(slot(i)[size - 1], static_cast<std::byte>(want[i])) << i;
  }
}

TEST(CachePoolTest, FreeBlocksGoBackToTheSystemWhenTheOtherKindGrows) {
  const int64_t budget = int64_t{4} << 20;
  auto pool = CachePool::Create(SmallGeometry(), budget);
  ASSERT_TRUE(pool.ok());
  Ledger& ledger = pool->ledger();
  {
    auto pages = ledger.Reserve(ledger.capacity(BlockKind::kPage), 0);
    ASSERT_TRUE(pages.ok());
    pool->Touch(BlockKind::kPage, pages->pages());
    std::memset(pool->pages().k, 1, pages->pages().size() * pool->geometry().page_bytes());
  }
  auto slots = ledger.Reserve(0, ledger.capacity(BlockKind::kSlot));
  ASSERT_TRUE(slots.ok());
  pool->Touch(BlockKind::kSlot, slots->slots());
  EXPECT_LE(pool->resident_bytes(), budget);
  EXPECT_GE(pool->resident_bytes(),
            static_cast<int64_t>(slots->slots().size()) * pool->slots().slot_bytes);
}

TEST(CachePoolTest, AFullPoolGivesBackSomeFreeBlocksAtOnce) {
  constexpr int64_t kPage = 4096, kSlot = 2 * kPage, kPages = 128 * 10;
  auto pool = CachePool::Create(
      {.page_size = 8, .Hkv = 1, .D = 128, .kv_dtype = DType::kBF16, .slot_bytes = kSlot},
      kPages * kPage);
  ASSERT_TRUE(pool.ok());
  Ledger& ledger = pool->ledger();
  {
    auto pages = ledger.Reserve(kPages, 0);
    ASSERT_TRUE(pages.ok());
    pool->Touch(BlockKind::kPage, pages->pages());
  }
  EXPECT_EQ(pool->resident_bytes(), kPages * kPage);
  auto slots = ledger.Reserve(0, 6);
  ASSERT_TRUE(slots.ok());
  pool->Touch(BlockKind::kSlot, std::span(slots->slots()).first(1));
  EXPECT_EQ(pool->resident_bytes(), (kPages - 10) * kPage + kSlot);
  pool->Touch(BlockKind::kSlot, std::span(slots->slots()).subspan(1, 4));
  EXPECT_EQ(pool->resident_bytes(), kPages * kPage) << "there was room for these";
  pool->Touch(BlockKind::kSlot, std::span(slots->slots()).subspan(5));
  EXPECT_EQ(pool->resident_bytes(), (kPages - 10) * kPage + kSlot);
}

// As on a device: memory comes in units, of which there are so many.
class UnitMemory : public BlockMemory {
 public:
  UnitMemory(int64_t unit, int most) : unit_(unit), left_(most) {}
  Expected<std::byte*> Reserve(int64_t bytes) override {
    auto reserved = HostMemory().Reserve(bytes);
    if (reserved.ok()) spaces_.insert(*reserved);
    return reserved;
  }
  void Release(std::byte* begin, int64_t bytes) override { HostMemory().Release(begin, bytes); }
  void Back(std::byte* block, int64_t) override {
    int& blocks = blocks_[Unit(block)];
    if (blocks == 0 && left_ == 0) throw std::bad_alloc();
    if (blocks++ == 0) --left_;
  }
  void GiveBack(std::byte* block, int64_t) override {
    if (--blocks_[Unit(block)] == 0) ++left_;
  }
  void Copy(std::span<const BlockCopy>, int64_t) override {}
  void Zero(std::span<std::byte* const>, int64_t) override {}

 private:
  const std::byte* Unit(const std::byte* block) const {
    const std::byte* const space = *std::prev(spaces_.upper_bound(block));
    return space + (block - space) / unit_ * unit_;
  }
  const int64_t unit_;
  int left_;
  std::set<const std::byte*> spaces_;
  std::map<const std::byte*, int> blocks_;  // by unit
};

TEST(CachePoolTest, MemoryBehindScatteredFreeBlocksIsFound) {
  // Pages of a quarter of a unit and slots of one; eight pages and two units are all there is.
  constexpr int64_t kPage = 4096, kUnit = 4 * kPage;
  UnitMemory memory(kUnit, 2);
  auto pool = CachePool::Create(
      {.page_size = 8, .Hkv = 1, .D = 128, .kv_dtype = DType::kBF16, .slot_bytes = kUnit},
      8 * kPage, memory);
  ASSERT_TRUE(pool.ok());
  ASSERT_EQ(pool->geometry().page_bytes(), kPage);
  Ledger& ledger = pool->ledger();
  auto pages = ledger.Reserve(8, 0);
  ASSERT_TRUE(pages.ok());
  const std::vector<int32_t> ids = pages->pages();
  pages->Commit();
  pool->Touch(BlockKind::kPage, ids);
  // One of the upper unit stays, so that the four that the slot is to replace free none.
  for (const int page : {0, 1, 2, 3, 5, 6, 7}) ledger.Free(BlockKind::kPage, ids[page]);
  auto slot = ledger.Reserve(0, 1);
  ASSERT_TRUE(slot.ok());
  pool->Touch(BlockKind::kSlot, slot->slots());
  EXPECT_EQ(pool->resident_bytes(), kPage + kUnit);
  // Without any there is none.
  auto another = ledger.Reserve(2, 0);
  ASSERT_TRUE(another.ok());
  EXPECT_THROW(pool->Touch(BlockKind::kPage, another->pages()), std::bad_alloc);
  ledger.Free(BlockKind::kPage, ids[4]);
}

}  // namespace
}  // namespace dsla
