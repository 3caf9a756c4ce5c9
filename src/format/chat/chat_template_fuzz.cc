// Any bytes as a model file's chat template: recognised or refused in bounded time, never a crash.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "format/chat/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto found =
      dsla::DetectChatTemplate(std::string_view(reinterpret_cast<const char*>(data), size));
  DSLA_CHECK(found.ok() || found.status().message().find('\n') == std::string::npos);
  return 0;
}
