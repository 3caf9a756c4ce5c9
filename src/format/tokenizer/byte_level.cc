#include "format/tokenizer/byte_level.h"

#include <array>
#include <cstdint>

#include "format/tokenizer/utf8.h"

namespace dsla::byte_level {
namespace {

constexpr int kCharacters = 0x100 + 68;

struct Alphabet {
  std::array<char16_t, 256> character{};
  std::array<int16_t, kCharacters> byte{};  // -1: not in the alphabet
};

constexpr Alphabet MakeAlphabet() {
  Alphabet a;
  for (auto& byte : a.byte) byte = -1;
  char16_t next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool itself = (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad);
    a.character[static_cast<size_t>(b)] = itself ? static_cast<char16_t>(b) : next++;
    a.byte[a.character[static_cast<size_t>(b)]] = static_cast<int16_t>(b);
  }
  return a;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::optional<std::string> ToBytes(std::string_view token) {
  std::string bytes;
  while (!token.empty()) {
    const utf8::Decoded d = utf8::Decode(token);
    if (!d.valid || d.code_point >= kCharacters || kAlphabet.byte[d.code_point] < 0)
      return std::nullopt;
    bytes.push_back(static_cast<char>(kAlphabet.byte[d.code_point]));
    token.remove_prefix(static_cast<size_t>(d.length));
  }
  return bytes;
}

std::string FromBytes(std::string_view bytes) {
  std::string token;
  for (const char b : bytes)
    utf8::Append(kAlphabet.character[static_cast<unsigned char>(b)], &token);
  return token;
}

}  // namespace dsla::byte_level
