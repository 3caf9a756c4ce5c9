// Growing, touching and giving up the nodes of the tree.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "cache/prefix_cache.h"
#include "cache/prefix_cache_node.h"

namespace dsla {

PrefixCache::Node* PrefixCache::Find(const PrefixKey& key,
                                     std::span<const LevelSpan> history) const {
  const auto [begin, end] = nodes_.equal_range(key);
  const auto found = std::find_if(begin, end, [&](const auto& entry) {
    return std::ranges::equal(entry.second->history, history);
  });
  return found == end ? nullptr : found->second.get();
}

PrefixCache::Node* PrefixCache::Add(Node* parent, const PrefixKey& key,
                                    std::span<const LevelSpan> history) {
  ++changes_;
  auto owned = std::make_unique<Node>();
  Node* node = owned.get();
  node->key = key;
  node->parent = parent;
  node->history.assign(history.begin(), history.end());
  node->last_use = time_;
  if (parent != nullptr) {
    node->tokens = parent->tokens + options_.page_size;
    node->pages.assign(options_.layers, -1);
    leaves_.erase({parent->last_use, parent});
    ++parent->children;
  }
  leaves_.emplace(node->last_use, node);
  nodes_.emplace(key, std::move(owned));
  return node;
}

void PrefixCache::Touch(Node* node) {
  ++time_;
  if (node->children == 1) ++enriched_;  // places that were used apart now are one
  for (; node != nullptr; node = node->parent) {
    const bool leaf = node->children == 0;
    if (leaf) leaves_.erase({node->last_use, node});
    node->last_use = time_;
    if (!leaf) continue;
    leaves_.emplace(time_, node);
    node->bare = -1;
  }
}

// The branch whose own the node is, if any, has more to give up than when it was last looked at.
void PrefixCache::Enrich(Node* node) {
  if (node->children == 0) node->bare = -1;
  if (node->children == 1) ++enriched_;
}

void PrefixCache::FillPages(Node* node, const SequenceCache& sequence) {
  if (node->covers <= sequence.level()) return;
  const int index = node->tokens / options_.page_size - 1;
  for (int layer = 0; layer < options_.layers; ++layer) {
    if (sequence.is_dsla(layer) || node->pages[layer] >= 0) continue;
    const int32_t page = sequence.pages(layer)[index];
    ledger_->Share(BlockKind::kPage, page);
    ledger_->SetRetained(BlockKind::kPage, page, true);
    node->pages[layer] = page;
  }
  node->covers = sequence.level();
  Enrich(node);
}

// Copies of the sequence's states, in the order of the layers.
Expected<Reservation> PrefixCache::TakeSnapshot(const SequenceCache& sequence) {
  const int level = sequence.level();
  ReclaimUsedBefore(level * ledger_->config().slot_bytes, time_);
  DSLA_ASSIGN_OR_RETURN(Reservation reservation, ledger_->Reserve(0, level));
  std::vector<int32_t> from;
  for (int layer = 0; layer < options_.layers; ++layer)
    if (sequence.is_dsla(layer)) from.push_back(sequence.slot(layer));
  DSLA_RETURN_IF_ERROR(copier_->CopySlots(from, reservation.slots()));
  return reservation;
}

void PrefixCache::KeepSnapshot(Node* node, Reservation slots, const SequenceCache& sequence) {
  ++changes_;
  node->snapshot.assign(options_.layers, -1);
  auto slot = slots.slots().begin();
  for (int layer = 0; layer < options_.layers; ++layer) {
    if (!sequence.is_dsla(layer)) continue;
    node->snapshot[layer] = *slot++;
    ledger_->SetRetained(BlockKind::kSlot, node->snapshot[layer], true);
  }
  slots.Commit();
  ++snapshots_;
  Enrich(node);
}

// A long prompt leaves many, each as large as hundreds of tokens; who begins like it parts from it
// near its end, where prompts branch, or anywhere: so many near the end and few far from it.
void PrefixCache::ThinSnapshots(const Node& newest) {
  int kept = 0;  // distance of the last one kept
  for (Node* node = newest.parent; node != nullptr; node = node->parent) {
    if (node->snapshot.empty()) continue;
    const int distance = newest.tokens - node->tokens;
    if (node->children > 1 || distance >= 2 * kept) {
      kept = distance;
    } else {
      DropSnapshot(node);
    }
  }
}

void PrefixCache::DropSnapshot(Node* node) {
  if (node->snapshot.empty()) return;
  ++changes_;
  for (const int32_t slot : node->snapshot) {
    if (slot < 0) continue;
    ledger_->SetRetained(BlockKind::kSlot, slot, false);
    ledger_->Free(BlockKind::kSlot, slot);
  }
  node->snapshot.clear();
  --snapshots_;
}

int64_t PrefixCache::Gain(const Node& node) const {
  int64_t bytes = 0;
  for (int32_t page : node.pages) {
    if (page >= 0 && ledger_->references(BlockKind::kPage, page) == 1)
      bytes += ledger_->config().page_bytes;
  }
  for (int32_t slot : node.snapshot) {
    if (slot >= 0) bytes += ledger_->config().slot_bytes;
  }
  return bytes;
}

// In order of use: first what costs next to nothing to lose, of all; then leaves that free
// something; then, as they may stand before others that do, all leaves. Where it has to look, it
// frees more than was asked for, as far as that is cheap, so that a full cache is not looked
// through for every page.
bool PrefixCache::ReclaimUsedBefore(int64_t bytes, int64_t time) {
  if (ledger_->free_bytes() >= bytes) return true;
  const int64_t ample = bytes + ledger_->config().budget_bytes / 128;
  for (auto it = leaves_.begin(); it != leaves_.end() && it->first < time; ++it) {
    if (ledger_->free_bytes() >= ample) return true;
    Prune(it->second, ample, time);
  }
  if (ledger_->free_bytes() >= bytes) return true;
  for (const bool all : {false, true}) {
    const int64_t enough = all ? bytes : ample;
    for (auto it = leaves_.begin(); it != leaves_.end() && it->first < time;) {
      if (ledger_->free_bytes() >= enough) return true;
      Node* node = it->second;
      if (!all && Gain(*node) == 0) {
        ++it;
        continue;
      }
      const int64_t last_use = node->last_use;
      Drop(node);
      it = leaves_.lower_bound({last_use, nullptr});
    }
  }
  return ledger_->free_bytes() >= bytes;
}

// Gives up what the leaf's branch can lose and still be resumed from, snapshots only until `bytes`
// bytes are free. A leaf that has no more of that is not looked at again until it has.
void PrefixCache::Prune(Node* leaf, int64_t bytes, int64_t time) {
  if (leaf->bare == enriched_) return;
  const bool pages = ShedPages(leaf), snapshots = ShedSnapshots(leaf, bytes, time);
  if (pages && snapshots) leaf->bare = enriched_;
}

// Gives up the pages that the leaf and the snapshots on its own branch do not need: those of layers
// that have their states there. What is left is a small part of the memory and all of the tokens;
// only to resume at a lower level is no longer possible. False if a sequence holds some of them.
bool PrefixCache::ShedPages(Node* leaf) {
  const Node* needs = nullptr;  // the snapshot of the lowest level so far
  for (Node* node = leaf; node->parent != nullptr; node = node->parent) {
    if (node != leaf && node->children > 1) break;
    if (!node->snapshot.empty() && (needs == nullptr || node->level() < needs->level()))
      needs = node;
    if (needs == nullptr) break;  // of level 0: all of its pages are needed
    if (node->covers >= needs->level()) continue;
    const auto idle = [&](int layer) {
      const int32_t page = node->pages[layer];
      return page >= 0 && needs->snapshot[layer] >= 0 &&
             ledger_->references(BlockKind::kPage, page) == 1;
    };
    // A sequence holds it, and with it all before it: nothing is to be had.
    bool any = false;
    for (int layer = 0; layer < options_.layers && !any; ++layer) any = idle(layer);
    if (!any) return false;
    for (int layer = 0; layer < options_.layers; ++layer) {
      int32_t& page = node->pages[layer];
      if (page < 0 || needs->snapshot[layer] < 0) continue;
      ledger_->SetRetained(BlockKind::kPage, page, false);
      ledger_->Free(BlockKind::kPage, page);
      page = -1;
    }
    node->covers = needs->level();
    ++changes_;
  }
  return true;
}

// Gives up snapshots of the leaf's own branch used before `time`, all but the last two before each
// place that was used: who begins like it most likely parts from it near its end. False if some of
// them may be left, or pages that were for those alone.
bool PrefixCache::ShedSnapshots(Node* leaf, int64_t bytes, int64_t time) {
  std::vector<Node*> spare;
  int64_t use = leaf->last_use;
  int kept = 0;
  bool whole = true;
  for (Node* node = leaf; node->parent != nullptr; node = node->parent) {
    if (node != leaf && node->children > 1) break;
    if (node->last_use >= time) {
      whole = false;
      break;
    }
    if (std::exchange(use, node->last_use) != node->last_use) kept = 0;
    if (!node->snapshot.empty() && ++kept > 2) spare.push_back(node);
  }
  for (auto node = spare.rbegin(); node != spare.rend(); ++node) {
    if (ledger_->free_bytes() >= bytes) return false;
    DropSnapshot(*node);
  }
  return whole && spare.empty();
}

void PrefixCache::Drop(Node* node) {
  ++changes_;
  // And the parents that were only steps on the way to it.
  while (node != nullptr && node->children == 0) {
    for (int32_t page : node->pages) {
      if (page < 0) continue;
      ledger_->SetRetained(BlockKind::kPage, page, false);
      ledger_->Free(BlockKind::kPage, page);
    }
    DropSnapshot(node);
    Node* parent = node->parent;
    if (parent != nullptr && --parent->children == 1) ++enriched_;  // a branch has become longer
    leaves_.erase({node->last_use, node});
    const auto [begin, end] = nodes_.equal_range(node->key);
    nodes_.erase(std::find_if(begin, end, [&](const auto& e) { return e.second.get() == node; }));
    if (parent != nullptr && parent->children == 0 && parent->useful()) {
      parent->bare = -1;
      leaves_.emplace(parent->last_use, parent);
      return;
    }
    node = parent;
  }
}

}  // namespace dsla
