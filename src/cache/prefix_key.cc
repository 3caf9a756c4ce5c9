#include "cache/prefix_key.h"

namespace dsla {
namespace {

template <typename T>
void Update(Sha256& hash, std::span<const T> values) {
  const uint64_t count = values.size();  // lengths first: no two lists of fields read the same
  hash.Update(std::as_bytes(std::span(&count, 1)));
  hash.Update(std::as_bytes(values));
}

}  // namespace

PrefixKey RootKey(Sha256& hash, std::string_view adapter_id, std::string_view salt) {
  Update<char>(hash, adapter_id);
  Update<char>(hash, salt);
  return hash.Finish();
}

PrefixKey NextKey(Sha256& hash, const PrefixKey& before, std::span<const int32_t> page) {
  hash.Update(std::span<const std::byte>(before));
  Update(hash, page);
  return hash.Finish();
}

}  // namespace dsla
