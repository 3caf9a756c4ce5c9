#include "format/chat/tool_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace dsla {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::shared_ptr<const std::vector<Tool>> Tools() {
  static const auto tools = std::make_shared<const std::vector<Tool>>(std::vector<Tool>{
      {"get_weather", "{}",
       R"({"type":"object","properties":{"city":{"type":"string"},"days":{"type":"integer"},)"
       R"("unit":{"enum":["C","F"]}}})"},
      {"now", "{}", ""}});
  return tools;
}

ToolParser NewParser(ToolDialect dialect, bool parallel = true) {
  ToolParser::Options options;
  options.dialect = dialect;
  options.tools = Tools();
  options.parallel = parallel;
  return ToolParser(std::move(options));
}

// What a client makes of the pieces.
struct Stream {
  std::string content;
  std::vector<std::pair<std::string, std::string>> calls;  // name, arguments

  void Add(const ToolReplyDelta& delta) {
    content += delta.content;
    for (const auto& call : delta.calls) {
      const auto index = static_cast<size_t>(call.index);
      EXPECT_LE(index, calls.size());
      if (index == calls.size()) {
        EXPECT_FALSE(call.name.empty());
        calls.push_back({call.name, ""});
      } else {
        EXPECT_TRUE(call.name.empty());
      }
      calls[index].second += call.arguments;
    }
  }
  bool operator==(const Stream&) const = default;
};

struct Parsed {
  Stream stream;
  ToolReply reply;
};

Parsed Parse(ToolParser parser, const std::vector<std::string>& pieces) {
  Parsed parsed;
  for (const std::string& piece : pieces) parsed.stream.Add(parser.Push(piece));
  parsed.stream.Add(parser.Finish());
  parsed.reply = parser.reply();
  return parsed;
}

// However the text is cut in two or byte by byte.
Parsed EverySplit(ToolDialect dialect, const std::string& text, bool parallel = true) {
  const Parsed whole = Parse(NewParser(dialect, parallel), {text});
  const auto expect_same = [&](const std::vector<std::string>& pieces) {
    const Parsed split = Parse(NewParser(dialect, parallel), pieces);
    EXPECT_TRUE(split.stream == whole.stream) << pieces[0];
    EXPECT_EQ(split.reply.content, whole.reply.content) << pieces[0];
    EXPECT_EQ(split.reply.calls, whole.reply.calls) << pieces[0];
  };
  std::vector<std::string> bytes;
  for (size_t i = 0; i < text.size(); ++i) {
    expect_same({text.substr(0, i), text.substr(i)});
    bytes.push_back(text.substr(i, 1));
  }
  if (!bytes.empty()) expect_same(bytes);
  return whole;
}

ToolCall Call(std::string name, std::string arguments) {
  return {"", std::move(name), std::move(arguments)};
}

void ExpectReply(ToolDialect dialect, const std::string& text, const std::string& content,
                 const std::vector<ToolCall>& calls) {
  const Parsed parsed = EverySplit(dialect, text);
  EXPECT_EQ(parsed.reply.content, content) << text;
  EXPECT_EQ(parsed.reply.calls, calls) << text;
  if (parsed.stream.calls.size() != calls.size()) return;  // one that broke has begun
  EXPECT_EQ(parsed.stream.content, content) << text;
  for (size_t i = 0; i < calls.size(); ++i) {
    EXPECT_EQ(parsed.stream.calls[i].first, calls[i].name);
    EXPECT_EQ(parsed.stream.calls[i].second, calls[i].arguments);
  }
}

const std::string kParis = R"({"city": "Paris"})", kOslo = R"({"city":"Ósló \"{[","days":2})";

TEST(ToolParser, Hermes) {
  const auto d = ToolDialect::kHermes;
  const std::string paris =
      "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": " + kParis + "}\n</tool_call>";
  const std::string oslo =
      "<tool_call>{\"arguments\":" + kOslo + ",\"name\":\"get_weather\"}</tool_call>";
  ExpectReply(d, paris, "", {Call("get_weather", kParis)});
  ExpectReply(d, oslo, "", {Call("get_weather", kOslo)});
  ExpectReply(d, "\n" + paris + "\n" + oslo + "\n", "",
              {Call("get_weather", kParis), Call("get_weather", kOslo)});
  ExpectReply(d, "I look.\n" + paris, "I look.\n", {Call("get_weather", kParis)});
  ExpectReply(d, paris + "\nWait for it. </tool_call>", "\nWait for it. </tool_call>",
              {Call("get_weather", kParis)});
  // Without what should end them.
  ExpectReply(d, paris.substr(0, paris.size() - 13), "", {Call("get_weather", kParis)});
  ExpectReply(d, paris.substr(0, paris.size() - 3), "", {Call("get_weather", kParis)});
  // Other ways to write arguments.
  ExpectReply(d, R"(<tool_call>{"name": "now"}</tool_call>)", "", {Call("now", "{}")});
  ExpectReply(d, R"(<tool_call>{"name": "now", "parameters": null}</tool_call>)", "",
              {Call("now", "{}")});
  ExpectReply(d, R"(<tool_call>{"id": 7, "name": "a", "arguments": "{\"b\": 1}"}</tool_call>)", "",
              {Call("a", R"({"b": 1})")});
}

TEST(ToolParser, TextIsContent) {
  for (const auto d : {ToolDialect::kHermes, ToolDialect::kLlama3, ToolDialect::kMistral,
                       ToolDialect::kQwen3Coder, ToolDialect::kDeepSeek}) {
    for (const char* text :
         {"", " \n", "Hello.", " <tool", "a < b, [TOOL] <|x|> ｜ é 日本", "see {\"name\": 1}",
          "<tool_callx>", "[TOOL_CALLS", "\n\nx\n ", "<function", "<｜tool", "```\n{}\n```"})
      ExpectReply(d, text, text, {});
  }
}

TEST(ToolParser, MalformedCallsAreContentAsTheyWere) {
  const auto d = ToolDialect::kHermes;
  for (const char* text :
       {"<tool_call>", "<tool_call>\n", " <tool_call>{}</tool_call>",
        "<tool_call>get()</tool_call>",
        "<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": 5}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": \"x\"}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": {'b': 1}}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": {\"b\": True}}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"arguments\": {\"b\": 1",
        "<tool_call>{\"name\": \"a\", \"arguments\": {}} ",
        "<tool_call>{\"name\": \"a\", \"arguments\": {}, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"what\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>", "<tool_call>[]</tool_call>"}) {
    const bool complete = std::string_view(text).ends_with("}} ");
    if (complete) continue;  // that one is a call
    ExpectReply(d, text, text, {});
  }
  // One after the other: the second is read all the same.
  ExpectReply(d, R"(<tool_call>oops<tool_call>{"name": "now", "arguments": {}}</tool_call>)",
              "<tool_call>oops", {Call("now", "{}")});
  ExpectReply(d, R"(<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>)",
              "<tool_call>", {Call("now", "{}")});
}

TEST(ToolParser, WhatHasGoneOutOfABrokenCallIsFollowedByTheRest) {
  const Parsed parsed =
      EverySplit(ToolDialect::kHermes, R"(<tool_call>{"name": "a", "arguments": {"b": oh no)");
  EXPECT_THAT(parsed.stream.calls, ElementsAre(std::pair("a", R"({"b": )")));
  EXPECT_EQ(parsed.stream.content, "oh no");
  EXPECT_THAT(parsed.reply.calls, IsEmpty());
}

TEST(ToolParser, Llama3) {
  const auto d = ToolDialect::kLlama3;
  const std::string paris = R"({"name": "get_weather", "parameters": )" + kParis + "}";
  ExpectReply(d, paris, "", {Call("get_weather", kParis)});
  ExpectReply(d, " <|python_tag|>" + paris, "", {Call("get_weather", kParis)});
  ExpectReply(d, R"({"type": "function", "name": "now", "parameters": {}})", "",
              {Call("now", "{}")});
  ExpectReply(d, paris + "; " + paris + "\n", "",
              {Call("get_weather", kParis), Call("get_weather", kParis)});
  ExpectReply(d, "Well: <|python_tag|>" + paris, "Well: ", {Call("get_weather", kParis)});
  // Without the tag only a tool's name makes a call.
  for (const char* text :
       {R"({"name": "Bob", "age": 3})", R"({"name": "Bob", "parameters": {}})", R"({"a": 1})", "{",
        "{}", "Here: {\"name\": \"now\", \"parameters\": {}}", "<|python_tag|>print(1)",
        "<|python_tag|>"})
    ExpectReply(d, text, text, {});
  ExpectReply(d, R"(<|python_tag|>{"name": "Bob", "parameters": {}})", "", {Call("Bob", "{}")});
}

TEST(ToolParser, Mistral) {
  const auto d = ToolDialect::kMistral;
  const std::string paris = R"({"name": "get_weather", "arguments": )" + kParis + "}";
  ExpectReply(d, "[TOOL_CALLS] [" + paris + "]", "", {Call("get_weather", kParis)});
  ExpectReply(d, "[TOOL_CALLS][" + paris + ", {\"name\": \"now\", \"id\": \"abc\"} ] ", "",
              {Call("get_weather", kParis), Call("now", "{}")});
  ExpectReply(d, "Ok.[TOOL_CALLS]" + paris, "Ok.", {Call("get_weather", kParis)});
  ExpectReply(d, "[TOOL_CALLS]get_weather[ARGS]" + kParis + "[TOOL_CALLS]now[CALL_ID]x1[ARGS]{}",
              "", {Call("get_weather", kParis), Call("now", "{}")});
  ExpectReply(d, "[TOOL_CALLS] get_weather" + kOslo, "", {Call("get_weather", kOslo)});
  ExpectReply(d, "[TOOL_CALLS][" + paris + ", oops]", ", oops]", {Call("get_weather", kParis)});
  for (const char* text : {"[TOOL_CALLS]", "[TOOL_CALLS] []", "[TOOL_CALLS]{\"name\": 1}",
                           "[TOOL_CALLS]now", "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS]now[ARGS]x"})
    ExpectReply(d, text, text, {});
}

TEST(ToolParser, Qwen3Coder) {
  const auto d = ToolDialect::kQwen3Coder;
  const std::string call =
      "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n"
      "<parameter=days>\n3\n</parameter>\n<parameter=note>\nno \"json\"\n</parameter>\n"
      "</function>\n</tool_call>";
  const auto expected = Call("get_weather", R"({"city": "12", "days": 3, "note": "no \"json\""})");
  ExpectReply(d, call, "", {expected});
  ExpectReply(d, "Look:\n" + call + "\n" + call, "Look:\n", {expected, expected});
  ExpectReply(d, "<function=now></function>", "", {Call("now", "{}")});
  ExpectReply(d,
              "<function=get_weather><parameter=unit>\n C \n</parameter><parameter=city> x "
              "</parameter></function>",
              "", {Call("get_weather", R"({"unit": "C", "city": " x "})")});
  ExpectReply(d, std::string("<function=f><parameter=a>1\0 2</parameter></function>", 52), "",
              {Call("f", R"({"a": "1\u0000 2"})")});
  for (const char* text : {"<tool_call>", "<tool_call>\n{}", "<function=>", "<function=now>x",
                           "<tool_call><function=now><parameter=a>1</parameter>"}) {
    const Parsed parsed = EverySplit(d, text);
    EXPECT_EQ(parsed.reply.content, text);
    EXPECT_THAT(parsed.reply.calls, IsEmpty());
  }
}

TEST(ToolParser, DeepSeek) {
  const auto d = ToolDialect::kDeepSeek;
  const std::string fenced = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" +
                             kParis + "\n```<｜tool▁call▁end｜>";
  const std::string plain =
      "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + kOslo + "<｜tool▁call▁end｜>";
  ExpectReply(d, "Ok.<｜tool▁calls▁begin｜>" + fenced + "\n" + fenced + "<｜tool▁calls▁end｜>",
              "Ok.", {Call("get_weather", kParis), Call("get_weather", kParis)});
  ExpectReply(d, "<｜tool▁calls▁begin｜>" + plain + "<｜tool▁calls▁end｜>", "",
              {Call("get_weather", kOslo)});
  for (const char* text : {"<｜tool▁calls▁begin｜>nothing", "<｜tool▁call▁begin｜>{}",
                           "<｜tool▁call▁begin｜>function<｜tool▁sep｜>x{}"})
    ExpectReply(d, text, text, {});
}

TEST(ToolParser, OneCallWhereNoMoreAreWanted) {
  const std::string call = R"(<tool_call>{"name": "now", "arguments": {}}</tool_call>)";
  const Parsed parsed = EverySplit(ToolDialect::kHermes, call + "\n" + call, /*parallel=*/false);
  EXPECT_EQ(parsed.reply.calls, std::vector<ToolCall>{Call("now", "{}")});
  EXPECT_EQ(parsed.stream.calls.size(), 1u);
  EXPECT_EQ(parsed.stream.content, "");
}

TEST(ToolParser, ArgumentsComeAsTheyAreWritten) {
  ToolParser parser = NewParser(ToolDialect::kHermes);
  EXPECT_THAT(parser.Push("Hi <tool").content, "Hi ");
  EXPECT_THAT(parser.Push("_call>{\"name\": \"get_weather\", \"arguments\": ").calls, IsEmpty());
  auto delta = parser.Push("{\"city\": \"Par");
  ASSERT_EQ(delta.calls.size(), 1u);
  EXPECT_EQ(delta.calls[0].name, "get_weather");
  EXPECT_EQ(delta.calls[0].arguments, "{\"city\": \"Par");
  delta = parser.Push("is");
  ASSERT_EQ(delta.calls.size(), 1u);
  EXPECT_EQ(delta.calls[0].name, "");
  EXPECT_EQ(delta.calls[0].arguments, "is");
}

TEST(ToolDialects, ByNameAndByTemplate) {
  for (const std::string_view name : ToolDialectNames())
    EXPECT_EQ(Name(*ToolDialectByName(name)), name);
  EXPECT_FALSE(ToolDialectByName("python"));
  const std::map<std::string, ToolDialect> sources = {
      {"<tool_call>{}", ToolDialect::kHermes},
      {"<tool_call><function=x><parameter=y>", ToolDialect::kQwen3Coder},
      {"'[TOOL_CALLS] ['", ToolDialect::kMistral},
      {"{\"name\": x, \"parameters\": y}", ToolDialect::kLlama3},
      {"'<｜tool▁call▁begin｜>'", ToolDialect::kDeepSeek}};
  for (const auto& [source, dialect] : sources) EXPECT_EQ(DetectToolDialect(source), dialect);
  EXPECT_FALSE(DetectToolDialect("<|im_start|>"));
}

}  // namespace
}  // namespace dsla
