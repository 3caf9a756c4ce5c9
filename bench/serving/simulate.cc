// Plays a trace of trace.py in virtual time through the scheduler, the prefix cache and the
// policies that serve, with a cost model in place of the model: what a change of a policy is worth,
// in a second and without the noise of a machine.
//
//   dsla serve --cost-model cost.json ...    measures the cost model of this machine
//   bench/serving/trace.py --seed 2 --out trace.json
//   build/release/bench/serving/simulate trace.json cost.json --memory 256
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "adapt/cost_correction.h"
#include "adapt/make_policy.h"
#include "base/mapped_file.h"
#include "base/quantile.h"
#include "engine/scheduler.h"

namespace dsla {
namespace {

struct Options {
  std::string trace, cost;
  int layers = 30, level = 0, max_level = 22,
      max_batch_tokens = SchedulerOptions().max_batch_tokens;
  double speed = 1;
  double memory = 256;                                    // MiB
  int64_t page_bytes = 64 * 768, slot_bytes = 400 * 768;  // of one layer, SmolLM2-135M's
  std::string texts = "/usr/share/common-licenses";
};

constexpr double kBytesPerToken = 4.7;  // of the texts

struct Request {
  double arrival = 0;
  std::vector<int32_t> prompt;
  int reply = 0;
};

// Texts become runs of numbers: what counts is how long they are and what they share.
Expected<std::vector<Request>> ReadTrace(const Options& options) {
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(options.trace, 64 << 20));
  std::vector<Request> requests;
  std::map<std::string, int32_t> first_token;  // of each text
  int32_t next = 0;
  try {
    const nlohmann::json trace = nlohmann::json::parse(text);
    for (const auto& from : trace.at("burst")) {
      Request request{.arrival = from.at("at").get<double>() / options.speed,
                      .prompt = {},
                      .reply = from.at("max_tokens")};
      double bytes = 0;
      if (from.contains("text")) {
        const std::string names = from.at("text");
        for (size_t begin = 0; begin < names.size();) {
          const size_t end = std::min(names.find('+', begin), names.size());
          bytes += static_cast<double>(
              std::filesystem::file_size(options.texts + "/" + names.substr(begin, end - begin)));
          begin = end + 1;
        }
        const auto tokens = static_cast<int32_t>(bytes / kBytesPerToken);
        const auto [at, is_new] = first_token.try_emplace(names, next);
        if (is_new) next += tokens;
        for (int32_t i = 0; i < tokens; ++i) request.prompt.push_back(at->second + i);
      }
      const std::string own = from.at("question").get<std::string>() + from.value("quote", "");
      // A chat template's words, and what nobody else asks.
      const size_t words = from.value("words", size_t{0});
      for (size_t i = 0; i < 30 + own.size() / 5 + words; ++i) request.prompt.push_back(next++);
      requests.push_back(std::move(request));
    }
  } catch (const std::exception& error) {
    return DataLoss("'{}': {}", options.trace, error.what());
  }
  return requests;
}

class Simulation : public CacheOps {
 public:
  Simulation(const Options& options, const CostModel& cost, const std::vector<Request>& requests,
             std::unique_ptr<LevelPolicy> policy)
      : cost_(cost),
        requests_(requests),
        policy_(std::move(policy)),
        ledger_({.budget_bytes = static_cast<int64_t>(options.memory * (1 << 20)),
                 .page_bytes = options.page_bytes,
                 .slot_bytes = options.slot_bytes}),
        scheduler_(&ledger_, this,
                   {.layers = options.layers,
                    .max_level = options.layers,
                    .top_level = options.max_level,
                    .max_batch_tokens = options.max_batch_tokens,
                    .adapter_id = "simulated"}) {
    for (int i = 0; i < options.layers; ++i) ladder_.push_back(i);
    scheduler_.set_auto_max_level(options.max_level);
  }

  void Run() {
    while (next_ < requests_.size() || !scheduler_.idle()) {
      for (; next_ < requests_.size() && requests_[next_].arrival <= now_; ++next_) {
        const Request& r = requests_[next_];
        const int64_t id = scheduler_.Add(
            {.prompt = r.prompt, .max_tokens = r.reply, .cache_salt = "", .arrival = r.arrival});
        states_[id] = {.request = &r};
        tokens_ += static_cast<int64_t>(r.prompt.size()) + r.reply;
        prompt_tokens_ += static_cast<int64_t>(r.prompt.size());
      }
      Decide();
      const StepPlan plan = scheduler_.Plan(now_);
      for (const EndedSequence& ended : plan.ended) Finish(ended);
      if (!plan.rows.empty())
        Step(plan);
      else
        now_ += kIdle;
    }
  }

  void Print(const char* name) const {
    std::vector<double> ttft, tpot;
    for (const auto& [id, s] : states_) {
      ttft.push_back(s.first - s.request->arrival);
      tpot.push_back((s.last - s.first) / std::max(1, s.request->reply - 1));
    }
    std::printf("%-8s %8.1f %9.0f %9.2f %9.2f %9.0f %9.0f %8.0f%% %6d %5lld\n", name, now_,
                static_cast<double>(tokens_) / now_, Quantile(ttft, .5), Quantile(ttft, .95),
                1e3 * Quantile(tpot, .5), 1e3 * Quantile(tpot, .95),
                100. * static_cast<double>(cached_) / static_cast<double>(prompt_tokens_), highest_,
                static_cast<long long>(scheduler_.preemptions()));
  }

  SequenceCache NewSequence(int level) override {
    return SequenceCache(&ledger_, ladder_, SchedulerOptions().page_size, level);
  }
  Status Raise(SequenceCache& cache, int level) override {
    const int from = cache.level();
    for (int next = from + 1; next <= level; ++next) {
      DSLA_RETURN_IF_ERROR(cache.BeginRaise(next).status());
      cache.CommitRaise();
    }
    const double seconds = cost_.FoldSeconds(from, level, cache.length());
    now_ += seconds;
    policy_->ObserveFold({.from = from, .to = level, .length = cache.length(), .seconds = seconds});
    return Status::Ok();
  }
  Status CopySlots(std::span<const int32_t>, std::span<const int32_t>) override {
    return Status::Ok();
  }

 private:
  struct State {
    const Request* request = nullptr;
    double first = -1, last = 0;  // of its tokens, when
    int written = 0;
  };
  static constexpr double kIdle = 0.05;

  void Decide() {
    LoadSnapshot load = scheduler_.Snapshot();
    load.now = now_;
    const LevelDecision decision = policy_->Decide(load);
    scheduler_.set_prefill_limit(decision.prefill_limit);
    scheduler_.set_short_prompt(decision.short_prompt);
    scheduler_.set_target_level(decision.target);
    highest_ = std::max(highest_, decision.target);
    // Where there is no room for it, things go on as they are.
    for (const LevelDecision::Raise& raise : decision.raises)
      static_cast<void>(scheduler_.Raise(raise.id, raise.level));
  }

  void Step(const StepPlan& plan) {
    StepTime step = StepTimeOf(plan);
    const StepParts parts = PredictStep(cost_, step);
    step.seconds = parts.prefill + parts.decode;
    now_ += step.seconds;
    policy_->ObserveStep(step);
    std::vector<RowResult> results(plan.rows.size());
    for (size_t i = 0; i < results.size(); ++i) {
      if (!plan.rows[i].samples) continue;
      State& s = states_.at(plan.rows[i].id);
      if (s.first < 0) {
        s.first = now_;
        policy_->ObserveFirstToken({.now = now_,
                                    .seconds = now_ - s.request->arrival,
                                    .prompt_tokens = static_cast<int>(s.request->prompt.size()),
                                    .cached_tokens = scheduler_.cached_tokens(plan.rows[i].id)});
      } else {
        policy_->ObserveToken(now_, now_ - s.last);
      }
      s.last = now_;
      results[i] = {.token = 0, .finish = ++s.written == s.request->reply};
    }
    for (const EndedSequence& ended : scheduler_.Commit(results)) Finish(ended);
  }

  void Finish(const EndedSequence& ended) {
    DSLA_CHECK(ended.status.ok());
    cached_ += ended.cached_tokens;
  }

  const CostModel& cost_;
  const std::vector<Request>& requests_;
  const std::unique_ptr<LevelPolicy> policy_;
  Ledger ledger_;
  Scheduler scheduler_;
  std::vector<int> ladder_;
  std::map<int64_t, State> states_;
  double now_ = 0;
  size_t next_ = 0;
  int highest_ = 0;
  int64_t tokens_ = 0, prompt_tokens_ = 0, cached_ = 0;
};

Status Simulate(const Options& options) {
  DSLA_ASSIGN_OR_RETURN(const std::vector<Request> requests, ReadTrace(options));
  DSLA_ASSIGN_OR_RETURN(const std::string file, ReadTextFile(options.cost, 1 << 20));
  const auto json = nlohmann::json::parse(file, nullptr, false);
  if (!json.is_object() || !json.contains("cost_model"))
    return DataLoss("'{}' is not what `dsla serve --cost-model` writes", options.cost);
  DSLA_ASSIGN_OR_RETURN(const CostModel cost, CostModel::FromJson(json["cost_model"].dump()));
  std::printf("%-8s %8s %9s %9s %9s %9s %9s %9s %6s %5s\n", "", "burst, s", "tokens/s", "TTFT p50",
              "p95, s", "TPOT p50", "p95, ms", "cached", "level", "pre-empted");
  for (const auto& [name, policy] :
       {std::pair{"fixed", "fixed"}, {"paper", "paper"}, {"ours", "slo"}}) {
    PolicyOptions of;
    of.policy = policy;
    of.layers = options.layers;
    of.max_level = options.max_level;
    of.fixed_level = options.level;
    of.cost.model = cost;
    of.slo.prefill_chunk = options.max_batch_tokens;
    DSLA_ASSIGN_OR_RETURN(auto made, MakePolicy(of));
    Simulation simulation(options, cost, requests, std::move(made));
    simulation.Run();
    simulation.Print(name);
  }
  return Status::Ok();
}

}  // namespace
}  // namespace dsla

int main(int argc, char** argv) {
  dsla::Options options;
  CLI::App app("Plays a trace through scheduler and policies in virtual time.");
  app.add_option("trace", options.trace, "of bench/serving/trace.py")->required();
  app.add_option("cost", options.cost, "of dsla serve --cost-model")->required();
  app.add_option("--memory", options.memory, "cache memory, MiB")->capture_default_str();
  app.add_option("--level", options.level, "of the first line")->capture_default_str();
  app.add_option("--max-level", options.max_level, "of tier auto")->capture_default_str();
  app.add_option("--layers", options.layers, "of the model")->capture_default_str();
  app.add_option("--page-bytes", options.page_bytes, "of one layer")->capture_default_str();
  app.add_option("--slot-bytes", options.slot_bytes, "of one layer")->capture_default_str();
  app.add_option("--max-batch-tokens", options.max_batch_tokens, "of a step")
      ->capture_default_str();
  app.add_option("--speed", options.speed, "requests come so many times as fast")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--texts", options.texts, "folder of the texts")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const dsla::Status status = dsla::Simulate(options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "simulate: %s\n", status.message().c_str());
  return 1;
}
