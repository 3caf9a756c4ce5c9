#include "engine/scheduler_testing.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace dsla {
namespace {

constexpr uint64_t kNoTokens = 0x9e3779b97f4a7c15;

uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0xff51afd7ed558ccd ^ (b + 0x632be59bd9b4e019);
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9;
  return x ^ (x >> 32);
}

}  // namespace

uint64_t FakeModel::Next(uint64_t before, int32_t token, int level, int shape, int owner) const {
  uint64_t link = before;
  for (int part : {token, level, exact_shape_ ? shape : 0, owner})
    link = Mix(link, static_cast<uint64_t>(part));
  return link;
}

std::vector<FakeModel::Entry>& FakeModel::Page(int32_t id) {
  if (static_cast<size_t>(id) >= pages_.size()) pages_.resize(id + 1);
  pages_[id].resize(page_size_);
  return pages_[id];
}

Status FakeModel::CopySlots(std::span<const int32_t> from, std::span<const int32_t> to) {
  EXPECT_EQ(from.size(), to.size());
  if (failing_copies_ > 0 && failing_copies_-- > 0) return ResourceExhausted("no memory to copy");
  for (size_t i = 0; i < from.size(); ++i) {
    EXPECT_FALSE(ledger_->is_free(BlockKind::kSlot, from[i]));
    EXPECT_EQ(ledger_->references(BlockKind::kSlot, to[i]), 1);
    EXPECT_FALSE(ledger_->is_retained(BlockKind::kSlot, to[i]));
    ++copies_;
    slots_.resize(std::max<size_t>({slots_.size(), from[i] + 1ul, to[i] + 1ul}));
    slots_[to[i]] = slots_[from[i]];
  }
  return Status::Ok();
}

uint64_t FakeModel::Read(const SequenceCache& cache) const {
  const int length = cache.length();
  std::vector<uint64_t> last;
  for (int layer = 0; layer < cache.layers(); ++layer) {
    if (cache.is_dsla(layer)) {
      const int32_t slot = cache.slot(layer);
      EXPECT_GE(slot, 0);
      EXPECT_EQ(ledger_->references(BlockKind::kSlot, slot), 1) << "states are one sequence's own";
      EXPECT_EQ(slots_.at(slot).layer, layer);
      last.push_back(slots_.at(slot).link);
    } else if (length > 0) {
      last.push_back(
          pages_.at(cache.pages(layer)[(length - 1) / page_size_])[(length - 1) % page_size_].link);
    }
  }
  if (length == 0) last.push_back(kNoTokens);
  for (uint64_t link : last) EXPECT_EQ(link, last[0]) << "layers stand at different tokens";
  uint64_t link = last[0];
  for (int position = length - 1; position >= 0; --position) {
    const auto found = links_.find(link);
    if (found == links_.end()) {
      ADD_FAILURE() << "rubbish at position " << position;
      break;
    }
    for (int layer = 0; layer < cache.layers(); ++layer) {
      if (cache.is_dsla(layer)) continue;
      const int32_t page = cache.pages(layer)[position / page_size_];
      EXPECT_FALSE(ledger_->is_free(BlockKind::kPage, page));
      const Entry& entry = pages_.at(page)[position % page_size_];
      EXPECT_EQ(entry.layer, layer);
      EXPECT_EQ(entry.link, link) << "position " << position;
    }
    link = found->second.before;
  }
  EXPECT_EQ(link, kNoTokens) << "the cache holds more tokens than it says";
  return last[0];
}

Status FakeModel::Raise(SequenceCache& cache, int level) {
  for (int next = cache.level() + 1; next <= level; ++next) {
    if (failing_raises_ > 0 && failing_raises_-- > 0) return ResourceExhausted("no memory to fold");
    const uint64_t link = cache.length() == 0 ? kNoTokens : Read(cache);
    const auto conversions = cache.BeginRaise(next);
    EXPECT_TRUE(conversions.ok()) << "the scheduler has made room";
    if (!conversions.ok()) return conversions.status();
    for (const auto& [layer, slot] : *conversions) {
      slots_.resize(std::max<size_t>(slots_.size(), slot + 1));
      slots_[slot] = {layer, link};
      ++folds_;
    }
    cache.CommitRaise();
  }
  return Status::Ok();
}

uint64_t FakeModel::Forward(const PlannedRows& rows, std::span<const int32_t> tokens, int owner) {
  SequenceCache& cache = *rows.cache;
  for (int32_t slot : cache.TakeFreshSlots()) {
    slots_.resize(std::max<size_t>(slots_.size(), slot + 1));
    for (int layer = 0; layer < cache.layers(); ++layer) {
      if (cache.slot(layer) == slot) slots_[slot] = {layer, kNoTokens};
    }
  }
  uint64_t link = Read(cache);
  uint64_t back = link;
  for (int position = cache.length() - 1; position >= 0; --position) {
    const Link& entry = links_.at(back);
    EXPECT_EQ(entry.token, tokens[position]) << "another text at position " << position;
    back = entry.before;
  }
  const int begin = cache.length();
  for (size_t i = 0; i < rows.tokens.size(); ++i) {
    const int position = begin + static_cast<int>(i);
    if (rows.feed < 0) {
      EXPECT_EQ(rows.tokens[i], tokens[position]);
    }
    const uint64_t next = Next(link, tokens[position], cache.level(), begin, owner);
    links_.insert({next, {link, tokens[position]}});
    link = next;
    for (int layer = 0; layer < cache.layers(); ++layer) {
      if (cache.is_dsla(layer)) {
        slots_.at(cache.slot(layer)).link = link;
        continue;
      }
      const int32_t page = cache.pages(layer)[position / page_size_];
      EXPECT_EQ(ledger_->references(BlockKind::kPage, page), 1) << "a shared page is written";
      Page(page)[position % page_size_] = {layer, link};
    }
  }
  return link;
}

std::vector<uint64_t> FakeModel::Alone(std::span<const int32_t> tokens, const LevelHistory& history,
                                       int prompt_tokens, int chunk, int owner) const {
  std::vector<uint64_t> links;
  uint64_t link = kNoTokens;
  for (int position = 0; position < static_cast<int>(tokens.size()); ++position) {
    const int shape = position < prompt_tokens ? position / chunk * chunk : position;
    link = Next(link, tokens[position], LevelBefore(history, position + 1), shape, owner);
    links.push_back(link);
  }
  return links;
}

void ExpectExactAccounts(const Ledger& ledger, Scheduler& scheduler) {
  struct Count {
    int references = 0, retained = 0;
  };
  std::vector<Count> counts[kBlockKinds];
  const auto count = [&](BlockKind kind, int32_t id) -> Count& {
    auto& list = counts[static_cast<int>(kind)];
    if (static_cast<size_t>(id) >= list.size()) list.resize(id + 1);
    return list[id];
  };
  for (const SequenceCache* cache : scheduler.caches()) {
    for (int layer = 0; layer < cache->layers(); ++layer) {
      for (int32_t page : cache->pages(layer)) ++count(BlockKind::kPage, page).references;
      if (cache->slot(layer) >= 0) ++count(BlockKind::kSlot, cache->slot(layer)).references;
    }
  }
  if (scheduler.prefix_cache() != nullptr) {
    for (const auto& [kind, id] : scheduler.prefix_cache()->Blocks()) {
      ++count(kind, id).references;
      ++count(kind, id).retained;
    }
  }
  int64_t idle_bytes = 0;
  for (const BlockKind kind : {BlockKind::kPage, BlockKind::kSlot}) {
    const auto& list = counts[static_cast<int>(kind)];
    int64_t used = 0;
    for (size_t i = 0; i < list.size(); ++i) {
      const auto id = static_cast<int32_t>(i);
      ASSERT_EQ(ledger.references(kind, id), list[i].references);
      ASSERT_EQ(ledger.is_retained(kind, id), list[i].retained == 1);
      ASSERT_LE(list[i].retained, 1);
      used += list[i].references > 0;
      if (list[i].references == 1 && list[i].retained == 1)
        idle_bytes += ledger.config().bytes(kind);
    }
    ASSERT_EQ(ledger.used(kind), used);
  }
  ASSERT_EQ(ledger.idle_bytes(), idle_bytes);
  ASSERT_LE(ledger.used_bytes(), ledger.config().budget_bytes);
}

}  // namespace dsla
