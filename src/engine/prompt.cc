#include "engine/prompt.h"

#include <string>

#include "format/chat/strip.h"

namespace dsla {
namespace {

// Takes away what stands behind the last message's text. White space at its end stays where the
// template leaves it.
Status EndWithin(const ChatMessage& last, std::vector<PromptPiece>& pieces) {
  const std::string_view text = Strip(last.content);
  if (last.role != "assistant" || text.empty())
    return InvalidArgument("the last message is no answer that could be continued");
  for (; !pieces.empty(); pieces.pop_back()) {
    PromptPiece& piece = pieces.back();
    const size_t at = piece.control ? std::string::npos : piece.text.rfind(text);
    if (at == std::string::npos) continue;
    const std::string_view space = StripLeft(last.content).substr(text.size());
    const size_t end = at + text.size();
    const bool kept = std::string_view(piece.text).substr(end).starts_with(space);
    piece.text.resize(end + (kept ? space.size() : 0));
    return Status::Ok();
  }
  return Unsupported("the chat template changes the last message, which cannot be continued");
}

}  // namespace

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
  options.add_generation_prompt = prompt.add_generation_prompt && !prompt.continue_last;
  options.enable_thinking = prompt.enable_thinking;
  options.bos = text_of(tokenizer.bos_id());
  options.eos = text_of(tokenizer.eos_id());
  DSLA_ASSIGN_OR_RETURN(auto pieces, RenderChat(chat_template, messages, options));
  if (prompt.continue_last) DSLA_RETURN_IF_ERROR(EndWithin(messages.back(), pieces));
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
