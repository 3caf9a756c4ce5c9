// Bytes of a connection, cut anywhere, through the reader that every connection uses.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "server/http/request_reader.h"

namespace {

// Reads requests from `bytes`, which come `step` at a time; a digest of what was read.
std::string ReadAll(const std::string& bytes, size_t step) {
  dsla::HttpRequestLimits limits;
  limits.head_bytes = 2048;
  limits.uri_bytes = 512;
  limits.body_bytes = 4096;
  dsla::RequestReader reader(limits);
  std::string in, seen;
  for (size_t at = 0; at < bytes.size();) {
    const size_t n = std::min(step, bytes.size() - at);
    in.append(bytes, at, n);
    at += n;
    for (bool more = true; more;) {
      size_t used = 0;
      const auto event = reader.Feed(in, &used);
      DSLA_CHECK(used <= in.size());
      in.erase(0, used);
      switch (event) {
        case dsla::RequestReader::Event::kNeedMore:
          more = false;
          break;
        case dsla::RequestReader::Event::kHead:
          DSLA_CHECK(reader.request().path == "*" || reader.request().path.starts_with('/'));
          DSLA_CHECK(reader.request().path.find('\0') == std::string::npos);
          break;
        case dsla::RequestReader::Event::kDone: {
          const auto& request = reader.request();
          DSLA_CHECK(static_cast<int64_t>(request.body.size()) <= limits.body_bytes);
          seen += request.method + " " + request.path + " " + request.body + "\n";
          for (const auto& [name, value] : request.headers) {
            DSLA_CHECK(value.find_first_of("\r\n") == std::string::npos);
          }
          reader.Reset();
          break;
        }
        case dsla::RequestReader::Event::kError:
          DSLA_CHECK(reader.error().status >= 400 && reader.error().status < 500);
          return seen;
      }
    }
  }
  return seen;
}

}  // namespace

// The first byte says how large the pieces are; whole or in pieces, the same requests are read.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string whole = ReadAll(bytes, bytes.size());
  const std::string pieces = ReadAll(bytes, 1 + data[0] % 64);
  DSLA_CHECK(whole == pieces);
  return 0;
}
