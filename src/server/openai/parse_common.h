// The parts of parsing that several routes share. Internal to server/openai.
#pragma once

#include <limits>

#include "server/openai/fields.h"
#include "server/openai/requests.h"

namespace dsla::openai {

constexpr size_t kMaxNameBytes = 512;                // model names, salts
constexpr size_t kMaxTextBytes = size_t{256} << 20;  // prompts: the body's own limit is lower
// Of max_tokens; whether it fits the context is seen once the prompt's tokens are counted.
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

// Everything but the prompt, logprobs and max_tokens.
void ParseCommon(const Fields& fields, const Limits& limits, Common* common);

// Where an object of a type has what belongs to it: chat's in a field of the type's name,
// {"type":"function","function":{...}}, the Responses API's beside the type.
enum class Form { kNested, kFlat };

// What the replies are to follow, by whichever field says so: OpenAI's response_format, vLLM's
// structured_outputs, llama.cpp's json_schema and grammar.
void ParseGrammar(const Fields& fields, Common* common);
// The Responses API's `format`, within its `text`.
void ParseTextFormat(const Fields& text, Common* common);

// `choices` replies of max_tokens each, both within their limits; min_tokens within max_tokens.
// `param`: the name that max_tokens was given by.
void CheckTotals(const Fields& fields, const Limits& limits, int64_t choices,
                 std::string_view param, const Common& common);

bool IsEmptyArray(const Fields& fields, std::string_view name);
// The field that must be there and is not.
void SetMissing(const Fields& fields, std::string_view name);

// messages, with their text parts joined by line breaks.
void ParseMessages(const Fields& fields, const Limits& limits, std::vector<ChatMessage>* messages);
// tools, tool_choice and parallel_tool_calls. Tools of the flat form that do not say whether they
// are strict are.
void ParseTools(const Fields& fields, const Limits& limits, Form form, ToolsRequest* tools);
// tool_calls of a message of the assistant.
void ParseToolCalls(const Fields& message, const Limits& limits, std::vector<ToolCall>* calls);
// The name and the arguments of a call.
void ParseCalledFunction(const Fields& function, ToolCall* call);
// The Responses API's input.
void ParseResponsesInput(const Fields& fields, const Limits& limits,
                         std::vector<ChatMessage>* messages);
// How they become a prompt.
void ParsePromptOptions(const Fields& fields, PromptOptions* prompt);

}  // namespace dsla::openai
