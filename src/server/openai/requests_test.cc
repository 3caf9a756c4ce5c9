#include "server/openai/requests.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "server/http/http.h"

namespace dsla::openai {
namespace {

Limits TestLimits() {
  Limits limits;
  limits.vocab_size = 100;
  limits.max_context = 1000;
  limits.adapter = true;
  limits.max_level = 4;
  return limits;
}

template <typename T>
T Good(Parsed<T> parsed, const std::string& body) {
  const auto* error = std::get_if<HttpError>(&parsed);
  EXPECT_EQ(error, nullptr) << body << ": " << (error ? error->message : "");
  return error ? T{} : std::get<T>(std::move(parsed));
}

CompletionRequest Completion(const std::string& body) {
  return Good(ParseCompletion(body, TestLimits()), body);
}
ChatRequest Chat(const std::string& body) { return Good(ParseChat(body, TestLimits()), body); }

template <typename T>
void ExpectError(const Parsed<T>& parsed, const std::string& body, const std::string& code,
                 const std::string& param) {
  const auto* error = std::get_if<HttpError>(&parsed);
  ASSERT_NE(error, nullptr) << body.substr(0, 200);
  EXPECT_EQ(error->status, 400) << body.substr(0, 200);
  EXPECT_EQ(error->type, "invalid_request_error");
  EXPECT_EQ(error->code, code) << body.substr(0, 200) << ": " << error->message;
  EXPECT_EQ(error->param, param) << body.substr(0, 200) << ": " << error->message;
  EXPECT_LT(error->message.size(), 500u);
  EXPECT_EQ(error->message.find('\n'), std::string::npos);
}

void BadCompletion(const std::string& body, const std::string& code,
                   const std::string& param = "") {
  ExpectError(ParseCompletion(body, TestLimits()), body, code, param);
}
void BadChat(const std::string& body, const std::string& code, const std::string& param = "") {
  ExpectError(ParseChat(body, TestLimits()), body, code, param);
}
// A field beside a good prompt, and beside good messages.
void BadField(const std::string& field, const std::string& code, const std::string& param) {
  BadCompletion(fmt::format(R"({{"prompt":"x",{}}})", field), code, param);
  BadChat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", field), code,
          param);
}
CompletionRequest GoodField(const std::string& field) {
  Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", field));
  return Completion(fmt::format(R"({{"prompt":"x",{}}})", field));
}

std::string Pair(std::string_view name, std::string_view value) {
  return fmt::format("\"{}\":{}", name, value);
}

std::string Repeat(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

TEST(RequestJson, RefusesWhatIsNotJson) {
  for (const std::string& body : std::vector<std::string>{"",
                                                          " ",
                                                          "{",
                                                          "nonsense",
                                                          R"({"prompt":"x")",
                                                          R"({"prompt":"x"} )"
                                                          "x",
                                                          R"({"prompt":"x"}{})",
                                                          "\xef\xbb\xbf{\"prompt\":\"x\"}",
                                                          R"({"temperature":NaN})",
                                                          R"({"temperature":Infinity})",
                                                          R"({"temperature":-Infinity})",
                                                          R"({"n":01})",
                                                          R"({"n":1.})",
                                                          R"({"n":+1})",
                                                          "{\"prompt\":\"\xff\"}",
                                                          "{\"prompt\":\"\xc3\"}",
                                                          "{\"prompt\":\"\xed\xa0\x80\"}",
                                                          R"({"prompt":"\ud800"})",
                                                          R"({"prompt":"\ud800x"})",
                                                          R"({"prompt":"\udc00"})",
                                                          R"({"prompt":"\ud800\ud800"})",
                                                          R"({"\udfff":1})",
                                                          R"({"prompt":"\x"})",
                                                          "{\"prompt\":\"a\nb\"}",
                                                          R"({'prompt':'x'})",
                                                          R"({"prompt":"x",})",
                                                          R"({"prompt":"x" /* no */})",
                                                          std::string("{\"n\":1\0}", 8)}) {
    BadCompletion(body, "invalid_json");
  }
}

TEST(RequestJson, RefusesDuplicateKeysAnywhere) {
  BadCompletion(R"({"prompt":"x","prompt":"y"})", "invalid_json");
  BadCompletion(R"({"prompt":"x","\u0070rompt":"y"})", "invalid_json");
  BadCompletion(R"({"prompt":"x","unknown":[{"a":1,"b":2,"a":3}]})", "invalid_json");
}

TEST(RequestJson, BoundsDepthAndKeys) {
  const auto nested = [](int depth) {
    return fmt::format(R"({{"prompt":"x","deep":{}{}}})", Repeat("[", depth), Repeat("]", depth));
  };
  Completion(nested(60));
  BadCompletion(nested(65), "json_too_deep");
  BadCompletion(nested(1000000), "json_too_deep");
  std::string keys = R"({"prompt":"x")";
  for (int i = 0; i < 10001; ++i) keys += fmt::format(",\"{}\":0", i);
  BadCompletion(keys + "}", "json_too_deep");
}

TEST(RequestJson, RefusesOtherTopLevels) {
  for (const char* body : {"[]", "1", "\"x\"", "null", "true"}) BadCompletion(body, "invalid_type");
}

TEST(RequestJson, NamesTheFieldOfAnUnholdableNumber) {
  BadField(R"("max_tokens":1e999)", "decimal_out_of_range", "max_tokens");
  BadField(R"("max_tokens":-1e999)", "decimal_out_of_range", "max_tokens");
  BadField(R"("max_tokens":18446744073709551616)", "integer_out_of_range", "max_tokens");
  BadField(R"("seed":-9223372036854775809)", "integer_out_of_range", "seed");
  BadField(R"("logit_bias":{"\"n\":":1,"5":1e400})", "decimal_out_of_range", "logit_bias");
}

TEST(RequestTypes, NothingIsConverted) {
  for (const std::string name : {"max_tokens", "n", "min_tokens", "top_k", "seed"}) {
    for (const char* value : {"\"5\"", "true", "[5]", "{}", "1.5"}) {
      BadField(Pair(name, value), "invalid_type", name);
    }
    BadField(Pair(name, "18446744073709551615"), "integer_out_of_range", name);
  }
  for (const std::string name : {"temperature", "top_p", "min_p", "presence_penalty",
                                 "frequency_penalty", "repetition_penalty", "timeout"}) {
    for (const char* value : {"\"1\"", "true", "[]", "{}"}) {
      BadField(Pair(name, value), "invalid_type", name);
    }
  }
  for (const std::string name : {"stream", "ignore_eos", "return_token_ids"}) {
    for (const char* value : {"\"true\"", "1", "[]"}) {
      BadField(Pair(name, value), "invalid_type", name);
    }
  }
  BadField(R"("model":5)", "invalid_type", "model");
  BadField(R"("stream_options":true,"stream":true)", "invalid_type", "stream_options");
  BadField(R"("logit_bias":[1])", "invalid_type", "logit_bias");
  BadField(R"("stop":5)", "invalid_type", "stop");
  BadField(R"("stop":[5])", "invalid_type", "stop[0]");
}

TEST(RequestTypes, WholeDecimalsAreIntegers) {
  EXPECT_EQ(GoodField(R"("max_tokens":5.0)").common.max_tokens, 5);
  EXPECT_EQ(GoodField(R"("max_tokens":1e2)").common.max_tokens, 100);
  BadField(R"("seed":1e300)", "invalid_type", "seed");
}

TEST(RequestTypes, NullIsAbsent) {
  const auto request = GoodField(
      R"("max_tokens":null,"stop":null,"logprobs":null,"n":null,"seed":null,"tools":null,)"
      R"("stream_options":null,"logit_bias":null,"response_format":null,"suffix":null,"dsla":null,)"
      R"("service_tier":null,"user":null)");
  EXPECT_EQ(request.common.max_tokens, 16);
  EXPECT_FALSE(request.common.seed.has_value());
  EXPECT_EQ(request.logprobs, -1);
}

TEST(RequestRanges, Integers) {
  BadField(R"("max_tokens":-1)", "integer_below_min_value", "max_tokens");
  BadField(R"("max_tokens":0)", "integer_below_min_value", "max_tokens");
  BadField(R"("max_tokens":2147483648)", "integer_above_max_value", "max_tokens");
  BadField(R"("n":0)", "integer_below_min_value", "n");
  BadField(R"("n":17)", "integer_above_max_value", "n");
  BadField(R"("n":16,"max_tokens":100000)", "integer_above_max_value", "max_tokens");
  BadCompletion(fmt::format(R"({{"prompt":[{}"a"],"n":9}})", Repeat("\"a\",", 127)),
                "integer_above_max_value", "n");
  EXPECT_EQ(Completion(fmt::format(R"({{"prompt":[{}"a"],"n":8}})", Repeat("\"a\",", 127)))
                .prompts.size(),
            128u);
  Limits short_queue = TestLimits();
  short_queue.max_choices = 1;
  ExpectError(ParseCompletion(R"({"prompt":["a","b"]})", short_queue), "two prompts",
              "integer_above_max_value", "prompt");
  BadField(R"("min_tokens":-1)", "integer_below_min_value", "min_tokens");
  BadField(R"("min_tokens":6,"max_tokens":5)", "integer_above_max_value", "min_tokens");
  BadField(R"("top_k":-2)", "integer_below_min_value", "top_k");
  BadField(R"("stop_token_ids":[100])", "integer_above_max_value", "stop_token_ids[0]");
  BadField(R"("truncate_prompt_tokens":0)", "integer_below_min_value", "truncate_prompt_tokens");
  EXPECT_EQ(GoodField(R"("seed":-9223372036854775808)").common.seed, uint64_t{1} << 63);
  EXPECT_EQ(GoodField(R"("top_k":-1)").common.sampling.top_k, 0);
  EXPECT_EQ(GoodField(R"("n":16)").common.n, 16);
}

TEST(RequestRanges, Decimals) {
  for (const auto& [name, low, high] :
       std::vector<std::array<std::string, 3>>{{"temperature", "-0.1", "2.1"},
                                               {"top_p", "0", "1.1"},
                                               {"min_p", "-0.1", "1.1"},
                                               {"presence_penalty", "-2.1", "2.1"},
                                               {"frequency_penalty", "-2.1", "2.1"},
                                               {"repetition_penalty", "0", "101"},
                                               {"timeout", "0", "3601"}}) {
    BadField(Pair(name, low), "decimal_below_min_value", name);
    BadField(Pair(name, high), "decimal_above_max_value", name);
  }
  const auto request = GoodField(R"("temperature":2,"top_p":1,"min_p":1,"timeout":2.5)");
  EXPECT_EQ(request.common.sampling.temperature, 2);
  EXPECT_EQ(request.common.timeout, 2.5);
}

TEST(RequestRanges, Stop) {
  EXPECT_EQ(GoodField(R"("stop":"END")").common.stop, std::vector<std::string>{"END"});
  EXPECT_EQ(GoodField(R"("stop":["a","b"])").common.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(GoodField(R"("stop":[])").common.stop.empty());
  BadField(R"("stop":"")", "invalid_value", "stop");
  BadField(R"("stop":["a",""])", "invalid_value", "stop[1]");
  BadField(fmt::format(R"("stop":[{}"a"])", Repeat("\"a\",", 16)), "array_above_max_length",
           "stop");
  BadField(Pair("stop", fmt::format("\"{}\"", std::string(1 << 20, 'a'))),
           "string_above_max_length", "stop");
}

TEST(RequestRanges, LogitBias) {
  const auto request = GoodField(R"("logit_bias":{"5":-100,"99":100})");
  EXPECT_EQ(request.common.sampling.logit_bias.size(), 2u);
  EXPECT_EQ(request.common.sampling.logit_bias[0], (std::pair<int32_t, float>(5, -100)));
  for (const char* key : {"100", "-1", "x", "", "5x", " 5", "99999999999"}) {
    BadField(fmt::format(R"("logit_bias":{{"{}":1}})", key), "invalid_value", "logit_bias");
  }
  BadField(R"("logit_bias":{"5":1,"05":1})", "invalid_value", "logit_bias");
  BadField(R"("logit_bias":{"5":100.5})", "decimal_above_max_value", "logit_bias.5");
  BadField(R"("logit_bias":{"5":"1"})", "invalid_type", "logit_bias.5");
  std::string many = "\"logit_bias\":{\"0\":1";
  for (int i = 1; i < 1025; ++i) many += fmt::format(",\"{}\":1", i);
  BadField(many + "}", "object_above_max_properties", "logit_bias");
}

TEST(RequestRanges, Logprobs) {
  EXPECT_EQ(Completion(R"({"prompt":"x","logprobs":0})").logprobs, 0);
  EXPECT_EQ(Completion(R"({"prompt":"x","logprobs":20})").logprobs, 20);
  BadCompletion(R"({"prompt":"x","logprobs":21})", "integer_above_max_value", "logprobs");
  BadCompletion(R"({"prompt":"x","logprobs":true})", "invalid_type", "logprobs");
  const std::string chat = R"({"messages":[{"role":"user","content":"x"}],)";
  EXPECT_EQ(Chat(chat + R"("logprobs":true})").logprobs, 0);
  EXPECT_EQ(Chat(chat + R"("logprobs":true,"top_logprobs":20})").logprobs, 20);
  EXPECT_EQ(Chat(chat + R"("logprobs":false})").logprobs, -1);
  BadChat(chat + R"("logprobs":true,"top_logprobs":21})", "integer_above_max_value",
          "top_logprobs");
  BadChat(chat + R"("top_logprobs":2})", "invalid_value", "top_logprobs");
  BadChat(chat + R"("logprobs":1})", "invalid_type", "logprobs");
}

TEST(RequestGrammar, IsGivenByAnyOfItsFields) {
  using Kind = GrammarSpec::Kind;
  const auto expect = [](const std::string& field, Kind kind, const std::string& text,
                         const std::string& param) {
    SCOPED_TRACE(field);
    const auto request = GoodField(field);
    ASSERT_TRUE(request.common.grammar.has_value());
    EXPECT_EQ(request.common.grammar->kind, kind);
    EXPECT_EQ(request.common.grammar->text, text);
    EXPECT_EQ(request.common.grammar_param, param);
  };
  const std::string schema = R"({"type":"object","properties":{"b":{},"a":{}}})";
  expect(R"("response_format":{"type":"json_object"})", Kind::kJsonObject, "", "response_format");
  expect(R"("response_format":{"type":"json_schema","json_schema":{"name":"x","strict":true,)"
         R"("description":"y","schema":)" +
             schema + "}}",
         Kind::kJsonSchema, schema, "response_format.json_schema.schema");
  expect(R"("response_format":{"type":"structural_tag", "format":{}})", Kind::kStructuralTag,
         R"({"type":"structural_tag","format":{}})", "response_format");
  expect(R"("structured_outputs":{"json":)" + schema + "}", Kind::kJsonSchema, schema,
         "structured_outputs.json");
  expect(R"("structured_outputs":{"json":"{}"})", Kind::kJsonSchema, "{}",
         "structured_outputs.json");
  expect(R"("structured_outputs":{"json_object":true,"regex":null})", Kind::kJsonObject, "",
         "structured_outputs.json_object");
  expect(R"("structured_outputs":{"regex":"a+"})", Kind::kRegex, "a+", "structured_outputs.regex");
  expect(R"("structured_outputs":{"choice":["a","b."]})", Kind::kRegex, "(?:a)|(?:b\\.)",
         "structured_outputs.choice");
  expect(R"("structured_outputs":{"grammar":"root ::= \"a\""})", Kind::kEbnf, "root ::= \"a\"",
         "structured_outputs.grammar");
  expect(R"("structured_outputs":{"structural_tag":"{}"})", Kind::kStructuralTag, "{}",
         "structured_outputs.structural_tag");
  expect(R"("json_schema":)" + schema, Kind::kJsonSchema, schema, "json_schema");
  expect(R"("grammar":"root ::= [a-z]")", Kind::kEbnf, "root ::= [a-z]", "grammar");
  for (const char* none :
       {R"("response_format":{"type":"text"})", R"("grammar":"")", R"("structured_outputs":{})",
        R"("structured_outputs":{"json_object":false})", R"("json_schema":null)"}) {
    EXPECT_FALSE(GoodField(none).common.grammar.has_value()) << none;
  }
}

TEST(RequestGrammar, WhatIsWrongIsNamed) {
  BadField(R"("response_format":{})", "missing_required_parameter", "response_format.type");
  BadField(R"("response_format":{"type":"xml"})", "invalid_value", "response_format.type");
  BadField(R"("response_format":{"type":"json_schema"})", "missing_required_parameter",
           "response_format.json_schema");
  BadField(R"("response_format":{"type":"json_schema","json_schema":{"schema":{}}})",
           "missing_required_parameter", "response_format.json_schema.name");
  BadField(R"("response_format":{"type":"json_schema","json_schema":{"name":"x"}})",
           "missing_required_parameter", "response_format.json_schema.schema");
  BadField(R"("response_format":{"type":"json_schema","json_schema":{"name":"x","schema":"{}"}})",
           "invalid_type", "response_format.json_schema.schema");
  BadField(R"("structured_outputs":{"xml":1})", "unknown_parameter", "structured_outputs.xml");
  BadField(R"("structured_outputs":{"choice":[]})", "invalid_value", "structured_outputs.choice");
  BadField(R"("structured_outputs":{"choice":[1]})", "invalid_type",
           "structured_outputs.choice[0]");
  BadField(R"("structured_outputs":{"regex":1})", "invalid_type", "structured_outputs.regex");
  BadField(R"("structured_outputs":{"regex":"a","grammar":"b"})", "invalid_value",
           "structured_outputs.grammar");
  BadField(R"("response_format":{"type":"json_object"},"grammar":"a")", "invalid_value", "grammar");
  BadField(R"("json_schema":"{}")", "invalid_type", "json_schema");
}

TEST(RequestUnsupported, IsRefusedByName) {
  for (const std::string field : {"guided_json", "guided_regex", "guided_choice", "guided_grammar",
                                  "prompt_embeds", "length_penalty", "prompt_logprobs"}) {
    BadField(Pair(field, "1"), "unsupported_parameter", field);
  }
  BadField(R"("best_of":3)", "unsupported_parameter", "best_of");
  BadField(R"("best_of":17)", "integer_above_max_value", "best_of");
  GoodField(R"("best_of":3,"n":3)");
  BadField(R"("use_beam_search":true)", "unsupported_parameter", "use_beam_search");
  BadField(R"("skip_special_tokens":false)", "unsupported_parameter", "skip_special_tokens");
  BadField(R"("priority":3)", "unsupported_parameter", "priority");
  GoodField(R"("use_beam_search":false,"skip_special_tokens":true,"priority":0)");
  for (const auto& [name, nothing, something] :
       std::vector<std::array<std::string, 3>>{{"include_stop_str_in_output", "false", "true"},
                                               {"bad_words", "[]", R"(["x"])"},
                                               {"allowed_token_ids", "null", "[1]"},
                                               {"typical_p", "1.0", "0.9"},
                                               {"repeat_penalty", "1", "1.1"},
                                               {"mirostat", "0", "2"},
                                               {"dry_multiplier", "0.0", "0.8"},
                                               {"xtc_probability", "0", "0.5"},
                                               {"dynatemp_range", "0", "0.5"},
                                               {"n_predict", "-1", "32"}}) {
    GoodField(Pair(name, nothing));
    BadField(Pair(name, something), "unsupported_parameter", name);
  }
  BadCompletion(R"({"prompt":"x","suffix":"y"})", "unsupported_parameter", "suffix");
  Completion(R"({"prompt":"x","suffix":""})");
  const std::string chat = R"({"messages":[{"role":"user","content":"x"}],)";
  for (const std::string field :
       {R"("functions":[{}])", R"("function_call":"auto")", R"("modalities":["text","audio"])",
        R"("audio":{})", R"("prediction":{})", R"("web_search_options":{})",
        R"("chat_template":"x")", R"("reasoning_effort":"low")"}) {
    BadChat(fmt::format("{}{}}}", chat, field), "unsupported_parameter",
            field.substr(1, field.find('"', 1) - 1));
  }
  BadChat(chat + R"("continue_final_message":true,"add_generation_prompt":true})", "invalid_value",
          "continue_final_message");
  EXPECT_TRUE(Chat(chat + R"("continue_final_message":true})").prompt.continue_last);
  BadChat(chat + R"("chat_template_kwargs":{"enable_thinking":true,"a":1}})",
          "unsupported_parameter", "chat_template_kwargs.a");
  BadChat(chat + R"("chat_template_kwargs":{"enable_thinking":"no"}})", "invalid_type",
          "chat_template_kwargs.enable_thinking");
  EXPECT_FALSE(
      Chat(chat + R"("chat_template_kwargs":{"enable_thinking":false}})").prompt.enable_thinking);
  EXPECT_TRUE(Chat(chat + R"("chat_template_kwargs":{}})").prompt.enable_thinking);
  Chat(chat + R"("tools":[],"tool_choice":"none","modalities":["text"],"store":true,)"
              R"("metadata":{"a":"b"},"user":"u","parallel_tool_calls":true,"what":{}})");
}

TEST(RequestFields, SamplingThatIsNotSaidIsTheServers) {
  Limits limits = TestLimits();
  limits.sampling = {.temperature = 0.5f, .top_k = 40, .top_p = 0.9f, .min_p = 0.05f};
  const auto sampling = [&](const std::string& body) {
    return Good(ParseCompletion(body, limits), body).common.sampling;
  };
  const SamplingParams none = sampling(R"({"prompt":"x","temperature":null})");
  EXPECT_EQ(none.temperature, 0.5f);
  EXPECT_EQ(none.top_k, 40);
  EXPECT_EQ(none.top_p, 0.9f);
  EXPECT_EQ(none.min_p, 0.05f);
  const SamplingParams own =
      sampling(R"({"prompt":"x","temperature":1,"top_k":-1,"top_p":1,"min_p":0})");
  EXPECT_EQ(own.temperature, 1);
  EXPECT_EQ(own.top_k, 0);
  EXPECT_EQ(own.top_p, 1);
  EXPECT_EQ(own.min_p, 0);
}

TEST(RequestPrompt, AllFourForms) {
  const auto prompts = [](const std::string& prompt) {
    return Completion(fmt::format(R"({{"prompt":{}}})", prompt)).prompts;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(prompts(R"("a")"), (std::vector<Prompt>{"a"}));
  EXPECT_EQ(prompts(R"(["a","b"])"), (std::vector<Prompt>{"a", "b"}));
  EXPECT_EQ(prompts("[1,2]"), (std::vector<Prompt>{Ids{1, 2}}));
  EXPECT_EQ(prompts("[[1,2],[3]]"), (std::vector<Prompt>{Ids{1, 2}, Ids{3}}));
}

TEST(RequestPrompt, RefusesTheRest) {
  const auto bad = [](const std::string& prompt, const std::string& code,
                      const std::string& param) {
    BadCompletion(fmt::format(R"({{"prompt":{}}})", prompt), code, param);
  };
  BadCompletion("{}", "missing_required_parameter", "prompt");
  bad("null", "missing_required_parameter", "prompt");
  bad("\"\"", "invalid_value", "prompt");
  bad("[]", "invalid_value", "prompt");
  bad("[[]]", "invalid_value", "prompt[0]");
  bad("[[1],[]]", "invalid_value", "prompt[1]");
  bad("[\"a\",\"\"]", "invalid_value", "prompt[1]");
  bad("5", "invalid_type", "prompt");
  bad("{}", "invalid_type", "prompt");
  bad("[true]", "invalid_type", "prompt[0]");
  bad("[\"a\",5]", "invalid_type", "prompt[1]");
  bad("[\"a\",[5]]", "invalid_type", "prompt[1]");
  bad("[[1],\"a\"]", "invalid_type", "prompt[1]");
  bad("[5,\"a\"]", "invalid_type", "prompt[1]");
  bad("[[1,[2]]]", "invalid_type", "prompt[0][1]");
  bad("[5,1.5]", "invalid_type", "prompt[1]");
  bad("[-1]", "integer_below_min_value", "prompt[0]");
  bad("[5,100]", "integer_above_max_value", "prompt[1]");
  bad("[[5,4294967296]]", "integer_above_max_value", "prompt[0][1]");
  bad(fmt::format("[{}\"a\"]", Repeat("\"a\",", 256)), "array_above_max_length", "prompt");
}

TEST(RequestPrompt, NoTokensOnlyWithEcho) {
  EXPECT_EQ(Completion(R"({"prompt":"x","echo":true,"max_tokens":0})").common.max_tokens, 0);
  BadCompletion(R"({"prompt":"x","max_tokens":0})", "integer_below_min_value", "max_tokens");
}

TEST(RequestMessages, TextAndParts) {
  const auto request = Chat(
      R"({"messages":[{"role":"developer","content":"be brief"},)"
      R"({"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"name":"n"},)"
      R"({"role":"assistant","content":"c","tool_calls":[]}],"max_tokens":3,)"
      R"("max_completion_tokens":7})");
  ASSERT_EQ(request.messages.size(), 3u);
  EXPECT_EQ(request.messages[0].role, "system");
  EXPECT_EQ(request.messages[1].content, "a\nb");
  EXPECT_EQ(request.messages[2].content, "c");
  EXPECT_EQ(request.common.max_tokens, 7);
  EXPECT_FALSE(Chat(R"({"messages":[{"role":"user","content":""}]})").common.max_tokens);
}

TEST(RequestMessages, RefusesTheRest) {
  const auto bad = [](const std::string& messages, const std::string& code,
                      const std::string& param) {
    BadChat(fmt::format(R"({{"messages":{}}})", messages), code, param);
  };
  BadChat("{}", "missing_required_parameter", "messages");
  bad("[]", "invalid_value", "messages");
  bad("\"x\"", "invalid_type", "messages");
  bad("[5]", "invalid_type", "messages[0]");
  bad("[{}]", "missing_required_parameter", "messages[0].role");
  bad(R"([{"role":"user"}])", "missing_required_parameter", "messages[0].content");
  bad(R"([{"role":"user","content":null}])", "missing_required_parameter", "messages[0].content");
  bad(R"([{"role":"user","content":5}])", "invalid_type", "messages[0].content");
  bad(R"([{"role":"user","content":[]}])", "invalid_value", "messages[0].content");
  bad(R"([{"role":5,"content":"x"}])", "invalid_type", "messages[0].role");
  bad(R"([{"role":"wizard","content":"x"}])", "invalid_value", "messages[0].role");
  bad(R"([{"role":"function","content":"x","name":"f"}])", "unsupported_feature",
      "messages[0].role");
  bad(R"([{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]}])",
      "unsupported_feature", "messages[0].content[0].type");
  bad(R"([{"role":"user","content":[{"type":"text"}]}])", "missing_required_parameter",
      "messages[0].content[0].text");
  bad(R"([{"role":"user","content":["x"]}])", "invalid_type", "messages[0].content[0]");
  bad(R"([{"role":"assistant","content":null}])", "missing_required_parameter",
      "messages[0].content");
}

TEST(RequestMessages, CallsAndTheirResults) {
  const auto request = Chat(
      R"({"messages":[{"role":"user","content":"x"},{"role":"assistant","content":null,"tool_calls":)"
      R"([{"id":"a","type":"function","function":{"name":"f","arguments":"{\"b\": 1}"}},)"
      R"({"id":"c","type":"function","function":{"name":"g","arguments":""}},)"
      R"({"function":{"name":"h","arguments":{"i":2}}}]},)"
      R"({"role":"tool","tool_call_id":"c","content":[{"type":"text","text":"y"}]},)"
      R"({"role":"tool","tool_call_id":"z","content":"w","name":"own"},)"
      R"({"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]})");
  ASSERT_EQ(request.messages.size(), 5u);
  EXPECT_EQ(request.messages[1].content, "");
  EXPECT_EQ(request.messages[1].tool_calls,
            (std::vector<ToolCall>{
                {"a", "f", R"({"b": 1})"}, {"c", "g", "{}"}, {"", "h", R"({"i":2})"}}));
  EXPECT_EQ(request.messages[2].tool_call_id, "c");
  EXPECT_EQ(request.messages[2].content, "y");
  EXPECT_EQ(request.messages[2].name, "g") << "of the call that it answers";
  EXPECT_EQ(request.messages[3].name, "own");
  EXPECT_EQ(request.messages[4].tool_calls.size(), 1u);
}

TEST(RequestMessages, RefusesBadCallsByName) {
  const auto bad = [](const std::string& message, const std::string& code,
                      const std::string& param) {
    BadChat(fmt::format(R"({{"messages":[{}]}})", message), code, "messages[0]." + param);
  };
  const auto bad_call = [&](const std::string& call, const std::string& code,
                            const std::string& param) {
    bad(fmt::format(R"({{"role":"assistant","tool_calls":[{}]}})", call), code,
        "tool_calls[0]" + param);
  };
  bad(R"({"role":"tool","content":"x"})", "missing_required_parameter", "tool_call_id");
  bad(R"({"role":"tool","content":"x","tool_call_id":5})", "invalid_type", "tool_call_id");
  bad(R"({"role":"tool","tool_call_id":"a"})", "missing_required_parameter", "content");
  bad(R"({"role":"user","content":"x","tool_calls":[{}]})", "unsupported_parameter", "tool_calls");
  bad(R"({"role":"assistant","tool_calls":{}})", "invalid_type", "tool_calls");
  bad_call("5", "invalid_type", "");
  bad_call("{}", "missing_required_parameter", ".function");
  bad_call(R"({"type":"custom","function":{}})", "unsupported_feature", ".type");
  bad_call(R"({"function":{"arguments":"{}"}})", "missing_required_parameter", ".function.name");
  bad_call(R"({"function":{"name":"f"}})", "missing_required_parameter", ".function.arguments");
  for (const char* arguments : {R"("[]")", R"("{")", R"("x")", R"("{} {}")"}) {
    bad_call(fmt::format(R"({{"function":{{"name":"f","arguments":{}}}}})", arguments),
             "invalid_value", ".function.arguments");
  }
  bad_call(R"({"function":{"name":"f","arguments":[]}})", "invalid_type", ".function.arguments");
  std::string calls;
  for (int i = 0; i < 129; ++i) calls += std::string(i ? "," : "") + "{}";
  bad(fmt::format(R"({{"role":"assistant","tool_calls":[{}]}})", calls), "array_above_max_length",
      "tool_calls");
}

std::string Function(const std::string& name, const std::string& more = "") {
  return fmt::format(R"({{"type":"function","function":{{"name":"{}"{}}}}})", name, more);
}
std::string WithTools(const std::string& fields) {
  return fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],{}}})", fields);
}

TEST(RequestTools, AreKeptAsTheyAre) {
  const std::string more =
      R"(,"description":"d","parameters":{"type":"object","z":1,"a":[2.5]},"strict":true)";
  const auto tools = Chat(WithTools(R"("tools":[)" + Function("f", more) + "," + Function("g-_.9") +
                                    R"(],"parallel_tool_calls":false)"))
                         .tools;
  ASSERT_EQ(tools.tools.size(), 2u);
  EXPECT_EQ(tools.tools[0].name, "f");
  EXPECT_EQ(tools.tools[0].json, Function("f", more));
  EXPECT_EQ(tools.tools[0].parameters, R"({"type":"object","z":1,"a":[2.5]})");
  EXPECT_TRUE(tools.tools[0].strict);
  EXPECT_EQ(tools.tools[1].parameters, "");
  EXPECT_FALSE(tools.tools[1].strict);
  EXPECT_FALSE(tools.parallel);
  EXPECT_EQ(tools.choice, ToolsRequest::Choice::kAuto);
}

TEST(RequestTools, Choice) {
  const std::string tools = R"("tools":[)" + Function("f") + R"(],"tool_choice":)";
  EXPECT_EQ(Chat(WithTools(tools + R"("auto")")).tools.tools.size(), 1u);
  EXPECT_TRUE(Chat(WithTools(tools + R"("none")")).tools.tools.empty());
  EXPECT_EQ(Chat(WithTools(tools + R"("required")")).tools.choice, ToolsRequest::Choice::kRequired);
  const auto named = Chat(WithTools(tools + Function("f"))).tools;
  EXPECT_EQ(named.choice, ToolsRequest::Choice::kNamed);
  EXPECT_EQ(named.allowed, std::vector<std::string>{"f"});
  BadChat(WithTools(tools + Function("g")), "invalid_value", "tool_choice.function.name");
  BadChat(WithTools(tools + R"("any")"), "invalid_value", "tool_choice");
  BadChat(WithTools(tools + "5"), "invalid_type", "tool_choice");
  BadChat(WithTools(tools + R"({"type":"function"})"), "missing_required_parameter",
          "tool_choice.function");
  for (const char* value : {R"("auto")", R"("required")"})
    BadChat(WithTools(fmt::format(R"("tool_choice":{})", value)), "invalid_value", "tool_choice");
  BadChat(WithTools(tools + R"("auto","parallel_tool_calls":"no")"), "invalid_type",
          "parallel_tool_calls");
}

TEST(RequestTools, BadOnesAreRefusedByName) {
  const auto bad = [](const std::string& tool, const std::string& code, const std::string& param) {
    BadChat(WithTools(fmt::format(R"("tools":[{}])", tool)), code, param);
  };
  BadChat(WithTools(R"("tools":{})"), "invalid_type", "tools");
  bad("5", "invalid_type", "tools[0]");
  bad("{}", "missing_required_parameter", "tools[0].type");
  bad(R"({"type":"web_search"})", "unsupported_feature", "tools[0].type");
  bad(R"({"type":"function"})", "missing_required_parameter", "tools[0].function");
  bad(R"({"type":"function","function":{}})", "missing_required_parameter",
      "tools[0].function.name");
  bad(Function(""), "invalid_value", "tools[0].function.name");
  bad(Function("a b"), "invalid_value", "tools[0].function.name");
  bad(Function(std::string(65, 'a')), "string_above_max_length", "tools[0].function.name");
  bad(Function("f", R"(,"description":5)"), "invalid_type", "tools[0].function.description");
  bad(Function("f", R"(,"parameters":[])"), "invalid_type", "tools[0].function.parameters");
  bad(Function("f", R"(,"strict":"yes")"), "invalid_type", "tools[0].function.strict");
  bad(Function("f") + "," + Function("g") + "," + Function("f"), "invalid_value",
      "tools[2].function.name");
  std::string deep = "1";
  for (int i = 0; i < 30; ++i) deep = "[" + deep + "]";
  bad(Function("f") + "," + Function("g", R"(,"parameters":{"a":)" + deep + "}"), "invalid_value",
      "tools[1]");
  std::string many;
  for (int i = 0; i < 129; ++i) many += (i ? "," : "") + Function(fmt::format("f{}", i));
  bad(many, "array_above_max_length", "tools");
  const std::string large(size_t{1} << 20, 'x');
  BadChat(
      WithTools(fmt::format(R"("tools":[{}])", Function("f", R"(,"description":")" + large + '"'))),
      "string_above_max_length", "tools");
}

TEST(RequestStream, OptionsNeedAStream) {
  BadField(R"("stream_options":{"include_usage":true})", "invalid_value", "stream_options");
  BadField(R"("stream":false,"stream_options":{})", "invalid_value", "stream_options");
  BadField(R"("stream":true,"stream_options":{"include_usage":1})", "invalid_type",
           "stream_options.include_usage");
  const auto request = GoodField(
      R"("stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true})");
  EXPECT_TRUE(request.common.stream && request.common.include_usage);
  EXPECT_TRUE(request.common.continuous_usage);
}

TEST(RequestTier, ByNameOrLevel) {
  EXPECT_EQ(GoodField(R"("service_tier":"auto")").common.tier, Tier::kAuto);
  EXPECT_EQ(GoodField(R"("service_tier":"default")").common.tier, Tier::kAuto);
  EXPECT_EQ(GoodField(R"("service_tier":"priority")").common.tier, Tier::kFull);
  EXPECT_EQ(GoodField(R"("service_tier":"flex")").common.tier, Tier::kEconomy);
  EXPECT_EQ(GoodField(R"("dsla":{"tier":"economy"})").common.tier, Tier::kEconomy);
  EXPECT_EQ(GoodField(R"("dsla":{},"service_tier":"flex")").common.tier, Tier::kEconomy);
  const auto exact = GoodField(R"("service_tier":"auto","dsla":{"level":4})");
  EXPECT_EQ(exact.common.tier, Tier::kExact);
  EXPECT_EQ(exact.common.level, 4);
  BadField(R"("service_tier":"gold")", "invalid_value", "service_tier");
  BadField(R"("service_tier":5)", "invalid_type", "service_tier");
  BadField(R"("dsla":{"tier":"gold"})", "invalid_value", "dsla.tier");
  BadField(R"("dsla":{"level":5})", "integer_above_max_value", "dsla.level");
  BadField(R"("dsla":{"level":-1})", "integer_below_min_value", "dsla.level");
  BadField(R"("dsla":{"levle":1})", "unknown_parameter", "dsla.levle");
  BadField(R"("dsla":{"level":1,"tier":"full"})", "invalid_value", "dsla");
  BadField(R"("dsla":{"level":1},"service_tier":"flex")", "invalid_value", "dsla");
}

TEST(RequestTier, EconomyNeedsAnAdapter) {
  Limits limits = TestLimits();
  limits.adapter = false;
  limits.max_level = 0;
  const std::string body = R"({"prompt":"x","service_tier":"flex"})";
  ExpectError(ParseCompletion(body, limits), body, "unsupported_value", "service_tier");
  const std::string level = R"({"prompt":"x","dsla":{"level":1}})";
  ExpectError(ParseCompletion(level, limits), level, "integer_above_max_value", "dsla.level");
}

TEST(RequestTokens, TokenizeAndDetokenize) {
  const Limits limits = TestLimits();
  const auto tokenize = [&](const std::string& body) {
    return Good(ParseTokenize(body, limits), body);
  };
  EXPECT_EQ(tokenize(R"({"prompt":"a","add_special_tokens":false})").text, "a");
  EXPECT_EQ(tokenize(R"({"content":""})").text, "");
  EXPECT_EQ(tokenize(R"({"messages":[{"role":"user","content":"a"}]})").messages.size(), 1u);
  ExpectError(ParseTokenize("{}", limits), "{}", "missing_required_parameter", "prompt");
  const std::string both = R"({"prompt":"a","content":"b"})";
  ExpectError(ParseTokenize(both, limits), both, "missing_required_parameter", "prompt");
  EXPECT_TRUE(Good(ParseDetokenize(R"({"tokens":[]})", limits), "").tokens.empty());
  const std::string large = R"({"tokens":[1,100]})";
  ExpectError(ParseDetokenize(large, limits), large, "integer_above_max_value", "tokens[1]");
  ExpectError(ParseDetokenize("{}", limits), "{}", "missing_required_parameter", "tokens");
}

TEST(RequestTimeout, Header) {
  const Limits limits = TestLimits();
  EXPECT_EQ(std::get<double>(ParseTimeoutHeader("2.5", limits)), 2.5);
  for (const char* value : {"", "0", "-1", "x", "1s", "nan", "inf", "1e9"}) {
    ExpectError(ParseTimeoutHeader(value, limits), value, "invalid_value", kTimeoutHeader);
  }
}

}  // namespace
}  // namespace dsla::openai
