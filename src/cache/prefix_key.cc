#include "cache/prefix_key.h"

#include <string>

#include "base/check.h"
#include "format/sha256.h"

namespace dsla {
namespace {

template <typename T>
void Update(Sha256& hash, std::span<const T> values) {
  const uint64_t count = values.size();  // lengths first: no two lists of fields read the same
  hash.Update(std::as_bytes(std::span(&count, 1)));
  hash.Update(std::as_bytes(values));
}

std::byte FromHex(char digit) {
  return static_cast<std::byte>(digit <= '9' ? digit - '0' : digit - 'a' + 10);
}

PrefixKey Finish(Sha256& hash) {
  const std::string hex = hash.HexDigest();
  PrefixKey key;
  DSLA_CHECK(hex.size() == 2 * key.size());
  for (size_t i = 0; i < key.size(); ++i)
    key[i] = FromHex(hex[2 * i]) << 4 | FromHex(hex[2 * i + 1]);
  return key;
}

}  // namespace

PrefixKey RootKey(std::string_view adapter_id, std::string_view salt) {
  Sha256 hash;
  Update<char>(hash, adapter_id);
  Update<char>(hash, salt);
  return Finish(hash);
}

PrefixKey NextKey(const PrefixKey& before, std::span<const LevelSpan> raises,
                  std::span<const int32_t> page) {
  Sha256 hash;
  hash.Update(std::span<const std::byte>(before));
  Update(hash, raises);
  Update(hash, page);
  return Finish(hash);
}

std::span<const LevelSpan> RaisesIn(std::span<const LevelSpan> history, int begin, int end) {
  size_t first = 0;
  while (first < history.size() && history[first].position < begin) ++first;
  size_t last = first;
  while (last < history.size() && history[last].position < end) ++last;
  return history.subspan(first, last - first);
}

}  // namespace dsla
