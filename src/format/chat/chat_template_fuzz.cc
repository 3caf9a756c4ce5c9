// Any bytes as a model file's chat template: recognised or refused in bounded time, never a crash;
// with tools, no byte of a client's counts as the template's.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "format/chat/chat_template.h"
#include "format/chat/model_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  const auto found = dsla::DetectChatTemplate(source);
  DSLA_CHECK(found.ok() || found.status().message().find('\n') == std::string::npos);
  const auto plain = dsla::ModelTemplate::ForChat(source);
  DSLA_CHECK(plain.ok() || plain.status().message().find('\n') == std::string::npos);
  const auto with_tools = dsla::ModelTemplate::ForTools(source);
  if (!with_tools.ok()) {
    DSLA_CHECK(with_tools.status().message().find('\n') == std::string::npos);
    return 0;
  }
  const dsla::ChatMessage user{"user", "\x01\x01"};
  const dsla::Tool tool{"\x01", R"({"\u0001":["\u0001"]})", ""};
  const auto text = with_tools->Render({&user, 1}, {&tool, 1}, {});
  if (!text.ok() || source.find('\x01') != std::string_view::npos) return 0;
  size_t begin = 0;
  for (const auto& foreign : text->foreign()) {
    DSLA_CHECK(text->bytes().substr(begin, foreign.begin - begin).find('\x01') ==
               std::string::npos);
    begin = foreign.end;
  }
  DSLA_CHECK(text->bytes().substr(begin).find('\x01') == std::string::npos);
  return 0;
}
