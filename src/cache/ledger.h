// Ledger: who holds which page and which state slot, under one budget of bytes. Pure bookkeeping:
// no memory, no torch. A page holds page_size tokens of K and V of one layer of one sequence; a
// slot holds one DSLA layer's states, ring and sinks of one sequence. Both draw on the same budget,
// so neither kind can starve the other by a fixed split.
//
// A block may have several holders: Share adds a reference, Free drops one, and the block is free
// when none is left. At most one of them is the prefix cache's (SetRetained): blocks that it alone
// holds are idle, memory that can be had at once by giving entries up.
//
// Changes are transactions: Reserve takes all it was asked for or nothing and leaves no trace when
// it fails; the Reservation gives everything back unless it is committed; Commit cannot fail. Not
// thread-safe: the engine's thread owns it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"

namespace dsla {

enum class BlockKind { kPage = 0, kSlot = 1 };
inline constexpr int kBlockKinds = 2;

struct LedgerConfig {
  int64_t budget_bytes = 0;
  int64_t page_bytes = 0;
  int64_t slot_bytes = 0;  // 0: the model has no adapter, so there are no slots

  int64_t bytes(BlockKind kind) const { return kind == BlockKind::kPage ? page_bytes : slot_bytes; }
};

class Ledger;

// Blocks taken but not yet owned by a sequence. Movable.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation() { Abort(); }

  const std::vector<int32_t>& pages() const { return ids_[0]; }
  const std::vector<int32_t>& slots() const { return ids_[1]; }

  // The blocks now belong to the caller, who must Free each of them some day.
  void Commit();
  // Gives them back. What the destructor does to a reservation that was not committed.
  void Abort();

 private:
  friend class Ledger;
  Ledger* ledger_ = nullptr;
  std::vector<int32_t> ids_[kBlockKinds];
};

class Ledger {
 public:
  explicit Ledger(const LedgerConfig& config);
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  // Lowest free ids first, so that the touched part of the arena stays small. kResourceExhausted,
  // with the figures, when the budget does not hold them.
  Expected<Reservation> Reserve(int64_t pages, int64_t slots);
  void Share(BlockKind kind, int32_t id);  // one more reference to a block that has one
  void Free(BlockKind kind, int32_t id);   // one less
  // Says that one of the references is, or no longer is, the prefix cache's.
  void SetRetained(BlockKind kind, int32_t id, bool retained);

  const LedgerConfig& config() const { return config_; }
  int64_t used(BlockKind kind) const { return used_[static_cast<int>(kind)]; }
  int64_t used_bytes() const;
  int64_t free_bytes() const { return config_.budget_bytes - used_bytes(); }
  int64_t idle(BlockKind kind) const { return idle_[static_cast<int>(kind)]; }
  int64_t idle_bytes() const;              // of used_bytes: held by the prefix cache alone
  int64_t capacity(BlockKind kind) const;  // blocks of one kind that the whole budget could hold
  int32_t references(BlockKind kind, int32_t id) const;
  bool is_free(BlockKind kind, int32_t id) const { return references(kind, id) == 0; }
  bool is_retained(BlockKind kind, int32_t id) const;
  // The free blocks, a bit each, 64 ids a word.
  static uint64_t Bit(int64_t id) { return uint64_t{1} << (id % 64); }
  std::span<const uint64_t> free(BlockKind kind) const { return free_[static_cast<int>(kind)]; }

 private:
  friend class Reservation;
  struct Block {
    int32_t references = 0;
    bool retained = false;

    bool idle() const { return retained && references == 1; }
  };
  // The block, which must be taken, changed by `change`, and the idle ones counted anew.
  template <typename F>
  Block& Change(BlockKind kind, int32_t id, F change);

  LedgerConfig config_;
  int64_t used_[kBlockKinds] = {0, 0};
  int64_t idle_[kBlockKinds] = {0, 0};
  std::vector<Block> blocks_[kBlockKinds];  // by id, as many as the whole budget could hold
  std::vector<uint64_t> free_[kBlockKinds];
  size_t lowest_[kBlockKinds] = {0, 0};  // no word of free_ before this one has a bit
};

}  // namespace dsla
