#include "cache/cache_pool.h"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

namespace dsla {
namespace {

// Blocks start on memory pages, so that a free one's memory can be given back alone.
constexpr int64_t kMemoryPage = 4096;
int64_t RoundUp(int64_t bytes) { return (bytes + kMemoryPage - 1) / kMemoryPage * kMemoryPage; }

}  // namespace

int64_t CacheGeometry::page_bytes() const {
  return RoundUp(2 * Hkv * page_size * KvRowBytes(kv_dtype, D));
}

int64_t CacheGeometry::slot_block_bytes() const { return RoundUp(slot_bytes); }

Expected<CachePool> CachePool::Create(const CacheGeometry& geometry, int64_t budget_bytes,
                                      BlockMemory& memory) {
  CachePool pool;
  pool.memory_ = &memory;
  pool.geometry_ = geometry;
  pool.ledger_ = std::make_unique<Ledger>(LedgerConfig{.budget_bytes = budget_bytes,
                                                       .page_bytes = geometry.page_bytes(),
                                                       .slot_bytes = geometry.slot_block_bytes()});
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    const int64_t blocks = pool.ledger_->capacity(static_cast<BlockKind>(kind));
    if (blocks == 0) continue;
    const int64_t bytes = blocks * pool.ledger_->config().bytes(static_cast<BlockKind>(kind));
    DSLA_ASSIGN_OR_RETURN(pool.arena_[kind], memory.Reserve(bytes));
    pool.arena_bytes_[kind] = bytes;
    pool.resident_[kind].assign((blocks + 63) / 64, 0);
  }
  return pool;
}

CachePool::CachePool(CachePool&& other) noexcept
    : memory_(other.memory_), geometry_(other.geometry_), ledger_(std::move(other.ledger_)) {
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    arena_[kind] = std::exchange(other.arena_[kind], nullptr);
    arena_bytes_[kind] = std::exchange(other.arena_bytes_[kind], 0);
    resident_[kind] = std::move(other.resident_[kind]);
    resident_count_[kind] = std::exchange(other.resident_count_[kind], 0);
  }
}

CachePool::~CachePool() {
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    if (arena_[kind] != nullptr) memory_->Release(arena_[kind], arena_bytes_[kind]);
  }
}

PagedKvView CachePool::pages() const {
  PagedKvView view;
  view.k = arena_[0];
  view.v =
      arena_[0] + geometry_.Hkv * geometry_.page_size * KvRowBytes(geometry_.kv_dtype, geometry_.D);
  view.page_stride = geometry_.page_bytes() / SizeOf(geometry_.kv_dtype);
  view.page_size = geometry_.page_size;
  view.Hkv = geometry_.Hkv;
  view.D = geometry_.D;
  view.dtype = geometry_.kv_dtype;
  return view;
}

DslaStateView CachePool::slots() const { return {arena_[1], geometry_.slot_block_bytes()}; }

int64_t CachePool::resident_bytes() const {
  return resident_count_[0] * ledger_->config().page_bytes +
         resident_count_[1] * ledger_->config().slot_bytes;
}

std::byte* CachePool::Block(BlockKind kind, int32_t id) const {
  return arena_[static_cast<int>(kind)] + id * ledger_->config().bytes(kind);
}

void CachePool::Touch(BlockKind kind, std::span<const int32_t> ids) {
  const int k = static_cast<int>(kind);
  const LedgerConfig& config = ledger_->config();
  for (int32_t id : ids) {
    uint64_t& word = resident_[k][id / 64];
    if (word & Ledger::Bit(id)) continue;
    // Room first: what a device gives back is what it has for the next block. It may have to wait
    // before it can, so it gives back some at once.
    const int64_t over = resident_bytes() + config.bytes(kind) - config.budget_bytes;
    if (over > 0) Trim(std::max(over, config.budget_bytes / 128));
    try {
      memory_->Back(Block(kind, id), config.bytes(kind));
    } catch (const std::bad_alloc&) {
      // A unit of memory is only given back with the last block in it, so what was trimmed may have
      // freed none. Of all free blocks some may.
      const int64_t before = resident_bytes();
      Trim(before);
      if (resident_bytes() == before) throw;
      memory_->Back(Block(kind, id), config.bytes(kind));
    }
    word |= Ledger::Bit(id);
    ++resident_count_[k];
  }
}

void CachePool::CopyBlocks(BlockKind kind, std::span<const int32_t> from,
                           std::span<const int32_t> to) {
  DSLA_CHECK(from.size() == to.size());
  Touch(kind, to);
  copies_.clear();
  for (size_t i = 0; i < to.size(); ++i)
    copies_.push_back({.to = Block(kind, to[i]), .from = Block(kind, from[i])});
  memory_->Copy(copies_, ledger_->config().bytes(kind));
}

void CachePool::ZeroBlocks(BlockKind kind, std::span<const int32_t> to) {
  Touch(kind, to);
  zeros_.clear();
  for (const int32_t id : to) zeros_.push_back(Block(kind, id));
  memory_->Zero(zeros_, ledger_->config().bytes(kind));
}

// Of millions of blocks, often while the budget is full: hence words.
void CachePool::Trim(int64_t bytes_over) {
  for (const BlockKind kind : {BlockKind::kPage, BlockKind::kSlot}) {
    const std::span<const uint64_t> free = ledger_->free(kind);
    const int64_t bytes = ledger_->config().bytes(kind);
    // From the top: the ledger hands out the lowest free ids first.
    for (auto at = static_cast<int32_t>(free.size()) - 1; at >= 0 && bytes_over > 0; --at) {
      uint64_t left = free[at] & resident_[static_cast<int>(kind)][at];
      for (; left != 0 && bytes_over > 0; bytes_over -= bytes) {
        const int32_t id = at * 64 + 63 - std::countl_zero(left);
        left &= ~Ledger::Bit(id);
        GiveBack(kind, id);
      }
    }
  }
}

void CachePool::GiveBack(BlockKind kind, int32_t id) {
  const int k = static_cast<int>(kind);
  memory_->GiveBack(Block(kind, id), ledger_->config().bytes(kind));
  resident_[k][id / 64] &= ~Ledger::Bit(id);
  --resident_count_[k];
}

}  // namespace dsla
