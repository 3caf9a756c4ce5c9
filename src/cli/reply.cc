#include "cli/reply.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>

#include "base/clock.h"
#include "eval/cost.h"

namespace dsla {
namespace {

std::atomic<bool> interrupted{false};

// Control-C ends the answer while there is one of these, elsewhere the program.
class InterruptCatcher {
 public:
  InterruptCatcher() {
    interrupted = false;
    before_ = std::signal(SIGINT, [](int) { interrupted = true; });
  }
  ~InterruptCatcher() { std::signal(SIGINT, before_); }
  InterruptCatcher(const InterruptCatcher&) = delete;
  InterruptCatcher& operator=(const InterruptCatcher&) = delete;

 private:
  void (*before_)(int);
};

// The cache ran out; the message has its figures.
Status NamingTheOption(const Status& status, const SessionOptions& options) {
  if (status.code() != StatusCode::kResourceExhausted) return status;
  return ResourceExhausted("{} (see --memory{})", status.message(),
                           options.auto_raise ? "" : " and --tier auto");
}

double PerSecond(double count, double seconds) { return seconds > 0 ? count / seconds : 0; }

}  // namespace

Expected<Reply> Answer(const LoadedModel& loaded, CachePool& pool,
                       std::unique_ptr<Session>& session, const SessionOptions& session_options,
                       const std::vector<int32_t>& prompt, GenerateOptions options, bool chat,
                       bool stream) {
  const InterruptCatcher catcher;
  Reply reply;
  const double start = NowSeconds();
  // States cannot be rewound: a conversation that does not continue what is cached is read anew, at
  // the level it had.
  const bool continues =
      session != nullptr && session->tokens().size() < prompt.size() &&
      std::equal(session->tokens().begin(), session->tokens().end(), prompt.begin());
  if (!continues) {
    SessionOptions anew = session_options;
    if (session != nullptr) anew.level = std::max(anew.level, session->level());
    session.reset();
    session = std::make_unique<Session>(loaded.model.get(), &pool, loaded.ctx, anew);
  }
  reply.cached_tokens = static_cast<int>(session->tokens().size());
  reply.prompt_tokens = static_cast<int>(prompt.size());
  const int todo = reply.prompt_tokens - reply.cached_tokens;
  const bool progress =
      stream && ::isatty(STDERR_FILENO) != 0 && todo > session_options.prefill_chunk;
  const Status prefilled =
      session->Prefill(std::span(prompt).subspan(reply.cached_tokens), [&](int done) {
        if (progress) {
          fmt::print(stderr, "\rreading {} of {} tokens ({:.0f}/s)", done, todo,
                     done / (NowSeconds() - start));
          std::fflush(stderr);
        }
        return !interrupted.load();
      });
  if (progress) fmt::print(stderr, "\r\033[K");
  if (!prefilled.ok()) return NamingTheOption(prefilled, session_options);
  reply.prefill_seconds = NowSeconds() - start;

  IncrementalDecoder decoder(*loaded.tokenizer, {.skip_special = true, .continues = !chat});
  const auto emit = [&](const std::string& text) {
    reply.text += text;
    if (!stream) return;
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  };
  options.on_token = [&](int32_t token, float) {
    emit(decoder.Push(token));
    return !interrupted.load();
  };
  auto result = session->Generate(options);
  emit(decoder.Finish());
  if (stream) {
    std::fputs("\n", stdout);
    std::fflush(stdout);  // what goes to standard error comes after it
  }
  if (!result.ok()) return NamingTheOption(result.status(), session_options);
  reply.result = std::move(result).value();
  reply.first_token_seconds = reply.prefill_seconds + reply.result.seconds_to_first_token;
  return reply;
}

void PrintStats(const LoadedModel& loaded, const Session& session, const Reply& reply) {
  const GenerateResult& result = reply.result;
  const int read = reply.prompt_tokens - reply.cached_tokens;
  const CacheBytes cache = session.cache_bytes();
  fmt::print(stderr, "\nprompt  {} tokens", reply.prompt_tokens);
  if (reply.cached_tokens > 0) fmt::print(stderr, " ({} cached)", reply.cached_tokens);
  fmt::print(stderr, ", read in {:.2f} s ({:.0f} tokens/s); first token after {:.2f} s\n",
             reply.prefill_seconds, PerSecond(read, reply.prefill_seconds),
             reply.first_token_seconds);
  fmt::print(stderr, "reply   {} tokens, {:.1f} tokens/s; ended by {}\n", result.tokens.size(),
             PerSecond(result.decode_steps, result.decode_seconds), Name(result.finish));
  fmt::print(stderr, "cache   {} = KV pages {} + states {}; level 0 would hold {}\n",
             FormatBytes(cache.total()), FormatBytes(cache.pages), FormatBytes(cache.states),
             FormatBytes(CacheBytesAt(*loaded.model, 0, session.length())));
  fmt::print(stderr, "level   {} of {}", session.level(), loaded.model->max_level());
  for (const LevelChange& change : session.level_changes()) {
    fmt::print(stderr, "; raised {} -> {} at token {} in {:.0f} ms", change.from, change.to,
               change.position, change.seconds * 1e3);
  }
  fmt::print(stderr, "\n");
}

nlohmann::json ReplyJson(const LoadedModel& loaded, const Session& session, const Reply& reply) {
  const GenerateResult& result = reply.result;
  const CacheBytes cache = session.cache_bytes();
  nlohmann::json changes = nlohmann::json::array();
  for (const LevelChange& change : session.level_changes()) {
    changes.push_back({{"position", change.position},
                       {"from", change.from},
                       {"to", change.to},
                       {"fold_seconds", change.seconds}});
  }
  return {{"text", reply.text},
          {"tokens", result.tokens},
          {"finish_reason", Name(result.finish)},
          {"usage",
           {{"prompt_tokens", reply.prompt_tokens},
            {"cached_tokens", reply.cached_tokens},
            {"completion_tokens", result.tokens.size()}}},
          {"level", session.level()},
          {"level_changes", std::move(changes)},
          {"stats",
           {{"load_seconds", loaded.load_seconds},
            {"prefill_seconds", reply.prefill_seconds},
            {"prefill_tokens_per_second",
             PerSecond(reply.prompt_tokens - reply.cached_tokens, reply.prefill_seconds)},
            {"first_token_seconds", reply.first_token_seconds},
            {"decode_tokens_per_second", PerSecond(result.decode_steps, result.decode_seconds)},
            {"cache_bytes",
             {{"pages", cache.pages}, {"states", cache.states}, {"total", cache.total()}}},
            {"level0_cache_bytes", CacheBytesAt(*loaded.model, 0, session.length())}}}};
}

}  // namespace dsla
