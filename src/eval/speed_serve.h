// The speed of serving: several requests at once through the engine, as the server runs them, but
// without HTTP and at one level. Their prompts share no prefix.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "format/tokenizer/tokenizer.h"
#include "model/hybrid_model.h"

namespace dsla {

struct ServeOptions {
  std::vector<int> levels;
  std::vector<int> prompts;  // tokens of each request's prompt
  int requests = 8;          // sent at the same time
  int reply_tokens = 64;     // of each, greedy, whatever they are
  int repetitions = 3;
  int64_t memory_bytes = 0;  // of the cache
};

// Times in seconds.
struct ServeSpeed {
  int level = 0, prompt_tokens = 0;
  std::vector<double> seconds;      // of each repetition, until the last request has ended
  std::vector<double> first_token;  // of every request, from its sending
  std::vector<double> per_token;    // of every request, mean after the first; none for one token
};

// In the order of prompts, ascending, then levels; repetitions alternate between levels. `text` is
// repeated where it is too short, and request i begins with its token i. kResourceExhausted and
// kInvalidArgument where a request can never run.
Expected<std::vector<ServeSpeed>> MeasureServe(
    const ExecContext& ctx, const HybridModel& model, const Tokenizer& tokenizer,
    std::span<const int32_t> text, const ServeOptions& options,
    const std::function<void(const std::string&)>& progress = {});

}  // namespace dsla
