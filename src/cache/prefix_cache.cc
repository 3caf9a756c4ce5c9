#include "cache/prefix_cache.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "cache/prefix_cache_node.h"

namespace dsla {
namespace {

// The most of 0 to `most` for which it holds, where it holds for 0 and for all up to some number.
// Looks at few, and at none of more than twice that number.
template <typename F>
int LastOf(int most, F holds) {
  int low = 0, high = 1;
  while (high <= most && holds(high)) {
    low = high;
    high *= 2;
  }
  high = std::min(high, most + 1);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

// Whether a prefix of `tokens` tokens that ran at `history` is one that was asked for.
bool MayServe(const PrefixQuery& query, std::span<const LevelSpan> history, int tokens) {
  if (!query.history.empty()) return std::ranges::equal(history, HistoryOf(query.history, tokens));
  if (query.may_fold) return history.back().level <= query.level;
  return history.size() == 1 && history.front() == LevelSpan{0, query.level};
}

}  // namespace

PrefixCache::PrefixCache(Ledger* ledger, SlotCopier* copier, const PrefixCacheOptions& options)
    : ledger_(ledger), copier_(copier), options_(options) {
  DSLA_CHECK(options.layers > 0 && options.page_size > 0);
}

PrefixCache::~PrefixCache() { Clear(); }

PrefixCache::Hit PrefixCache::Lookup(const PrefixQuery& query) {
  PrefixPath own;
  const PrefixTokens of{query.tokens, query.salt, query.path == nullptr ? &own : query.path};
  const int multiple = query.multiple == 0 ? options_.page_size : query.multiple;
  // Whatever is there has all before it.
  int pages = LastOf((static_cast<int>(query.tokens.size()) - 1) / options_.page_size,
                     [&](int page) { return nodes_.contains(KeyOf(of, page)); });
  Node* best = nullptr;
  for (; pages > 0 && best == nullptr; --pages) {
    const int tokens = pages * options_.page_size;
    if (tokens % multiple != 0) continue;
    const auto [begin, end] = nodes_.equal_range(KeyOf(of, pages));
    for (auto it = begin; it != end; ++it) {
      Node* node = it->second.get();
      if (!node->useful() || !MayServe(query, node->history, tokens)) continue;
      if (best == nullptr || best->level() < node->level()) best = node;
    }
  }
  Hit hit;
  if (best == nullptr) return hit;
  Touch(best);
  hit.tokens = best->tokens;
  hit.history = best->history;
  hit.node = best;
  return hit;
}

int PrefixCache::CommonTokens(const PrefixTokens& a, const PrefixTokens& b) {
  const auto same = [&](int pages) { return KeyOf(a, pages) == KeyOf(b, pages); };
  if (!same(0)) return 0;
  const size_t most = std::min(a.tokens.size(), b.tokens.size()) / options_.page_size;
  return LastOf(static_cast<int>(most), same) * options_.page_size;
}

const PrefixKey& PrefixCache::KeyOf(const PrefixTokens& of, int pages) {
  PrefixPath& path = *of.path;
  if (path.empty()) path.push_back(RootKey(hash_, options_.adapter_id, of.salt));
  const size_t size = options_.page_size;
  for (auto page = path.size() - 1; page < static_cast<size_t>(pages); ++page)
    path.push_back(NextKey(hash_, path.back(), of.tokens.subspan(page * size, size)));
  return path[pages];
}

Status PrefixCache::Adopt(const Hit& hit, SequenceCache* sequence) {
  DSLA_CHECK(hit.tokens > 0 && sequence->level() == hit.node->level());
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
  const int64_t slot_bytes = hit.node->level() * ledger_->config().slot_bytes;
  if (slot_bytes > ledger_->free_bytes()) ReclaimUsedBefore(slot_bytes, hit.node->last_use);
  DSLA_RETURN_IF_ERROR(sequence->Adopt(hit.tokens, std::move(pages)));
  if (sequence->level() == 0) return Status::Ok();
  std::vector<int32_t> from, to;
  for (int layer = 0; layer < options_.layers; ++layer) {
    if (!sequence->is_dsla(layer)) continue;
    from.push_back(hit.node->snapshot[layer]);
    to.push_back(sequence->slot(layer));
  }
  const Status copied = copier_->CopySlots(from, to);
  if (!copied.ok()) sequence->Release();
  return copied;
}

void PrefixCache::Insert(const PrefixTokens& of, std::span<const LevelSpan> history,
                         const SequenceCache& sequence, bool snapshot) {
  const int page_size = options_.page_size;
  const int pages = static_cast<int>(of.tokens.size()) / page_size;
  const int level = sequence.level();
  DSLA_CHECK(level == history.back().level && sequence.length() >= pages * page_size);
  DSLA_CHECK(!snapshot || (level > 0 && sequence.length() == pages * page_size));
  if (pages == 0 || (level > 0 && !snapshot)) return;
  const auto find = [&](int page) {
    return Find(KeyOf(of, page), HistoryOf(history, page * page_size));
  };
  const auto deepest = [&] {
    Node* node = nullptr;
    for (int page = pages; page >= 0 && node == nullptr; --page) node = find(page);
    return node;
  };
  Node* node = deepest();
  // First, because it may give up nodes, or fail.
  Reservation slots;
  const bool copy =
      snapshot && (node == nullptr || node->tokens < pages * page_size || node->snapshot.empty());
  if (copy) {
    if (node != nullptr) Touch(node);  // not to be given up for its own continuation
    auto taken = TakeSnapshot(sequence);
    if (!taken.ok()) return;
    slots = std::move(taken).value();
    node = deepest();  // that one goes with the last that made it useful
  }
  // Back to one that has all that this sequence could give it: then, as covers never falls towards
  // the root, so has everything before it.
  while (node != nullptr && node->parent != nullptr && node->covers > level) node = node->parent;
  if (node == nullptr) node = Add(nullptr, KeyOf(of, 0), {});
  for (int page = node->tokens / page_size + 1; page <= pages; ++page) {
    Node* child = find(page);
    if (child == nullptr) child = Add(node, KeyOf(of, page), HistoryOf(history, page * page_size));
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
