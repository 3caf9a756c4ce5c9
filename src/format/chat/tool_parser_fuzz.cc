// Any bytes as a reply, of any dialect: the calls are JSON objects, nothing is lost where there is
// none, and the pieces say the same however the text is cut.
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "format/chat/json_scanner.h"
#include "format/chat/tool_parser.h"

namespace dsla {
namespace {

struct Streamed {
  std::string content, calls;
  ToolReply reply;
};

Streamed Parse(const ToolParser::Options& options, std::string_view text, size_t piece) {
  ToolParser parser(options);
  Streamed streamed;
  const auto add = [&](const ToolReplyDelta& delta) {
    streamed.content += delta.content;
    for (const auto& call : delta.calls) {
      if (!call.name.empty()) streamed.calls += "\n" + std::to_string(call.index) + call.name + " ";
      streamed.calls += call.arguments;
    }
  };
  for (size_t at = 0; at < text.size(); at += piece) add(parser.Push(text.substr(at, piece)));
  add(parser.Finish());
  streamed.reply = parser.reply();
  return streamed;
}

}  // namespace
}  // namespace dsla

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsla;
  if (size == 0) return 0;
  const auto names = ToolDialectNames();
  ToolParser::Options options;
  options.dialect = *ToolDialectByName(names[data[0] % names.size()]);
  options.parallel = data[0] < 128;
  options.tools = std::make_shared<const std::vector<Tool>>(
      std::vector<Tool>{{"now", "{}", R"({"properties":{"a":{"type":"string"}}})"}});
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const Streamed whole = Parse(options, text, text.size() + 1), cut = Parse(options, text, 1);
  DSLA_CHECK(whole.content == cut.content && whole.calls == cut.calls);
  DSLA_CHECK(whole.reply.content == cut.reply.content && whole.reply.calls == cut.reply.calls);
  if (whole.calls.empty()) DSLA_CHECK(whole.content == text);
  if (whole.reply.calls.empty()) DSLA_CHECK(whole.reply.content == text);
  for (const ToolCall& call : whole.reply.calls) {
    DSLA_CHECK(!call.name.empty() && IsJsonObject(call.arguments));
  }
  return 0;
}
