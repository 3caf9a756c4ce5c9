// JSON from files nobody vouches for: nesting is bounded, a key may stand in an object only once,
// text must be UTF-8, and errors are one line that names the file.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/status.h"

namespace dsla {

constexpr int kMaxJsonDepth = 32;

// kDataLoss for anything that is not one JSON object or array. `path` is for messages.
Expected<nlohmann::json> ParseJson(std::string_view text, const std::string& path,
                                   int max_depth = kMaxJsonDepth);

// Text of a file inside a message: control characters and what is not ASCII replaced, cut at 80
// characters, so that a message stays one line.
std::string Printable(std::string_view text);

}  // namespace dsla
