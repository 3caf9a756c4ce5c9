#include "format/sha256.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include "base/check.h"

namespace dsla {

struct Sha256::Context {
  EVP_MD_CTX* md = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(md); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  DSLA_CHECK(context_->md != nullptr);
  DSLA_CHECK(EVP_DigestInit_ex(context_->md, EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::Update(std::span<const std::byte> bytes) {
  DSLA_CHECK(EVP_DigestUpdate(context_->md, bytes.data(), bytes.size()) == 1);
}

void Sha256::Update(std::string_view text) { Update(std::as_bytes(std::span(text))); }

Sha256::Digest Sha256::Finish() {
  Digest digest;
  unsigned int size = 0;
  DSLA_CHECK(EVP_DigestFinal_ex(context_->md, reinterpret_cast<unsigned char*>(digest.data()),
                                &size) == 1);
  DSLA_CHECK(size == digest.size());
  DSLA_CHECK(EVP_DigestInit_ex(context_->md, nullptr, nullptr) == 1);  // the algorithm stays
  return digest;
}

std::string Sha256::HexDigest() {
  std::string hex;
  for (const std::byte byte : Finish()) hex += fmt::format("{:02x}", static_cast<int>(byte));
  return hex;
}

}  // namespace dsla
