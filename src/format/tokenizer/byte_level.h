// The printable alphabet in which byte-level vocabularies write bytes: 188 bytes stand for
// themselves as Latin-1 characters, the other 68 (controls, space, 0x7F-0xA0, 0xAD) for U+0100 and
// on, in order.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace dsla::byte_level {

// The bytes that a token stands for; nothing if it holds a character outside the alphabet.
std::optional<std::string> ToBytes(std::string_view token);
std::string FromBytes(std::string_view bytes);

}  // namespace dsla::byte_level
