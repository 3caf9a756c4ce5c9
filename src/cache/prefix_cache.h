// PrefixCache: pages and states of earlier prompts and replies, shared with new sequences that
// begin with the same tokens. Pure bookkeeping on a Ledger; the engine's thread owns it.
//
// A tree with one node per page of tokens and level history. Its key is a SHA-256 chain over the
// adapter's identity, the salt and the tokens up to the node's end, so that entries of different
// adapters or salts never meet; the history is compared as it is. A node owns references to the
// pages of the layers that were softmax, and may own a snapshot: copies of the state slots of the
// layers that were DSLA, as they stood at the node's end. A sequence can resume at a node of level
// 0, or at one with a snapshot. Pages are read-only once whole, so sharing them needs no copy;
// states change with every token, so a snapshot is copied on the way in and on the way out.
//
// All of it is optional memory: entries keep blocks that nobody else needs, Reclaim gives them up
// at once (pages that only lower levels would read and all but the last snapshots of a path before
// all, then the least recently used, leaves before what they hang on), and nothing is ever copied
// or waited for to evict. The memory that only the cache keeps is Ledger::idle_bytes().
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cache/ledger.h"
#include "cache/level_history.h"
#include "cache/prefix_key.h"
#include "cache/sequence_cache.h"

namespace dsla {

// Copies the memory of state slots, those of a sequence's layers at once; whoever owns it
// implements this. `to`, in the order of `from`, were just reserved. kResourceExhausted where there
// is no memory behind them. May throw what a device that failed throws: the caches' accounts stay
// right.
class SlotCopier {
 public:
  virtual ~SlotCopier() = default;
  virtual Status CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) = 0;
};

struct PrefixCacheOptions {
  int layers = 0;          // L
  int page_size = 64;      // tokens per page
  std::string adapter_id;  // identity of model and adapter
};

// Tokens of a sequence, and its own memo of their keys, empty at first.
struct PrefixTokens {
  std::span<const int32_t> tokens;
  std::string_view salt;
  PrefixPath* path;
};

struct PrefixQuery {
  std::span<const int32_t> tokens = {};  // at least one of them is left to compute
  std::string_view salt = {};
  PrefixPath* path = nullptr;  // as in PrefixTokens; null: none
  // Either the level wanted: the prefix's last level is at most this, and the caller folds it up to
  // it. With may_fold = false the prefix ran at exactly this level from the start.
  int level = 0;
  bool may_fold = true;
  // Or, if not empty, a history to be met exactly: that of a sequence to be recomputed.
  std::span<const LevelSpan> history = {};
  int multiple = 0;  // the prefix's length is a multiple of this; 0 = the page size
};

class PrefixCache {
  struct Node;

 public:
  // What was found; tokens == 0: nothing. Valid until the next call of anything but Lookup and
  // Adopt.
  struct Hit {
    int tokens = 0;
    LevelHistory history;  // of those tokens

   private:
    friend class PrefixCache;
    Node* node = nullptr;
  };

  // The ledger and the copier must outlive the cache.
  PrefixCache(Ledger* ledger, SlotCopier* copier, const PrefixCacheOptions& options);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // The longest prefix that a sequence can resume from; of equally long ones that of the highest
  // level, which leaves least to fold.
  Hit Lookup(const PrefixQuery& query);

  // Gives the hit's pages and copies of its states to an empty sequence at the hit's last level.
  // Reclaims other entries if there is no room for the states; kResourceExhausted, the sequence
  // empty as before, if that is not enough or the copier has no memory.
  Status Adopt(const Hit& hit, SequenceCache* sequence);

  // Enters the whole pages of the sequence's first tokens, as far as it still has them, by
  // reference: takes no memory. What is there already is kept and marked as used. With `snapshot`,
  // which needs all of the sequence's tokens, a multiple of the page size, and level > 0, also its
  // states, if there is room, or entries of older use can be given up for it, and the copier has
  // the memory; of the snapshots before it on an unbranched path those at about doubling distances
  // are kept. Pages of a history above level 0 are of use only before a snapshot, and are entered
  // only with one.
  void Insert(const PrefixTokens& of, std::span<const LevelSpan> history,
              const SequenceCache& sequence, bool snapshot);

  // In whole pages, how many tokens of one could be had from the other: 0 if their salts differ.
  int CommonTokens(const PrefixTokens& a, const PrefixTokens& b);

  // Gives up entries until `bytes` bytes of the ledger's budget are free, and where they were not
  // some more (1/128 of the budget), as looking for them takes time; false, with nothing given up,
  // if free and idle memory together are less than that.
  bool Reclaim(int64_t bytes);
  void Clear();

  // Rises with everything that may change what Lookup finds.
  int64_t changes() const { return changes_; }
  int64_t entries() const { return static_cast<int64_t>(nodes_.size()); }
  int64_t snapshots() const { return snapshots_; }

  // Everything it holds, for checks: every page and slot once.
  std::vector<std::pair<BlockKind, int32_t>> Blocks() const;

 private:
  const PrefixKey& KeyOf(const PrefixTokens& of, int pages);  // of so many; valid until the next
  Node* Find(const PrefixKey& key, std::span<const LevelSpan> history) const;
  Node* Add(Node* parent, const PrefixKey& key, std::span<const LevelSpan> history);
  void Touch(Node* node);  // and all before it
  void FillPages(Node* node, const SequenceCache& sequence);
  Expected<Reservation> TakeSnapshot(const SequenceCache& sequence);
  void KeepSnapshot(Node* node, Reservation slots, const SequenceCache& sequence);
  void ThinSnapshots(const Node& newest);
  void DropSnapshot(Node* node);
  void Enrich(Node* node);
  void Prune(Node* leaf, int64_t bytes, int64_t time);
  bool ShedPages(Node* leaf);
  bool ShedSnapshots(Node* leaf, int64_t bytes, int64_t time);
  int64_t Gain(const Node& node) const;  // bytes that dropping it would free
  bool ReclaimUsedBefore(int64_t bytes, int64_t time);
  void Drop(Node* leaf);

  Ledger* ledger_;
  SlotCopier* copier_;
  PrefixCacheOptions options_;
  Sha256 hash_;
  int64_t time_ = 0;  // counts uses
  int64_t snapshots_ = 0;
  int64_t changes_ = 0;
  int64_t enriched_ = 0;  // rises when branches may have more to give up than they had
  std::unordered_multimap<PrefixKey, std::unique_ptr<Node>, PrefixKeyHash> nodes_;
  std::set<std::pair<int64_t, Node*>> leaves_;  // by last use
};

}  // namespace dsla
