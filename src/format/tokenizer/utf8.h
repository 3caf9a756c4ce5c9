// UTF-8 with every ill-formed sequence handled in one way: each maximal part that starts like a
// code point but does not end as one, and each byte that cannot start one, is one U+FFFD (Unicode,
// section 3.9, table 3-8).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dsla::utf8 {

struct Decoded {
  char32_t code_point = 0;  // 0xFFFD where ill-formed
  int length = 0;           // bytes read, at least 1
  bool valid = false;
  bool truncated = false;  // ill-formed only because the text ends
};

// The code point at the start of a text that is not empty.
Decoded Decode(std::string_view text);

bool IsValid(std::string_view text);
// Appends the text to *out with U+FFFD for whatever is ill-formed.
void AppendReplaced(std::string_view text, std::string* out);
// The same, but returns the number of bytes at the end that were not consumed as they may still
// become a code point.
size_t AppendComplete(std::string_view text, std::string* out);

void Append(char32_t code_point, std::string* out);

// The length of the valid code point whose first byte this is.
inline int LengthOf(char first) {
  const auto c = static_cast<unsigned char>(first);
  return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

// Unicode's White_Space, and what may be part of a word (letters, marks, decimal digits,
// connectors, joiners).
bool IsWhiteSpace(char32_t code_point);
bool IsWordCharacter(char32_t code_point);
// General categories Nd, Nl and No.
bool IsNumeric(char32_t code_point);

}  // namespace dsla::utf8
