// ModelTemplate: prompts by evaluating a model file's Jinja source: of conversations with tools,
// and of plain ones where the source is none of those that are rendered natively (chat_template.h).
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

class ModelTemplate {
 public:
  // kUnsupported, in one line: the source cannot be evaluated or has no place for tools.
  static Expected<ModelTemplate> ForTools(std::string_view jinja_source);
  // Likewise, or it does not show what a user says. Render then refuses what the source would drop
  // in silence of anybody but the assistant, whose thoughts many templates leave out.
  static Expected<ModelTemplate> ForChat(std::string_view jinja_source);

  // How the template's model writes its calls, as far as the source shows it.
  std::optional<ToolDialect> dialect() const { return dialect_; }
  // An answer begins with a thought, whatever enable_thinking says.
  bool always_thinks() const;

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
  static Expected<ModelTemplate> Parse(std::string_view jinja_source);
  ModelTemplate() = default;
  Expected<jinja::Text> RenderWith(const Calls& calls, std::span<const ChatMessage> messages,
                                   std::span<const Tool> tools,
                                   const ChatRenderOptions& options) const;
  bool TakesTools() const;
  std::optional<Calls> FindCalls() const;

  std::shared_ptr<const jinja::Body> program_;
  std::optional<ToolDialect> dialect_;
  std::optional<Calls> calls_;   // nothing: it has no place for them
  bool shows_messages_ = false;  // what it drops is refused
};

}  // namespace dsla
