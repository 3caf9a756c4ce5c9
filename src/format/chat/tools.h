// Function calling, as OpenAI's API has it: what a model may call and what it calls.
#pragma once

#include <string>
#include <vector>

namespace dsla {

struct Tool {
  std::string name;
  std::string json;        // {"type":"function","function":{...}}, as the client wrote it
  std::string parameters;  // the JSON schema of its arguments; empty: none was given
  bool strict = false;     // its arguments are made to follow their schema
};

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments;  // a JSON object
  bool operator==(const ToolCall&) const = default;
};

}  // namespace dsla
