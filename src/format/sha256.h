// SHA-256 (OpenSSL), for the identities of models and adapters and the keys of prefixes.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace dsla {

class Sha256 {
 public:
  using Digest = std::array<std::byte, 32>;

  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(std::span<const std::byte> bytes);
  void Update(std::string_view text);
  // Of all since the last one; what follows begins anew.
  Digest Finish();
  std::string HexDigest();  // the same as 64 lower-case hex digits

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace dsla
