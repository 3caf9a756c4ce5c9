// ToolTemplate: prompts of conversations with tools, by evaluating a model file's Jinja source.
//
// `tools` are what the client wrote; a message's `tool_calls` have `id`, `type` and `function` with
// its `name` and `arguments`, as an object or as text, whichever the template can render; messages
// of role `tool` have `tool_call_id` and `name`. Which of these a template takes is found by
// rendering probes when it is made. Everything is as transformers' apply_chat_template has it,
// except that there is no strftime_now, so that one conversation is one prompt on any day.
//
// Immutable; safe to use from many threads.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "base/status.h"
#include "format/chat/chat_template.h"
#include "format/chat/jinja.h"
#include "format/chat/tool_dialect.h"
#include "format/chat/tools.h"

namespace dsla {

class ToolTemplate {
 public:
  // kUnsupported, in one line: the source cannot be evaluated or has no place for tools.
  static Expected<ToolTemplate> Create(std::string_view jinja_source);

  // How the template's model writes its calls, as far as the source shows it.
  std::optional<ToolDialect> dialect() const { return dialect_; }

  // The prompt; its foreign bytes are those of messages and tools. kInvalidArgument where the
  // template refuses the conversation, kUnsupported where it has no place for a part of it.
  Expected<jinja::Text> Render(std::span<const ChatMessage> messages, std::span<const Tool> tools,
                               const ChatRenderOptions& options) const;

 private:
  // How calls that stand in the conversation are given to the template.
  struct Calls {
    bool arguments_as_text = false;
    bool null_content = false;  // instead of an empty one
  };
  ToolTemplate() = default;
  Expected<jinja::Text> RenderWith(const Calls& calls, std::span<const ChatMessage> messages,
                                   std::span<const Tool> tools,
                                   const ChatRenderOptions& options) const;
  bool TakesTools() const;
  std::optional<Calls> FindCalls() const;

  std::shared_ptr<const jinja::Body> program_;
  std::optional<ToolDialect> dialect_;
  std::optional<Calls> calls_;  // nothing: it has no place for them
};

}  // namespace dsla
