#include "cache/prefix_cache.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "cache/prefix_cache_node.h"

namespace dsla {
namespace {

// Histories that a lookup follows side by side. More than a few exist only where raises met running
// sequences of one prompt at many positions; leaving some out costs a shorter hit.
constexpr size_t kMaxBranches = 8;

bool MayFollow(const PrefixQuery& query, std::span<const LevelSpan> raises, int begin) {
  if (query.may_fold) return raises.empty() || raises.back().level <= query.level;
  if (begin > 0) return raises.empty();
  return raises.size() == 1 && raises.front() == LevelSpan{0, query.level};
}

}  // namespace

PrefixCache::PrefixCache(Ledger* ledger, SlotCopier* copier, const PrefixCacheOptions& options)
    : ledger_(ledger), copier_(copier), options_(options) {
  DSLA_CHECK(options.layers > 0 && options.page_size > 0);
}

PrefixCache::~PrefixCache() { Clear(); }

PrefixCache::Hit PrefixCache::Lookup(const PrefixQuery& query) {
  const int page_size = options_.page_size;
  const int multiple = query.multiple == 0 ? page_size : query.multiple;
  const int size = static_cast<int>(query.tokens.size());
  std::vector<Node*> frontier, next;
  if (Node* root = Find(RootKey(options_.adapter_id, query.salt))) frontier.push_back(root);
  Node* best = nullptr;
  for (int begin = 0; begin + page_size < size && !frontier.empty(); begin += page_size) {
    const auto page = query.tokens.subspan(begin, page_size);
    next.clear();
    const auto follow = [&](const Node& node, std::span<const LevelSpan> raises) {
      Node* child = Find(NextKey(node.key, raises, page));
      if (child == nullptr || next.size() == kMaxBranches) return;
      next.push_back(child);
      if (!child->useful() || child->tokens % multiple != 0) return;
      if (best == nullptr || best->tokens < child->tokens || best->level < child->level)
        best = child;
    };
    for (const Node* node : frontier) {
      if (!query.history.empty()) {
        follow(*node, RaisesIn(query.history, begin, begin + page_size));
        continue;
      }
      for (const auto& [raises, count] : node->child_raises) {
        if (MayFollow(query, raises, begin)) follow(*node, raises);
      }
    }
    frontier.swap(next);
  }
  Hit hit;
  if (best == nullptr) return hit;
  Touch(best);
  hit.tokens = best->tokens;
  hit.history = HistoryOf(*best);
  hit.node = best;
  return hit;
}

Status PrefixCache::Adopt(const Hit& hit, SequenceCache* sequence) {
  DSLA_CHECK(hit.tokens > 0 && sequence->level() == hit.node->level);
  std::vector<std::vector<int32_t>> pages(options_.layers);
  for (const Node* node = hit.node; node->parent != nullptr; node = node->parent) {
    for (int layer = 0; layer < options_.layers; ++layer) {
      if (sequence->is_dsla(layer)) continue;
      DSLA_CHECK(node->pages[layer] >= 0);
      pages[layer].push_back(node->pages[layer]);
    }
  }
  for (auto& table : pages) std::reverse(table.begin(), table.end());
  // The entry itself was touched by Lookup, so it is not given up for its own reader.
  const int64_t slot_bytes = hit.node->level * ledger_->config().slot_bytes;
  if (slot_bytes > ledger_->free_bytes()) ReclaimUsedBefore(slot_bytes, hit.node->last_use);
  DSLA_RETURN_IF_ERROR(sequence->Adopt(hit.tokens, std::move(pages)));
  for (int layer = 0; layer < options_.layers; ++layer) {
    if (!sequence->is_dsla(layer)) continue;
    const Status copied = copier_->CopySlot(hit.node->snapshot[layer], sequence->slot(layer));
    if (copied.ok()) continue;
    sequence->Release();
    return copied;
  }
  return Status::Ok();
}

void PrefixCache::Insert(std::span<const int32_t> tokens, std::string_view salt,
                         std::span<const LevelSpan> history, const SequenceCache& sequence,
                         bool snapshot, PrefixPath* path) {
  const int page_size = options_.page_size;
  const int pages = static_cast<int>(tokens.size()) / page_size;
  const int level = sequence.level();
  DSLA_CHECK(level == history.back().level && sequence.length() >= pages * page_size);
  DSLA_CHECK(!snapshot || (level > 0 && sequence.length() == pages * page_size));
  if (pages == 0 || (level > 0 && !snapshot)) return;
  if (path->empty()) path->push_back(RootKey(options_.adapter_id, salt));
  for (int page = static_cast<int>(path->size()) - 1; page < pages; ++page) {
    path->push_back(NextKey(path->back(),
                            RaisesIn(history, page * page_size, (page + 1) * page_size),
                            tokens.subspan(page * page_size, page_size)));
  }
  // First, because it may give up nodes, or fail.
  Reservation slots;
  const Node* end = Find((*path)[pages]);
  const bool copy = snapshot && (end == nullptr || end->snapshot.empty());
  if (copy) {
    auto taken = TakeSnapshot(std::span(*path).first(pages + 1), sequence);
    if (!taken.ok()) return;
    slots = std::move(taken).value();
  }
  // The deepest node that is there with all that this sequence could give it: then, as covers never
  // falls towards the root, so is everything before it.
  int page = pages;
  Node* node = nullptr;
  for (; page >= 0; --page) {
    node = Find((*path)[page]);
    if (node != nullptr && (page == 0 || node->covers <= level)) break;
  }
  if (node == nullptr) {
    page = 0;
    node = Add(nullptr, (*path)[0], {}, 0);
  }
  for (; page < pages; ++page) {
    const auto raises = RaisesIn(history, page * page_size, (page + 1) * page_size);
    Node* child = Find((*path)[page + 1]);
    if (child == nullptr) {
      child = Add(node, (*path)[page + 1], {raises.begin(), raises.end()},
                  LevelBefore(history, (page + 1) * page_size));
    }
    FillPages(child, sequence);
    node = child;
  }
  if (copy) {
    KeepSnapshot(node, std::move(slots), sequence);
    ThinSnapshots(*node);
  }
  Touch(node);
}

bool PrefixCache::Reclaim(int64_t bytes) {
  if (bytes > ledger_->free_bytes() + ledger_->idle_bytes()) return false;
  const bool done = ReclaimUsedBefore(bytes, std::numeric_limits<int64_t>::max());
  DSLA_CHECK(done);
  return true;
}

void PrefixCache::Clear() {
  while (!leaves_.empty()) Drop(leaves_.begin()->second);
  DSLA_CHECK(nodes_.empty());
}

std::vector<std::pair<BlockKind, int32_t>> PrefixCache::Blocks() const {
  std::vector<std::pair<BlockKind, int32_t>> blocks;
  for (const auto& [key, node] : nodes_) {
    for (int32_t page : node->pages) {
      if (page >= 0) blocks.emplace_back(BlockKind::kPage, page);
    }
    for (int32_t slot : node->snapshot) {
      if (slot >= 0) blocks.emplace_back(BlockKind::kSlot, slot);
    }
  }
  return blocks;
}

}  // namespace dsla
