#include "eval/speed_serve.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "adapt/make_policy.h"
#include "base/clock.h"
#include "engine/engine.h"

namespace dsla {
namespace {

// Keeps the results of all requests of a run.
class Results {
 public:
  class Sink : public RequestSink {
   public:
    explicit Sink(Results* results) : results_(results) {}
    void OnPromptLogprobs(std::vector<PromptLogprob>) override {}
    void OnToken(TokenOutput) override {}
    void OnFinish(const RequestResult& result) override { results_->Add(result); }

   private:
    Results* results_;
  };

  std::vector<RequestResult> Wait(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return results_.size() == count; });
    return std::move(results_);
  }

 private:
  void Add(const RequestResult& result) {
    const std::lock_guard lock(mutex_);
    results_.push_back(result);
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<RequestResult> results_;
};

std::vector<int32_t> Prompt(std::span<const int32_t> text, size_t first, int tokens) {
  std::vector<int32_t> prompt(static_cast<size_t>(tokens));
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = text[(first + i) % text.size()];
  return prompt;
}

// One run: all requests sent, until the last has ended.
Status Run(Engine& engine, std::span<const int32_t> text, const ServeOptions& options,
           ServeSpeed* speed) {
  Results results;
  const double begin = NowSeconds();
  size_t sent = 0;
  std::optional<Rejection> rejection;
  for (; sent < static_cast<size_t>(options.requests) && !rejection; ++sent) {
    Request request;
    request.id = fmt::format("{}", sent);
    request.prompt = Prompt(text, sent, speed->prompt_tokens);
    request.sampling.temperature = 0;
    request.max_tokens = options.reply_tokens;
    request.ignore_eos = true;
    request.tier = Tier::kExact;
    request.level = speed->level;
    rejection = engine.Submit(std::move(request), std::make_shared<Results::Sink>(&results));
  }
  const auto ended = results.Wait(sent - (rejection ? 1 : 0));
  if (rejection)
    return ResourceExhausted("a prompt of {} tokens: {}", speed->prompt_tokens, rejection->message);
  speed->seconds.push_back(NowSeconds() - begin);
  for (const RequestResult& result : ended) {
    DSLA_RETURN_IF_ERROR(result.status);
    speed->first_token.push_back(result.first_token_seconds);
    if (result.generated_tokens > 1)
      speed->per_token.push_back((result.total_seconds - result.first_token_seconds) /
                                 (result.generated_tokens - 1));
  }
  return Status::Ok();
}

}  // namespace

Expected<std::vector<ServeSpeed>> MeasureServe(
    const ExecContext& ctx, const HybridModel& model, const Tokenizer& tokenizer,
    std::span<const int32_t> text, const ServeOptions& options,
    const std::function<void(const std::string&)>& progress) {
  if (text.empty()) return InvalidArgument("the text is empty");
  for (const int level : options.levels) {
    if (level < 0 || level > model.max_level())
      return InvalidArgument("level {}: the adapter has levels 0 to {}", level, model.max_level());
  }
  PolicyOptions policy_options;
  policy_options.policy = "fixed";
  policy_options.layers = model.config().L;
  DSLA_ASSIGN_OR_RETURN(auto policy, MakePolicy(policy_options));
  EngineOptions engine_options;
  engine_options.memory_bytes = options.memory_bytes;
  engine_options.prefix_cache = false;
  engine_options.max_queued = std::max(engine_options.max_queued, options.requests);
  DSLA_ASSIGN_OR_RETURN(const auto engine,
                        Engine::Create(&model, &tokenizer, ctx, engine_options, std::move(policy)));
  std::vector<int> prompts = options.prompts;
  std::ranges::sort(prompts);
  std::vector<ServeSpeed> speeds;
  for (const int tokens : prompts) {
    const size_t first = speeds.size();
    for (const int level : options.levels)
      speeds.push_back({.level = level,
                        .prompt_tokens = std::max(tokens, 1),
                        .seconds = {},
                        .first_token = {},
                        .per_token = {}});
    for (int repetition = 0; repetition < options.repetitions; ++repetition) {
      for (size_t i = first; i < speeds.size(); ++i) {
        if (progress)
          progress(fmt::format("serving {} prompts of {} tokens at level {}, run {} of {}",
                               options.requests, speeds[i].prompt_tokens, speeds[i].level,
                               repetition + 1, options.repetitions));
        DSLA_RETURN_IF_ERROR(Run(*engine, text, options, &speeds[i]));
      }
    }
  }
  return speeds;
}

}  // namespace dsla
