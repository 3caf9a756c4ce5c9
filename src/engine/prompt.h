// From text or messages to the token ids that go into a model.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/chat/chat_template.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {

// Renders messages and tokenises the pieces, so that only the template's own control pieces become
// control tokens. Errors: RenderChat's, and kInvalidArgument for an empty conversation.
Expected<std::vector<int32_t>> EncodeChat(const Tokenizer& tokenizer,
                                          const ChatTemplate& chat_template,
                                          std::span<const ChatMessage> messages,
                                          bool add_generation_prompt);

}  // namespace dsla
