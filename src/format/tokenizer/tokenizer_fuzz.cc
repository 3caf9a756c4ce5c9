// Arbitrary bytes as text, through a byte-level and a SentencePiece tokenizer; and as token ids,
// decoded in pieces.
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "format/tokenizer/testing.h"
#include "format/tokenizer/tokenizer.h"
#include "format/tokenizer/utf8.h"

namespace {

using dsla::Tokenizer;

struct Tokenizers {
  std::unique_ptr<Tokenizer> byte_level, pieces;
};

const Tokenizers& Made() {
  static const Tokenizers made = [] {
    auto bytes = Tokenizer::Create(
        dsla::ParseTokenizerJson(dsla::testing::ByteLevelJson().dump(), "tiny").value());
    auto pieces =
        Tokenizer::Create(dsla::FromGgufVocab(dsla::testing::SentencePieceVocab()).value());
    return Tokenizers{std::move(bytes).value(), std::move(pieces).value()};
  }();
  return made;
}

void CheckText(const Tokenizer& tokenizer, std::string_view text, bool exact) {
  for (const bool parse_special : {false, true}) {
    const auto ids = tokenizer.Encode(text, {.add_bos = false, .parse_special = parse_special});
    DSLA_CHECK(ids.ok());
    for (const int32_t id : *ids) DSLA_CHECK(parse_special || !tokenizer.IsSpecial(id));
    const std::string back = tokenizer.Decode(*ids);
    DSLA_CHECK(dsla::utf8::IsValid(back));
    if (exact) {
      std::string replaced;
      dsla::utf8::AppendReplaced(text, &replaced);
      DSLA_CHECK(back == replaced);
    }
  }
}

void CheckIds(const Tokenizer& tokenizer, const uint8_t* bytes, size_t size) {
  dsla::IncrementalDecoder decoder(tokenizer);
  std::vector<int32_t> ids;
  std::string text;
  for (size_t i = 0; i + 1 < size; i += 2) {
    ids.push_back((bytes[i] | (bytes[i + 1] & 1) << 8) - 1);
    text += decoder.Push(ids.back());
    DSLA_CHECK(dsla::utf8::IsValid(text));
  }
  DSLA_CHECK(text + decoder.Finish() == tokenizer.Decode(ids));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  if (size > 4096) return 0;
  const std::string_view text(reinterpret_cast<const char*>(bytes), size);
  CheckText(*Made().byte_level, text, true);
  CheckText(*Made().pieces, text, false);
  CheckIds(*Made().byte_level, bytes, size);
  CheckIds(*Made().pieces, bytes, size);
  return 0;
}
