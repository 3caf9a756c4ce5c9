#include "format/chat/tool_dialect.h"

#include <array>
#include <span>

#include "base/check.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

using std::string_view;

constexpr string_view kHermesMarkers[] = {"<tool_call>", "</tool_call>"};
constexpr string_view kLlama3Markers[] = {"<|python_tag|>"};
constexpr string_view kMistralMarkers[] = {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"};
constexpr string_view kDeepSeekMarkers[] = {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
                                            "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
                                            "<｜tool▁sep｜>"};

struct Entry {
  ToolDialect dialect;
  const char* name;
  std::span<const string_view> markers;
};

const std::array<Entry, 5>& Entries() {
  static const std::array<Entry, 5> entries = {{
      {ToolDialect::kHermes, "hermes", kHermesMarkers},
      {ToolDialect::kLlama3, "llama3", kLlama3Markers},
      {ToolDialect::kMistral, "mistral", kMistralMarkers},
      {ToolDialect::kQwen3Coder, "qwen3-coder", kHermesMarkers},
      {ToolDialect::kDeepSeek, "deepseek", kDeepSeekMarkers},
  }};
  return entries;
}

const Entry& EntryOf(ToolDialect dialect) {
  for (const Entry& entry : Entries()) {
    if (entry.dialect == dialect) return entry;
  }
  CheckFailed(__FILE__, __LINE__, "a known ToolDialect");
}

}  // namespace

const char* Name(ToolDialect dialect) { return EntryOf(dialect).name; }

std::vector<string_view> ToolDialectNames() {
  std::vector<string_view> names;
  for (const Entry& entry : Entries()) names.emplace_back(entry.name);
  return names;
}

std::optional<ToolDialect> ToolDialectByName(string_view name) {
  for (const Entry& entry : Entries()) {
    if (entry.name == name) return entry.dialect;
  }
  return std::nullopt;
}

std::optional<ToolDialect> DetectToolDialect(string_view source) {
  const auto has = [&](string_view text) { return source.find(text) != string_view::npos; };
  if (has("[TOOL_CALLS]")) return ToolDialect::kMistral;
  if (has("<｜tool▁call▁begin｜>")) return ToolDialect::kDeepSeek;
  if (has("<function=") && has("<parameter=")) return ToolDialect::kQwen3Coder;
  if (has("<tool_call>")) return ToolDialect::kHermes;
  if (has("<|python_tag|>") || (has("{\"name\":") && has("\"parameters\":")))
    return ToolDialect::kLlama3;
  return std::nullopt;
}

std::vector<ToolMarker> ToolMarkers(ToolDialect dialect, const Tokenizer& tokenizer) {
  std::vector<ToolMarker> markers;
  for (const string_view text : EntryOf(dialect).markers) {
    const auto id = tokenizer.TokenToId(text);
    if (id && tokenizer.IsSpecial(*id)) markers.push_back({text, *id});
  }
  return markers;
}

}  // namespace dsla
