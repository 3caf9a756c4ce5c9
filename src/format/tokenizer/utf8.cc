#include "format/tokenizer/utf8.h"

#include <unicode/uchar.h>

#include <cstring>

namespace dsla::utf8 {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

// The length of the run of ASCII at the start.
size_t AsciiPrefix(std::string_view text) {
  size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    uint64_t block;
    std::memcpy(&block, text.data() + i, 8);
    if (block & 0x8080808080808080u) break;
  }
  while (i < text.size() && static_cast<unsigned char>(text[i]) < 0x80) ++i;
  return i;
}

}  // namespace

Decoded Decode(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return {first, 1, true, false};
  if (first < 0xc2 || first > 0xf4) return {0xfffd, 1, false, false};
  const int length = LengthOf(text[0]);
  char32_t code_point = first & (0xffu >> (length + 1));
  // The second byte's range rules out overlong forms, surrogates and what lies beyond U+10FFFF.
  unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) return {0xfffd, i, false, true};
    if (byte(i) < low || byte(i) > high) return {0xfffd, i, false, false};
    code_point = code_point << 6 | (byte(i) & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {code_point, length, true, false};
}

bool IsValid(std::string_view text) {
  while (true) {
    text.remove_prefix(AsciiPrefix(text));
    if (text.empty()) return true;
    const Decoded d = Decode(text);
    if (!d.valid) return false;
    text.remove_prefix(static_cast<size_t>(d.length));
  }
}

size_t AppendComplete(std::string_view text, std::string* out) {
  while (!text.empty()) {
    const size_t ascii = AsciiPrefix(text);
    out->append(text.substr(0, ascii));
    text.remove_prefix(ascii);
    if (text.empty()) break;
    const Decoded d = Decode(text);
    if (d.truncated) break;
    out->append(d.valid ? text.substr(0, static_cast<size_t>(d.length)) : kReplacement);
    text.remove_prefix(static_cast<size_t>(d.length));
  }
  return text.size();
}

void AppendReplaced(std::string_view text, std::string* out) {
  if (AppendComplete(text, out) > 0) out->append(kReplacement);
}

void Append(char32_t c, std::string* out) {
  const auto put = [out](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6);
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

bool IsWhiteSpace(char32_t c) {
  return u_hasBinaryProperty(static_cast<UChar32>(c), UCHAR_WHITE_SPACE);
}

bool IsWordCharacter(char32_t code_point) {
  const auto c = static_cast<UChar32>(code_point);
  const uint32_t categories = U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK;
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || (U_GET_GC_MASK(c) & categories) != 0 ||
         u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL);
}

bool IsNumeric(char32_t code_point) {
  if (code_point < 0x80) return code_point >= '0' && code_point <= '9';
  return (U_GET_GC_MASK(static_cast<UChar32>(code_point)) & U_GC_N_MASK) != 0;
}

}  // namespace dsla::utf8
