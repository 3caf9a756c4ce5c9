#include "cache/ledger.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace dsla {

Reservation::Reservation(Reservation&& other) noexcept
    : ledger_(std::exchange(other.ledger_, nullptr)) {
  for (int kind = 0; kind < kBlockKinds; ++kind) ids_[kind] = std::exchange(other.ids_[kind], {});
}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  if (this == &other) return *this;
  Abort();
  ledger_ = std::exchange(other.ledger_, nullptr);
  for (int kind = 0; kind < kBlockKinds; ++kind) ids_[kind] = std::exchange(other.ids_[kind], {});
  return *this;
}

void Reservation::Commit() { ledger_ = nullptr; }

void Reservation::Abort() {
  if (ledger_ == nullptr) return;
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    for (int32_t id : ids_[kind]) ledger_->Free(static_cast<BlockKind>(kind), id);
    ids_[kind].clear();
  }
  ledger_ = nullptr;
}

Ledger::Ledger(const LedgerConfig& config) : config_(config) {
  DSLA_CHECK(config.budget_bytes >= 0 && config.page_bytes > 0 && config.slot_bytes >= 0);
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    const int64_t blocks = capacity(static_cast<BlockKind>(kind));
    blocks_[kind].resize(blocks);
    free_[kind].assign((blocks + 63) / 64, ~uint64_t{0});
    if (blocks % 64 != 0) free_[kind].back() = Bit(blocks) - 1;
  }
}

int64_t Ledger::used_bytes() const {
  return used_[0] * config_.page_bytes + used_[1] * config_.slot_bytes;
}

int64_t Ledger::capacity(BlockKind kind) const {
  const int64_t bytes = config_.bytes(kind);
  return bytes == 0 ? 0 : config_.budget_bytes / bytes;
}

int64_t Ledger::idle_bytes() const {
  return idle_[0] * config_.page_bytes + idle_[1] * config_.slot_bytes;
}

int32_t Ledger::references(BlockKind kind, int32_t id) const {
  return blocks_[static_cast<int>(kind)][id].references;
}

bool Ledger::is_retained(BlockKind kind, int32_t id) const {
  return blocks_[static_cast<int>(kind)][id].retained;
}

template <typename F>
Ledger::Block& Ledger::Change(BlockKind kind, int32_t id, F change) {
  const int k = static_cast<int>(kind);
  DSLA_CHECK(id >= 0 && id < std::ssize(blocks_[k]) && blocks_[k][id].references > 0);
  Block& block = blocks_[k][id];
  idle_[k] -= block.idle();
  change(block);
  idle_[k] += block.idle();
  return block;
}

void Ledger::Share(BlockKind kind, int32_t id) {
  Change(kind, id, [](Block& block) { ++block.references; });
}

void Ledger::SetRetained(BlockKind kind, int32_t id, bool retained) {
  Change(kind, id, [&](Block& block) {
    DSLA_CHECK(block.retained != retained);  // one cache, which knows what it holds
    block.retained = retained;
  });
}

Expected<Reservation> Ledger::Reserve(int64_t pages, int64_t slots) {
  DSLA_CHECK(pages >= 0 && slots >= 0 && (slots == 0 || config_.slot_bytes > 0));
  const int64_t needed = pages * config_.page_bytes + slots * config_.slot_bytes;
  if (needed > free_bytes()) {
    return ResourceExhausted(
        "cache memory: {} pages and {} state slots need {} bytes, {} of {} are free", pages, slots,
        needed, free_bytes(), config_.budget_bytes);
  }
  Reservation reservation;
  reservation.ledger_ = this;
  const int64_t counts[kBlockKinds] = {pages, slots};
  for (int kind = 0; kind < kBlockKinds; ++kind) {
    auto& ids = reservation.ids_[kind];
    ids.reserve(counts[kind]);
    size_t& word = lowest_[kind];
    for (int64_t i = 0; i < counts[kind]; ++i) {
      while (free_[kind][word] == 0) ++word;  // the budget holds them, so there is one
      const int32_t id = static_cast<int32_t>(word) * 64 + std::countr_zero(free_[kind][word]);
      free_[kind][word] &= ~Bit(id);
      blocks_[kind][id].references = 1;
      ids.push_back(id);
    }
    used_[kind] += counts[kind];
  }
  return reservation;
}

void Ledger::Free(BlockKind kind, int32_t id) {
  const Block& block = Change(kind, id, [](Block& b) { --b.references; });
  if (block.references > 0) return;
  DSLA_CHECK(!block.retained);
  const int k = static_cast<int>(kind);
  --used_[k];
  const auto word = static_cast<size_t>(id / 64);
  free_[k][word] |= Bit(id);
  lowest_[k] = std::min(lowest_[k], word);
}

}  // namespace dsla
