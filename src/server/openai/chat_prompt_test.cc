// What a request may say about how its messages become a prompt.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/openai/testing.h"

namespace dsla::openai {
namespace {

using testing::FakeResponder;
using testing::TestApi;

void ExpectRefused(const FakeResponder& responder, const char* why = "") {
  EXPECT_EQ(responder.head().status, 400) << responder.body();
  EXPECT_THAT(responder.body(),
              ::testing::HasSubstr(R"("param":"messages","code":"chat_template_error")"));
  EXPECT_THAT(responder.body(), ::testing::HasSubstr(why));
}

TEST(ChatPrompt, WithoutATemplate) {
  TestApi api;
  api.context.chat_template.reset();
  api.context.no_chat_template = "it is odd";
  ExpectRefused(*api.Chat(R"({"messages":[{"role":"user","content":"x"}]})"), "it is odd");
}

TEST(ChatPrompt, ATemplateThatRefuses) {
  TestApi api;
  api.context.chat_template = ChatTemplateByName("llama2").value();
  ExpectRefused(*api.Chat(R"({"messages":[{"role":"assistant","content":"x"}]})"));
}

TEST(ChatPrompt, ByTheModelFilesOwnTemplate) {
  TestApi api;
  api.context.chat_template =
      ChoosePromptTemplate(
          "{% for m in messages if m.role == 'user' %}{{ 'hello' ~ m.content }}{% endfor %}")
          .value();
  api.Chat(R"({"messages":[{"role":"user","content":" hello"}]})");
  EXPECT_EQ(api.tokenizer->Decode(api.engine.job(0).request.prompt), "hello hello");
  ExpectRefused(
      *api.Chat(R"({"messages":[{"role":"system","content":"a"},{"role":"user","content":"b"}]})"),
      "the text of message 1");
}

TEST(ChatPrompt, TheLastMessageIsContinuedWhenAsked) {
  TestApi api(100, testing::SentencePieceTokenizer());
  api.context.chat_template = ChatTemplateByName("llama2").value();
  const auto asks = [&](const char* fields) {
    return api.Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}},)"
                                R"({{"role":"assistant","content":"hello"}}],"max_tokens":1,{}}})",
                                fields));
  };
  asks(R"("continue_final_message":true,"add_generation_prompt":false)");
  ASSERT_EQ(api.engine.jobs(), 1u);
  const Request& request = api.engine.job(0).request;
  EXPECT_THAT(api.tokenizer->Decode(request.prompt), ::testing::EndsWith("hello"));
  EXPECT_TRUE(request.continues) << "a space before the next word is part of the reply";
  asks(R"("add_generation_prompt":false)");
  EXPECT_FALSE(api.engine.job(1).request.continues);
  ExpectRefused(*api.Chat(R"({"messages":[{"role":"user","content":"x"}],)"
                          R"("continue_final_message":true})"));
}

TEST(ChatPrompt, ThinkingIsLeftOutWhenAsked) {
  TestApi api;
  const auto asks = [&](const char* name, const char* thinking) {
    api.router.reset();
    api.context.chat_template = ChatTemplateByName(name).value();
    return api.Chat(fmt::format(R"({{"messages":[{{"role":"user","content":"x"}}],"max_tokens":1,)"
                                R"("chat_template_kwargs":{{"enable_thinking":{}}}}})",
                                thinking));
  };
  asks("qwen3", "true");
  asks("qwen3", "false");
  ASSERT_EQ(api.engine.jobs(), 2u);
  const auto prompt = [&](int job) {
    return api.tokenizer->Decode(api.engine.job(job).request.prompt);
  };
  EXPECT_EQ(prompt(1), prompt(0) + "<think>\n\n</think>\n\n");
  ExpectRefused(*asks("qwen3-thinking", "false"));
}

}  // namespace
}  // namespace dsla::openai
