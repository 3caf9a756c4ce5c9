// API keys. Only SHA-256 digests are kept, and a given key is compared with every one of them in
// constant time, so that neither the time of a refusal nor a memory dump gives a key away.
//
// Immutable after creation; thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace dsla {

class KeyRing {
 public:
  // No API keys: everybody may call what needs no admin key. No admin keys: nobody may call what
  // does. An admin key opens everything. Keys are 1 to 1024 printable ASCII characters.
  static Expected<KeyRing> Create(const std::vector<std::string>& api_keys,
                                  const std::vector<std::string>& admin_keys);

  enum class Grant {
    kNone,     // no key was given
    kInvalid,  // one that is not known, or no Bearer scheme
    kUser,
    kAdmin,
  };
  // `authorization`: the header's value, "Bearer KEY" with the scheme in any case; "" = none.
  Grant Check(std::string_view authorization) const;

  bool needs_key() const { return !api_digests_.empty(); }
  bool has_admin() const { return !admin_digests_.empty(); }

 private:
  using Digest = std::array<uint8_t, 32>;
  std::vector<Digest> api_digests_, admin_digests_;
};

// The keys of a file, one a line; blank lines and lines that start with # are left out.
Expected<std::vector<std::string>> ReadKeyFile(const std::string& path);

}  // namespace dsla
