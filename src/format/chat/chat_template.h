// Chat templates: from a list of messages to the prompt that a chat model was trained on.
//
// Templates are rendered natively; a model file's Jinja source only decides which one
// (DetectChatTemplate). Each equals what transformers' apply_chat_template renders for
// conversations of plain text: no images. Those with tools, and sources that are none of these, are
// ModelTemplate's.
//
// Contract of the pieces. A prompt comes back as pieces whose texts, joined, are the rendered
// string. A control piece holds exactly one token text written by the template (or the model's BOS
// or EOS); a plain piece holds everything between two control pieces: template text and message
// text together, so that "user\n" and the content after it are tokenised as one run. No byte of a
// message, its role included, is ever in a control piece. To tokenise:
//   1. MergePlainPieces with "is this text one of the model's added tokens": a marker may be none
//      (TinyLlama spells <|user|>, Llama 2 spells [INST]) and then joins the plain text around it.
//   2. A control piece becomes that token's id.
//   3. A plain piece is encoded with no added token recognised in it.
//   4. Nothing is added: no BOS or EOS, as the template wrote its own.
// The plain pieces are then the very segments that the `tokenizers` library makes by splitting at
// added tokens, so byte-level merges and SentencePiece's space rules ("add a prefix space to the
// first segment only", "to each") hold by applying them per piece, and the ids equal tokenising the
// joined string as long as no message spells an added token.
//
// All functions are pure and thread-safe. Errors are one line: kInvalidArgument where the template
// itself refuses the conversation, kUnsupported where it would drop or mangle a message silently (a
// role it has no place for), or where a template is not one of ours.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/chat/tools.h"

namespace dsla {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", "tool"; some templates take any
  std::string content;
  // Of conversations with tools, which ModelTemplate renders.
  std::vector<ToolCall> tool_calls = {};  // the assistant's
  std::string tool_call_id = {};          // of a tool's result
  std::string name = {};                  // of the tool
};

enum class ChatFamily { kChatMl, kLlama2, kLlama3, kZephyr, kMistral };

// What a family's published variants differ in. Made by ChatTemplateByName or DetectChatTemplate;
// the fields that do not belong to the family keep their defaults.
struct ChatTemplate {
  enum class System { kRefused, kFirstUser, kLastUser };  // Mistral: where the system text goes
  enum class Thinking { kNone, kHybrid, kAlways };        // Qwen3

  std::string name;  // one of ChatTemplateNames()
  ChatFamily family = ChatFamily::kChatMl;

  // ChatML, and Qwen with it
  std::optional<std::string>
      default_system;    // for a conversation that begins with no system message
  bool any_role = true;  // false: system, user and assistant only
  bool begins_with_bos = false;
  bool trims = false;
  Thinking thinking = Thinking::kNone;

  // Llama 2
  bool trims_system = false;

  // Llama 3
  bool always_prompts = false;      // as first published: whatever add_generation_prompt says
  std::optional<std::string> date;  // 3.1 and later: the template's own date_string, "26 Jul 2024"

  // Mistral
  System system = System::kRefused;
  // Spaces or nothing.
  std::string before_inst, after_inst, before_end_inst, before_answer, after_answer;
  bool trims_answer = false;
};

struct ChatRenderOptions {
  bool add_generation_prompt = true;
  std::string bos = {};  // texts of the model's tokens; empty: it has none
  std::string eos = {};
  // Today Date of Llama 3.1 and later, such as "26 Jul 2024"; empty: the date written in the
  // template, so that one conversation is one token sequence on any day (transformers takes today's
  // date for 3.2; pass it here to do the same).
  std::string date = {};
  bool enable_thinking = true;  // Qwen3: false closes an empty <think> block before the answer
};

struct PromptPiece {
  std::string text;
  bool control = false;
  bool operator==(const PromptPiece&) const = default;
};

// The names for --chat-template, in the order to show them.
std::vector<std::string> ChatTemplateNames();

// kNotFound, with the names, for any other name.
Expected<ChatTemplate> ChatTemplateByName(std::string_view name);

// The template that a model file's Jinja source is: the one that renders a set of probing
// conversations exactly as the source does. So it does not matter how the source is written, and
// one that differs in what it renders is refused (kUnsupported, with the names for
// --chat-template). Features of the source beyond plain conversations are ignored. The source is
// untrusted: its evaluation is bounded in depth, steps and memory.
Expected<ChatTemplate> DetectChatTemplate(std::string_view jinja_source);

// The prompt for `messages`, which must not be empty.
Expected<std::vector<PromptPiece>> RenderChat(const ChatTemplate& chat_template,
                                              std::span<const ChatMessage> messages,
                                              const ChatRenderOptions& options);

// Step 1 of the contract above: control pieces for which is_token is false join the plain text
// around them.
std::vector<PromptPiece> MergePlainPieces(std::span<const PromptPiece> pieces,
                                          const std::function<bool(std::string_view)>& is_token);

}  // namespace dsla
