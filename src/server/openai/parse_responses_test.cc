#include <fmt/format.h>
#include <gtest/gtest.h>

#include "server/openai/responses.h"

namespace dsla::openai {
namespace {

Limits TestLimits() {
  Limits limits;
  limits.vocab_size = 100;
  limits.max_context = 1000;
  return limits;
}

ResponsesRequest Good(const std::string& body) {
  auto parsed = ParseResponses(body, TestLimits());
  const auto* error = std::get_if<HttpError>(&parsed);
  EXPECT_EQ(error, nullptr) << body << ": " << (error ? error->message : "");
  return error ? ResponsesRequest{} : std::get<ResponsesRequest>(std::move(parsed));
}

void Bad(const std::string& body, const std::string& code, const std::string& param) {
  const auto parsed = ParseResponses(body, TestLimits());
  const auto* error = std::get_if<HttpError>(&parsed);
  ASSERT_NE(error, nullptr) << body;
  EXPECT_EQ(error->status, 400);
  EXPECT_EQ(error->code, code) << body << ": " << error->message;
  EXPECT_EQ(error->param, param) << body << ": " << error->message;
  EXPECT_EQ(error->message.find('\n'), std::string::npos);
}

void BadField(const std::string& field, const std::string& code, const std::string& param) {
  Bad(fmt::format(R"({{"input":"x",{}}})", field), code, param);
}

TEST(ParseResponses, AText) {
  const auto request = Good(R"({"input":"hello","instructions":"Be brief.","max_output_tokens":7,
               "temperature":0.5,"top_p":0.25,"stream":true,"metadata":{"a":"b\n"}})");
  ASSERT_EQ(request.chat.messages.size(), 2u);
  EXPECT_EQ(request.chat.messages[0].role, "system");
  EXPECT_EQ(request.chat.messages[0].content, "Be brief.");
  EXPECT_EQ(request.chat.messages[1].role, "user");
  EXPECT_EQ(request.chat.messages[1].content, "hello");
  EXPECT_EQ(request.echo.instructions, "Be brief.");
  EXPECT_EQ(request.echo.metadata, R"({"a":"b\n"})");
  EXPECT_EQ(request.chat.common.max_tokens, 7);
  EXPECT_EQ(request.chat.common.sampling.temperature, 0.5f);
  EXPECT_EQ(request.chat.common.sampling.top_p, 0.25f);
  EXPECT_TRUE(request.chat.common.stream && request.chat.common.include_usage);
  EXPECT_FALSE(Good(R"({"input":"x"})").chat.common.include_usage);
}

TEST(ParseResponses, Messages) {
  const auto request = Good(R"({"input":[
      {"role":"developer","content":"d"},
      {"type":"message","role":"user","content":[{"type":"input_text","text":"a"},
                                                 {"type":"input_text","text":"b"}]},
      {"id":"msg_1","type":"message","role":"assistant","status":"completed",
       "content":[{"type":"output_text","text":"c","annotations":[]}]}]})");
  ASSERT_EQ(request.chat.messages.size(), 3u);
  EXPECT_EQ(request.chat.messages[0].role, "system");
  EXPECT_EQ(request.chat.messages[1].content, "a\nb");
  EXPECT_EQ(request.chat.messages[2].role, "assistant");
  EXPECT_EQ(request.chat.messages[2].content, "c");
}

TEST(ParseResponses, BadInput) {
  Bad("{}", "missing_required_parameter", "input");
  Bad(R"({"input":7})", "invalid_type", "input");
  Bad(R"({"input":[]})", "invalid_value", "input");
  Bad(R"({"input":[7]})", "invalid_type", "input[0]");
  Bad(R"({"input":[{"content":"x"}]})", "missing_required_parameter", "input[0].role");
  Bad(R"({"input":[{"role":"tool","content":"x"}]})", "invalid_value", "input[0].role");
  Bad(R"({"input":[{"role":"user"}]})", "missing_required_parameter", "input[0].content");
  Bad(R"({"input":[{"role":"user","content":[]}]})", "invalid_value", "input[0].content");
  Bad(R"({"input":[{"role":"user","content":[{"type":"input_image","image_url":"u"}]}]})",
      "unsupported_feature", "input[0].content[0].type");
  Bad(R"({"input":[{"role":"user","content":[{"type":"input_text"}]}]})",
      "missing_required_parameter", "input[0].content[0].text");
  for (const char* type : {"reasoning", "item_reference", "web_search_call", "custom_tool_call"})
    Bad(fmt::format(R"({{"input":[{{"type":"{}"}}]}})", type), "unsupported_feature",
        "input[0].type");
  Limits limits = TestLimits();
  limits.max_messages = 1;
  const auto parsed = ParseResponses(
      R"({"input":[{"role":"user","content":"a"},{"role":"user","content":"b"}]})", limits);
  EXPECT_EQ(std::get<HttpError>(parsed).code, "array_above_max_length");
}

TEST(ParseResponses, CallsAndTheirOutputs) {
  const auto messages = Good(R"({"input":[
      {"role":"user","content":"x"},
      {"type":"message","role":"assistant","content":[{"type":"output_text","text":"t"}]},
      {"type":"function_call","id":"fc_1","call_id":"a","name":"f","arguments":"{\"b\":1}",
       "status":"completed"},
      {"type":"function_call","call_id":"b","name":"g","arguments":""},
      {"type":"function_call_output","call_id":"b","output":"two"},
      {"type":"function_call_output","id":"o","call_id":"a","status":"completed",
       "output":[{"type":"input_text","text":"o"},{"type":"input_text","text":"ne"}]},
      {"type":"function_call","call_id":"c","name":"f","arguments":"{}"},
      {"type":"function_call_output","call_id":"c","output":""},
      {"role":"assistant","content":"u"},
      {"role":"assistant","content":"v"}]})")
                            .chat.messages;
  ASSERT_EQ(messages.size(), 8u);
  EXPECT_EQ(messages[1].role, "assistant");
  EXPECT_EQ(messages[1].content, "t");
  EXPECT_EQ(messages[1].tool_calls,
            (std::vector<ToolCall>{{"a", "f", R"({"b":1})"}, {"b", "g", "{}"}}));
  EXPECT_EQ(messages[2].role, "tool");
  EXPECT_EQ(messages[2].tool_call_id, "b");
  EXPECT_EQ(messages[2].name, "g");
  EXPECT_EQ(messages[2].content, "two");
  EXPECT_EQ(messages[3].name, "f");
  EXPECT_EQ(messages[3].content, "o\nne");
  EXPECT_EQ(messages[4].role, "assistant");
  EXPECT_EQ(messages[4].content, "");
  EXPECT_EQ(messages[4].tool_calls.size(), 1u);
  EXPECT_EQ(messages[5].content, "");
  EXPECT_TRUE(messages[6].tool_calls.empty() && messages[7].tool_calls.empty());
}

TEST(ParseResponses, BadCalls) {
  const auto bad = [](const std::string& item, const std::string& code, const std::string& param) {
    Bad(fmt::format(
            R"({{"input":[{{"type":"function_call","call_id":"a","name":"f","arguments":"{{}}"}},{}]}})",
            item),
        code, param.empty() ? "input" : "input[1]." + param);
  };
  bad(R"({"type":"function_call","name":"f","arguments":"{}"})", "missing_required_parameter",
      "call_id");
  bad(R"({"type":"function_call","call_id":"b","arguments":"{}"})", "missing_required_parameter",
      "name");
  bad(R"({"type":"function_call","call_id":"b","name":"f"})", "missing_required_parameter",
      "arguments");
  for (const char* arguments : {"7", "{", "[]", R"({\"a\":)"}) {
    bad(fmt::format(R"({{"type":"function_call","call_id":"b","name":"f","arguments":"{}"}})",
                    arguments),
        "invalid_value", "arguments");
  }
  bad(R"({"type":"function_call_output","output":"x"})", "missing_required_parameter", "call_id");
  bad(R"({"type":"function_call_output","call_id":"z","output":"x"})", "invalid_value", "call_id");
  bad(R"({"type":"function_call_output","call_id":"a"})", "missing_required_parameter", "output");
  bad(R"({"type":"function_call_output","call_id":"a","output":7})", "invalid_type", "output");
  bad(R"({"type":"function_call_output","call_id":"a","output":[{"type":"input_image"}]})",
      "unsupported_feature", "output[0].type");
  std::string many;
  for (int i = 0; i < 128; ++i) {
    many +=
        fmt::format(R"({}{{"type":"function_call","call_id":"{}","name":"f","arguments":"{{}}"}})",
                    i > 0 ? "," : "", i);
  }
  bad(many, "array_above_max_length", "");
}

constexpr const char* kFlat =
    R"("tools":[{"type":"function","name":"f","description":"d","parameters":{"type":"object"}},)"
    R"({"type":"function","name":"g","parameters":null,"strict":false}])";

TEST(ParseResponses, Tools) {
  const auto request =
      Good(fmt::format(R"({{"input":"x",{},"parallel_tool_calls":false}})", kFlat));
  const ToolsRequest& tools = request.chat.tools;
  ASSERT_EQ(tools.tools.size(), 2u);
  EXPECT_EQ(tools.tools[0].name, "f");
  EXPECT_EQ(tools.tools[0].parameters, R"({"type":"object"})");
  // As chat's clients write it.
  EXPECT_EQ(tools.tools[0].json, R"({"type":"function","function":{"name":"f","description":"d",)"
                                 R"("parameters":{"type":"object"}}})");
  EXPECT_TRUE(tools.tools[0].strict) << "where it is not said";
  EXPECT_FALSE(tools.tools[1].strict);
  EXPECT_FALSE(tools.parallel || request.echo.parallel);
  EXPECT_EQ(request.echo.tools,
            R"([{"type":"function","name":"f","description":"d","parameters":{"type":"object"},)"
            R"("strict":true},{"type":"function","name":"g","parameters":null,"strict":false}])");
  EXPECT_EQ(request.echo.tool_choice, R"("auto")");
}

TEST(ParseResponses, ToolChoice) {
  const auto choose = [](const char* choice) {
    return Good(fmt::format(R"({{"input":"x",{},"tool_choice":{}}})", kFlat, choice));
  };
  using Choice = ToolsRequest::Choice;
  EXPECT_EQ(choose(R"("auto")").chat.tools.choice, Choice::kAuto);
  EXPECT_EQ(choose(R"("required")").chat.tools.choice, Choice::kRequired);
  const auto none = choose(R"("none")");
  EXPECT_TRUE(none.chat.tools.tools.empty());
  EXPECT_EQ(none.echo.tool_choice, R"("none")");
  EXPECT_NE(none.echo.tools, "[]");
  auto tools = choose(R"({"type":"function","name":"g"})").chat.tools;
  EXPECT_EQ(tools.choice, Choice::kNamed);
  EXPECT_EQ(tools.allowed, std::vector<std::string>{"g"});
  const char* allowed =
      R"({"type":"allowed_tools","mode":"auto","tools":[{"type":"function","name":"f"}]})";
  tools = choose(allowed).chat.tools;
  EXPECT_EQ(tools.choice, Choice::kAuto);
  EXPECT_EQ(tools.tools.size(), 2u);
  EXPECT_EQ(tools.allowed, std::vector<std::string>{"f"});
  EXPECT_EQ(choose(allowed).echo.tool_choice, allowed);
  tools = choose(R"({"type":"allowed_tools","mode":"required","tools":[
      {"type":"function","name":"g"},{"type":"function","name":"f"}]})")
              .chat.tools;
  EXPECT_EQ(tools.choice, Choice::kRequired);
  EXPECT_EQ(tools.allowed, (std::vector<std::string>{"g", "f"}));
}

TEST(ParseResponses, BadTools) {
  const auto tool = [](const char* fields, const char* code, const char* param) {
    BadField(fmt::format(R"("tools":[{{{}}}])", fields), code, fmt::format("tools[0].{}", param));
  };
  for (const char* type : {"web_search", "file_search", "computer_use_preview", "code_interpreter",
                           "mcp", "image_generation", "custom", "namespace"}) {
    tool(fmt::format(R"("type":"{}","name":"f")", type).c_str(), "unsupported_parameter", "type");
  }
  tool(R"("name":"f")", "missing_required_parameter", "type");
  tool(R"("type":"function","function":{"name":"f"})", "missing_required_parameter", "name");
  tool(R"("type":"function","name":"a b")", "invalid_value", "name");
  tool(R"("type":"function","name":"f","parameters":[])", "invalid_type", "parameters");
  tool(R"("type":"function","name":"f","strict":"yes")", "invalid_type", "strict");
  tool(R"("type":"function","name":"f","defer_loading":true)", "unsupported_parameter",
       "defer_loading");
  tool(R"("type":"function","name":"f","allowed_callers":["programmatic"])",
       "unsupported_parameter", "allowed_callers");
  BadField(R"("tools":[7])", "invalid_type", "tools[0]");
  BadField(R"("tools":[{"type":"function","name":"f"},{"type":"function","name":"f"}])",
           "invalid_value", "tools[1].name");
  const auto choice = [](const char* value, const char* code, const char* param) {
    BadField(fmt::format(R"({},"tool_choice":{})", kFlat, value), code, param);
  };
  choice("7", "invalid_type", "tool_choice");
  choice(R"("any")", "invalid_value", "tool_choice");
  choice(R"({"type":"function"})", "missing_required_parameter", "tool_choice.name");
  choice(R"({"type":"function","name":"h"})", "invalid_value", "tool_choice.name");
  choice(R"({"type":"web_search"})", "unsupported_parameter", "tool_choice.type");
  choice(R"({"type":"allowed_tools","tools":[]})", "missing_required_parameter",
         "tool_choice.mode");
  choice(R"({"type":"allowed_tools","mode":"some","tools":[]})", "invalid_value",
         "tool_choice.mode");
  choice(R"({"type":"allowed_tools","mode":"auto"})", "missing_required_parameter",
         "tool_choice.tools");
  choice(R"({"type":"allowed_tools","mode":"auto","tools":[]})", "invalid_value",
         "tool_choice.tools");
  choice(R"({"type":"allowed_tools","mode":"auto","tools":[7]})", "invalid_type",
         "tool_choice.tools[0]");
  choice(R"({"type":"allowed_tools","mode":"auto","tools":[{"type":"mcp"}]})",
         "unsupported_parameter", "tool_choice.tools[0].type");
  choice(R"({"type":"allowed_tools","mode":"auto","tools":[{"type":"function","name":"h"}]})",
         "invalid_value", "tool_choice.tools[0].name");
  BadField(R"("tool_choice":"required")", "invalid_value", "tool_choice");
  BadField(fmt::format(R"({},"parallel_tool_calls":"no")", kFlat), "invalid_type",
           "parallel_tool_calls");
}

TEST(ParseResponses, TextFormat) {
  auto request = Good(R"({"input":"x","text":{"format":{"type":"json_object"}}})");
  ASSERT_TRUE(request.chat.common.grammar);
  EXPECT_EQ(request.chat.common.grammar->kind, GrammarSpec::Kind::kJsonObject);
  EXPECT_EQ(request.chat.common.grammar_param, "text.format");
  EXPECT_EQ(request.echo.format, R"({"type":"json_object"})");
  const char* format =
      R"({"type":"json_schema","name":"n","schema":{"type":"object"},"strict":true})";
  request = Good(fmt::format(R"({{"input":"x","text":{{"format":{}}}}})", format));
  EXPECT_EQ(request.chat.common.grammar->kind, GrammarSpec::Kind::kJsonSchema);
  EXPECT_EQ(request.chat.common.grammar->text, R"({"type":"object"})");
  EXPECT_EQ(request.chat.common.grammar_param, "text.format.schema");
  EXPECT_EQ(request.echo.format, format);
  EXPECT_FALSE(Good(R"({"input":"x","text":{"verbosity":"medium"}})").chat.common.grammar);
  const auto bad = [](const char* value, const char* code, const char* param) {
    BadField(fmt::format(R"("text":{{"format":{}}})", value), code, param);
  };
  bad("7", "invalid_type", "text.format");
  bad("{}", "missing_required_parameter", "text.format.type");
  bad(R"({"type":"xml"})", "invalid_value", "text.format.type");
  bad(R"({"type":"structural_tag"})", "invalid_value", "text.format.type");
  bad(R"({"type":"json_schema","schema":{}})", "missing_required_parameter", "text.format.name");
  bad(R"({"type":"json_schema","name":"n"})", "missing_required_parameter", "text.format.schema");
  bad(R"({"type":"json_schema","name":"n","schema":[]})", "invalid_type", "text.format.schema");
  bad(R"({"type":"json_schema","json_schema":{"name":"n","schema":{}}})",
      "missing_required_parameter", "text.format.name");
  BadField(R"("grammar":"root ::= \"a\"","text":{"format":{"type":"json_object"}})",
           "invalid_value", "text.format");
}

TEST(ParseResponses, Logprobs) {
  EXPECT_EQ(Good(R"({"input":"x"})").chat.logprobs, -1);
  const char* include =
      R"("include":["reasoning.encrypted_content","message.output_text.logprobs"])";
  EXPECT_EQ(Good(fmt::format(R"({{"input":"x",{}}})", include)).chat.logprobs, 0);
  const auto request = Good(fmt::format(R"({{"input":"x",{},"top_logprobs":3}})", include));
  EXPECT_EQ(request.chat.logprobs, 3);
  EXPECT_EQ(request.echo.top_logprobs, 3);
  BadField(R"("top_logprobs":3)", "invalid_value", "top_logprobs");
  BadField(fmt::format(R"({},"top_logprobs":21)", include), "integer_above_max_value",
           "top_logprobs");
  BadField(R"("include":"x")", "invalid_type", "include");
  BadField(R"("include":[7])", "invalid_type", "include[0]");
  BadField(R"("include":["reasoning.encrypted_content","file_search_call.results"])",
           "unsupported_parameter", "include[1]");
  BadField(fmt::format("{},{}", include, kFlat), "unsupported_parameter", "include[1]");
  Good(fmt::format(R"({{"input":"x",{},{},"tool_choice":"none"}})", include, kFlat));
  std::string many;
  for (int i = 0; i < 33; ++i)
    many += fmt::format(R"({}"reasoning.encrypted_content")", i ? "," : "");
  BadField(fmt::format(R"("include":[{}])", many), "array_above_max_length", "include");
}

TEST(ParseResponses, WhatIsNotThereIsRefusedByName) {
  const std::pair<const char*, const char*> refused[] = {
      {"previous_response_id", R"("resp_1")"},
      {"conversation", R"("conv_1")"},
      {"prompt", R"({"id":"p"})"},
      {"store", "true"},
      {"background", "true"},
      {"truncation", R"("auto")"},
      {"max_tool_calls", "1"},
      {"n", "2"},
      {"max_tokens", "5"},
      {"messages", "[]"},
      {"response_format", R"({"type":"text"})"},
  };
  for (const auto& [name, value] : refused)
    BadField(fmt::format(R"("{}":{})", name, value), "unsupported_parameter", name);
  BadField(R"("reasoning":{"effort":"low"})", "unsupported_parameter", "reasoning.effort");
  BadField(R"("text":{"verbosity":"low"})", "unsupported_parameter", "text.verbosity");
  // The same fields where they ask for nothing.
  Good(R"({"input":"x","previous_response_id":null,"store":false,"background":false,"tools":[],
           "tool_choice":"auto","include":[],"truncation":"disabled","reasoning":{"effort":null},
           "text":{"format":{"type":"text"},"verbosity":"medium"},"user":"me","n":1,
           "top_logprobs":0})");
}

TEST(ParseResponses, BadFields) {
  BadField(R"("instructions":["x"])", "invalid_type", "instructions");
  BadField(R"("max_output_tokens":0)", "integer_below_min_value", "max_output_tokens");
  BadField(R"("max_output_tokens":2147483647)", "integer_above_max_value", "max_output_tokens");
  BadField(R"("min_tokens":3,"max_output_tokens":2)", "integer_above_max_value", "min_tokens");
  BadField(R"("temperature":3)", "decimal_above_max_value", "temperature");
  BadField(R"("metadata":{"a":1})", "invalid_type", "metadata");
  std::string many;
  for (int i = 0; i < 17; ++i) many += fmt::format(R"({}"{}":"")", i > 0 ? "," : "", i);
  BadField(fmt::format(R"("metadata":{{{}}})", many), "object_above_max_properties", "metadata");
  BadField(fmt::format(R"("metadata":{{"{}":""}})", std::string(600, 'k')),
           "string_above_max_length", "metadata");
}

}  // namespace
}  // namespace dsla::openai
