// Keys of the prefix cache: a SHA-256 chain. Equal keys mean equal adapter, salt and tokens; nobody
// can make two prompts collide, so entries of one client cannot be read by another through another
// salt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "format/sha256.h"

namespace dsla {

using PrefixKey = Sha256::Digest;

struct PrefixKeyHash {
  size_t operator()(const PrefixKey& key) const {
    size_t hash;
    std::memcpy(&hash, key.data(), sizeof(hash));
    return hash;
  }
};

// Of no tokens. `hash` is one for many keys, as it takes longer to make than to use.
PrefixKey RootKey(Sha256& hash, std::string_view adapter_id, std::string_view salt);

// Of one page more.
PrefixKey NextKey(Sha256& hash, const PrefixKey& before, std::span<const int32_t> page);

// A sequence's keys, root first, so that each page is hashed once.
using PrefixPath = std::vector<PrefixKey>;

}  // namespace dsla
