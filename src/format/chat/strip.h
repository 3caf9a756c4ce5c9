// Python's str.strip family on UTF-8, which is what templates trim with: Unicode white space, not
// ASCII alone.
#pragma once

#include <string_view>

namespace dsla {

std::string_view StripLeft(std::string_view text);
std::string_view StripRight(std::string_view text);
inline std::string_view Strip(std::string_view text) { return StripLeft(StripRight(text)); }

// The same with a set of ASCII characters in place of white space.
std::string_view StripLeft(std::string_view text, std::string_view characters);
std::string_view StripRight(std::string_view text, std::string_view characters);

}  // namespace dsla
