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

ChatRenderOptions RenderOptions(const Tokenizer& tokenizer, const PromptOptions& prompt) {
  const auto text_of = [&](std::optional<int32_t> id) {
    return id ? std::string(tokenizer.TokenText(*id)) : std::string();
  };
  ChatRenderOptions options;
  options.add_generation_prompt = prompt.add_generation_prompt && !prompt.continue_last;
  options.enable_thinking = prompt.enable_thinking;
  options.bos = text_of(tokenizer.bos_id());
  options.eos = text_of(tokenizer.eos_id());
  return options;
}

// Control tokens in what the template itself wrote become control pieces.
std::vector<PromptPiece> CutControl(const Tokenizer& tokenizer, const jinja::Text& text) {
  const std::string_view bytes = text.bytes();
  std::vector<PromptPiece> pieces;
  size_t at = 0;  // of what has become pieces
  const auto cut = [&](size_t begin, size_t end) {
    for (const auto& token : tokenizer.FindControlTokens(bytes.substr(begin, end - begin))) {
      pieces.push_back({std::string(bytes.substr(at, begin + token.begin - at)), false});
      pieces.push_back({std::string(tokenizer.TokenText(token.id)), true});
      at = begin + token.end;
    }
  };
  size_t begin = 0;
  for (const auto& foreign : text.foreign()) {
    cut(begin, foreign.begin);
    begin = foreign.end;
  }
  cut(begin, bytes.size());
  pieces.push_back({std::string(bytes.substr(at)), false});
  std::erase_if(pieces, [](const PromptPiece& piece) { return piece.text.empty(); });
  return pieces;
}

Expected<std::vector<int32_t>> EncodePieces(const Tokenizer& tokenizer,
                                            std::span<const ChatMessage> messages,
                                            const PromptOptions& prompt,
                                            std::vector<PromptPiece> pieces) {
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

}  // namespace

Expected<PromptTemplate> ChoosePromptTemplate(std::string_view jinja_source) {
  auto known = DetectChatTemplate(jinja_source);
  if (known.ok()) return PromptTemplate(std::move(known).value());
  auto own = ModelTemplate::ForChat(jinja_source);
  if (own.ok()) return PromptTemplate(std::move(own).value());
  return Unsupported("{}; by itself: {}", known.status().message(), own.status().message());
}

std::string NameOf(const PromptTemplate& prompt_template) {
  const auto* const known = std::get_if<ChatTemplate>(&prompt_template);
  return known != nullptr ? known->name : "the model file's own";
}

Status CheckThinking(const PromptTemplate& prompt_template, const PromptOptions& prompt) {
  if (prompt.enable_thinking) return Status::Ok();
  const auto* const known = std::get_if<ChatTemplate>(&prompt_template);
  const bool always = known != nullptr ? known->thinking == ChatTemplate::Thinking::kAlways
                                       : std::get<ModelTemplate>(prompt_template).always_thinks();
  if (!always) return Status::Ok();
  return Unsupported("the chat template ({}) always thinks", NameOf(prompt_template));
}

Expected<std::vector<int32_t>> EncodeChat(const Tokenizer& tokenizer,
                                          const PromptTemplate& prompt_template,
                                          std::span<const ChatMessage> messages,
                                          const PromptOptions& prompt) {
  DSLA_RETURN_IF_ERROR(CheckThinking(prompt_template, prompt));
  if (const auto* const own = std::get_if<ModelTemplate>(&prompt_template))
    return EncodeToolChat(tokenizer, *own, messages, /*tools=*/{}, prompt);
  DSLA_ASSIGN_OR_RETURN(auto pieces, RenderChat(std::get<ChatTemplate>(prompt_template), messages,
                                                RenderOptions(tokenizer, prompt)));
  return EncodePieces(tokenizer, messages, prompt, std::move(pieces));
}

Expected<std::vector<int32_t>> EncodeToolChat(const Tokenizer& tokenizer,
                                              const ModelTemplate& tool_template,
                                              std::span<const ChatMessage> messages,
                                              std::span<const Tool> tools,
                                              const PromptOptions& prompt) {
  DSLA_ASSIGN_OR_RETURN(const jinja::Text text,
                        tool_template.Render(messages, tools, RenderOptions(tokenizer, prompt)));
  return EncodePieces(tokenizer, messages, prompt, CutControl(tokenizer, text));
}

}  // namespace dsla
