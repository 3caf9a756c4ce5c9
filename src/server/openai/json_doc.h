// The body of a request as a checked JSON document. Refused with the code to answer with: what is
// not JSON (trailing bytes, a byte-order mark, NaN, ill-formed UTF-8, half a surrogate pair, a key
// twice in one object: "invalid_json"), what is nested deeper than kMaxJsonDepth or has an object
// of more than kMaxJsonKeys keys ("json_too_deep"), numbers that no type of ours can hold
// ("integer_out_of_range", "decimal_out_of_range", with the field as `param`), and what is not an
// object ("invalid_type").
#pragma once

#include <simdjson.h>

#include <optional>
#include <string_view>

#include "server/http/errors.h"

namespace dsla::openai {

constexpr size_t kMaxJsonDepth = 64;
constexpr size_t kMaxJsonKeys = 10000;

// Holds what `object()` points into. Not thread-safe.
class JsonDoc {
 public:
  // What is wrong with the body, or nothing; then object() may be used.
  std::optional<HttpError> Parse(std::string_view body);
  simdjson::dom::object object() const { return object_; }

 private:
  simdjson::dom::parser parser_;
  simdjson::dom::object object_;
};

}  // namespace dsla::openai
