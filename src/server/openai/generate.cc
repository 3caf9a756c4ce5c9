#include <algorithm>
#include <span>

#include "engine/prompt.h"
#include "format/chat/tool_grammar.h"
#include "server/openai/generation.h"
#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

void Refuse(Responder& responder, const HttpError& error) {
  responder.Respond(ErrorResponse(error));
}

void Truncate(int keep, std::vector<int32_t>* tokens) {
  if (keep > 0 && tokens->size() > static_cast<size_t>(keep)) {
    tokens->erase(tokens->begin(), tokens->end() - keep);
  }
}

// The tokens of a prompt, and its text where it will be echoed.
std::optional<HttpError> AddPrompt(const Service& service, const CompletionRequest& request,
                                   const Prompt& prompt, GenerationPlan* plan) {
  std::vector<int32_t> tokens;
  size_t before = 0, after = 0;  // tokens that are put around a text
  const auto* text = std::get_if<std::string>(&prompt);
  if (text) {
    EncodeOptions options;
    options.parse_special = request.parse_special;
    if (!request.add_special_tokens) options.add_bos = false;
    auto encoded = EncodeText(service, *text, options);
    if (const auto* error = std::get_if<HttpError>(&encoded)) return *error;
    tokens = std::move(std::get<std::vector<int32_t>>(encoded));
    if (request.add_special_tokens) {
      before = service.tokenizer().prefix().size();
      after = service.tokenizer().suffix().size();
    }
  } else {
    tokens = std::get<std::vector<int32_t>>(prompt);
  }
  if (tokens.empty()) return InvalidRequestError("'prompt' has no tokens", "prompt");
  const size_t whole = tokens.size();
  Truncate(request.common.truncate_prompt, &tokens);
  if (request.echo) {
    const size_t cut = whole - tokens.size();
    GenerationPlan::Echo echo;
    echo.begin = before - std::min(before, cut);
    echo.end = tokens.size() - std::min(after, tokens.size());
    echo.text = text && cut == 0 ? *text
                                 : service.tokenizer().Decode(std::span(tokens).subspan(
                                       echo.begin, echo.end - echo.begin));
    plan->echoes.push_back(std::move(echo));
  }
  plan->prompts.push_back(std::move(tokens));
  return std::nullopt;
}

bool IsOfTools(const ChatMessage& message) {
  return message.role == "tool" || !message.tool_calls.empty();
}

size_t TextBytes(const std::vector<ChatMessage>& messages, const std::vector<Tool>& tools) {
  size_t bytes = 0;
  for (const ChatMessage& message : messages) {
    bytes += message.content.size();
    for (const ToolCall& call : message.tool_calls) bytes += call.arguments.size();
  }
  for (const Tool& tool : tools) bytes += tool.json.size();
  return bytes;
}

// The grammar of replies whose calls are asked for or must follow their schemas. Where the replies
// follow another one, a reply is either of the two.
std::optional<HttpError> SetToolGrammar(const Service& service, const ToolsRequest& tools,
                                        Common* common) {
  using Choice = ToolsRequest::Choice;
  const bool forced = tools.choice != Choice::kAuto;
  std::vector<Tool> callable = tools.tools;
  const auto is_other = [&](const Tool& tool) {
    return std::ranges::find(tools.allowed, tool.name) == tools.allowed.end();
  };
  if (!tools.allowed.empty()) std::erase_if(callable, is_other);
  const bool one = tools.choice == Choice::kNamed || !tools.parallel;
  ToolGrammar grammar;
  grammar.calls = one ? ToolGrammar::Calls::kOne : ToolGrammar::Calls::kSome;
  grammar.text = forced ? ToolGrammar::Text::kNone : ToolGrammar::Text::kAny;
  if (!forced && common->grammar) {
    using Kind = GrammarSpec::Kind;
    const GrammarSpec& other = *common->grammar;
    if (other.kind != Kind::kJsonSchema && other.kind != Kind::kJsonObject) {
      return InvalidRequestError(
          fmt::format("'tools' go with no '{}' but JSON", common->grammar_param), "tools");
    }
    grammar.text = ToolGrammar::Text::kJson;
    grammar.schema = other.text;
  }
  const bool fewer = callable.size() < tools.tools.size();
  const bool strict = std::ranges::any_of(callable, &Tool::strict);
  if (!forced && !fewer && !strict && !common->grammar) return std::nullopt;
  common->grammar_param = forced ? "tool_choice" : "tools";
  common->grammar = GrammarSpec{.kind = GrammarSpec::Kind::kStructuralTag,
                                .text = StructuralTagOf(*service.context().tool_dialect, grammar,
                                                        callable, service.tool_markers()),
                                .control_tokens = true};
  return std::nullopt;
}

// How the calls in the replies are made and read.
std::optional<HttpError> PlanTools(const Service& service, ToolsRequest tools, Common* common,
                                   GenerationPlan* plan) {
  if (tools.tools.empty()) return std::nullopt;
  const ApiContext& context = service.context();
  if (!context.tool_dialect)
    return InvalidRequestError(context.no_tools, "tools", "unsupported_parameter");
  if (auto error = SetToolGrammar(service, tools, common)) return error;
  ToolParser::Options& options = plan->tools.emplace();
  options.dialect = *context.tool_dialect;
  options.tools = std::make_shared<const std::vector<Tool>>(std::move(tools.tools));
  options.parallel = tools.parallel;
  return std::nullopt;
}

std::optional<HttpError> FindModel(const Service& service, std::string_view asked,
                                   std::string* model) {
  auto name = service.ModelName(asked);
  if (const auto* error = std::get_if<HttpError>(&name)) return *error;
  *model = std::get<std::string>(std::move(name));
  return std::nullopt;
}

HttpError GrammarError(const Status& status, const Common& common) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
      return InvalidGrammarError(status.message(), common);
    case StatusCode::kResourceExhausted:
      return QueueFullError(status.message(), /*retry_after_seconds=*/1);
    default: {
      HttpError error;
      error.status = 503;
      error.type = "server_error";
      error.code = "grammars_unavailable";
      error.message = status.message();
      error.param = common.grammar_param;
      error.retry = false;
      return error;
    }
  }
}

}  // namespace

// A grammar takes time to compile, and its first mask to be made.
void StartGeneration(const ServicePtr& service, PermitPtr permit, GenerationPlan plan,
                     RequestPtr request, ResponderPtr responder) {
  if (!plan.common.grammar) {
    Generation::Start(service, std::move(permit), std::move(plan), *request, std::move(responder));
    return;
  }
  if (service->context().grammars == nullptr)
    return Refuse(*responder, UnsupportedParameterError(plan.common.grammar_param));
  struct Work {
    PermitPtr permit;
    GenerationPlan plan;
  };
  const auto work = std::make_shared<Work>(Work{std::move(permit), std::move(plan)});
  const auto start = [=] {
    GenerationPlan& waiting = work->plan;
    auto grammar = service->context().grammars->Compile(*waiting.common.grammar);
    if (!grammar.ok()) return Refuse(*responder, GrammarError(grammar.status(), waiting.common));
    waiting.grammar = std::move(grammar).value();
    Generation::Start(service, std::move(work->permit), std::move(waiting), *request, responder);
  };
  TaskPool* const pool = service->context().grammar_pool;
  pool == nullptr ? start() : RunInPool(*pool, responder, start);
}

Parsed<std::vector<int32_t>> EncodeText(const Service& service, const std::string& text,
                                        const EncodeOptions& options) {
  if (text.size() > service.max_text_bytes()) {
    const auto context = service.limits().max_context;
    return ContextLengthError(
        fmt::format("the model's context is {} tokens; a text of {} bytes has more", context,
                    text.size()),
        context + 1, context);
  }
  auto tokens = service.tokenizer().Encode(text, options);
  if (!tokens.ok()) return InvalidRequestError(tokens.status().message(), "prompt");
  return std::move(tokens).value();
}

Parsed<std::vector<int32_t>> EncodeMessages(const Service& service,
                                            const std::vector<ChatMessage>& messages,
                                            const std::vector<Tool>& tools,
                                            const PromptOptions& prompt) {
  const ApiContext& context = service.context();
  if (!context.chat_template) {
    return InvalidRequestError(
        fmt::format("this server has no chat template: {}", context.no_chat_template), "messages",
        "chat_template_error");
  }
  const size_t bytes = TextBytes(messages, tools);
  if (bytes > service.max_text_bytes()) {
    const auto limit = service.limits().max_context;
    return ContextLengthError(
        fmt::format("the model's context is {} tokens; messages of {} bytes have more", limit,
                    bytes),
        limit + 1, limit);
  }
  const bool with_tools = !tools.empty() || std::ranges::any_of(messages, IsOfTools);
  if (with_tools && !context.tool_template) {
    return InvalidRequestError(context.no_tools, tools.empty() ? "messages" : "tools",
                               "unsupported_parameter");
  }
  const auto encode = [&]() -> Expected<std::vector<int32_t>> {
    const Tokenizer& tokenizer = service.tokenizer();
    if (!with_tools) return EncodeChat(tokenizer, *context.chat_template, messages, prompt);
    DSLA_RETURN_IF_ERROR(CheckThinking(*context.chat_template, prompt));
    return EncodeToolChat(tokenizer, *context.tool_template, messages, tools, prompt);
  };
  const auto tokens = encode();
  if (!tokens.ok())
    return InvalidRequestError(tokens.status().message(), "messages", "chat_template_error");
  return *tokens;
}

void HandleCompletions(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                       ResponderPtr responder) {
  auto parsed = ParseCompletion(request->body, service->limits());
  if (const auto* error = std::get_if<HttpError>(&parsed)) return Refuse(*responder, *error);
  CompletionRequest& completion = std::get<CompletionRequest>(parsed);
  GenerationPlan plan;
  if (auto error = FindModel(*service, completion.common.model, &plan.model)) {
    return Refuse(*responder, *error);
  }
  plan.continues = true;
  plan.echo = completion.echo;
  plan.logprobs = completion.logprobs;
  for (const Prompt& prompt : completion.prompts) {
    if (auto error = AddPrompt(*service, completion, prompt, &plan)) {
      return Refuse(*responder, *error);
    }
  }
  plan.common = std::move(completion.common);
  StartGeneration(service, std::move(permit), std::move(plan), std::move(request),
                  std::move(responder));
}

Parsed<GenerationPlan> PlanChat(const Service& service, ChatRequest chat) {
  GenerationPlan plan;
  plan.chat = true;
  plan.continues = chat.prompt.continue_last;
  if (auto error = FindModel(service, chat.common.model, &plan.model)) return *error;
  auto tokens = EncodeMessages(service, chat.messages, chat.tools.tools, chat.prompt);
  if (const auto* error = std::get_if<HttpError>(&tokens)) return *error;
  if (auto error = PlanTools(service, std::move(chat.tools), &chat.common, &plan)) return *error;
  plan.prompts.push_back(std::move(std::get<std::vector<int32_t>>(tokens)));
  Truncate(chat.common.truncate_prompt, &plan.prompts[0]);
  plan.logprobs = chat.logprobs;
  plan.common = std::move(chat.common);
  return plan;
}

void HandleChat(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                ResponderPtr responder) {
  auto parsed = ParseChat(request->body, service->limits());
  if (const auto* error = std::get_if<HttpError>(&parsed)) return Refuse(*responder, *error);
  auto plan = PlanChat(*service, std::get<ChatRequest>(std::move(parsed)));
  if (const auto* error = std::get_if<HttpError>(&plan)) return Refuse(*responder, *error);
  StartGeneration(service, std::move(permit), std::get<GenerationPlan>(std::move(plan)),
                  std::move(request), std::move(responder));
}

}  // namespace dsla::openai
