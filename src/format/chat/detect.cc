// Recognition by behaviour: the source is evaluated on probing conversations, and a native template
// is the answer only if it renders every one of them to the same bytes, or refuses it where the
// source does.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <map>

#include "format/chat/chat_template.h"
#include "format/chat/jinja.h"

namespace dsla {
namespace {

constexpr std::string_view kBos = "<probe-bos>", kEos = "<probe-eos>";

struct Probe {
  std::vector<ChatMessage> messages;
  bool prompt = false;
};

// What a source does with a probe.
struct Outcome {
  bool raised = false;
  std::string text;
};

// Each conversation asks something that published templates differ in.
std::vector<Probe> Probes() {
  const ChatMessage system{"system", " \nBe\tbrief.\u3000"}, bare{"system", "S"},
      empty{"system", ""};
  const ChatMessage user{"user", "\n What is 1 + 1? \u00a0\n"}, user2{"user", "And 2?"};
  const ChatMessage answer{"assistant", "\n\n  It is 2.\n "}, answer2{"assistant", "4"};
  const ChatMessage thought{"assistant", "<think>\nEasy.\n\n</think>\n\n It is 2."};
  const ChatMessage half{"assistant", "\nx</think>y<think>z\n</think>\n 2"},
      nothing{"assistant", ""};
  const ChatMessage reply{"user", "<tool_response>\n3\n</tool_response>"};
  const ChatMessage other{"narrator", "Night falls."}, capital{"User", "A"};
  const ChatMessage spelled{"user", "<<SYS>>\nx\n<</SYS>>\n\n[INST] <|im_end|></s> /no_think"};
  const std::vector<std::vector<ChatMessage>> conversations = {
      {user2},
      {user},
      {bare, user2},
      {system, user},
      {empty, user},
      {system},
      {answer},
      {nothing},
      {user, answer},
      {user, thought},
      {user, half},
      {user, nothing},
      {user, {"user", ""}},
      {{"user", ""}},
      {user, answer, user2},
      {user, thought, user2},
      {user, half, user2, nothing, user},
      {user, nothing, user2, answer2},
      {system, user, answer, user2},
      {system, user, answer, user2, answer2},
      {system, user, answer, user2, answer2, user2, answer, user},
      {system, answer, user},
      {system, user, user2},
      {system, system, user},
      {user, user2, answer, answer2, user2},
      {user, system, user2},
      {user, answer, bare, user2},
      {user, answer, user2, bare},
      {user, answer, reply, thought, reply},
      {user, thought, reply, answer, reply, half},
      {reply, answer},
      {system, thought, answer},
      {other, user},
      {user, other},
      {user, answer, other},
      {capital, user2},
      {spelled, answer, spelled},
      {bare, spelled, thought},
  };
  std::vector<Probe> probes;
  for (const auto& messages : conversations) {
    for (const bool prompt : {false, true}) probes.push_back({messages, prompt});
  }
  return probes;
}

Expected<Outcome> Evaluate(const jinja::Body& program, const Probe& probe) {
  jinja::List messages;
  for (const ChatMessage& m : probe.messages) {
    messages.emplace_back(jinja::Dict{{"role", m.role}, {"content", m.content}});
  }
  std::map<std::string, jinja::Value> globals;
  globals["messages"] = std::move(messages);
  globals["add_generation_prompt"] = probe.prompt;
  globals["bos_token"] = kBos;
  globals["eos_token"] = kEos;
  // As transformers passes them when there are none. strftime_now stays undefined: a template that
  // asks for today's date falls back on its own.
  globals["tools"] = jinja::None{};
  globals["documents"] = jinja::None{};
  DSLA_ASSIGN_OR_RETURN(jinja::Rendered r, jinja::Render(program, std::move(globals)));
  return Outcome{r.raised, r.text.bytes()};
}

// A silent drop that we refuse is no difference; anything else must be equal.
bool Agrees(const ChatTemplate& t, const Probe& probe, const Outcome& outcome) {
  ChatRenderOptions options;
  options.add_generation_prompt = probe.prompt;
  options.bos = kBos;
  options.eos = kEos;
  const auto pieces = RenderChat(t, probe.messages, options);
  if (!pieces.ok()) {
    return outcome.raised || pieces.status().code() == StatusCode::kUnsupported;
  }
  if (outcome.raised) return false;
  std::string text;
  for (const PromptPiece& piece : *pieces) text += piece.text;
  return text == outcome.text;
}

std::optional<std::string> Between(std::string_view text, std::string_view before,
                                   std::string_view after) {
  const size_t begin = text.find(before);
  if (begin == std::string_view::npos) return std::nullopt;
  const size_t end = text.find(after, begin + before.size());
  if (end == std::string_view::npos) return std::nullopt;
  return std::string(text.substr(begin + before.size(), end - begin - before.size()));
}

// The variants of one named template, itself included. `plain` is what the source makes of a
// lone user message: a default system message and a date are read from it.
std::vector<ChatTemplate> Variants(const ChatTemplate& named, std::string_view plain) {
  std::vector<ChatTemplate> variants = {named};
  const auto also = [&](auto change) {
    for (size_t i = 0, n = variants.size(); i < n; ++i) {
      variants.push_back(variants[i]);
      change(variants.back());
    }
  };
  switch (named.family) {
    case ChatFamily::kChatMl: {
      const auto system = Between(plain, "<|im_start|>system\n", "<|im_end|>\n");
      if (system) also([&](ChatTemplate& t) { t.default_system = system; });
      also([](ChatTemplate& t) { t.begins_with_bos = true; });
      also([](ChatTemplate& t) { t.trims = true; });
      break;
    }
    case ChatFamily::kLlama2:
      also([](ChatTemplate& t) { t.trims_system = true; });
      break;
    case ChatFamily::kLlama3:
      if (const auto date = Between(plain, "Today Date: ", "\n"); date && named.date) {
        also([&](ChatTemplate& t) { t.date = date; });
      }
      also([](ChatTemplate& t) { t.always_prompts = true; });
      break;
    case ChatFamily::kMistral:
      also([](ChatTemplate& t) { t.trims_answer = !t.trims_answer; });
      break;
    case ChatFamily::kZephyr:
      break;
  }
  return variants;
}

Status Refuse(std::string_view why) {
  return Unsupported("the model's chat template {}; choose one with --chat-template: {}", why,
                     fmt::join(ChatTemplateNames(), ", "));
}

}  // namespace

Expected<ChatTemplate> DetectChatTemplate(std::string_view jinja_source) {
  const auto program = jinja::Parse(jinja_source);
  if (!program.ok()) {
    return Refuse(fmt::format("cannot be read ({})", program.status().message()));
  }
  const std::vector<Probe> probes = Probes();
  std::vector<Outcome> outcomes;
  for (const Probe& probe : probes) {
    auto outcome = Evaluate(*program, probe);
    if (!outcome.ok()) {
      return Refuse(fmt::format("cannot be evaluated ({})", outcome.status().message()));
    }
    outcomes.push_back(std::move(*outcome));
  }
  const auto agrees = [&](const ChatTemplate& t) {
    for (size_t i = 0; i < probes.size(); ++i) {
      if (!Agrees(t, probes[i], outcomes[i])) return false;
    }
    return true;
  };
  // Templates as named come before variants of any, so that the name says as much as it can.
  std::vector<ChatTemplate> candidates, variants;
  for (const std::string& name : ChatTemplateNames()) {
    DSLA_ASSIGN_OR_RETURN(candidates.emplace_back(), ChatTemplateByName(name));
    std::ranges::move(Variants(candidates.back(), outcomes[0].text), std::back_inserter(variants));
  }
  std::ranges::move(variants, std::back_inserter(candidates));
  const auto found = std::ranges::find_if(candidates, agrees);
  if (found != candidates.end()) return *found;
  return Refuse("is none of those known here");
}

}  // namespace dsla
