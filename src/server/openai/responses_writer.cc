#include "server/openai/responses_writer.h"

namespace dsla::openai {
namespace {

using simdjson::dom::element;

const char* Name(OutputItem::Status status) {
  switch (status) {
    case OutputItem::Status::kInProgress:
      break;
    case OutputItem::Status::kCompleted:
      return "completed";
    case OutputItem::Status::kIncomplete:
      return "incomplete";
  }
  return "in_progress";
}

int64_t Count(element object, const char* name) {
  int64_t count = 0;
  [[maybe_unused]] const auto absent = object[name].get(count);
  return count;
}

void WriteUsage(element usage, JsonWriter& out) {
  const int64_t input = Count(usage, "prompt_tokens"), output = Count(usage, "completion_tokens"),
                cached = Count(usage["prompt_tokens_details"].value(), "cached_tokens");
  out.BeginObject().Field("input_tokens", input);
  out.Key("input_tokens_details").BeginObject().Field("cached_tokens", cached).EndObject();
  out.Field("output_tokens", output);
  out.Key("output_tokens_details").BeginObject().Field("reasoning_tokens", 0).EndObject();
  out.Field("total_tokens", input + output);
  out.Key("dsla").Raw(simdjson::minify(usage["dsla"])).EndObject();
}

void WriteEcho(const ResponsesEcho& echo, JsonWriter& out) {
  out.Key("instructions");
  if (echo.instructions) {
    out.String(*echo.instructions);
  } else {
    out.Null();
  }
  out.Key("max_output_tokens");
  if (echo.max_tokens) {
    out.Int(*echo.max_tokens);
  } else {
    out.Null();
  }
  out.Key("temperature").Float(echo.temperature).Key("top_p").Float(echo.top_p);
  out.Field("top_logprobs", echo.top_logprobs).Field("parallel_tool_calls", echo.parallel);
  out.Key("tools").Raw(echo.tools).Key("tool_choice").Raw(echo.tool_choice);
  out.Key("text").BeginObject().Key("format").Raw(echo.format);
  out.Field("verbosity", "medium").EndObject().Key("metadata").Raw(echo.metadata);
}

}  // namespace

void WritePart(const OutputItem& message, JsonWriter& out) {
  out.BeginObject().Field("type", "output_text").Field("text", message.text);
  out.Key("annotations").BeginArray().EndArray();
  out.Key("logprobs").BeginArray().Raw(message.logprobs.str()).EndArray().EndObject();
}

void WriteItem(const OutputItem& item, JsonWriter& out) {
  out.BeginObject().Field("id", item.id).Field("type", item.call ? "function_call" : "message");
  out.Field("status", Name(item.status));
  if (item.call) {
    out.Field("call_id", item.call_id).Field("name", item.name).Field("arguments", item.text);
  } else {
    out.Field("role", "assistant").Key("content").BeginArray();
    if (item.status != OutputItem::Status::kInProgress) WritePart(item, out);
    out.EndArray();
  }
  out.EndObject();
}

void WriteResponse(const ResponseState& state, const ResponsesEcho& echo, const element* usage,
                   JsonWriter& out) {
  out.BeginObject().Field("id", "resp_" + state.id).Field("object", "response");
  out.Field("created_at", state.created).Field("status", Name(state.status));
  out.Field("background", false).Key("error").Null().Key("incomplete_details");
  if (state.status == OutputItem::Status::kIncomplete) {
    out.BeginObject().Field("reason", "max_output_tokens").EndObject();
  } else {
    out.Null();
  }
  out.Field("model", state.model).Field("service_tier", state.service_tier);
  WriteEcho(echo, out);
  out.Key("previous_response_id").Null().Field("store", false).Field("truncation", "disabled");
  out.Key("reasoning").BeginObject().Key("effort").Null().Key("summary").Null().EndObject();
  out.Key("output").BeginArray();
  if (usage) {
    for (const OutputItem& item : state.output) WriteItem(item, out);
  }
  out.EndArray().Key("usage");
  if (usage) {
    WriteUsage(*usage, out);
  } else {
    out.Null();
  }
  out.EndObject();
}

}  // namespace dsla::openai
