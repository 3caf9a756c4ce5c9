#include "server/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "server/http/http.h"

namespace dsla {
namespace {

std::array<uint8_t, 32> Hash(std::string_view key) {
  std::array<uint8_t, 32> digest;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t' || text.back() == '\r'))
    text.remove_suffix(1);
  return text;
}

Status CheckKey(std::string_view what, const std::string& key) {
  const bool sound =
      !key.empty() && key.size() <= 1024 &&
      std::all_of(key.begin(), key.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (sound) return Status::Ok();
  // Never the key itself: this goes to a log.
  return InvalidArgument("{}: a key of {} characters is not 1 to 1024 printable ASCII characters",
                         what, key.size());
}

}  // namespace

Expected<KeyRing> KeyRing::Create(const std::vector<std::string>& api_keys,
                                  const std::vector<std::string>& admin_keys) {
  KeyRing ring;
  for (const std::string& key : api_keys) {
    DSLA_RETURN_IF_ERROR(CheckKey("--api-key", key));
    ring.api_digests_.push_back(Hash(key));
  }
  for (const std::string& key : admin_keys) {
    DSLA_RETURN_IF_ERROR(CheckKey("--admin-key", key));
    if (std::find(api_keys.begin(), api_keys.end(), key) != api_keys.end())
      return InvalidArgument("--admin-key: an API key must not be the admin key too");
    ring.admin_digests_.push_back(Hash(key));
  }
  return ring;
}

KeyRing::Grant KeyRing::Check(std::string_view authorization) const {
  authorization = Trim(authorization);
  if (authorization.empty()) return Grant::kNone;
  const size_t blank = authorization.find(' ');
  if (blank == std::string_view::npos ||
      !EqualsIgnoreCase(authorization.substr(0, blank), "bearer"))
    return Grant::kInvalid;
  const Digest digest = Hash(Trim(authorization.substr(blank)));
  // All are compared, whichever fits.
  const auto holds = [&](const std::vector<Digest>& digests) {
    int found = 0;
    for (const Digest& known : digests) {
      found |= static_cast<int>(CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0);
    }
    return found != 0;
  };
  const bool admin = holds(admin_digests_), user = holds(api_digests_);
  return admin ? Grant::kAdmin : user ? Grant::kUser : Grant::kInvalid;
}

Expected<std::vector<std::string>> ReadKeyFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return NotFound("cannot read the key file '{}': {}", path, std::strerror(errno));
  std::vector<std::string> keys;
  std::string line;
  while (std::getline(file, line)) {
    const std::string_view key = Trim(line);
    if (!key.empty() && key.front() != '#') keys.emplace_back(key);
  }
  if (file.bad()) return DataLoss("cannot read the key file '{}'", path);
  if (keys.empty()) return InvalidArgument("the key file '{}' holds no key", path);
  return keys;
}

}  // namespace dsla
