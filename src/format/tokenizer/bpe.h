// Byte pair encoding of one word: starting from its bytes or characters, the neighbouring pair
// whose merge ranks first (of equal ranks the leftmost) is joined until no pair can be.
//
// Short words are joined by scanning, long ones by a heap of pairs: O(n log n) in the word's
// length. Results of short words are kept in the caller's cache. Immutable; each thread brings its
// own Scratch.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dsla {

// (left id, right id) -> (rank, merged id), open addressing with linear probing.
class MergeTable {
 public:
  struct Entry {
    uint64_t pair = kEmpty;
    int32_t rank = 0, id = 0;
  };
  MergeTable() = default;
  explicit MergeTable(size_t merges);
  // Returns false if the pair is there already.
  bool Insert(int32_t left, int32_t right, int32_t rank, int32_t id);
  const Entry* Find(int32_t left, int32_t right) const {
    const uint64_t pair = Pair(left, right);
    for (size_t i = Slot(pair);; i = (i + 1) & mask_) {
      if (slots_[i].pair == pair) return &slots_[i];
      if (slots_[i].pair == kEmpty) return nullptr;
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  static uint64_t Pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  size_t Slot(uint64_t pair) const { return (pair * 0x9e3779b97f4a7c15u >> 20) & mask_; }

  std::vector<Entry> slots_{1};
  size_t mask_ = 0;
};

class Bpe {
 public:
  // How a word's text becomes its first symbols.
  struct Symbols {
    bool bytes = true;                    // else characters
    std::array<int32_t, 256> byte_ids{};  // bytes: by byte; characters: byte fallback; -1: none
    std::unordered_map<char32_t, int32_t> char_ids;  // characters only
    bool byte_fallback = false;
    int32_t unk_id = -1;  // for what has no symbol; -1: it is left out
    bool fuse_unk = false;
  };
  struct Scratch {
    Scratch();
    struct CachedWord {
      uint8_t length = 0, count = 0;  // length 0: free
      char text[30];
      int32_t ids[8];
    };
    std::vector<CachedWord> cache;  // direct-mapped, so bounded whatever the text
    std::vector<int32_t> ids, next, previous;
    std::vector<const MergeTable::Entry*> pairs;
    std::vector<uint64_t> heap;
  };

  Bpe() = default;
  // whole_words: words that are tokens whatever the merges say; the views must outlive the object.
  Bpe(Symbols symbols, MergeTable merges,
      std::unordered_map<std::string_view, int32_t> whole_words);

  // Appends the word's tokens. `word` is not empty, and valid UTF-8 where symbols are characters.
  void Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* out) const;

  const Symbols& symbols() const { return symbols_; }

 private:
  void FirstSymbols(std::string_view word, std::vector<int32_t>* ids) const;
  void MergeByScan(Scratch* scratch) const;
  void MergeByHeap(Scratch* scratch) const;

  Symbols symbols_;
  MergeTable merges_;
  std::unordered_map<std::string_view, int32_t> whole_words_;
  std::array<int32_t, 128> ascii_ids_{};  // char_ids of ASCII
};

}  // namespace dsla
