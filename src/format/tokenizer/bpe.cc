#include "format/tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "base/check.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

constexpr size_t kCacheSlots =
    1 << 14;  // 1 MiB with 64-byte entries: more than the frequent words of a language
constexpr size_t kScanLimit = 48;  // symbols; above, the heap is faster

}  // namespace

static_assert(sizeof(Bpe::Scratch::CachedWord) == 64, "one cache line");

MergeTable::MergeTable(size_t merges)
    : slots_(std::bit_ceil(2 * merges + 1)), mask_(slots_.size() - 1) {}

bool MergeTable::Insert(int32_t left, int32_t right, int32_t rank, int32_t id) {
  const uint64_t pair = Pair(left, right);
  size_t i = Slot(pair);
  for (; slots_[i].pair != kEmpty; i = (i + 1) & mask_) {
    if (slots_[i].pair == pair) return false;
  }
  slots_[i] = {pair, rank, id};
  return true;
}

Bpe::Scratch::Scratch() : cache(kCacheSlots) {}

Bpe::Bpe(Symbols symbols, MergeTable merges,
         std::unordered_map<std::string_view, int32_t> whole_words)
    : symbols_(std::move(symbols)),
      merges_(std::move(merges)),
      whole_words_(std::move(whole_words)) {
  for (char32_t c = 0; c < 128; ++c) {
    const auto it = symbols_.char_ids.find(c);
    ascii_ids_[c] = it == symbols_.char_ids.end() ? -1 : it->second;
  }
}

void Bpe::FirstSymbols(std::string_view word, std::vector<int32_t>* ids) const {
  ids->clear();
  bool unknown = false;  // the symbol before stands for unknown text
  const auto put_unknown = [&] {
    if (symbols_.unk_id >= 0 && !(unknown && symbols_.fuse_unk)) ids->push_back(symbols_.unk_id);
    unknown = true;
  };
  if (symbols_.bytes) {
    for (const char c : word) {
      const int32_t id = symbols_.byte_ids[static_cast<unsigned char>(c)];
      if (id < 0) {
        put_unknown();
      } else {
        ids->push_back(id);
        unknown = false;
      }
    }
    return;
  }
  for (size_t i = 0; i < word.size();) {
    const utf8::Decoded d = utf8::Decode(word.substr(i));
    int32_t id = -1;
    if (d.code_point < 128) {
      id = ascii_ids_[d.code_point];
    } else if (const auto it = symbols_.char_ids.find(d.code_point);
               it != symbols_.char_ids.end()) {
      id = it->second;
    }
    if (id >= 0) {
      ids->push_back(id);
      unknown = false;
    } else if (symbols_.byte_fallback) {
      for (int k = 0; k < d.length; ++k) {
        ids->push_back(
            symbols_.byte_ids[static_cast<unsigned char>(word[i + static_cast<size_t>(k)])]);
      }
      unknown = false;
    } else {
      put_unknown();
    }
    i += static_cast<size_t>(d.length);
  }
}

void Bpe::MergeByScan(Scratch* s) const {
  std::vector<int32_t>& ids = s->ids;
  auto& pairs = s->pairs;  // pairs[i]: the merge of symbols i and i + 1, or null
  pairs.resize(ids.size() - 1);
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = merges_.Find(ids[i], ids[i + 1]);
  while (true) {
    size_t best = pairs.size();
    for (size_t i = 0; i < pairs.size(); ++i) {
      if (pairs[i] && (best == pairs.size() || pairs[i]->rank < pairs[best]->rank)) best = i;
    }
    if (best == pairs.size()) return;
    ids[best] = pairs[best]->id;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
    pairs.erase(pairs.begin() + static_cast<ptrdiff_t>(best));
    if (best > 0) pairs[best - 1] = merges_.Find(ids[best - 1], ids[best]);
    if (best < pairs.size()) pairs[best] = merges_.Find(ids[best], ids[best + 1]);
  }
}

void Bpe::MergeByHeap(Scratch* s) const {
  const auto n = static_cast<int32_t>(s->ids.size());
  const auto at = [](auto& v, int32_t i) -> auto& { return v[static_cast<size_t>(i)]; };
  s->next.resize(s->ids.size());
  s->previous.resize(s->ids.size());
  for (int32_t i = 0; i < n; ++i) {
    at(s->next, i) = i + 1;  // n: none
    at(s->previous, i) = i - 1;
  }
  s->heap.clear();  // rank << 32 | position of the left symbol, smallest on top; entries may be out
                    // of date
  const auto offer = [&](int32_t i) {
    if (i < 0 || at(s->next, i) == n) return;
    if (const auto* entry = merges_.Find(at(s->ids, i), at(s->ids, at(s->next, i)))) {
      s->heap.push_back(static_cast<uint64_t>(static_cast<uint32_t>(entry->rank)) << 32 |
                        static_cast<uint32_t>(i));
      std::push_heap(s->heap.begin(), s->heap.end(), std::greater<>());
    }
  };
  for (int32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!s->heap.empty()) {
    std::pop_heap(s->heap.begin(), s->heap.end(), std::greater<>());
    const auto rank = static_cast<int32_t>(s->heap.back() >> 32);
    const auto i = static_cast<int32_t>(s->heap.back() & 0xffffffffu);
    s->heap.pop_back();
    if (at(s->ids, i) < 0 || at(s->next, i) == n)
      continue;  // the symbol was merged into another, or is the last
    const int32_t right = at(s->next, i);
    const auto* entry = merges_.Find(at(s->ids, i), at(s->ids, right));
    if (entry == nullptr || entry->rank != rank) continue;
    at(s->ids, i) = entry->id;
    at(s->ids, right) = -1;
    at(s->next, i) = at(s->next, right);
    if (at(s->next, i) < n) at(s->previous, at(s->next, i)) = i;
    offer(at(s->previous, i));
    offer(i);
  }
  std::erase(s->ids, -1);
}

void Bpe::Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* out) const {
  if (symbols_.bytes && word.size() == 1 &&
      symbols_.byte_ids[static_cast<unsigned char>(word[0])] >= 0) {
    out->push_back(symbols_.byte_ids[static_cast<unsigned char>(word[0])]);
    return;
  }
  Scratch::CachedWord* cached = nullptr;
  if (word.size() <= sizeof(cached->text)) {
    cached = &scratch->cache[std::hash<std::string_view>()(word) % kCacheSlots];
    if (cached->length == word.size() && std::memcmp(cached->text, word.data(), word.size()) == 0) {
      out->insert(out->end(), cached->ids, cached->ids + cached->count);
      return;
    }
  }
  std::vector<int32_t>& ids = scratch->ids;
  const auto whole = whole_words_.empty() ? whole_words_.end() : whole_words_.find(word);
  if (whole != whole_words_.end()) {
    ids.assign(1, whole->second);
  } else {
    FirstSymbols(word, &ids);
    if (ids.size() > kScanLimit) {
      MergeByHeap(scratch);
    } else if (ids.size() > 1) {
      MergeByScan(scratch);
    }
  }
  out->insert(out->end(), ids.begin(), ids.end());
  if (cached != nullptr && ids.size() <= std::size(cached->ids)) {
    cached->length = static_cast<uint8_t>(word.size());
    cached->count = static_cast<uint8_t>(ids.size());
    std::memcpy(cached->text, word.data(), word.size());
    std::copy(ids.begin(), ids.end(), cached->ids);
  }
}

}  // namespace dsla
