// CachePool: the memory behind a Ledger, the host's or a device's. Pages and slots lie in two
// arenas of address space, each as large as the whole budget; physical memory is only there for
// blocks that were touched (and what shares a huge page with one), and the free blocks' memory goes
// back to the system when both arenas together would hold more than the budget. The engine's thread
// owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "cache/block_memory.h"
#include "cache/ledger.h"
#include "ops/dsla/dsla.h"
#include "ops/views.h"

namespace dsla {

// What a model's cache blocks look like.
struct CacheGeometry {
  int page_size = 64;  // tokens
  int Hkv = 0;
  int D = 0;
  DType kv_dtype = DType::kBF16;
  int64_t slot_bytes = 0;  // of the largest DSLA layer; 0 without an adapter

  // What one block takes, rounded up to whole memory pages: K and V of page_size tokens of one
  // layer, and one slot.
  int64_t page_bytes() const;
  int64_t slot_block_bytes() const;
};

class CachePool {
 public:
  // `memory` must outlive the pool. kResourceExhausted when the address space cannot be had.
  static Expected<CachePool> Create(const CacheGeometry& geometry, int64_t budget_bytes,
                                    BlockMemory& memory = HostMemory());
  CachePool(CachePool&& other) noexcept;
  CachePool& operator=(CachePool&&) = delete;
  ~CachePool();

  Ledger& ledger() { return *ledger_; }
  const Ledger& ledger() const { return *ledger_; }
  const CacheGeometry& geometry() const { return geometry_; }

  // Addresses of the pool's memory: on a device only its kernels can follow them.
  PagedKvView pages() const;
  DslaStateView slots() const;

  // To be called with every block before it is first written after a reservation: counts it as
  // resident, and trims free blocks while the resident bytes exceed the budget. Throws
  // std::bad_alloc if a device has no memory left.
  void Touch(BlockKind kind, std::span<const int32_t> ids);
  // Touch `to`, then set all of it: to what the blocks of `from` in its order hold, or to zeros.
  void CopyBlocks(BlockKind kind, std::span<const int32_t> from, std::span<const int32_t> to);
  void ZeroBlocks(BlockKind kind, std::span<const int32_t> to);
  int64_t resident_bytes() const;

 private:
  CachePool() = default;
  void Trim(int64_t bytes_over);
  void GiveBack(BlockKind kind, int32_t id);
  std::byte* Block(BlockKind kind, int32_t id) const;

  BlockMemory* memory_ = nullptr;
  CacheGeometry geometry_;
  std::unique_ptr<Ledger> ledger_;
  std::byte* arena_[kBlockKinds] = {nullptr, nullptr};
  int64_t arena_bytes_[kBlockKinds] = {0, 0};
  std::vector<uint64_t> resident_[kBlockKinds];  // bits, as the ledger's free()
  int64_t resident_count_[kBlockKinds] = {0, 0};
  // Of one call, kept for their memory.
  std::vector<BlockCopy> copies_;
  std::vector<std::byte*> zeros_;
};

}  // namespace dsla
