#include "server/openai/generation.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <utility>

#include "base/clock.h"
#include "server/openai/requests.h"

namespace dsla::openai {
namespace {

// What the tier is called in answers; an exact level has no name of OpenAI's.
const char* ServiceTierName(Tier tier) {
  return tier == Tier::kFull ? "priority" : tier == Tier::kEconomy ? "flex" : "default";
}

// What a piece of text adds to a reply.
ToolReplyDelta Parse(ToolParser& parser, std::string_view text, bool last) {
  ToolReplyDelta delta = parser.Push(text);
  if (!last) return delta;
  ToolReplyDelta rest = parser.Finish();
  delta.content += rest.content;
  std::ranges::move(rest.calls, std::back_inserter(delta.calls));
  return delta;
}

// Mistral's templates take ids of nine letters and digits, and no others.
std::string NewCallId(uint64_t random, ToolDialect dialect) {
  if (dialect != ToolDialect::kMistral) return fmt::format("call_{:016x}", random);
  return fmt::format("{:016x}", random).substr(0, 9);
}

}  // namespace

class Generation::Sink : public RequestSink {
 public:
  Sink(std::shared_ptr<Generation> generation, int index)
      : generation_(std::move(generation)), index_(index) {}

  void OnPlaced(int replica) override { generation_->OnPlaced(index_, replica); }
  void OnPromptLogprobs(std::vector<PromptLogprob> logprobs) override {
    generation_->OnPromptLogprobs(index_, std::move(logprobs));
  }
  void OnToken(TokenOutput token) override { generation_->OnToken(index_, std::move(token)); }
  void OnFinish(const RequestResult& result) override { generation_->OnFinish(index_, result); }

 private:
  const std::shared_ptr<Generation> generation_;
  const int index_;
};

void Generation::Start(std::shared_ptr<Service> service, std::unique_ptr<Service::Permit> permit,
                       GenerationPlan plan, const HttpRequest& request,
                       std::shared_ptr<Responder> responder) {
  const auto generation = std::make_shared<Generation>(
      std::move(service), std::move(permit), std::move(plan), request.request_id, responder);
  if (auto error = generation->Prepare(request)) {
    responder->Respond(ErrorResponse(*error));
    return;
  }
  // Weak: the responder must not keep alive what holds it.
  responder->OnDisconnect([weak = std::weak_ptr<Generation>(generation)] {
    const auto generation = weak.lock();
    if (!generation) return;
    generation->disconnected_ = true;
    {
      const std::lock_guard lock(generation->mutex_);
      generation->NoteUsage();
    }
    generation->CancelAll();
  });
  if (generation->plan_.common.stream) {
    responder->ExpectStream(generation->WithTier(SseHead()));
  }
  generation->Submit();
}

Generation::Generation(std::shared_ptr<Service> service, std::unique_ptr<Service::Permit> permit,
                       GenerationPlan plan, std::string_view request_id,
                       std::shared_ptr<Responder> responder)
    : service_(std::move(service)),
      permit_(std::move(permit)),
      plan_(std::move(plan)),
      responder_(std::move(responder)),
      choices_(plan_.prompts.size() * plan_.common.n) {
  const uint64_t serial = service_->Random();
  id_ = fmt::format("{}-{:016x}", plan_.chat ? "chatcmpl" : "cmpl", serial);
  for (size_t i = 0; i < choices_.size(); ++i) {
    // The client's id for the log, the serial number to be unique.
    ids_.push_back(fmt::format("{}/{:08x}.{}", request_id, serial >> 32, i));
    Choice& choice = choices_[i];
    if (plan_.tools) choice.parser.emplace(*plan_.tools);
    if (plan_.logprobs < 0) continue;
    choice.logprobs.emplace(&service_->tokenizer(), plan_.chat, plan_.logprobs);
    if (!plan_.chat) {
      choice.offsets.emplace(service_->tokenizer(), /*continues=*/!plan_.echo);
    }
  }
  JsonWriter head(plan_.common.stream ? "data: {" : "{");
  head.Field("id", id_);
  const char* object = plan_.chat ? "chat.completion" : "text_completion";
  head.Field("object", plan_.chat && plan_.common.stream ? "chat.completion.chunk" : object);
  head.Field("created", service_->Now()).Field("model", plan_.model);
  head.Field("service_tier", ServiceTierName(plan_.common.tier));
  head.Key("choices").BeginArray();
  head_ = head.Take();
}

std::optional<HttpError> Generation::SetMaxTokens() {
  const Common& common = plan_.common;
  const int64_t context = service_->limits().max_context;
  for (const auto& prompt : plan_.prompts) {
    const auto length = static_cast<int64_t>(prompt.size());
    const int64_t reply = common.max_tokens.value_or(1);  // without a limit: at least one
    if (length + reply > context) {
      return ContextLengthError(
          fmt::format("the model's context is {} tokens, but {} are asked for: {} of the prompt "
                      "and {} of the reply",
                      context, length + reply, length, reply),
          length, context);
    }
    if (common.max_tokens) {
      max_tokens_.push_back(*common.max_tokens);
    } else {
      // As much as the context and the cache hold. Where that is nothing, the engine refuses the
      // one token with its figures.
      const int64_t room = service_->engine().LongestReply(length, common.tier, common.level);
      max_tokens_.push_back(static_cast<int>(std::clamp<int64_t>(room, 1, context - length)));
    }
    if (common.min_tokens > max_tokens_.back()) {
      return InvalidRequestError(fmt::format("'min_tokens' is {}, but there is room for {} tokens",
                                             common.min_tokens, max_tokens_.back()),
                                 "min_tokens", "integer_above_max_value");
    }
  }
  return std::nullopt;
}

// An answer is held in memory until it is whole; of a stream only the prompt's part is, unless the
// plan says otherwise.
std::optional<HttpError> Generation::CheckLogprobs() const {
  const Common& common = plan_.common;
  int64_t prompt = 0, reply = 0;  // tokens
  for (size_t i = 0; i < plan_.prompts.size(); ++i) {
    if (scores_prompt(static_cast<int>(i)))
      prompt += common.n * static_cast<int64_t>(plan_.prompts[i].size());
    if (plan_.logprobs >= 0 && (!common.stream || plan_.keeps_logprobs))
      reply += common.n * int64_t{max_tokens_[i]};
  }
  const int64_t each = 1 + std::max(plan_.logprobs, 0);
  const int64_t most = service_->limits().max_total_logprobs;
  if ((prompt + reply) * each <= most) return std::nullopt;
  return InvalidRequestError(
      fmt::format("{} log-probabilities are asked for, {} of each of {} prompt tokens and {} reply "
                  "tokens; one answer may have {}",
                  (prompt + reply) * each, each, prompt, reply, most),
      plan_.logprobs < 0 ? "prompt" : plan_.logprobs_param, "integer_above_max_value");
}

std::optional<HttpError> Generation::Prepare(const HttpRequest& request) {
  const Common& common = plan_.common;
  if (auto error = SetMaxTokens()) return error;
  if (auto error = CheckLogprobs()) return error;
  // The shortest of what the server, the field and the header say.
  double timeout = service_->context().default_timeout;
  const auto shorten = [&](double seconds) {
    if (seconds > 0 && (timeout == 0 || seconds < timeout)) timeout = seconds;
  };
  shorten(common.timeout);
  if (const std::string* header = request.headers.Find(kTimeoutHeader)) {
    const auto seconds = ParseTimeoutHeader(*header, service_->limits());
    if (const auto* error = std::get_if<HttpError>(&seconds)) return *error;
    shorten(std::get<double>(seconds));
  }
  if (timeout > 0) {
    deadline_ = (request.arrival > 0 ? request.arrival : NowSeconds()) + timeout;
  }
  for (size_t i = 0; i < choices_.size(); ++i) {
    // Replies to one prompt differ, and are the same again for the same seed.
    const uint64_t nth = i % common.n;
    seeds_.push_back(common.seed ? *common.seed + nth * 0x9e3779b97f4a7c15 : service_->Random());
  }
  return std::nullopt;
}

Request Generation::RequestOf(int index) const {
  const Common& common = plan_.common;
  Request request;
  request.id = ids_[index];
  request.prompt = plan_.prompts[prompt_of(index)];
  request.sampling = common.sampling;
  request.sampling.seed = seeds_[index];
  request.max_tokens = max_tokens_[prompt_of(index)];
  request.min_tokens = common.min_tokens;
  // Who scores a prompt with one token to spare counts on it: an end token counts as well.
  request.ignore_eos = common.ignore_eos || (plan_.echo && plan_.logprobs >= 0 &&
                                             request.max_tokens == 1 && common.stop_ids.empty());
  request.continues = plan_.continues;
  // What spells a call is part of the text, even where it is a control token.
  if (plan_.tools) {
    for (const ToolMarker& marker : service_->tool_markers())
      request.shown_ids.push_back(marker.id);
  }
  request.stop_ids = common.stop_ids;
  request.stop = common.stop;
  request.grammar = plan_.grammar;
  request.top_logprobs = plan_.logprobs;
  request.prompt_logprobs = scores_prompt(prompt_of(index));
  request.tier = common.tier;
  request.level = common.level;
  request.cache_salt = common.cache_salt;
  request.deadline = deadline_;
  return request;
}

void Generation::Submit() {
  const auto self = shared_from_this();
  std::vector<Submission> group;
  for (size_t i = 0; i < ids_.size(); ++i) {
    const int index = static_cast<int>(i);
    group.push_back({RequestOf(index), std::make_shared<Sink>(self, index)});
  }
  if (const auto rejection = service_->engine().SubmitAll(std::move(group))) {
    const auto& prompt = plan_.prompts[prompt_of(static_cast<int>(rejection->index))];
    HttpError error = service_->ErrorOf(*rejection, static_cast<int64_t>(prompt.size()));
    if (error.param == "grammar") error = InvalidGrammarError(rejection->message, plan_.common);
    responder_->Respond(ErrorResponse(error));
    return;
  }
  // The client may have left before they were there to be cancelled.
  if (disconnected_) CancelAll();
}

void Generation::CancelAll() {
  for (const std::string& id : ids_) service_->engine().Cancel(id);
}

void Generation::OnPlaced(int index, int replica) {
  const std::lock_guard lock(mutex_);
  choices_[index].replica = replica;
}

void Generation::OnPromptLogprobs(int index, std::vector<PromptLogprob> logprobs) {
  const std::lock_guard lock(mutex_);
  if (plan_.logprobs >= 0) choices_[index].prompt_logprobs = std::move(logprobs);
}

void Generation::OnToken(int index, TokenOutput token) {
  const std::lock_guard lock(mutex_);
  if (ended_) return;
  Choice& choice = choices_[index];
  if (finished_ == 0 && choice.tokens == 0) first_level_ = std::max(first_level_, token.level);
  highest_level_ = std::max(highest_level_, token.level);
  ++choice.tokens;
  if (plan_.common.stream) {
    WriteChunk(index, std::move(token.text), &token);
  } else {
    AddText(index, token.text);
    AddToken(choice, token);
  }
  Advance();
}

void Generation::OnFinish(int index, const RequestResult& result) {
  const std::lock_guard lock(mutex_);
  Choice& choice = choices_[index];
  choice.done = true;
  choice.result = result;
  if (ended_) return;
  if (!result.status.ok() || result.finish == FinishReason::kCancelled) {
    if (!failure_) failure_ = ErrorOf(result);
  } else if (plan_.common.stream) {
    WriteChunk(index, result.tail_text, nullptr);
  } else {
    AddText(index, result.tail_text);
    if (choice.parser) choice.parser->Finish();
  }
  ++finished_;
  Advance();
}

// To a reply that is sent as a whole.
void Generation::AddText(int index, std::string_view text) {
  Choice& choice = choices_[index];
  if (choice.parser) {
    choice.parser->Push(text);
    return;
  }
  BeginText(index, &choice.text);
  choice.text += text;
}

void Generation::AddToken(Choice& choice, const TokenOutput& token) {
  if (plan_.common.return_token_ids) choice.token_ids.push_back(token.token);
  if (!choice.logprobs) return;
  // As TextStream: a control token gives no text.
  const bool in_text = !service_->tokenizer().IsSpecial(token.token);
  choice.logprobs->Add(token.token, &token.logprob, token.top,
                       choice.offsets ? choice.offsets->Next(token.token, in_text) : 0);
}

// What precedes the reply itself: the prompt, where it is to be echoed.
void Generation::BeginText(int index, std::string* text) {
  Choice& choice = choices_[index];
  if (std::exchange(choice.begun, true)) return;
  if (!plan_.echo) return;
  const GenerationPlan::Echo& echo = plan_.echoes[prompt_of(index)];
  text->insert(0, echo.text);
  if (!choice.logprobs) return;
  for (size_t i = 0; i < choice.prompt_logprobs.size(); ++i) {
    const PromptLogprob& token = choice.prompt_logprobs[i];
    choice.logprobs->Add(token.token, i == 0 ? nullptr : &token.logprob, token.top,
                         choice.offsets->Next(token.token, i >= echo.begin && i < echo.end));
  }
  choice.prompt_logprobs = {};
}

void Generation::WriteChunk(int index, std::string text, const TokenOutput* token) {
  Choice& choice = choices_[index];
  const bool first = !choice.begun;
  const bool prompt_logprobs = first && !choice.prompt_logprobs.empty();
  BeginText(index, &text);
  if (token) AddToken(choice, *token);
  JsonWriter out(head_);
  out.BeginObject().Field("index", index);
  if (plan_.chat) {
    out.Key("delta").BeginObject();
    if (first) out.Field("role", "assistant");
    if (choice.parser) {
      WriteToolDelta(choice, first, Parse(*choice.parser, text, /*last=*/token == nullptr), out);
    } else if (first || token || !text.empty()) {
      out.Field("content", text);
    }
    out.EndObject();
  } else {
    out.Field("text", text);
  }
  out.Key("logprobs");
  if (choice.logprobs && (token || prompt_logprobs)) {
    out.Raw(choice.logprobs->Take());
  } else {
    out.Null();
  }
  if (token) {
    out.Key("finish_reason").Null();
  } else {
    WriteStop(choice, out);
  }
  if (plan_.common.return_token_ids) {
    out.Key("token_ids").BeginArray();
    for (const int32_t id : choice.token_ids) out.Int(id);
    out.EndArray();
    choice.token_ids.clear();
  }
  out.EndObject().EndArray();
  if (plan_.common.include_usage) {
    out.Key("usage");
    if (plan_.common.continuous_usage) {
      WriteContinuousUsage(index, out);
    } else {
      out.Null();
    }
  }
  out.EndObject();
  pending_ += out.str();
  pending_ += "\n\n";
}

// The fields of a delta: a chunk goes out for every token, whatever is held back.
void Generation::WriteToolDelta(Choice& choice, bool first, const ToolReplyDelta& delta,
                                JsonWriter& out) {
  if (!delta.content.empty()) {
    out.Field("content", delta.content);
  } else if (first) {
    out.Key("content").Null();
  }
  if (delta.calls.empty()) return;
  out.Key("tool_calls").BeginArray();
  for (const auto& call : delta.calls) {
    out.BeginObject().Field("index", call.index);
    if (!call.name.empty())
      out.Field("id", CallId(choice, static_cast<size_t>(call.index))).Field("type", "function");
    out.Key("function").BeginObject();
    if (!call.name.empty()) out.Field("name", call.name);
    out.Field("arguments", call.arguments).EndObject().EndObject();
  }
  out.EndArray();
}

const std::string& Generation::CallId(Choice& choice, size_t call) {
  while (choice.call_ids.size() <= call)
    choice.call_ids.push_back(NewCallId(service_->Random(), plan_.tools->dialect));
  return choice.call_ids[call];
}

void Generation::WriteStop(const Choice& choice, JsonWriter& out) const {
  const RequestResult& result = choice.result;
  const bool calls = choice.parser && !choice.parser->reply().calls.empty();
  const char* stop = calls ? "tool_calls" : "stop";
  out.Field("finish_reason", result.finish == FinishReason::kStop ? stop : "length");
  // As vLLM: which string or token of the request's own ended it.
  out.Key("stop_reason");
  const auto& stop_ids = plan_.common.stop_ids;
  if (!result.stop_string.empty()) {
    out.String(result.stop_string);
  } else if (std::find(stop_ids.begin(), stop_ids.end(), result.stop_token) != stop_ids.end()) {
    out.Int(result.stop_token);
  } else {
    out.Null();
  }
}

void Generation::WriteMessage(Choice& choice, JsonWriter& out) {
  out.Key("message").BeginObject().Field("role", "assistant").Key("content");
  const std::string& content = choice.parser ? choice.parser->reply().content : choice.text;
  const bool calls = choice.parser && !choice.parser->reply().calls.empty();
  if (calls && content.empty()) {
    out.Null();
  } else {
    out.String(content);
  }
  out.Key("refusal").Null();
  if (calls) {
    out.Key("tool_calls").BeginArray();
    size_t index = 0;
    for (const ToolCall& call : choice.parser->reply().calls) {
      out.BeginObject().Field("id", CallId(choice, index++)).Field("type", "function");
      out.Key("function").BeginObject().Field("name", call.name);
      out.Field("arguments", call.arguments).EndObject().EndObject();
    }
    out.EndArray();
  }
  out.EndObject();
}

void Generation::WriteChoice(int index, JsonWriter& out) {
  Choice& choice = choices_[index];
  out.BeginObject().Field("index", index);
  if (plan_.chat) {
    WriteMessage(choice, out);
  } else {
    out.Field("text", choice.text);
  }
  out.Key("logprobs");
  if (choice.logprobs) {
    out.Raw(choice.logprobs->Take());
  } else {
    out.Null();
  }
  WriteStop(choice, out);
  if (plan_.common.return_token_ids) {
    out.Key("token_ids").BeginArray();
    for (const int32_t id : choice.token_ids) out.Int(id);
    out.EndArray().Key("prompt_token_ids").BeginArray();
    for (const int32_t id : plan_.prompts[prompt_of(index)]) out.Int(id);
    out.EndArray();
  }
  out.EndObject();
}

void Generation::WriteContinuousUsage(int index, JsonWriter& out) const {
  const auto prompt = static_cast<int64_t>(plan_.prompts[prompt_of(index)].size());
  const int64_t tokens = choices_[index].tokens;
  out.BeginObject().Field("prompt_tokens", prompt).Field("completion_tokens", tokens);
  out.Field("total_tokens", prompt + tokens).EndObject();
}

void Generation::WriteUsage(JsonWriter& out) const {
  int64_t prompt = 0, cached = 0, tokens = 0;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    tokens += choice.result.generated_tokens;
    if (i % plan_.common.n != 0) continue;  // a prompt counts once
    prompt += static_cast<int64_t>(plan_.prompts[prompt_of(static_cast<int>(i))].size());
    cached += choice.result.cached_tokens;
  }
  out.BeginObject().Field("prompt_tokens", prompt).Field("completion_tokens", tokens);
  out.Field("total_tokens", prompt + tokens);
  out.Key("prompt_tokens_details").BeginObject().Field("cached_tokens", cached).EndObject();
  // The levels that were really used, of each reply from which position on.
  out.Key("dsla").BeginObject().Field("tier", Name(plan_.common.tier)).Key("levels").BeginArray();
  for (size_t i = 0; i < choices_.size(); ++i) {
    for (const LevelSpan& span : choices_[i].result.levels) {
      out.BeginObject();
      if (choices_.size() > 1) out.Field("choice", static_cast<int64_t>(i));
      out.Field("position", span.position).Field("level", span.level).EndObject();
    }
  }
  out.EndArray().EndObject().EndObject();
}

// Sends what is due and ends the answer when everything is in.
void Generation::Advance() {
  if (ended_) return;
  if (failure_) {
    Fail(*std::exchange(failure_, std::nullopt));
  } else if (finished_ == static_cast<int>(choices_.size())) {
    Complete();
  } else {
    Flush();
  }
}

void Generation::Flush() {
  if (pending_.empty()) return;
  if (std::exchange(started_, true)) {
    responder_->Write(pending_);
  } else {
    HttpResponse head = WithLevel(SseHead(), first_level_);
    head.body = std::move(pending_);
    responder_->StartStream(std::move(head));
  }
  pending_.clear();
}

void Generation::Complete() {
  NoteUsage();
  ended_ = true;
  if (!plan_.common.stream) {
    JsonWriter out(std::move(head_));
    for (size_t i = 0; i < choices_.size(); ++i) WriteChoice(static_cast<int>(i), out);
    out.EndArray().Key("usage");
    WriteUsage(out);
    const auto& levels = choices_[0].result.levels;
    responder_->Respond(WithLevel(JsonResponse(200, out.EndObject().Take()),
                                  levels.empty() ? 0 : levels.back().level));
    return;
  }
  if (plan_.common.include_usage) {
    JsonWriter out(head_);
    out.EndArray().Key("usage");
    WriteUsage(out);
    pending_ += out.EndObject().str();
    pending_ += "\n\n";
  }
  pending_ += SseEvent("[DONE]");
  Flush();
  responder_->End();
}

// The replies that still run are cancelled.
void Generation::Fail(HttpError error) {
  NoteUsage();
  if (!disconnected_) responder_->Note("error", error.code);
  ended_ = true;
  std::vector<std::string> running;
  for (size_t i = 0; i < choices_.size(); ++i) {
    if (!choices_[i].done) running.push_back(ids_[i]);
  }
  service_->canceller().Cancel(std::move(running));
  if (!started_ && responder_->Respond(ErrorResponse(error))) return;
  pending_ += SseEvent(ErrorJson(error));
  Flush();
  responder_->End();
}

HttpError Generation::ErrorOf(const RequestResult& result) const {
  switch (result.status.code()) {
    case StatusCode::kDeadlineExceeded:
      return DeadlineError();
    case StatusCode::kOk:  // cancelled, but not by the client: the server ends
    case StatusCode::kCancelled:
    case StatusCode::kUnavailable:
      return ShuttingDownError();
    case StatusCode::kResourceExhausted:
      return OutOfMemoryError();
    case StatusCode::kInvalidArgument:  // of what is checked, a grammar alone shows it so late
      return InvalidGrammarError(result.status.message(), plan_.common);
    default:
      // How the engine marks logits that are not numbers.
      return result.status.message().starts_with("numerical_error") ? NumericalError()
                                                                    : InternalError();
  }
}

HttpResponse Generation::WithTier(HttpResponse response) const {
  response.headers.Add("X-Dsla-Tier", Name(plan_.common.tier));
  return response;
}

HttpResponse Generation::WithLevel(HttpResponse response, int level) const {
  response = WithTier(std::move(response));
  response.headers.Add("X-Dsla-Level", fmt::format("{}", level));
  return response;
}

// For the log's line, once: at the end, or when the client leaves.
void Generation::NoteUsage() {
  if (std::exchange(noted_, true)) return;
  size_t prompt = 0;
  int64_t tokens = 0;
  int level = highest_level_;
  std::set<int> replicas;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    prompt += plan_.prompts[prompt_of(static_cast<int>(i))].size();
    tokens += choice.done ? choice.result.generated_tokens : choice.tokens;
    for (const LevelSpan& span : choice.result.levels) level = std::max(level, span.level);
    if (choice.replica >= 0) replicas.insert(choice.replica);
  }
  responder_->Note("prompt_tokens", fmt::format("{}", prompt));
  responder_->Note("tokens", fmt::format("{}", tokens));
  responder_->Note("tier", Name(plan_.common.tier));
  responder_->Note("dsla_level", fmt::format("{}", level));
  if (!replicas.empty()) responder_->Note("replica", fmt::format("{}", fmt::join(replicas, ",")));
}

}  // namespace dsla::openai
