#include "engine/engine.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "engine/engine_checks.h"
#include "engine/engine_inbox.h"
#include "engine/worker.h"

namespace dsla {
namespace {

class EngineImpl : public Engine {
 public:
  EngineImpl(const HybridModel* model, const Tokenizer* tokenizer, const EngineOptions& options)
      : model_(model),
        tokenizer_(tokenizer),
        limits_{.V = model->config().V,
                .max_positions = model->max_positions(),
                .max_level = model->max_level()},
        inbox_({.max_queued = options.max_queued,
                .max_queued_tokens = options.max_queued_tokens,
                .shared = options.queue}) {
    end_ids_ = model->config().eos_ids;
    if (const auto eos = tokenizer->eos_id()) end_ids_.push_back(*eos);
    std::erase_if(end_ids_, [&](int32_t id) { return id < 0 || id >= limits_.V; });
  }

  ~EngineImpl() override {
    inbox_.Stop();
    if (thread_.joinable()) thread_.join();
  }

  Status Start(const ExecContext& ctx, const EngineOptions& options,
               std::unique_ptr<LevelPolicy> policy, FaultInjector fault_injector) {
    DSLA_ASSIGN_OR_RETURN(worker_, Worker::Create(model_, ctx, options, std::move(policy), &inbox_,
                                                  std::move(fault_injector)));
    thread_ = std::thread([this] { worker_->Run(); });
    return Status::Ok();
  }

  std::optional<Rejection> SubmitAll(std::vector<Submission> group) override {
    DSLA_CHECK(!group.empty());
    for (size_t i = 0; i < group.size(); ++i) {
      DSLA_CHECK(group[i].sink != nullptr);
      auto wrong = Check(group[i].request);
      if (!wrong) continue;
      wrong->index = i;
      return wrong;
    }
    std::vector<std::unique_ptr<ActiveRequest>> requests;
    for (Submission& submission : group) {
      requests.push_back(NewRequest(std::move(submission)));
      const Status begun = BeginGrammar(*requests.back());
      if (begun.ok()) continue;
      return Rejection{.kind = begun.code() == StatusCode::kInvalidArgument
                                   ? Rejection::Kind::kInvalid
                                   : Rejection::Kind::kQueueFull,
                       .message = begun.message(),
                       .param = "grammar",
                       .index = requests.size() - 1};
    }
    return inbox_.Put(std::move(requests));
  }

  std::optional<Rejection> Check(const Request& request) const override {
    if (auto wrong = CheckRequest(request, limits_)) return wrong;
    const Status fits = worker_->CanEverFit(request);
    if (fits.ok()) return std::nullopt;
    return Rejection{.kind = Rejection::Kind::kTooLargeForCache, .message = fits.message()};
  }

  int LongestReply(int64_t prompt_tokens, Tier tier, int level) const override {
    return static_cast<int>(
        worker_->LongestReply(prompt_tokens, limits_.max_positions - prompt_tokens, tier, level));
  }

  std::optional<Rejection> RefusesAll() const override { return inbox_.RefusesAll(); }
  void Cancel(const std::string& id) override { inbox_.Cancel(id); }
  void CancelAll() override { inbox_.CancelAll(); }
  EngineState state() const override { return worker_->state(); }
  bool device_failed() const override { return worker_->device_failed(); }
  void SetFinishObserver(FinishObserver observer) override {
    worker_->SetFinishObserver(std::move(observer));
  }
  void SetPolicy(const PolicyMaker& make) override {
    std::unique_ptr<LevelPolicy> policy = make(0);
    DSLA_CHECK(policy != nullptr);
    inbox_.SetPolicy(std::move(policy));
  }
  void SetMaxLevel(int level) override {
    DSLA_CHECK(level >= 0 && level <= limits_.max_level);
    inbox_.SetMaxLevel(level);
  }
  void Drain() override { inbox_.Drain(); }

 private:
  std::unique_ptr<ActiveRequest> NewRequest(Submission submission) const {
    auto active = std::make_unique<ActiveRequest>(
        std::move(submission.request), std::move(submission.sink), *tokenizer_, limits_.V);
    std::vector<int32_t>& end_ids = active->end_ids;
    end_ids = active->request.stop_ids;
    if (!active->request.ignore_eos)
      end_ids.insert(end_ids.end(), end_ids_.begin(), end_ids_.end());
    std::sort(end_ids.begin(), end_ids.end());
    end_ids.erase(std::unique(end_ids.begin(), end_ids.end()), end_ids.end());
    return active;
  }

  static Status BeginGrammar(ActiveRequest& active) {
    const Request& request = active.request;
    if (request.grammar == nullptr) return Status::Ok();
    DSLA_ASSIGN_OR_RETURN(active.mask, ReplyMask::Create(*request.grammar, active.end_ids,
                                                         /*may_end=*/request.min_tokens == 0));
    active.empty_reply = active.mask->complete();
    if (active.empty_reply) active.mask.reset();
    return Status::Ok();
  }

  const HybridModel* model_;
  const Tokenizer* tokenizer_;
  const RequestLimits limits_;
  std::vector<int32_t> end_ids_;  // the model's own
  Inbox inbox_;
  std::unique_ptr<Worker> worker_;
  std::thread thread_;
};

}  // namespace

Expected<std::unique_ptr<Engine>> CreateEngine(const HybridModel* model, const Tokenizer* tokenizer,
                                               const ExecContext& ctx, const EngineOptions& options,
                                               std::unique_ptr<LevelPolicy> policy,
                                               FaultInjector fault_injector) {
  auto engine = std::make_unique<EngineImpl>(model, tokenizer, options);
  DSLA_RETURN_IF_ERROR(engine->Start(ctx, options, std::move(policy), std::move(fault_injector)));
  return std::unique_ptr<Engine>(std::move(engine));
}

Expected<std::unique_ptr<Engine>> Engine::Create(const HybridModel* model,
                                                 const Tokenizer* tokenizer, const ExecContext& ctx,
                                                 const EngineOptions& options,
                                                 std::unique_ptr<LevelPolicy> policy) {
  return CreateEngine(model, tokenizer, ctx, options, std::move(policy), {});
}

}  // namespace dsla
