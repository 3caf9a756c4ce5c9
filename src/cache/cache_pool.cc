#include "cache/cache_pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace dsla {
namespace {

// Blocks start on memory pages, so that a free one's memory can be given back alone.
constexpr int64_t kMemoryPage = 4096;
int64_t RoundUp(int64_t bytes) { return (bytes + kMemoryPage - 1) / kMemoryPage * kMemoryPage; }

}  // namespace

int64_t CacheGeometry::page_bytes() const {
  return RoundUp(int64_t{2} * Hkv * page_size * D * SizeOf(kv_dtype));
}

int64_t CacheGeometry::slot_block_bytes() const { return RoundUp(slot_bytes); }

Expected<CachePool> CachePool::Create(const CacheGeometry& geometry, int64_t budget_bytes) {
  CachePool pool;
  pool.geometry_ = geometry;
  pool.ledger_ = std::make_unique<Ledger>(LedgerConfig{.budget_bytes = budget_bytes,
                                                       .page_bytes = geometry.page_bytes(),
                                                       .slot_bytes = geometry.slot_block_bytes()});
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    const int64_t blocks = pool.ledger_->capacity(static_cast<BlockKind>(kind));
    if (blocks == 0) continue;
    const int64_t bytes = blocks * pool.ledger_->config().bytes(static_cast<BlockKind>(kind));
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      return ResourceExhausted("cannot map {} bytes of cache memory: {}", bytes,
                               std::strerror(errno));
    }
    // Pages of a sequence are read in long runs; huge pages save most of the address translation.
    ::madvise(p, bytes, MADV_HUGEPAGE);
    pool.arena_[kind] = static_cast<std::byte*>(p);
    pool.arena_bytes_[kind] = bytes;
    pool.resident_[kind].assign(blocks, false);
  }
  return pool;
}

CachePool::CachePool(CachePool&& other) noexcept
    : geometry_(other.geometry_), ledger_(std::move(other.ledger_)) {
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    arena_[kind] = std::exchange(other.arena_[kind], nullptr);
    arena_bytes_[kind] = std::exchange(other.arena_bytes_[kind], 0);
    resident_[kind] = std::move(other.resident_[kind]);
    resident_count_[kind] = std::exchange(other.resident_count_[kind], 0);
  }
}

CachePool::~CachePool() {
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    if (arena_[kind] != nullptr) ::munmap(arena_[kind], arena_bytes_[kind]);
  }
}

PagedKvView CachePool::pages() const {
  PagedKvView view;
  view.k = arena_[0];
  view.v = arena_[0] +
           int64_t{geometry_.Hkv} * geometry_.page_size * geometry_.D * SizeOf(geometry_.kv_dtype);
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

void CachePool::Touch(BlockKind kind, std::span<const int32_t> ids) {
  const int k = static_cast<int>(kind);
  for (int32_t id : ids) {
    if (resident_[k][id]) continue;
    resident_[k][id] = true;
    ++resident_count_[k];
  }
  const int64_t over = resident_bytes() - ledger_->config().budget_bytes;
  if (over > 0) Trim(over);
}

void CachePool::Trim(int64_t bytes_over) {
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    const int64_t bytes = ledger_->config().bytes(static_cast<BlockKind>(kind));
    // From the top: the ledger hands out the lowest free ids first.
    for (int64_t id = static_cast<int64_t>(resident_[kind].size()) - 1; id >= 0 && bytes_over > 0;
         --id) {
      if (!resident_[kind][id] ||
          !ledger_->is_free(static_cast<BlockKind>(kind), static_cast<int32_t>(id)))
        continue;
      ::madvise(arena_[kind] + id * bytes, bytes, MADV_DONTNEED);
      resident_[kind][id] = false;
      --resident_count_[kind];
      bytes_over -= bytes;
    }
  }
}

}  // namespace dsla
