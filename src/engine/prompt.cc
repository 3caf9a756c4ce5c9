#include "engine/prompt.h"

#include <string>

namespace dsla {

Expected<std::vector<int32_t>> EncodeChat(const Tokenizer& tokenizer,
                                          const ChatTemplate& chat_template,
                                          std::span<const ChatMessage> messages,
                                          const PromptOptions& prompt) {
  if (!prompt.enable_thinking && chat_template.thinking == ChatTemplate::Thinking::kAlways)
    return Unsupported("the chat template '{}' always thinks", chat_template.name);
  const auto text_of = [&](std::optional<int32_t> id) {
    return id ? std::string(tokenizer.TokenText(*id)) : std::string();
  };
  ChatRenderOptions options;
  options.add_generation_prompt = prompt.add_generation_prompt;
  options.enable_thinking = prompt.enable_thinking;
  options.bos = text_of(tokenizer.bos_id());
  options.eos = text_of(tokenizer.eos_id());
  DSLA_ASSIGN_OR_RETURN(const auto pieces, RenderChat(chat_template, messages, options));
  std::vector<int32_t> ids;
  for (const PromptPiece& piece : MergePlainPieces(
           pieces, [&](std::string_view text) { return tokenizer.TokenToId(text).has_value(); })) {
    if (piece.control) {
      ids.push_back(*tokenizer.TokenToId(piece.text));
      continue;
    }
    DSLA_ASSIGN_OR_RETURN(
        const auto encoded,
        tokenizer.Encode(piece.text,
                         {.add_bos = false, .parse_special = false, .continues = !ids.empty()}));
    ids.insert(ids.end(), encoded.begin(), encoded.end());
  }
  return ids;
}

}  // namespace dsla
