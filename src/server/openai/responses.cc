#include "server/openai/responses.h"

#include <utility>

#include "base/check.h"
#include "server/json_writer.h"
#include "server/openai/fields.h"
#include "server/openai/generation.h"
#include "server/openai/handlers.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

constexpr std::string_view kData = "data: ", kEnd = "\n\n";

// Of what chat wrote, which has the fields that it always has.
std::string_view Text(Element object, const char* name) {
  std::string_view text;
  [[maybe_unused]] const auto absent_or_null = object[name].get(text);
  return text;
}

int64_t Count(Element object, const char* name) {
  int64_t count = 0;
  [[maybe_unused]] const auto absent = object[name].get(count);
  return count;
}

class ResponsesAnswer final : public Responder {
 public:
  ResponsesAnswer(std::shared_ptr<Responder> responder, const ResponsesRequest& request)
      : responder_(std::move(responder)),
        instructions_(request.instructions),
        metadata_(request.metadata),
        max_tokens_(request.common.max_tokens),
        temperature_(request.common.sampling.temperature),
        top_p_(request.common.sampling.top_p) {}

  bool Respond(HttpResponse response) override {
    if (response.status == 200) response.body = Whole(response.body);
    return responder_->Respond(std::move(response));
  }
  void ExpectStream(HttpResponse head) override { responder_->ExpectStream(std::move(head)); }
  bool StartStream(HttpResponse head) override {
    head.body = Events(head.body);
    return responder_->StartStream(std::move(head));
  }
  bool Write(std::string_view chunk) override { return responder_->Write(Events(chunk)); }
  void End() override { responder_->End(); }
  void OnDisconnect(std::function<void()> callback) override {
    responder_->OnDisconnect(std::move(callback));
  }
  bool gone() const override { return responder_->gone(); }
  void Note(std::string name, std::string value) override {
    responder_->Note(std::move(name), std::move(value));
  }

 private:
  std::string Whole(std::string_view body);
  std::string Events(std::string_view chunk);
  void Translate(std::string_view data);
  void TakeHead(Element chat);
  void Begin();
  void Delta(std::string_view text);
  void Complete(Element usage);
  void Fail(Element error);

  // An event up to what is its own, and its end.
  JsonWriter Event(const char* type);
  void Send(const char* type, JsonWriter event);

  void WritePlace(JsonWriter& out) const;
  void WritePart(JsonWriter& out) const;
  void WriteItem(bool done, JsonWriter& out) const;
  void WriteResponse(const Element* usage, JsonWriter& out) const;

  const std::shared_ptr<Responder> responder_;
  const std::optional<std::string> instructions_;
  const std::string metadata_;
  const std::optional<int> max_tokens_;
  const float temperature_, top_p_;

  dom::parser parser_;
  std::string id_, model_, service_tier_;  // of the first thing that chat says
  int64_t created_ = 0;
  bool begun_ = false;
  std::string text_;
  bool cut_ = false;  // by the limit of tokens
  int sequence_ = 0;  // of the next event
  std::string out_;   // events that are due
};

void ResponsesAnswer::TakeHead(Element chat) {
  const std::string_view id = Text(chat, "id");
  id_ = id.substr(id.find('-') + 1);
  model_ = Text(chat, "model");
  service_tier_ = Text(chat, "service_tier");
  created_ = Count(chat, "created");
}

std::string ResponsesAnswer::Whole(std::string_view body) {
  Element chat;
  DSLA_CHECK(parser_.parse(body.data(), body.size()).get(chat) == simdjson::SUCCESS);
  TakeHead(chat);
  const Element choice = chat["choices"].at(0).value();
  text_ = Text(choice["message"], "content");
  cut_ = Text(choice, "finish_reason") == "length";
  const Element usage = chat["usage"].value();
  JsonWriter out;
  WriteResponse(&usage, out);
  return out.Take();
}

std::string ResponsesAnswer::Events(std::string_view chunk) {
  out_.clear();
  while (chunk.starts_with(kData)) {
    const size_t end = chunk.find(kEnd);
    DSLA_CHECK(end != chunk.npos);
    Translate(chunk.substr(kData.size(), end - kData.size()));
    chunk.remove_prefix(end + kEnd.size());
  }
  return std::exchange(out_, {});
}

void ResponsesAnswer::Translate(std::string_view data) {
  if (data == "[DONE]") return;  // this API ends with response.completed
  Element event;
  DSLA_CHECK(parser_.parse(data.data(), data.size()).get(event) == simdjson::SUCCESS);
  if (Element error; event["error"].get(error) == simdjson::SUCCESS) return Fail(error);
  if (!std::exchange(begun_, true)) {
    TakeHead(event);
    Begin();
  }
  Element choice;
  if (event["choices"].at(0).get(choice) != simdjson::SUCCESS)
    return Complete(event["usage"].value());
  Delta(Text(choice["delta"], "content"));
  if (Text(choice, "finish_reason") == "length") cut_ = true;
}

JsonWriter ResponsesAnswer::Event(const char* type) {
  JsonWriter out;
  out.BeginObject().Field("type", type).Field("sequence_number", sequence_++);
  return out;
}

void ResponsesAnswer::Send(const char* type, JsonWriter event) {
  event.EndObject();
  out_ += fmt::format("event: {}\n{}{}{}", type, kData, event.str(), kEnd);
}

void ResponsesAnswer::Begin() {
  for (const char* type : {"response.created", "response.in_progress"}) {
    JsonWriter event = Event(type);
    event.Key("response");
    WriteResponse(nullptr, event);
    Send(type, std::move(event));
  }
  JsonWriter item = Event("response.output_item.added");
  item.Field("output_index", 0).Key("item");
  WriteItem(false, item);
  Send("response.output_item.added", std::move(item));
  JsonWriter part = Event("response.content_part.added");
  WritePlace(part);
  part.Key("part");
  WritePart(part);
  Send("response.content_part.added", std::move(part));
}

void ResponsesAnswer::Delta(std::string_view text) {
  if (text.empty()) return;
  text_ += text;
  JsonWriter event = Event("response.output_text.delta");
  WritePlace(event);
  event.Field("delta", text).Key("logprobs").BeginArray().EndArray();
  Send("response.output_text.delta", std::move(event));
}

void ResponsesAnswer::Complete(Element usage) {
  JsonWriter text = Event("response.output_text.done");
  WritePlace(text);
  text.Field("text", text_).Key("logprobs").BeginArray().EndArray();
  Send("response.output_text.done", std::move(text));
  JsonWriter part = Event("response.content_part.done");
  WritePlace(part);
  part.Key("part");
  WritePart(part);
  Send("response.content_part.done", std::move(part));
  JsonWriter item = Event("response.output_item.done");
  item.Field("output_index", 0).Key("item");
  WriteItem(true, item);
  Send("response.output_item.done", std::move(item));
  const char* type = cut_ ? "response.incomplete" : "response.completed";
  JsonWriter event = Event(type);
  event.Key("response");
  WriteResponse(&usage, event);
  Send(type, std::move(event));
}

// The fields that the API's event has, and the error as the server's others are: clients raise it.
void ResponsesAnswer::Fail(Element error) {
  JsonWriter event = Event("error");
  event.Field("message", Text(error, "message"));
  for (const char* name : {"code", "param"}) event.Key(name).Raw(simdjson::minify(error[name]));
  event.Key("error").Raw(simdjson::minify(error));
  Send("error", std::move(event));
}

void ResponsesAnswer::WritePlace(JsonWriter& out) const {
  out.Field("item_id", "msg_" + id_).Field("output_index", 0).Field("content_index", 0);
}

void ResponsesAnswer::WritePart(JsonWriter& out) const {
  out.BeginObject().Field("type", "output_text").Field("text", text_);
  out.Key("annotations").BeginArray().EndArray();
  out.Key("logprobs").BeginArray().EndArray().EndObject();
}

void ResponsesAnswer::WriteItem(bool done, JsonWriter& out) const {
  out.BeginObject().Field("id", "msg_" + id_).Field("type", "message");
  out.Field("status", !done ? "in_progress" : cut_ ? "incomplete" : "completed");
  out.Field("role", "assistant").Key("content").BeginArray();
  if (done) WritePart(out);
  out.EndArray().EndObject();
}

// usage: chat's; null while the response is in progress.
void ResponsesAnswer::WriteResponse(const Element* usage, JsonWriter& out) const {
  const bool done = usage != nullptr;
  out.BeginObject().Field("id", "resp_" + id_).Field("object", "response");
  out.Field("created_at", created_);
  out.Field("status", !done ? "in_progress" : cut_ ? "incomplete" : "completed");
  out.Field("background", false).Key("error").Null().Key("incomplete_details");
  if (done && cut_) {
    out.BeginObject().Field("reason", "max_output_tokens").EndObject();
  } else {
    out.Null();
  }
  out.Key("instructions");
  if (instructions_) {
    out.String(*instructions_);
  } else {
    out.Null();
  }
  out.Key("max_output_tokens");
  if (max_tokens_) {
    out.Int(*max_tokens_);
  } else {
    out.Null();
  }
  out.Field("model", model_).Key("output").BeginArray();
  if (done) WriteItem(true, out);
  out.EndArray().Field("parallel_tool_calls", true).Key("previous_response_id").Null();
  out.Key("reasoning").BeginObject().Key("effort").Null().Key("summary").Null().EndObject();
  out.Field("service_tier", service_tier_).Field("store", false);
  out.Key("temperature").Float(temperature_);
  out.Key("text").BeginObject().Key("format").BeginObject().Field("type", "text").EndObject();
  out.EndObject().Field("tool_choice", "auto").Key("tools").BeginArray().EndArray();
  out.Key("top_p").Float(top_p_).Field("truncation", "disabled").Key("usage");
  if (done) {
    const int64_t input = Count(*usage, "prompt_tokens"),
                  output = Count(*usage, "completion_tokens"),
                  cached = Count((*usage)["prompt_tokens_details"].value(), "cached_tokens");
    out.BeginObject().Field("input_tokens", input);
    out.Key("input_tokens_details").BeginObject().Field("cached_tokens", cached).EndObject();
    out.Field("output_tokens", output);
    out.Key("output_tokens_details").BeginObject().Field("reasoning_tokens", 0).EndObject();
    out.Field("total_tokens", input + output);
    out.Key("dsla").Raw(simdjson::minify((*usage)["dsla"])).EndObject();
  } else {
    out.Null();
  }
  out.Key("metadata").Raw(metadata_).EndObject();
}

}  // namespace

std::shared_ptr<Responder> ResponsesOver(std::shared_ptr<Responder> responder,
                                         const ResponsesRequest& request) {
  return std::make_shared<ResponsesAnswer>(std::move(responder), request);
}

void HandleResponses(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                     ResponderPtr responder) {
  auto parsed = ParseResponses(request->body, service->limits());
  const auto refuse = [&](const HttpError& error) { responder->Respond(ErrorResponse(error)); };
  if (const auto* error = std::get_if<HttpError>(&parsed)) return refuse(*error);
  ResponsesRequest& asked = std::get<ResponsesRequest>(parsed);
  auto model = service->ModelName(asked.common.model);
  if (const auto* error = std::get_if<HttpError>(&model)) return refuse(*error);
  auto tokens = EncodeMessages(*service, asked.messages, /*tools=*/{}, asked.prompt);
  if (auto* error = std::get_if<HttpError>(&tokens)) {
    if (error->param == "messages") error->param = "input";
    return refuse(*error);
  }
  auto answer = ResponsesOver(std::move(responder), asked);
  GenerationPlan plan;
  plan.chat = true;
  plan.continues = asked.prompt.continue_last;
  plan.model = std::get<std::string>(std::move(model));
  plan.prompts.push_back(std::get<std::vector<int32_t>>(std::move(tokens)));
  plan.common = std::move(asked.common);
  Generation::Start(service, std::move(permit), std::move(plan), *request, std::move(answer));
}

}  // namespace dsla::openai
