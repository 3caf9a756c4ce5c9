// One answer of `dsla run`: what it was, what it took, and how it is shown.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/model_args.h"
#include "engine/session.h"

namespace dsla {

struct Reply {
  std::string text;
  GenerateResult result;
  int prompt_tokens = 0;
  int cached_tokens = 0;  // of the prompt, from the turns before
  double prefill_seconds = 0;
  double first_token_seconds = 0;
};

// Runs `prompt` (a whole conversation as ids), reusing what the session already holds of it, and,
// if `stream`, prints the answer to standard output as it comes. Control-C ends the answer alone.
// `session` is made anew, at its level, where it does not hold a prefix of the prompt. `chat`: the
// answer's text stands for itself; else it goes on from the prompt's, with a leading space where it
// has one.
Expected<Reply> Answer(const LoadedModel& loaded, CachePool& pool,
                       std::unique_ptr<Session>& session, const SessionOptions& session_options,
                       const std::vector<int32_t>& prompt, GenerateOptions options, bool chat,
                       bool stream);

// Times, rates, cache bytes and levels, to standard error.
void PrintStats(const LoadedModel& loaded, const Session& session, const Reply& reply);

nlohmann::json ReplyJson(const LoadedModel& loaded, const Session& session, const Reply& reply);

}  // namespace dsla
