#include "format/chat/chat_template.h"

#include <fmt/ranges.h>

namespace dsla {
namespace {

ChatTemplate ChatMl(std::string name, std::optional<std::string> default_system, bool any_role,
                    ChatTemplate::Thinking thinking = ChatTemplate::Thinking::kNone) {
  ChatTemplate t;
  t.name = std::move(name);
  t.default_system = std::move(default_system);
  t.any_role = any_role;
  t.thinking = thinking;
  return t;
}

ChatTemplate OfFamily(std::string name, ChatFamily family) {
  ChatTemplate t;
  t.name = std::move(name);
  t.family = family;
  return t;
}

struct MistralSpaces {
  const char *before_inst, *after_inst, *before_end_inst, *before_answer, *after_answer;
};

ChatTemplate Mistral(std::string name, ChatTemplate::System system, const MistralSpaces& spaces) {
  ChatTemplate t = OfFamily(std::move(name), ChatFamily::kMistral);
  t.system = system;
  t.before_inst = spaces.before_inst;
  t.after_inst = spaces.after_inst;
  t.before_end_inst = spaces.before_end_inst;
  t.before_answer = spaces.before_answer;
  t.after_answer = spaces.after_answer;
  return t;
}

std::vector<ChatTemplate> AllTemplates() {
  using System = ChatTemplate::System;
  using Thinking = ChatTemplate::Thinking;
  ChatTemplate llama31 = OfFamily("llama3.1", ChatFamily::kLlama3);
  llama31.date = "26 Jul 2024";
  ChatTemplate mistral3 = Mistral("mistral-v0.3", System::kLastUser, {"", " ", "", " ", ""});
  mistral3.trims_answer = true;
  return {
      ChatMl("chatml", std::nullopt, true),
      ChatMl("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
             true),
      ChatMl("qwen2", "You are a helpful assistant.", true),
      ChatMl("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
             false),
      ChatMl("qwen3", std::nullopt, false, Thinking::kHybrid),
      ChatMl("qwen3-instruct", std::nullopt, false),
      ChatMl("qwen3-thinking", std::nullopt, false, Thinking::kAlways),
      OfFamily("llama2", ChatFamily::kLlama2),
      OfFamily("llama3", ChatFamily::kLlama3),
      llama31,
      OfFamily("zephyr", ChatFamily::kZephyr),
      // As first published, v0.1 put a space after </s> and v0.2 did not; both were later replaced
      // by one that takes a system message.
      Mistral("mistral-v0.1", System::kRefused, {"", " ", " ", "", " "}),
      Mistral("mistral-v0.2", System::kRefused, {"", " ", " ", "", ""}),
      Mistral("mistral-v0.2-system", System::kFirstUser, {" ", " ", " ", " ", ""}),
      mistral3,
      Mistral("mistral-nemo", System::kLastUser, {"", "", "", "", ""}),
  };
}

}  // namespace

std::vector<std::string> ChatTemplateNames() {
  std::vector<std::string> names;
  for (ChatTemplate& t : AllTemplates()) names.push_back(std::move(t.name));
  return names;
}

Expected<ChatTemplate> ChatTemplateByName(std::string_view name) {
  for (ChatTemplate& t : AllTemplates()) {
    if (t.name == name) return std::move(t);
  }
  return NotFound("no chat template is named '{}'; there are {}", name,
                  fmt::join(ChatTemplateNames(), ", "));
}

std::vector<PromptPiece> MergePlainPieces(std::span<const PromptPiece> pieces,
                                          const std::function<bool(std::string_view)>& is_token) {
  std::vector<PromptPiece> merged;
  for (const PromptPiece& piece : pieces) {
    const bool control = piece.control && is_token(piece.text);
    if (!control && !merged.empty() && !merged.back().control) {
      merged.back().text += piece.text;
    } else {
      merged.push_back({piece.text, control});
    }
  }
  return merged;
}

}  // namespace dsla
