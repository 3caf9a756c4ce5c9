#include "cache/cache_pool.h"

#include <gtest/gtest.h>

#include <cstring>

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

}  // namespace
}  // namespace dsla
