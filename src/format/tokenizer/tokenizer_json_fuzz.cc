// Arbitrary bytes as a tokenizer.json: read, checked and, if accepted, used. Nothing may crash or
// hang.
#include <cstdint>

#include "base/check.h"
#include "format/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const std::string_view json(reinterpret_cast<const char*>(bytes), size);
  auto data = dsla::ParseTokenizerJson(json, "fuzz");
  if (!data.ok()) {
    DSLA_CHECK(data.status().message().find('\n') == std::string::npos);
    return 0;
  }
  const auto config = dsla::ApplyTokenizerConfig(json, "fuzz", &*data);
  DSLA_CHECK(config.ok() || config.message().find('\n') == std::string::npos);
  const auto tokenizer = dsla::Tokenizer::Create(std::move(data).value());
  if (!tokenizer.ok()) {
    DSLA_CHECK(tokenizer.status().message().find('\n') == std::string::npos);
    return 0;
  }
  for (const char* text :
       {"hello  world <s> 12\n\u00e9\U0001F600", "\xff\xe2\x82", "aaaaaaaaaaaaaaaaaaaaaaaa"}) {
    for (const bool parse_special : {false, true}) {
      const auto ids =
          (*tokenizer)->Encode(text, {.add_bos = false, .parse_special = parse_special});
      if (!ids.ok()) continue;
      for (const int32_t id : *ids) DSLA_CHECK(id >= 0 && id < (*tokenizer)->vocab_size());
      (*tokenizer)->Decode(*ids);
    }
  }
  return 0;
}
