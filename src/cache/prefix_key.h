// Keys of the prefix cache: a SHA-256 chain. Equal keys mean equal adapter, salt, level history and
// tokens; nobody can make two prompts collide, so entries of one client cannot be read by another
// through another salt.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "cache/level_history.h"

namespace dsla {

using PrefixKey = std::array<std::byte, 32>;

struct PrefixKeyHash {
  size_t operator()(const PrefixKey& key) const {
    size_t hash;
    std::memcpy(&hash, key.data(), sizeof(hash));
    return hash;
  }
};

// Of no tokens.
PrefixKey RootKey(std::string_view adapter_id, std::string_view salt);

// Of one page more. `raises`: the history's entries at positions inside the page, its first token
// included; for the first page that is the start level.
PrefixKey NextKey(const PrefixKey& before, std::span<const LevelSpan> raises,
                  std::span<const int32_t> page);

// The entries of `history` at positions begin <= p < end.
std::span<const LevelSpan> RaisesIn(std::span<const LevelSpan> history, int begin, int end);

// A sequence's keys, root first, so that each page is hashed once.
using PrefixPath = std::vector<PrefixKey>;

}  // namespace dsla
