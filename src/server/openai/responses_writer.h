// The objects of the Responses API as JSON.
#pragma once

#include <simdjson.h>

#include <cstdint>
#include <string>
#include <vector>

#include "server/json_writer.h"
#include "server/openai/responses.h"

namespace dsla::openai {

// An item of a response's output: a message of one part, or a call.
struct OutputItem {
  enum class Status { kInProgress, kCompleted, kIncomplete };
  bool call = false;
  std::string id = {};
  Status status = Status::kInProgress;
  std::string text = {};                // of the message, or the arguments of the call
  std::string call_id = {}, name = {};  // of the call
  JsonWriter logprobs = {};             // of the message's tokens: elements of an array
};

struct ResponseState {
  std::string id, model, service_tier;  // the id without its prefix
  int64_t created = 0;                  // seconds since 1970
  OutputItem::Status status = OutputItem::Status::kInProgress;
  std::vector<OutputItem> output;
};

// A message's one part.
void WritePart(const OutputItem& message, JsonWriter& out);
// Without what it holds while it is in progress.
void WriteItem(const OutputItem& item, JsonWriter& out);
// usage: chat's; null while the response is in progress, which has no output then.
void WriteResponse(const ResponseState& state, const ResponsesEcho& echo,
                   const simdjson::dom::element* usage, JsonWriter& out);

}  // namespace dsla::openai
