// From text or messages to the token ids that go into a model.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"
#include "format/chat/chat_template.h"
#include "format/chat/model_template.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {

struct PromptOptions {
  bool add_generation_prompt = true;  // the beginning of an answer
  bool enable_thinking = true;        // false: the answer begins with its thinking over (Qwen3)
  // The prompt ends within the last message, the assistant's, so that the answer goes on from it.
  // Goes before add_generation_prompt.
  bool continue_last = false;
};

// A template that is rendered natively, or a model file's own.
using PromptTemplate = std::variant<ChatTemplate, ModelTemplate>;

// Of a model file's source: natively where it is one of ours. kUnsupported, in one line, where it
// cannot be evaluated either.
Expected<PromptTemplate> ChoosePromptTemplate(std::string_view jinja_source);
std::string NameOf(const PromptTemplate& prompt_template);

// kUnsupported for a template that cannot do without thinking where that is asked for.
Status CheckThinking(const PromptTemplate& prompt_template, const PromptOptions& prompt);

// Renders messages and tokenises the pieces, so that only the template's own control pieces become
// control tokens. Errors: CheckThinking's, RenderChat's or ModelTemplate's, kInvalidArgument for an
// empty conversation or one without an answer to continue, and kUnsupported for a template that
// changes the answer.
Expected<std::vector<int32_t>> EncodeChat(const Tokenizer& tokenizer,
                                          const PromptTemplate& prompt_template,
                                          std::span<const ChatMessage> messages,
                                          const PromptOptions& prompt = {});

// The same of a conversation with tools, calls or results. Errors: ModelTemplate's, and
// EncodeChat's for prompt.continue_last.
Expected<std::vector<int32_t>> EncodeToolChat(const Tokenizer& tokenizer,
                                              const ModelTemplate& tool_template,
                                              std::span<const ChatMessage> messages,
                                              std::span<const Tool> tools,
                                              const PromptOptions& prompt = {});

}  // namespace dsla
