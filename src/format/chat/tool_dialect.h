// How a family of models writes the calls of tools into its replies.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace dsla {

class Tokenizer;

enum class ToolDialect {
  kHermes,      // <tool_call>{"name": .., "arguments": {..}}</tool_call>: Hermes, Qwen2.5, Qwen3
  kLlama3,      // [<|python_tag|>]{"name": .., "parameters": {..}}, further ones after a ;
  kMistral,     // [TOOL_CALLS][{"name": .., "arguments": {..}}, ..] or [TOOL_CALLS]name[ARGS]{..}
  kQwen3Coder,  // <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
  kDeepSeek,    // <｜tool▁call▁begin｜>..name..{..}<｜tool▁call▁end｜>
};

const char* Name(ToolDialect dialect);
// The names, in the order to show them.
std::vector<std::string_view> ToolDialectNames();
std::optional<ToolDialect> ToolDialectByName(std::string_view name);

// The dialect that a chat template's source teaches or repeats; nothing if it is none of these.
std::optional<ToolDialect> DetectToolDialect(std::string_view jinja_source);

// A control token of the model that belongs to the text of a call.
struct ToolMarker {
  std::string_view text;
  int32_t id;
};
// Those of the dialect's that are control tokens of this tokenizer.
std::vector<ToolMarker> ToolMarkers(ToolDialect dialect, const Tokenizer& tokenizer);

}  // namespace dsla
