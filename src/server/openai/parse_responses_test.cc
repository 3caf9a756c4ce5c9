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
  ASSERT_EQ(request.messages.size(), 2u);
  EXPECT_EQ(request.messages[0].role, "system");
  EXPECT_EQ(request.messages[0].content, "Be brief.");
  EXPECT_EQ(request.messages[1].role, "user");
  EXPECT_EQ(request.messages[1].content, "hello");
  EXPECT_EQ(request.instructions, "Be brief.");
  EXPECT_EQ(request.metadata, R"({"a":"b\n"})");
  EXPECT_EQ(request.common.max_tokens, 7);
  EXPECT_EQ(request.common.sampling.temperature, 0.5f);
  EXPECT_EQ(request.common.sampling.top_p, 0.25f);
  EXPECT_TRUE(request.common.stream && request.common.include_usage);
  EXPECT_FALSE(Good(R"({"input":"x"})").common.include_usage);
}

TEST(ParseResponses, Messages) {
  const auto request = Good(R"({"input":[
      {"role":"developer","content":"d"},
      {"type":"message","role":"user","content":[{"type":"input_text","text":"a"},
                                                 {"type":"input_text","text":"b"}]},
      {"id":"msg_1","type":"message","role":"assistant","status":"completed",
       "content":[{"type":"output_text","text":"c","annotations":[]}]}]})");
  ASSERT_EQ(request.messages.size(), 3u);
  EXPECT_EQ(request.messages[0].role, "system");
  EXPECT_EQ(request.messages[1].content, "a\nb");
  EXPECT_EQ(request.messages[2].role, "assistant");
  EXPECT_EQ(request.messages[2].content, "c");
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
  for (const char* type : {"function_call_output", "reasoning", "item_reference"})
    Bad(fmt::format(R"({{"input":[{{"type":"{}"}}]}})", type), "unsupported_feature",
        "input[0].type");
  Limits limits = TestLimits();
  limits.max_messages = 1;
  const auto parsed = ParseResponses(
      R"({"input":[{"role":"user","content":"a"},{"role":"user","content":"b"}]})", limits);
  EXPECT_EQ(std::get<HttpError>(parsed).code, "array_above_max_length");
}

TEST(ParseResponses, WhatIsNotThereIsRefusedByName) {
  const std::pair<const char*, const char*> refused[] = {
      {"previous_response_id", R"("resp_1")"},
      {"conversation", R"("conv_1")"},
      {"prompt", R"({"id":"p"})"},
      {"store", "true"},
      {"background", "true"},
      {"tools", R"([{"type":"web_search"}])"},
      {"tool_choice", R"("required")"},
      {"include", R"(["message.output_text.logprobs"])"},
      {"truncation", R"("auto")"},
      {"top_logprobs", "3"},
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
  BadField(R"("text":{"format":{"type":"json_object"}})", "unsupported_parameter", "text.format");
  // The same fields where they ask for nothing.
  Good(R"({"input":"x","previous_response_id":null,"store":false,"background":false,"tools":[],
           "tool_choice":"auto","include":[],"truncation":"disabled","reasoning":{"effort":null},
           "text":{"format":{"type":"text"},"verbosity":"medium"},"user":"me","n":1})");
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
