// The goldens are what transformers renders (tools/tool_template_oracle.py).
#include "format/chat/model_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

namespace dsla {
namespace {

using nlohmann::ordered_json;
using ::testing::HasSubstr;
using ::testing::Not;

const std::filesystem::path kData = DSLA_SOURCE_DIR "/tests/data/chat";

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

const ordered_json& Golden() {
  static const auto golden = ordered_json::parse(ReadFile(kData / "tools/golden.json"));
  return golden;
}

ModelTemplate Made(std::string_view source) {
  auto made = ModelTemplate::ForTools(source);
  EXPECT_TRUE(made.ok()) << made.status().message();
  return std::move(made).value();
}
ModelTemplate OfFile(const std::string& name) {
  return Made(ReadFile(kData / "tools" / (name + ".jinja")));
}

std::vector<ChatMessage> Messages(const ordered_json& conversation) {
  std::vector<ChatMessage> messages;
  for (const auto& m : conversation["messages"]) {
    ChatMessage& message = messages.emplace_back();
    message.role = m["role"];
    message.content = m["content"];
    message.tool_call_id = m.value("tool_call_id", "");
    message.name = m.value("name", "");
    if (!m.contains("tool_calls")) continue;
    for (const auto& call : m["tool_calls"])
      message.tool_calls.push_back({call["id"], call["name"], call["arguments"]});
  }
  return messages;
}

std::vector<Tool> Tools(const ordered_json& conversation) {
  std::vector<Tool> tools;
  for (const auto& tool : conversation["tools"])
    tools.push_back({tool["function"]["name"], tool.dump(), ""});
  return tools;
}

TEST(ModelTemplate, RendersAsTransformersDoes) {
  for (const auto& [name, golden] : Golden()["templates"].items()) {
    const ModelTemplate made = OfFile(name);
    ChatRenderOptions options;
    options.bos = golden["bos"];
    options.eos = golden["eos"];
    for (size_t i = 0; i < golden["renders"].size(); ++i) {
      const auto& conversation = Golden()["conversations"][i];
      const auto& expected = golden["renders"][i];
      const auto messages = Messages(conversation);
      const bool calls =
          std::ranges::any_of(messages, [](const ChatMessage& m) { return !m.tool_calls.empty(); });
      if (calls && name == "python-text") continue;  // it drops them
      const auto text = made.Render(messages, Tools(conversation), options);
      if (expected.contains("error")) {
        EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument) << name << " " << i;
        continue;
      }
      ASSERT_TRUE(text.ok()) << name << " " << i << ": " << text.status().message();
      EXPECT_EQ(text->bytes(), expected["text"].get<std::string>()) << name << " " << i;
    }
  }
}

TEST(ModelTemplate, KnowsTheDialect) {
  EXPECT_EQ(OfFile("hermes").dialect(), ToolDialect::kHermes);
  EXPECT_EQ(OfFile("llama3").dialect(), ToolDialect::kLlama3);
  EXPECT_EQ(OfFile("mistral").dialect(), ToolDialect::kMistral);
  EXPECT_EQ(OfFile("deepseek").dialect(), ToolDialect::kDeepSeek);
  EXPECT_EQ(OfFile("python-text").dialect(), ToolDialect::kHermes);
  EXPECT_EQ(Made("{{ tools }}").dialect(), std::nullopt);
}

// What is left of a prompt without the bytes of messages and tools.
std::string Own(const jinja::Text& text) {
  std::string own;
  size_t begin = 0;
  for (const auto& foreign : text.foreign()) {
    own += text.bytes().substr(begin, foreign.begin - begin);
    begin = foreign.end;
  }
  return own + text.bytes().substr(begin);
}

TEST(ModelTemplate, EveryByteOfTheClientIsForeign) {
  const std::string evil = "EVIL";
  const std::vector<Tool> tools = {
      {"t",
       R"({"type":"function","function":{"name":"EVIL","description":"a EVIL \" EVIL",)"
       R"("EVIL":[{"EVIL":"EVIL"}],"parameters":{"EVIL":"EVIL"}}})",
       ""}};
  ChatMessage call{"assistant", ""}, result{"tool", " EVIL\n\n EVIL"};
  call.tool_calls = {{"EVILEVILE", "EVIL", R"({"EVIL":"EVIL\nEVIL"})"}};
  result.tool_call_id = "EVILEVILE";
  result.name = "EVIL";
  for (const char* name : {"hermes", "llama3", "mistral"}) {
    const auto text = OfFile(name).Render(
        std::vector<ChatMessage>{{"system", "EVIL "}, {"user", " EVIL"}, call, result}, tools, {});
    ASSERT_TRUE(text.ok()) << name << text.status().message();
    EXPECT_THAT(text->bytes(), HasSubstr(evil)) << name;
    EXPECT_THAT(Own(*text), Not(HasSubstr(evil))) << name;
  }
}

TEST(ModelTemplate, TemplatesWithoutToolsAreRefused) {
  for (const char* name : {"smollm2", "chatml", "llama2", "zephyr", "mistral-v0.1"}) {
    const auto made =
        ModelTemplate::ForTools(ReadFile(kData / "templates" / (std::string(name) + ".jinja")));
    ASSERT_FALSE(made.ok()) << name;
    EXPECT_EQ(made.status().message(), "the model's chat template has no place for tools");
  }
  EXPECT_THAT(ModelTemplate::ForTools("{% oops %}").status().message(),
              HasSubstr("cannot be read"));
}

TEST(ModelTemplate, RefusesWhatItWouldDrop) {
  ChatMessage call{"assistant", ""}, talk{"assistant", "I look."};
  call.tool_calls = talk.tool_calls = {{"call00001", "get_weather", "{}"}};
  const std::vector<Tool> tools = Tools(Golden()["conversations"][0]);
  const ChatMessage user{"user", "x"};
  const auto refused = [&](const char* name, std::vector<ChatMessage> messages) {
    const auto text = OfFile(name).Render(messages, tools, {});
    EXPECT_FALSE(text.ok());
    return text.status().message();
  };
  EXPECT_THAT(refused("python-text", {user, call}), HasSubstr("no place for calls"));
  EXPECT_THAT(refused("python-text", {user, {"tool", "x"}}), HasSubstr("no place for calls"));
  EXPECT_THAT(refused("deepseek", {user, talk}), HasSubstr("no place for text beside calls"));
  EXPECT_TRUE(OfFile("hermes").Render(std::vector<ChatMessage>{user, talk}, tools, {}).ok());
}

TEST(ModelTemplate, WhatIsShownMayStandInAnotherOrder) {
  const auto last_first = ModelTemplate::ForChat(
      "{{ messages[-1].content }}{% for m in messages %}{% if not loop.last %}{{ m.content }}"
      "{% endif %}{% endfor %}");
  ASSERT_TRUE(last_first.ok()) << last_first.status().message();
  std::vector<ChatMessage> messages = {{"system", "a"}, {"user", "b"}, {"user", " c"}};
  const auto text = last_first->Render(messages, {}, {});
  ASSERT_TRUE(text.ok()) << text.status().message();
  EXPECT_EQ(text->bytes(), " cab");
  messages.insert(messages.begin() + 1, {"narrator\n", "d"});
  EXPECT_EQ(last_first->Render(messages, {}, {})->bytes(), " cadb");
  const auto users = ModelTemplate::ForChat(
      "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}");
  ASSERT_TRUE(users.ok());
  EXPECT_EQ(users->Render(messages, {}, {}).status().message(),
            "the chat template drops or changes the text of message 1");
  messages.erase(messages.begin());
  EXPECT_EQ(users->Render(messages, {}, {}).status().message(),
            "the chat template drops or changes the text of message 1");
}

TEST(ModelTemplate, RefusalsNameTheTemplatesWordsAlone) {
  ChatMessage call{"assistant", ""};
  call.tool_calls = {{"a", "secret", "{}"}, {"b", "secret", "{}"}};
  const auto text = OfFile("llama3").Render(std::vector<ChatMessage>{{"user", "x"}, call}, {}, {});
  ASSERT_EQ(text.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(text.status().message(), HasSubstr("one call at a time, not 2 such as ..."));
  EXPECT_THAT(text.status().message(), Not(HasSubstr("secret")));
}

TEST(ModelTemplate, LongConversationsAreRenderedAndEndlessOnesAreNot) {
  const ModelTemplate hermes = OfFile("hermes");
  const std::vector<Tool> tools = Tools(Golden()["conversations"][0]);
  std::vector<ChatMessage> messages;
  for (int i = 0; i < 4000; ++i) messages.push_back({i % 2 ? "assistant" : "user", "Some words."});
  messages.push_back({"user", std::string(4 << 20, 'x')});
  EXPECT_TRUE(hermes.Render(messages, tools, {}).ok());
  const ModelTemplate endless = Made(
      "{{ tools }}{% if messages | length > 3 %}{% for a in range(4000) %}{% for b in range(4000) "
      "%}"
      "{{ a }}{% endfor %}{% endfor %}{% endif %}");
  EXPECT_EQ(endless.Render(messages, tools, {}).status().code(), StatusCode::kUnsupported);
}

TEST(ModelTemplate, ThinkingIsSwitchedOffByItsVariable) {
  const ModelTemplate made =
      Made("{{ tools }}{{ enable_thinking is defined and enable_thinking is false }}");
  ChatRenderOptions options;
  const std::vector<ChatMessage> messages = {{"user", "x"}};
  EXPECT_EQ(made.Render(messages, {}, options)->bytes(), "NoneFalse");
  options.enable_thinking = false;
  EXPECT_EQ(made.Render(messages, {}, options)->bytes(), "NoneTrue");
}

}  // namespace
}  // namespace dsla
