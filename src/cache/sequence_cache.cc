#include "cache/sequence_cache.h"

#include <algorithm>
#include <utility>

namespace dsla {

SequenceCache::SequenceCache(Ledger* ledger, std::span<const int> ladder, int page_size, int level)
    : ledger_(ledger),
      ladder_(ladder),
      rank_(ladder.size()),
      page_size_(page_size),
      level_(level),
      pages_(ladder.size()),
      slots_(ladder.size(), -1) {
  DSLA_CHECK(page_size > 0 && level >= 0 && level <= static_cast<int>(ladder.size()));
  for (size_t rank = 0; rank < ladder.size(); ++rank) rank_[ladder[rank]] = static_cast<int>(rank);
}

SequenceCache::SequenceCache(SequenceCache&& other) noexcept
    : ledger_(other.ledger_),
      ladder_(other.ladder_),
      rank_(std::move(other.rank_)),
      page_size_(other.page_size_),
      level_(other.level_),
      length_(std::exchange(other.length_, 0)),
      pages_(std::exchange(other.pages_, {})),
      slots_(std::exchange(other.slots_, {})),
      fresh_slots_(std::exchange(other.fresh_slots_, {})),
      raise_to_(std::exchange(other.raise_to_, -1)),
      raise_slots_(std::move(other.raise_slots_)) {}

SequenceCache::Blocks SequenceCache::MissingFor(int count) const {
  const int64_t wanted = PagesFor(int64_t{length_} + count, page_size_);
  Blocks missing;
  for (int layer = 0; layer < layers(); ++layer) {
    if (is_dsla(layer)) {
      missing.slots += slots_[layer] < 0 ? 1 : 0;
    } else {
      missing.pages += std::max<int64_t>(0, wanted - static_cast<int64_t>(pages_[layer].size()));
    }
  }
  return missing;
}

int64_t SequenceCache::BytesToReserve(int count) const {
  const Blocks missing = MissingFor(count);
  return missing.pages * ledger_->config().page_bytes +
         missing.slots * ledger_->config().slot_bytes;
}

Status SequenceCache::Reserve(int count) {
  DSLA_CHECK(count >= 0 && raise_to_ < 0);
  const int64_t wanted = PagesFor(int64_t{length_} + count, page_size_);
  const Blocks missing = MissingFor(count);
  DSLA_ASSIGN_OR_RETURN(Reservation reservation, ledger_->Reserve(missing.pages, missing.slots));
  auto page = reservation.pages().begin();
  auto slot = reservation.slots().begin();
  // Layers that convert last first: what raises free lies together, and above what stays. A device
  // gives memory back in units of many pages.
  for (int rank = layers() - 1; rank >= 0; --rank) {
    const int layer = ladder_[rank];
    if (is_dsla(layer)) {
      if (slots_[layer] >= 0) continue;
      slots_[layer] = *slot++;
      fresh_slots_.push_back(slots_[layer]);
    } else {
      while (static_cast<int64_t>(pages_[layer].size()) < wanted) pages_[layer].push_back(*page++);
    }
  }
  reservation.Commit();
  return Status::Ok();
}

void SequenceCache::Commit(int count) {
  length_ += count;
  for (size_t layer = 0; layer < ladder_.size(); ++layer) {
    DSLA_CHECK(is_dsla(static_cast<int>(layer)) ||
               static_cast<int64_t>(pages_[layer].size()) >= PagesFor(length_, page_size_));
  }
}

void SequenceCache::Abort() {
  const size_t kept = PagesFor(length_, page_size_);
  for (auto& table : pages_) {
    while (table.size() > kept) {
      ledger_->Free(BlockKind::kPage, table.back());
      table.pop_back();
    }
  }
  if (length_ > 0) return;
  for (int32_t& slot : slots_) {
    if (slot >= 0) ledger_->Free(BlockKind::kSlot, std::exchange(slot, -1));
  }
  fresh_slots_.clear();
}

Status SequenceCache::Adopt(int tokens, std::vector<std::vector<int32_t>> pages) {
  DSLA_CHECK(length_ == 0 && page_count() == 0 && slot_count() == 0);
  DSLA_CHECK(tokens % page_size_ == 0 && pages.size() == pages_.size());
  DSLA_ASSIGN_OR_RETURN(Reservation reservation, ledger_->Reserve(0, level_));
  for (int layer = 0; layer < layers(); ++layer) {
    if (is_dsla(layer)) {
      DSLA_CHECK(pages[layer].empty());
      slots_[layer] = reservation.slots()[rank_[layer]];
      continue;
    }
    DSLA_CHECK(static_cast<int>(pages[layer].size()) * page_size_ == tokens);
    for (int32_t page : pages[layer]) ledger_->Share(BlockKind::kPage, page);
    pages_[layer] = std::move(pages[layer]);
  }
  reservation.Commit();
  length_ = tokens;
  return Status::Ok();
}

Expected<std::vector<SequenceCache::Conversion>> SequenceCache::BeginRaise(int level) {
  DSLA_CHECK(raise_to_ < 0);
  if (level < level_ || level > static_cast<int>(ladder_.size())) {
    return InvalidArgument("cannot go from level {} to {}: levels only rise, up to {}", level_,
                           level, ladder_.size());
  }
  DSLA_ASSIGN_OR_RETURN(raise_slots_, ledger_->Reserve(0, level - level_));
  raise_to_ = level;
  std::vector<Conversion> conversions;
  for (int rank = level_; rank < level; ++rank) {
    conversions.push_back({ladder_[rank], raise_slots_.slots()[rank - level_]});
  }
  return conversions;
}

void SequenceCache::CommitRaise() {
  DSLA_CHECK(raise_to_ >= 0);
  for (int rank = level_; rank < raise_to_; ++rank) {
    const int layer = ladder_[rank];
    for (int32_t page : pages_[layer]) ledger_->Free(BlockKind::kPage, page);
    pages_[layer].clear();
    slots_[layer] = raise_slots_.slots()[rank - level_];
  }
  raise_slots_.Commit();
  level_ = std::exchange(raise_to_, -1);
}

void SequenceCache::AbortRaise() {
  raise_slots_.Abort();
  raise_to_ = -1;
}

void SequenceCache::Release() {
  AbortRaise();
  length_ = 0;
  if (!pages_.empty()) Abort();
}

int64_t SequenceCache::page_count() const {
  int64_t count = 0;
  for (const auto& table : pages_) count += static_cast<int64_t>(table.size());
  return count;
}

int64_t SequenceCache::slot_count() const {
  return std::count_if(slots_.begin(), slots_.end(), [](int32_t slot) { return slot >= 0; });
}

}  // namespace dsla
