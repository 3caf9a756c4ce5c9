// SequenceCache: one sequence's page tables and state slots, layer by layer, and how many tokens
// they hold. Every layer is of one kind at a time: softmax (pages) or dsla (one slot). At level k
// the first k layers of the ladder are dsla, so the whole mix is one integer, which only rises.
// Pure bookkeeping on a Ledger; the engine's thread owns it.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cache/block_sizes.h"
#include "cache/ledger.h"

namespace dsla {

class SequenceCache {
 public:
  // `ladder`: layer indices, first to convert first; L = its size. Without an adapter it is the
  // identity and level stays 0. The ladder and the ledger must outlive the cache. A sequence at
  // level k from the start holds k slots from its first reservation on.
  SequenceCache(Ledger* ledger, std::span<const int> ladder, int page_size, int level);
  SequenceCache(SequenceCache&& other) noexcept;
  SequenceCache& operator=(SequenceCache&&) = delete;
  ~SequenceCache() { Release(); }

  int layers() const { return static_cast<int>(ladder_.size()); }
  int length() const { return length_; }  // tokens cached
  int level() const { return level_; }
  int layer_of_rank(int rank) const { return ladder_[rank]; }
  bool is_dsla(int layer) const { return rank_[layer] < level_; }
  std::span<const int32_t> pages(int layer) const { return pages_[layer]; }
  int32_t slot(int layer) const { return slots_[layer]; }  // -1 while softmax

  // Makes room for `count` more tokens, all layers or none. Slots handed out here hold rubbish: see
  // TakeFreshSlots.
  Status Reserve(int count);
  int64_t BytesToReserve(int count) const;  // what that would take
  // The reserved tokens are in the cache. Cannot fail.
  void Commit(int count);
  // Gives back what was reserved and not committed.
  void Abort();
  // Slots handed out since the last call; whoever owns the memory must reset them before use.
  std::vector<int32_t> TakeFreshSlots() { return std::exchange(fresh_slots_, {}); }
  std::span<const int32_t> fresh_slots() const { return fresh_slots_; }

  // Starts an empty sequence with the first `tokens` tokens of another, a multiple of the page
  // size: shares pages[layer] for each softmax layer, and takes a slot per DSLA layer, which the
  // caller fills with the states at that point (they are not among TakeFreshSlots). All or nothing.
  // Whole pages are never written again, so sharing them is safe; a raise or Release drops this
  // sequence's references alone.
  Status Adopt(int tokens, std::vector<std::vector<int32_t>> pages);

  // A raise to `level`: BeginRaise reserves a slot for each layer that converts and names them;
  // after the caller folded those layers' pages into the slots, CommitRaise frees the pages.
  // AbortRaise undoes BeginRaise.
  struct Conversion {
    int layer;
    int32_t slot;
  };
  Expected<std::vector<Conversion>> BeginRaise(int level);
  void CommitRaise();
  void AbortRaise();

  // Frees everything; length is 0 afterwards, the level stays.
  void Release();

  int64_t page_count() const;
  int64_t slot_count() const;

 private:
  struct Blocks {
    int64_t pages = 0, slots = 0;
  };
  Blocks MissingFor(int count) const;

  Ledger* ledger_;
  std::span<const int> ladder_;
  std::vector<int> rank_;  // by layer: its place in the ladder
  int page_size_;
  int level_;
  int length_ = 0;
  std::vector<std::vector<int32_t>> pages_;  // by layer
  std::vector<int32_t> slots_;               // by layer, -1 = none
  std::vector<int32_t> fresh_slots_;
  int raise_to_ = -1;  // between BeginRaise and its end
  Reservation raise_slots_;
};

}  // namespace dsla
