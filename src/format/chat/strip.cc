#include "format/chat/strip.h"

#include <algorithm>
#include <array>
#include <cstddef>

namespace dsla {
namespace {

// Every character for which Python's str.isspace holds.
constexpr std::array<std::string_view, 29> kSpaces = {
    "\t",           "\n",           "\v",           "\f",           "\r",
    "\x1c",         "\x1d",         "\x1e",         "\x1f",         " ",
    "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
    "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
    "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};

}  // namespace

std::string_view StripLeft(std::string_view text) {
  for (;;) {
    const auto space =
        std::ranges::find_if(kSpaces, [&](std::string_view s) { return text.starts_with(s); });
    if (space == kSpaces.end()) return text;
    text.remove_prefix(space->size());
  }
}

std::string_view StripRight(std::string_view text) {
  for (;;) {
    const auto space =
        std::ranges::find_if(kSpaces, [&](std::string_view s) { return text.ends_with(s); });
    if (space == kSpaces.end()) return text;
    text.remove_suffix(space->size());
  }
}

std::string_view StripLeft(std::string_view text, std::string_view characters) {
  text.remove_prefix(std::min(text.find_first_not_of(characters), text.size()));
  return text;
}

std::string_view StripRight(std::string_view text, std::string_view characters) {
  return text.substr(0, text.find_last_not_of(characters) + 1);
}

}  // namespace dsla
