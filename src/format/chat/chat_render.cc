// The families' renderers. Each comment gives the shape of a turn; \n stands for a line feed.
#include <fmt/format.h>

#include <algorithm>

#include "format/chat/chat_template.h"
#include "format/chat/strip.h"

namespace dsla {
namespace {

using Messages = std::span<const ChatMessage>;

// Collects pieces: plain text runs on, a control token stands alone.
class Prompt {
 public:
  Prompt& Plain(std::string_view text) {
    if (text.empty()) return *this;
    if (pieces_.empty() || pieces_.back().control) pieces_.push_back({});
    pieces_.back().text += text;
    return *this;
  }
  Prompt& Control(std::string_view token) {
    if (!token.empty()) pieces_.push_back({std::string(token), true});
    return *this;
  }
  std::vector<PromptPiece> Take() { return std::move(pieces_); }

 private:
  std::vector<PromptPiece> pieces_;
};

// Roles come from clients: keep the message one short line whatever they hold.
std::string MessageName(Messages messages, size_t i) {
  std::string role = messages[i].role.substr(0, 32);
  for (char& c : role) {
    if (c < ' ' || c > '~') c = '?';
  }
  return fmt::format("message {} ('{}')", i + 1, role);
}

Status NoPlaceForRole(const ChatTemplate& t, Messages messages, size_t i) {
  return Unsupported("{}: chat template {} has no place for this role here",
                     MessageName(messages, i), t.name);
}

// user, assistant, user, ... in messages[first..].
Status CheckAlternation(const ChatTemplate& t, Messages messages, size_t first) {
  for (size_t i = first; i < messages.size(); ++i) {
    const bool user_turn = (i - first) % 2 == 0;
    if ((messages[i].role == "user") != user_turn) {
      return InvalidArgument(
          "{}: chat template {} wants user and assistant to alternate, user first{}",
          MessageName(messages, i), t.name, first == 0 ? "" : " after the system message");
    }
  }
  return Status::Ok();
}

bool IsChatRole(std::string_view role) {
  return role == "system" || role == "user" || role == "assistant";
}

void ChatMlTurn(Prompt& prompt, std::string_view role, std::string_view content) {
  prompt.Control("<|im_start|>").Plain(role).Plain("\n").Plain(content);
  prompt.Control("<|im_end|>").Plain("\n");
}

// The index of the last user message that is a question, not a tool's reply; the last index if
// there is none.
size_t LastQuery(Messages messages) {
  for (size_t i = messages.size(); i-- > 0;) {
    const std::string& content = messages[i].content;
    const bool reply =
        content.starts_with("<tool_response>") && content.ends_with("</tool_response>");
    if (messages[i].role == "user" && !reply) return i;
  }
  return messages.size() - 1;
}

// Qwen3 drops the reasoning of answers before the last question, and writes one, empty if need be,
// in a final answer.
void Qwen3Answer(Prompt& prompt, std::string_view content, bool after_query, bool last) {
  std::string_view reasoning;
  if (const size_t end = content.rfind("</think>"); end != std::string_view::npos) {
    reasoning = StripRight(content.substr(0, content.find("</think>")), "\n");
    if (const size_t begin = reasoning.rfind("<think>"); begin != std::string_view::npos) {
      reasoning.remove_prefix(begin + 7);
    }
    reasoning = StripLeft(reasoning, "\n");
    content = StripLeft(content.substr(end + 8), "\n");
  }
  prompt.Control("<|im_start|>").Plain("assistant\n");
  if (after_query && (last || !reasoning.empty())) {
    prompt.Control("<think>").Plain("\n").Plain(StripRight(reasoning, "\n")).Plain("\n");
    prompt.Control("</think>").Plain("\n\n").Plain(StripLeft(content, "\n"));
  } else {
    prompt.Plain(content);
  }
  prompt.Control("<|im_end|>").Plain("\n");
}

// <|im_start|>role\ncontent<|im_end|>\n
Status RenderChatMl(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
                    Prompt& prompt) {
  if (t.begins_with_bos) prompt.Control(options.bos);
  if (t.default_system && messages[0].role != "system") {
    ChatMlTurn(prompt, "system", *t.default_system);
  }
  const size_t last_query = LastQuery(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (!t.any_role && !IsChatRole(m.role)) return NoPlaceForRole(t, messages, i);
    if (t.thinking != ChatTemplate::Thinking::kNone && m.role == "assistant") {
      Qwen3Answer(prompt, m.content, i > last_query, i + 1 == messages.size());
    } else {
      ChatMlTurn(prompt, m.role, t.trims ? Strip(m.content) : m.content);
    }
  }
  if (!options.add_generation_prompt) return Status::Ok();
  prompt.Control("<|im_start|>").Plain("assistant\n");
  if (t.thinking == ChatTemplate::Thinking::kAlways) {
    prompt.Control("<think>").Plain("\n");
  } else if (t.thinking == ChatTemplate::Thinking::kHybrid && !options.enable_thinking) {
    prompt.Control("<think>").Plain("\n\n").Control("</think>").Plain("\n\n");
  }
  return Status::Ok();
}

// BOS [INST] user [/INST] answer EOS, each turn with its BOS; <<SYS>> inside the first.
Status RenderLlama2(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
                    Prompt& prompt) {
  const size_t first = messages[0].role == "system" ? 1 : 0;
  DSLA_RETURN_IF_ERROR(CheckAlternation(t, messages, first));
  for (size_t i = first; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (m.role == "user") {
      std::string text = m.content;
      if (i == 1 && first == 1) {
        const std::string_view system = messages[0].content;
        text = fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n{}", t.trims_system ? Strip(system) : system,
                           text);
      }
      prompt.Control(options.bos).Control("[INST]").Plain(" ").Plain(Strip(text)).Plain(" ");
      prompt.Control("[/INST]");
    } else if (m.role == "assistant") {
      prompt.Plain(" ").Plain(Strip(m.content)).Plain(" ").Control(options.eos);
    } else {
      return NoPlaceForRole(t, messages, i);
    }
  }
  return Status::Ok();
}

Prompt& Llama3Header(Prompt& prompt, std::string_view role) {
  prompt.Control("<|start_header_id|>").Plain(role);
  return prompt.Control("<|end_header_id|>").Plain("\n\n");
}

// <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>
Status RenderLlama3(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
                    Prompt& prompt) {
  prompt.Control(options.bos);
  if (t.date) {
    const std::string& date = options.date.empty() ? *t.date : options.date;
    Llama3Header(prompt, "system").Plain("Cutting Knowledge Date: December 2023\nToday Date: ");
    prompt.Plain(date).Plain("\n\n");
    if (messages[0].role == "system") prompt.Plain(Strip(messages[0].content));
    prompt.Control("<|eot_id|>");
  }
  for (size_t i = t.date && messages[0].role == "system" ? 1 : 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    // Those hold JSON: the template quotes a text as a JSON string.
    if (t.date && (m.role == "tool" || m.role == "ipython")) return NoPlaceForRole(t, messages, i);
    Llama3Header(prompt, m.role).Plain(Strip(m.content)).Control("<|eot_id|>");
  }
  if (options.add_generation_prompt || t.always_prompts) Llama3Header(prompt, "assistant");
  return Status::Ok();
}

// <|role|>\ncontent EOS \n
Status RenderZephyr(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
                    Prompt& prompt) {
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (!IsChatRole(m.role)) return NoPlaceForRole(t, messages, i);
    // Of the three known roles, so this is template text.
    prompt.Control(m.role == "user"        ? "<|user|>"
                   : m.role == "assistant" ? "<|assistant|>"
                                           : "<|system|>");
    prompt.Plain("\n").Plain(m.content).Control(options.eos).Plain("\n");
  }
  if (options.add_generation_prompt) prompt.Control("<|assistant|>").Plain("\n");
  return Status::Ok();
}

// BOS once, then [INST] user [/INST] answer EOS with the variant's spaces.
Status RenderMistral(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
                     Prompt& prompt) {
  using System = ChatTemplate::System;
  const size_t first = t.system != System::kRefused && messages[0].role == "system" ? 1 : 0;
  DSLA_RETURN_IF_ERROR(CheckAlternation(t, messages, first));
  prompt.Control(options.bos);
  for (size_t i = first; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (m.role == "user") {
      const size_t with_system = t.system == System::kFirstUser ? 1 : messages.size() - 1;
      prompt.Plain(t.before_inst).Control("[INST]").Plain(t.after_inst);
      if (first == 1 && i == with_system) prompt.Plain(messages[0].content).Plain("\n\n");
      prompt.Plain(m.content).Plain(t.before_end_inst).Control("[/INST]");
    } else if (m.role == "assistant") {
      prompt.Plain(t.before_answer).Plain(t.trims_answer ? Strip(m.content) : m.content);
      prompt.Control(options.eos).Plain(t.after_answer);
    } else {
      return InvalidArgument("{}: chat template {} takes user and assistant only",
                             MessageName(messages, i), t.name);
    }
  }
  return Status::Ok();
}

Status Render(const ChatTemplate& t, Messages messages, const ChatRenderOptions& options,
              Prompt& prompt) {
  switch (t.family) {
    case ChatFamily::kChatMl:
      return RenderChatMl(t, messages, options, prompt);
    case ChatFamily::kLlama2:
      return RenderLlama2(t, messages, options, prompt);
    case ChatFamily::kLlama3:
      return RenderLlama3(t, messages, options, prompt);
    case ChatFamily::kZephyr:
      return RenderZephyr(t, messages, options, prompt);
    case ChatFamily::kMistral:
      return RenderMistral(t, messages, options, prompt);
  }
  CheckFailed(__FILE__, __LINE__, "a known ChatFamily");
}

}  // namespace

Expected<std::vector<PromptPiece>> RenderChat(const ChatTemplate& chat_template,
                                              std::span<const ChatMessage> messages,
                                              const ChatRenderOptions& options) {
  if (messages.empty()) return InvalidArgument("the conversation has no messages");
  Prompt prompt;
  DSLA_RETURN_IF_ERROR(Render(chat_template, messages, options, prompt));
  return prompt.Take();
}

}  // namespace dsla
