#include <fmt/format.h>

#include <utility>

#include "base/check.h"
#include "format/chat/json_scanner.h"
#include "server/openai/fields.h"
#include "server/openai/responses.h"
#include "server/openai/responses_writer.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;
using Status = OutputItem::Status;

constexpr std::string_view kData = "data: ", kEnd = "\n\n";

// Of what chat wrote, which has the fields that it always has.
std::string_view Text(Element object, const char* name) {
  std::string_view text;
  [[maybe_unused]] const auto absent_or_null = object[name].get(text);
  return text;
}

class ResponsesAnswer final : public Responder {
 public:
  ResponsesAnswer(std::shared_ptr<Responder> responder, ResponsesEcho echo)
      : responder_(std::move(responder)), echo_(std::move(echo)) {}

  bool Respond(HttpResponse response) override {
    if (response.status == 200) response.body = Whole(response.body);
    return responder_->Respond(std::move(response));
  }
  void ExpectStream(HttpResponse head) override {
    streamed_ = true;
    responder_->ExpectStream(std::move(head));
  }
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
  // Chat's answer, and chat's events, in this API's form.
  std::string Whole(std::string_view body);
  std::string Events(std::string_view chunk);
  void Translate(std::string_view data);

  void TakeHead(Element chat);
  void AddReply(Element choice, const char* reply);
  void AddLogprobs(Element choice);
  void AddText(std::string_view text);
  void AddCall(Element call);
  void Complete();

  OutputItem& item() { return state_.output.back(); }
  void Open(OutputItem item);
  void Close();

  // What is sent of a stream; of what is answered as a whole there are no events.
  void SendOpening();
  void SendClosing();
  void SendItem(const char* type);
  void SendPart(const char* type);
  void SendResponse(const char* type, const Element* usage);
  void SendError(Element error);
  // An event up to what is its own, and its end.
  JsonWriter Event(const char* type);
  JsonWriter ItemEvent(const char* type);
  JsonWriter PartEvent(const char* type);
  void Send(const char* type, JsonWriter event);

  const std::shared_ptr<Responder> responder_;
  const ResponsesEcho echo_;

  dom::parser parser_;
  ResponseState state_;
  JsonWriter logprobs_;  // of tokens whose text is still to come
  bool streamed_ = false;
  bool begun_ = false;
  bool open_ = false;  // the last item
  bool cut_ = false;   // by the limit of tokens
  int sequence_ = 0;   // of the next event
  std::string out_;    // events that are due
};

void ResponsesAnswer::TakeHead(Element chat) {
  const std::string_view id = Text(chat, "id");
  state_.id = id.substr(id.find('-') + 1);
  state_.model = Text(chat, "model");
  state_.service_tier = Text(chat, "service_tier");
  state_.created = chat["created"].get_int64().value();
}

std::string ResponsesAnswer::Whole(std::string_view body) {
  Element chat;
  DSLA_CHECK(parser_.parse(body.data(), body.size()).get(chat) == simdjson::SUCCESS);
  TakeHead(chat);
  AddReply(chat["choices"].at(0).value(), "message");
  Complete();
  const Element usage = chat["usage"].value();
  JsonWriter out;
  WriteResponse(state_, echo_, &usage, out);
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
  if (Element error; event["error"].get(error) == simdjson::SUCCESS) return SendError(error);
  if (!std::exchange(begun_, true)) {
    TakeHead(event);
    SendResponse("response.created", nullptr);
    SendResponse("response.in_progress", nullptr);
  }
  Element choice;
  if (event["choices"].at(0).get(choice) == simdjson::SUCCESS) return AddReply(choice, "delta");
  Complete();
  const Element usage = event["usage"].value();
  SendResponse(cut_ ? "response.incomplete" : "response.completed", &usage);
}

// What goes on with a call comes before the text beside it, a call that begins behind it.
void ResponsesAnswer::AddReply(Element choice, const char* reply) {
  AddLogprobs(choice);
  const Element message = choice[reply].value();
  std::string_view text = Text(message, "content");
  dom::array calls;
  if (message["tool_calls"].get(calls) == simdjson::SUCCESS) {
    for (const Element call : calls) {
      const bool begins = !Text(call["function"].value(), "name").empty();
      if (begins) AddText(std::exchange(text, {}));
      AddCall(call);
    }
  }
  AddText(text);
  cut_ = Text(choice, "finish_reason") == "length";
}

void ResponsesAnswer::AddLogprobs(Element choice) {
  dom::array tokens;
  if (choice["logprobs"]["content"].get(tokens) != simdjson::SUCCESS) return;
  for (const Element token : tokens) logprobs_.Raw(simdjson::minify(token));
}

void ResponsesAnswer::AddText(std::string_view text) {
  if (text.empty()) return;
  if (!open_ || item().call) Open({});
  item().text += text;
  const std::string logprobs = std::exchange(logprobs_, {}).Take();
  if (!logprobs.empty()) item().logprobs.Raw(logprobs);
  if (!streamed_) return;
  JsonWriter event = PartEvent("response.output_text.delta");
  event.Field("delta", text).Key("logprobs").BeginArray().Raw(logprobs).EndArray();
  Send("response.output_text.delta", std::move(event));
}

void ResponsesAnswer::AddCall(Element call) {
  const Element function = call["function"].value();
  const std::string_view name = Text(function, "name"), arguments = Text(function, "arguments");
  if (!name.empty()) {
    Open({.call = true, .call_id = std::string(Text(call, "id")), .name = std::string(name)});
  }
  DSLA_CHECK(open_ && item().call);
  item().text += arguments;
  if (!streamed_ || arguments.empty()) return;
  JsonWriter event = ItemEvent("response.function_call_arguments.delta");
  event.Field("delta", arguments);
  Send("response.function_call_arguments.delta", std::move(event));
}

// There is an item in any case: a reply of nothing is a message of no text.
void ResponsesAnswer::Complete() {
  if (state_.output.empty()) Open({});
  Close();
  state_.status = cut_ ? Status::kIncomplete : Status::kCompleted;
}

void ResponsesAnswer::Open(OutputItem item) {
  Close();
  item.id = fmt::format("{}_{}_{}", item.call ? "fc" : "msg", state_.id, state_.output.size());
  state_.output.push_back(std::move(item));
  open_ = true;
  if (streamed_) SendOpening();
}

void ResponsesAnswer::Close() {
  if (!std::exchange(open_, false)) return;
  const std::string logprobs = std::exchange(logprobs_, {}).Take();
  if (!logprobs.empty()) item().logprobs.Raw(logprobs);
  // A call that the limit, or other text, cuts off has arguments that are no JSON.
  const bool cut = item().call ? !IsJsonObject(item().text) : cut_;
  item().status = cut ? Status::kIncomplete : Status::kCompleted;
  if (streamed_) SendClosing();
}

void ResponsesAnswer::SendOpening() {
  SendItem("response.output_item.added");
  if (!item().call) SendPart("response.content_part.added");
}

void ResponsesAnswer::SendClosing() {
  if (item().call) {
    JsonWriter event = ItemEvent("response.function_call_arguments.done");
    event.Field("name", item().name).Field("arguments", item().text);
    Send("response.function_call_arguments.done", std::move(event));
  } else {
    JsonWriter event = PartEvent("response.output_text.done");
    event.Field("text", item().text);
    event.Key("logprobs").BeginArray().Raw(item().logprobs.str()).EndArray();
    Send("response.output_text.done", std::move(event));
    SendPart("response.content_part.done");
  }
  SendItem("response.output_item.done");
}

void ResponsesAnswer::SendItem(const char* type) {
  JsonWriter event = Event(type);
  event.Field("output_index", static_cast<int64_t>(state_.output.size()) - 1).Key("item");
  WriteItem(item(), event);
  Send(type, std::move(event));
}

void ResponsesAnswer::SendPart(const char* type) {
  JsonWriter event = PartEvent(type);
  event.Key("part");
  WritePart(item(), event);
  Send(type, std::move(event));
}

void ResponsesAnswer::SendResponse(const char* type, const Element* usage) {
  JsonWriter event = Event(type);
  event.Key("response");
  WriteResponse(state_, echo_, usage, event);
  Send(type, std::move(event));
}

// The fields that the API's event has, and the error as the server's others are: clients raise it.
void ResponsesAnswer::SendError(Element error) {
  JsonWriter event = Event("error");
  event.Field("message", Text(error, "message"));
  for (const char* name : {"code", "param"}) event.Key(name).Raw(simdjson::minify(error[name]));
  event.Key("error").Raw(simdjson::minify(error));
  Send("error", std::move(event));
}

JsonWriter ResponsesAnswer::Event(const char* type) {
  JsonWriter out;
  out.BeginObject().Field("type", type).Field("sequence_number", sequence_++);
  return out;
}

JsonWriter ResponsesAnswer::ItemEvent(const char* type) {
  JsonWriter out = Event(type);
  out.Field("item_id", item().id);
  out.Field("output_index", static_cast<int64_t>(state_.output.size()) - 1);
  return out;
}

JsonWriter ResponsesAnswer::PartEvent(const char* type) {
  JsonWriter out = ItemEvent(type);
  out.Field("content_index", 0);
  return out;
}

void ResponsesAnswer::Send(const char* type, JsonWriter event) {
  event.EndObject();
  out_ += fmt::format("event: {}\n{}{}{}", type, kData, event.str(), kEnd);
}

}  // namespace

std::shared_ptr<Responder> ResponsesOver(std::shared_ptr<Responder> responder, ResponsesEcho echo) {
  return std::make_shared<ResponsesAnswer>(std::move(responder), std::move(echo));
}

}  // namespace dsla::openai
