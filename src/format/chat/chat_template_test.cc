// The goldens are what transformers renders (tools/chat_template_oracle.py).
#include "format/chat/chat_template.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>

#include "base/testing/default_model.h"
#include "format/chat/model_template.h"
#include "format/chat/strip.h"

namespace dsla {
namespace {

using nlohmann::json;
using testing::HasSubstr;

const std::filesystem::path kData = DSLA_SOURCE_DIR "/tests/data/chat";

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string TemplateSource(const std::string& name) {
  return ReadFile(kData / "templates" / (name + ".jinja"));
}

const json& Golden() {
  static const json golden = json::parse(ReadFile(kData / "golden.json"));
  return golden;
}

std::vector<ChatMessage> Messages(const json& conversation) {
  std::vector<ChatMessage> messages;
  for (const json& m : conversation) messages.push_back({m["role"], m["content"]});
  return messages;
}

std::string Join(std::span<const PromptPiece> pieces) {
  std::string text;
  for (const PromptPiece& piece : pieces) text += piece.text;
  return text;
}

ChatRenderOptions Options(const json& golden, bool prompt) {
  ChatRenderOptions options;
  options.add_generation_prompt = prompt;
  options.bos = golden["bos"];
  options.eos = golden["eos"];
  options.date = Golden()["date"];
  return options;
}

ChatTemplate Detect(std::string_view source) {
  auto found = DetectChatTemplate(source);
  EXPECT_TRUE(found.ok()) << found.status().message();
  return found.ok() ? *found : ChatTemplate();
}

bool IsOneLine(const std::string& message) { return message.find('\n') == std::string::npos; }

void ExpectRender(const ChatTemplate& t, const json& messages, const json& golden,
                  const ChatRenderOptions& options) {
  const auto pieces = RenderChat(t, Messages(messages), options);
  if (golden.contains("error")) {
    ASSERT_FALSE(pieces.ok()) << Join(*pieces);
    EXPECT_TRUE(IsOneLine(pieces.status().message()));
    return;
  }
  if (golden.contains("drops")) {  // transformers leaves a message out; we say so
    ASSERT_FALSE(pieces.ok()) << Join(*pieces);
    EXPECT_EQ(pieces.status().code(), StatusCode::kUnsupported);
    return;
  }
  ASSERT_TRUE(pieces.ok()) << pieces.status().message();
  std::string expected = golden["text"];
  if (options.add_generation_prompt) expected += golden["prompt"].get<std::string>();
  EXPECT_EQ(Join(*pieces), expected);
}

void ExpectRenders(const ChatTemplate& t, const json& golden) {
  const json& conversations = Golden()["conversations"];
  ASSERT_EQ(golden["renders"].size(), conversations.size());
  for (size_t i = 0; i < conversations.size(); ++i) {
    for (const bool prompt : {false, true}) {
      SCOPED_TRACE(fmt::format("conversation {} {}", i, conversations[i].dump()));
      ExpectRender(t, conversations[i], golden["renders"][i], Options(golden, prompt));
    }
  }
}

// By the source itself what is rendered natively is the same, refusals included, and where the
// source leaves out what somebody says it is refused.
TEST(ChatTemplate, SourcesRenderLikewiseByThemselves) {
  const json& conversations = Golden()["conversations"];
  for (const auto& [file, golden] : Golden()["templates"].items()) {
    const auto made = ModelTemplate::ForChat(TemplateSource(file));
    ASSERT_TRUE(made.ok()) << file << ": " << made.status().message();
    for (size_t i = 0; i < conversations.size(); ++i) {
      SCOPED_TRACE(fmt::format("{}, conversation {} {}", file, i, conversations[i].dump()));
      const json& render = golden["renders"][i];
      const std::vector<ChatMessage> messages = Messages(conversations[i]);
      const auto text = made->Render(messages, {}, Options(golden, true));
      EXPECT_TRUE(text.ok() || IsOneLine(text.status().message()));
      if (render.contains("error") || render.contains("drops")) {
        EXPECT_FALSE(text.ok());
        continue;
      }
      const std::string expected =
          render["text"].get<std::string>() + render["prompt"].get<std::string>();
      const bool shown = std::ranges::all_of(messages, [&](const ChatMessage& message) {
        return message.role == "assistant" ||
               expected.find(Strip(message.content)) != std::string::npos;
      });
      ASSERT_EQ(text.ok(), shown);
      EXPECT_EQ(shown ? text->bytes() : expected, expected);
    }
  }
}

TEST(ChatTemplate, EveryTemplateIsDetectedAndRenderedAsTransformersDoes) {
  std::set<std::string> named;
  for (const auto& [file, golden] : Golden()["templates"].items()) {
    SCOPED_TRACE(file);
    const ChatTemplate t = Detect(TemplateSource(file));
    EXPECT_EQ(t.name, golden["name"]);
    ExpectRenders(t, golden);
    named.insert(t.name);
  }
  EXPECT_EQ(named.size(), ChatTemplateNames().size()) << "a named template without a golden";
}

// The templates as named, without a source at hand: the same as the file of that name.
TEST(ChatTemplate, NamesRenderAsTheirTemplates) {
  for (const std::string& name : ChatTemplateNames()) {
    SCOPED_TRACE(name);
    const auto t = ChatTemplateByName(name);
    ASSERT_TRUE(t.ok());
    EXPECT_EQ(t->name, name);
    ExpectRenders(*t, Golden()["templates"][name]);
  }
}

// The value of tokenizer.chat_template: after the key, a type (8: string) and a length. One of a
// kind in the file.
std::optional<std::string> GgufTemplate(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string head(16 << 20, '\0');
  in.read(head.data(), static_cast<std::streamsize>(head.size()));
  constexpr std::string_view kKey = "tokenizer.chat_template";
  const size_t at = head.find(kKey);
  if (at == std::string::npos) return std::nullopt;
  uint64_t length = 0;
  std::memcpy(&length, head.data() + at + kKey.size() + 4, sizeof length);
  return head.substr(at + kKey.size() + 12, length);
}

TEST(ChatTemplate, DefaultModelsOwnTemplate) {
  const std::filesystem::path model = testing_base::DefaultModelFile(DSLA_SOURCE_DIR);
  if (model.empty()) GTEST_SKIP() << "the default model is not installed";
  const auto source = GgufTemplate(model);
  ASSERT_TRUE(source.has_value()) << model;
  const ChatTemplate t = Detect(*source);
  EXPECT_EQ(t.name, Golden()["model"]["name"]);
  ExpectRenders(t, Golden()["model"]);
}

TEST(ChatTemplate, ThinkingSwitchedOff) {
  const json& renders = Golden()["qwen3_without_thinking"];
  ASSERT_GT(renders.size(), 0u);
  for (size_t i = 0; i < renders.size(); ++i) {
    ChatRenderOptions options = Options(Golden()["templates"]["qwen3"], true);
    options.enable_thinking = false;
    ExpectRender(*ChatTemplateByName("qwen3"), Golden()["conversations"][i], renders[i], options);
  }
}

TEST(ChatTemplate, DetectionReadsDefaultSystemAndDate) {
  EXPECT_EQ(Detect(TemplateSource("chatml-own-system")).default_system,
            "Answer in verse.\n\nAlways.");
  EXPECT_EQ(Detect(TemplateSource("llama3.1")).date, "26 Jul 2024");
  const ChatTemplate t = Detect(TemplateSource("llama3.2"));
  EXPECT_EQ(t.date, "01 Dec 2024");
  const std::vector<ChatMessage> hello = {{"user", "Hi"}};
  EXPECT_THAT(Join(*RenderChat(t, hello, {})), HasSubstr("Today Date: 01 Dec 2024\n\n"));
  EXPECT_THAT(Join(*RenderChat(t, hello, {.date = "02 Feb 2025"})),
              HasSubstr("Today Date: 02 Feb 2025\n\n"));
}

void ExpectRefused(std::string_view source, std::string_view why) {
  const auto found = DetectChatTemplate(source);
  ASSERT_FALSE(found.ok()) << "taken for " << found->name;
  EXPECT_EQ(found.status().code(), StatusCode::kUnsupported);
  EXPECT_TRUE(IsOneLine(found.status().message())) << found.status().message();
  EXPECT_THAT(found.status().message(), HasSubstr(why)) << source.substr(0, 200);
  for (const std::string& name : ChatTemplateNames()) {
    EXPECT_THAT(found.status().message(), HasSubstr(name));
  }
  EXPECT_THAT(found.status().message(), HasSubstr("--chat-template"));
}

// Each differs from a known template in something that a look at its tokens would miss.
TEST(ChatTemplate, UnknownTemplatesAreRefusedWithTheNames) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kData / "unknown")) {
    SCOPED_TRACE(entry.path());
    ExpectRefused(ReadFile(entry.path()), "the model's chat template ");
    ++files;
  }
  EXPECT_GE(files, 9);
  ExpectRefused("", "is none of those known here");
}

// One byte of the rendered text changed anywhere makes another template.
TEST(ChatTemplate, EveryChangeOfATemplatesTextIsNoticed) {
  const std::string source = TemplateSource("chatml");
  for (size_t at = source.find("<|im_start|>"); at != std::string::npos;
       at = source.find("<|im_", at + 1)) {
    std::string changed = source;
    changed[at + 2] = 'x';
    ExpectRefused(changed, "is none of those known here");
  }
}

std::string Repeat(std::string_view text, int n) {
  std::string result;
  for (int i = 0; i < n; ++i) result += text;
  return result;
}

TEST(ChatTemplate, UnreadableSourcesAreRefused) {
  ExpectRefused("{{ 'abc", "a string has no end");
  ExpectRefused("{{ 1", "a tag has no end");
  ExpectRefused("{{", "a tag has no end");
  ExpectRefused("{%", "a tag has no end");
  ExpectRefused("{# 1", "a comment has no end");
  ExpectRefused("{% for m in messages %}", "unexpected");
  ExpectRefused("{% endfor %}", "unexpected");
  ExpectRefused("{{ ] }}", "unbalanced ']'");
  ExpectRefused("{{ '\\x41' }}", "the escape \\x in a string");
  ExpectRefused("{% import 'os' as os %}", "the statement 'import'");
  ExpectRefused("{{ messages.__class__.mro() }}", "the method 'mro'");
  ExpectRefused("{{ messages.x.y }}", "an attribute of an undefined value");
  ExpectRefused("{{ lipsum() }}", "the function 'lipsum'");
  ExpectRefused("{{ messages | groupby }}", "the filter 'groupby'");
  ExpectRefused("{{ 1 % 0 }}", "division by zero");
}

TEST(ChatTemplate, SourcesThatWouldTakeForeverAreRefused) {
  const std::string grow =
      "{% set n = namespace(x=X) %}{% for i in range(1000) %}{% set n.x = Y %}{% endfor %}";
  const auto growing = [&](std::string_view from, std::string_view to) {
    std::string source = grow;
    source.replace(source.find('Y'), 1, to);
    return source.replace(source.find('X'), 1, from);
  };
  ExpectRefused("{{ " + Repeat("(", 100000) + "1" + Repeat(")", 100000) + " }}", "deep");
  ExpectRefused("{{ " + Repeat("not ", 50000) + "1 }}", "deep");
  ExpectRefused("{{ " + Repeat("-", 100000) + "1 }}", "deep");
  ExpectRefused("{{ 1" + Repeat("+1", 20000) + " }}", "an expression over");
  ExpectRefused("{{ a" + Repeat(".a", 20000) + " }}", "an expression over");
  ExpectRefused("{% if a %}" + Repeat("{% elif a %}", 20000) + "{% endif %}", "deep");
  ExpectRefused(Repeat("{% if a %}", 20000), "deep");
  ExpectRefused(Repeat("{% set x = [x] %}", 10000), "values nested over");
  ExpectRefused(std::string(1 << 20, 'a'), "bytes of source");
  ExpectRefused("{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
                "steps");
  ExpectRefused(growing("'a'", "n.x + n.x"), "bytes");
  ExpectRefused(growing("'a'", "n.x ~ n.x"), "bytes");
  ExpectRefused(growing("[1]", "n.x + n.x"), "a list of over");
  ExpectRefused(growing("[1]", "[n.x, n.x]"), "assignment to an attribute");
  ExpectRefused(growing("1", "n"), "assignment to an attribute");
  ExpectRefused(growing("1", "[n]"), "a namespace in a list");
  // Ten million leaves, two hundred values to hold.
  ExpectRefused("{% set a = [1,1,1,1,1,1,1,1,1,1] %}" +
                    Repeat("{% set a = [a,a,a,a,a,a,a,a,a,a] %}", 6) +
                    "{% set b = [1,1,1,1,1,1,1,1,1,1] %}" +
                    Repeat("{% set b = [b,b,b,b,b,b,b,b,b,b] %}", 6) + "{{ a == b }}",
                "a comparison of too many");
}

// Truncated and damaged sources must end in an answer, whichever; the sanitizers watch.
TEST(ChatTemplate, DamagedSourcesDoNoHarm) {
  std::mt19937 random(7);
  for (const auto& [file, golden] : Golden()["templates"].items()) {
    const std::string source = TemplateSource(file);
    for (int i = 0; i < 60; ++i) {
      std::string damaged = source;
      damaged[random() % damaged.size()] = static_cast<char>(random());
      if (i % 3 == 0) damaged.resize(random() % damaged.size());
      if (i % 3 == 1) damaged.erase(random() % damaged.size(), random() % 20);
      const auto found = DetectChatTemplate(damaged);
      EXPECT_TRUE(IsOneLine(found.status().message()));
    }
  }
}

TEST(ChatTemplate, NamesAndUnknownName) {
  const auto missing = ChatTemplateByName("no-such");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  EXPECT_EQ(missing.status().message().find("no chat template is named 'no-such'; there are "), 0u);
  for (const std::string& name : ChatTemplateNames()) {
    EXPECT_THAT(missing.status().message(), HasSubstr(name));
  }
}

std::string ErrorOf(const std::string& name, const std::vector<ChatMessage>& messages) {
  const auto pieces =
      RenderChat(*ChatTemplateByName(name), messages, {.bos = "<s>", .eos = "</s>"});
  return pieces.ok() ? "rendered: " + Join(*pieces) : pieces.status().message();
}

TEST(ChatTemplate, ErrorsNameTheMessage) {
  EXPECT_EQ(ErrorOf("chatml", {}), "the conversation has no messages");
  EXPECT_EQ(
      ErrorOf("llama2", {{"user", "a"}, {"user", "b"}}),
      "message 2 ('user'): chat template llama2 wants user and assistant to alternate, user first");
  EXPECT_EQ(ErrorOf("mistral-v0.3", {{"system", "s"}, {"assistant", "b"}}),
            "message 2 ('assistant'): chat template mistral-v0.3 wants user and assistant to "
            "alternate, user first after the "
            "system message");
  EXPECT_EQ(ErrorOf("mistral-v0.2", {{"user", "s"}, {"critic\n", "b"}}),
            "message 2 ('critic?'): chat template mistral-v0.2 takes user and assistant only");
  EXPECT_EQ(ErrorOf("qwen2.5", {{"user", "s"}, {"tool", "b"}}),
            "message 2 ('tool'): chat template qwen2.5 has no place for this role here");
  EXPECT_EQ(ErrorOf("llama3.1", {{"user", "s"}, {"ipython", "b"}}),
            "message 2 ('ipython'): chat template llama3.1 has no place for this role here");
  EXPECT_EQ(ErrorOf("zephyr", {{std::string(1000, 'r'), ""}}),
            "message 1 ('" + std::string(32, 'r') +
                "'): chat template zephyr has no place for this role here");
}

const std::vector<std::string> kControls = {"<|im_start|>",
                                            "<|im_end|>",
                                            "<think>",
                                            "</think>",
                                            "[INST]",
                                            "[/INST]",
                                            "<|start_header_id|>",
                                            "<|end_header_id|>",
                                            "<|eot_id|>",
                                            "<|system|>",
                                            "<|user|>",
                                            "<|assistant|>",
                                            "<bos>",
                                            "<eos>"};

std::vector<std::string> Controls(std::span<const PromptPiece> pieces) {
  std::vector<std::string> controls;
  for (const PromptPiece& piece : pieces) {
    if (piece.control) controls.push_back(piece.text);
  }
  return controls;
}

// Whatever messages hold, the control pieces are those of the same conversation with harmless
// texts: no byte of a message is in them.
TEST(ChatTemplate, MessagesNeverReachControlPieces) {
  constexpr unsigned kSeed = 20250214;
  std::cout << "seed " << kSeed << "\n";
  std::mt19937 random(kSeed);
  const auto hostile = [&](bool thoughts) {
    std::string text;
    for (size_t n = random() % 8; n > 0; --n) {
      const std::string& control = kControls[random() % kControls.size()];
      if (!thoughts && control.ends_with("think>")) continue;
      // Whole, cut at either end (so that it might join up with template text), or amid other text.
      const size_t cut = random() % 3 == 0 ? random() % control.size() : 0;
      text += random() % 2 ? control.substr(cut) : control.substr(0, control.size() - cut);
      if (random() % 3 == 0) text += random() % 2 ? "\n" : " x ";
    }
    return text;
  };
  for (const std::string& name : ChatTemplateNames()) {
    SCOPED_TRACE(name);
    const ChatTemplate t = *ChatTemplateByName(name);
    for (int round = 0; round < 300; ++round) {
      std::vector<ChatMessage> harmless, messages;
      for (size_t i = 0, n = 1 + random() % 5; i < n; ++i) {
        harmless.push_back({i % 2 ? "assistant" : "user", "text"});
        messages.push_back({harmless.back().role, hostile(false)});
      }
      if (t.family == ChatFamily::kChatMl && t.any_role) {
        messages.back().role = hostile(true);
      }
      ChatRenderOptions options{.bos = "<bos>", .eos = "<eos>"};
      options.add_generation_prompt = round % 2;
      const auto want = RenderChat(t, harmless, options), got = RenderChat(t, messages, options);
      ASSERT_TRUE(want.ok() && got.ok());
      ASSERT_EQ(Controls(*got), Controls(*want)) << Join(*got);
      // With reasoning, whose marks the template moves, each control piece is still one of the
      // template's tokens.
      for (ChatMessage& m : messages) m.content = hostile(true);
      const auto thoughts = RenderChat(t, messages, options);
      ASSERT_TRUE(thoughts.ok());
      for (const std::string& control : Controls(*thoughts)) {
        ASSERT_THAT(kControls, testing::Contains(control));
      }
      for (size_t i = 1; i < thoughts->size(); ++i) {
        ASSERT_TRUE((*thoughts)[i].control || (*thoughts)[i - 1].control) << "two plain pieces";
      }
    }
  }
}

TEST(ChatTemplate, PiecesAreSplitAtControlTokensOnly) {
  const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Hello"}};
  EXPECT_EQ(*RenderChat(*ChatTemplateByName("chatml"), messages, {}),
            (std::vector<PromptPiece>{{"<|im_start|>", true},
                                      {"system\nBe brief.", false},
                                      {"<|im_end|>", true},
                                      {"\n", false},
                                      {"<|im_start|>", true},
                                      {"user\nHello", false},
                                      {"<|im_end|>", true},
                                      {"\n", false},
                                      {"<|im_start|>", true},
                                      {"assistant\n", false}}));
}

TEST(ChatTemplate, MarkersThatAreNoTokensJoinTheText) {
  const std::vector<ChatMessage> messages = {{"user", "</s>a"}, {"assistant", "b"}, {"user", "c"}};
  const ChatRenderOptions options{.bos = "<s>", .eos = "</s>"};
  const auto is_eos_or_bos = [](std::string_view s) { return s == "<s>" || s == "</s>"; };
  EXPECT_EQ(MergePlainPieces(*RenderChat(*ChatTemplateByName("zephyr"), messages, options),
                             is_eos_or_bos),
            (std::vector<PromptPiece>{{"<|user|>\n</s>a", false},
                                      {"</s>", true},
                                      {"\n<|assistant|>\nb", false},
                                      {"</s>", true},
                                      {"\n<|user|>\nc", false},
                                      {"</s>", true},
                                      {"\n<|assistant|>\n", false}}));
  EXPECT_EQ(MergePlainPieces(*RenderChat(*ChatTemplateByName("mistral-v0.2"), messages, options),
                             is_eos_or_bos),
            (std::vector<PromptPiece>{{"<s>", true},
                                      {"[INST] </s>a [/INST]b", false},
                                      {"</s>", true},
                                      {"[INST] c [/INST]", false}}));
  EXPECT_EQ(MergePlainPieces({}, is_eos_or_bos), std::vector<PromptPiece>());
}

}  // namespace
}  // namespace dsla
