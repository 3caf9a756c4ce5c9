// Ledger: who holds which page and which state slot, under one budget of bytes. Pure bookkeeping:
// no memory, no torch. A page holds page_size tokens of K and V of one layer of one sequence; a
// slot holds one DSLA layer's states, ring and sinks of one sequence. Both draw on the same budget,
// so neither kind can starve the other by a fixed split.
//
// Changes are transactions: Reserve takes all it was asked for or nothing and leaves no trace when
// it fails; the Reservation gives everything back unless it is committed; Commit cannot fail. Not
// thread-safe: the engine's thread owns it.
#pragma once

#include <cstdint>
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
  void Free(BlockKind kind, int32_t id);

  const LedgerConfig& config() const { return config_; }
  int64_t used(BlockKind kind) const { return used_[static_cast<int>(kind)]; }
  int64_t used_bytes() const;
  int64_t free_bytes() const { return config_.budget_bytes - used_bytes(); }
  int64_t capacity(BlockKind kind) const;  // blocks of one kind that the whole budget could hold
  bool is_free(BlockKind kind, int32_t id) const;

 private:
  friend class Reservation;

  LedgerConfig config_;
  int64_t used_[kBlockKinds] = {0, 0};
  std::vector<int32_t> free_[kBlockKinds];  // min-heaps of ids that were used and given back
  int32_t next_[kBlockKinds] = {0, 0};      // every id from here on was never used
  std::vector<bool> taken_[kBlockKinds];    // by id, below next_
};

}  // namespace dsla
