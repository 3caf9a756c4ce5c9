// The bytes of a response.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/http/http.h"

namespace dsla {

enum class BodyFraming {
  kLength,      // Content-Length: `length`
  kChunked,     // Transfer-Encoding: chunked
  kUntilClose,  // a stream to an HTTP/1.0 client
  kNone,        // 204 and 304 have no body
};

// Status line and headers, with Date, Connection and what the framing needs. Line breaks in a
// header are replaced by blanks, so that no value can add a header.
std::string ResponseHeadBytes(int status, const HttpHeaders& headers, const HttpHeaders& extra,
                              BodyFraming framing, int64_t length, bool keep_alive);

void AppendChunk(std::string_view data, std::string& out);  // nothing for empty data
void AppendLastChunk(std::string& out);

const char* ReasonPhrase(int status);

}  // namespace dsla
