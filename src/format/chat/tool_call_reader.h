// ToolCallReader: one call in the text of a reply, byte by byte. Internal to ToolParser.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "format/chat/tool_dialect.h"
#include "format/chat/tools.h"

namespace dsla {

class ToolCallReader {
 public:
  enum class Result { kMore, kDone, kBad };
  virtual ~ToolCallReader() = default;

  // After kDone and kBad nothing may follow. kDone: name() and all of the arguments are known.
  virtual Result Next(char c) = 0;

  const std::string& name() const { return name_; }  // empty: not known yet
  // What has come of the arguments since the last call, once the name is known.
  std::string TakeArguments();

 protected:
  std::string name_;
  std::string arguments_;
};

// {"name": .., "arguments" or "parameters": {..}}, keys in any order, `id` and `type` beside them.
std::unique_ptr<ToolCallReader> NewJsonCallReader();
// name[ARGS]{..}, with [CALL_ID].. between them or with nothing.
std::unique_ptr<ToolCallReader> NewMistralCallReader();
// function<｜tool▁sep｜>name, a fence and {..}, or name<｜tool▁sep｜>{..}.
std::unique_ptr<ToolCallReader> NewDeepSeekCallReader();
// <function=name><parameter=key>value</parameter>..</function>. A value is a text where its
// parameter's schema says so or it is no JSON.
std::unique_ptr<ToolCallReader> NewXmlCallReader(std::shared_ptr<const std::vector<Tool>> tools);

}  // namespace dsla
