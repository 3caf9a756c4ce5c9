#include "format/tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <random>

namespace dsla {
namespace {

struct Model {
  std::map<std::pair<int32_t, int32_t>, std::pair<int32_t, int32_t>> merges;  // pair -> (rank, id)
  Bpe bpe;
};

// Bytes a-d with ids 0-3 and random merges of earlier tokens, some of equal rank.
Model RandomModel(std::mt19937* rng) {
  Model m;
  Bpe::Symbols symbols;
  symbols.byte_ids.fill(-1);
  std::vector<std::string> tokens = {"a", "b", "c", "d"};
  for (size_t i = 0; i < 4; ++i)
    symbols.byte_ids[static_cast<unsigned char>("abcd"[i])] = static_cast<int32_t>(i);
  std::map<std::string, int32_t> ids = {{"a", 0}, {"b", 1}, {"c", 2}, {"d", 3}};
  MergeTable table(200);
  for (int i = 0; i < 200; ++i) {
    const auto left = static_cast<int32_t>((*rng)() % tokens.size()),
               right = static_cast<int32_t>((*rng)() % tokens.size());
    if (m.merges.contains({left, right})) continue;
    const std::string text = tokens[static_cast<size_t>(left)] + tokens[static_cast<size_t>(right)];
    const auto [it, is_new] = ids.emplace(text, static_cast<int32_t>(tokens.size()));
    if (is_new) tokens.push_back(text);
    const int32_t rank = i / 3;
    m.merges[{left, right}] = {rank, it->second};
    EXPECT_TRUE(table.Insert(left, right, rank, it->second));
    EXPECT_FALSE(table.Insert(left, right, rank, it->second));
  }
  m.bpe = Bpe(symbols, std::move(table), {});
  return m;
}

// The definition, with no cleverness.
std::vector<int32_t> Reference(const Model& m, std::string_view word) {
  std::vector<int32_t> ids;
  for (const char c : word) ids.push_back(c - 'a');
  while (true) {
    size_t best = ids.size();
    std::pair<int32_t, int32_t> merge;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto it = m.merges.find({ids[i], ids[i + 1]});
      if (it != m.merges.end() && (best == ids.size() || it->second.first < merge.first)) {
        best = i;
        merge = it->second;
      }
    }
    if (best == ids.size()) return ids;
    ids[best] = merge.second;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
}

TEST(BpeTest, ScanAndHeapEqualTheDefinition) {
  std::mt19937 rng(20240519);
  for (int round = 0; round < 40; ++round) {
    const Model m = RandomModel(&rng);
    Bpe::Scratch scratch;
    for (int i = 0; i < 60; ++i) {
      std::string word;
      const size_t length = 1 + rng() % (i % 2 ? 40 : 300);
      while (word.size() < length) word.push_back(static_cast<char>('a' + rng() % 4));
      std::vector<int32_t> got, again;
      m.bpe.Encode(word, &scratch, &got);
      m.bpe.Encode(word, &scratch, &again);  // out of the cache, if it was short
      EXPECT_EQ(got, Reference(m, word)) << word;
      EXPECT_EQ(got, again) << word;
    }
  }
}

TEST(BpeTest, LongRunsTakeLittleMoreThanLinearTime) {
  Bpe::Symbols symbols;
  symbols.byte_ids.fill(-1);
  symbols.byte_ids['a'] = 0;
  MergeTable table(20);
  for (int32_t i = 0; i < 19; ++i) table.Insert(i, i, i, i + 1);  // a, aa, aaaa, ...
  const Bpe bpe(symbols, std::move(table), {});
  Bpe::Scratch scratch;
  std::vector<int32_t> ids;
  const auto start = std::chrono::steady_clock::now();
  bpe.Encode(std::string((1 << 20) + 5, 'a'), &scratch, &ids);
  EXPECT_EQ(ids, (std::vector<int32_t>{19, 19, 2, 0}));
  // A quadratic algorithm takes minutes; 20 s leaves room for sanitizers on a busy machine.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

TEST(BpeTest, UnknownSymbols) {
  Bpe::Symbols symbols;
  symbols.bytes = false;
  symbols.byte_ids.fill(-1);
  symbols.char_ids = {{U'a', 0}, {U'é', 1}};
  Bpe::Scratch scratch;
  const auto encode = [&](std::string_view word) {
    Bpe::Scratch fresh;
    std::vector<int32_t> ids;
    Bpe(symbols, MergeTable(0), {}).Encode(word, &fresh, &ids);
    return ids;
  };
  EXPECT_EQ(encode("axyé"), (std::vector<int32_t>{0, 1}));  // left out
  symbols.unk_id = 7;
  EXPECT_EQ(encode("axyé字"), (std::vector<int32_t>{0, 7, 7, 1, 7}));
  symbols.fuse_unk = true;
  EXPECT_EQ(encode("axyé字"), (std::vector<int32_t>{0, 7, 1, 7}));
  symbols.byte_fallback = true;
  for (int32_t b = 0; b < 256; ++b) symbols.byte_ids[static_cast<size_t>(b)] = 1000 + b;
  EXPECT_EQ(encode("aß"), (std::vector<int32_t>{0, 1000 + 0xc3, 1000 + 0x9f}));
}

TEST(BpeTest, WholeWordsComeBeforeMerges) {
  Bpe::Symbols symbols;
  symbols.byte_ids.fill(-1);
  symbols.byte_ids['a'] = 0;
  symbols.byte_ids['b'] = 1;
  Bpe::Scratch scratch;
  std::vector<int32_t> ids;
  Bpe(symbols, MergeTable(0), {{"ab", 5}}).Encode("ab", &scratch, &ids);
  EXPECT_EQ(ids, std::vector<int32_t>{5});
}

}  // namespace
}  // namespace dsla
