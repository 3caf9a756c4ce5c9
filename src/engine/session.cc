#include "engine/session.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/clock.h"
#include "engine/reply_mask.h"

namespace dsla {

Session::Session(const HybridModel* model, CachePool* pool, const ExecContext& ctx,
                 const SessionOptions& options)
    : model_(model),
      pool_(pool),
      ctx_(ctx),
      options_(options),
      cache_(model->NewSequence(*pool, options.level)) {
  DSLA_CHECK(options.prefill_chunk > 0);
}

// A raise needs one free slot while the pages it will free are still held, so with auto_raise that
// much is kept free as long as there is a level left to raise to.
Status Session::ReserveOrRaise(int count) {
  const Ledger& ledger = pool_->ledger();
  while (true) {
    const Status status = cache_.Reserve(count);
    const bool may_raise =
        options_.auto_raise && cache_.level() < options_.auto_top_level && cache_.length() > 0;
    if (!may_raise || (status.ok() && ledger.free_bytes() >= ledger.config().slot_bytes))
      return status;
    if (status.ok()) cache_.Abort();
    const Status raised = Raise(cache_.level() + 1);
    if (!raised.ok()) return status.ok() ? cache_.Reserve(count) : status;
  }
}

Status Session::Step(std::span<const int32_t> tokens) {
  const int count = static_cast<int>(tokens.size());
  DSLA_RETURN_IF_ERROR(ReserveOrRaise(count));
  DSLA_RETURN_IF_ERROR(model_->Append(ctx_, *pool_, cache_, tokens, 1, logits_, options_.products));
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  return Status::Ok();
}

Status Session::Prefill(std::span<const int32_t> tokens,
                        const std::function<bool(int done)>& after_step) {
  const int64_t total = int64_t{length()} + static_cast<int64_t>(tokens.size());
  if (total > model_->max_positions()) {
    return InvalidArgument("the prompt has {} tokens; the context holds {}", total,
                           model_->max_positions());
  }
  for (const int32_t token : tokens) {
    if (token < 0 || token >= model_->config().V) {
      return InvalidArgument("token id {}: the vocabulary has {}", token, model_->config().V);
    }
  }
  for (size_t done = 0; done < tokens.size();) {
    const size_t count = std::min<size_t>(options_.prefill_chunk, tokens.size() - done);
    DSLA_RETURN_IF_ERROR(Step(tokens.subspan(done, count)));
    done += count;
    if (after_step && !after_step(static_cast<int>(done)))
      return Status(StatusCode::kCancelled, "cancelled");
  }
  return Status::Ok();
}

Status Session::Raise(int level) {
  const LevelChange change{
      .position = length(), .from = this->level(), .to = level, .seconds = NowSeconds()};
  const Status status = model_->Raise(ctx_, *pool_, cache_, level);
  if (this->level() != change.from) {
    level_changes_.push_back(change);
    level_changes_.back().to = this->level();
    level_changes_.back().seconds = NowSeconds() - change.seconds;
  }
  return status;
}

Expected<GenerateResult> Session::Generate(const GenerateOptions& options) {
  if (length() == 0) return InvalidArgument("the prompt is empty");
  DSLA_RETURN_IF_ERROR(Validate(options.sampling, model_->config().V));
  const double start = NowSeconds();
  Sampler sampler(options.sampling, model_->config().V);
  sampler.AddPrompt(tokens_);
  std::optional<ReplyMask> mask;
  if (options.grammar != nullptr) {
    DSLA_ASSIGN_OR_RETURN(mask,
                          ReplyMask::Create(*options.grammar, options.stop_ids, /*may_end=*/true));
    if (mask->complete()) return GenerateResult{};
  }
  GenerateResult result;
  result.finish = FinishReason::kLength;
  auto next_raise = options.raises.begin();
  const auto raise_due = [&](int generated) {
    for (; next_raise != options.raises.end() && next_raise->after_tokens <= generated;
         ++next_raise) {
      if (next_raise->level > level()) DSLA_RETURN_IF_ERROR(Raise(next_raise->level));
    }
    return Status::Ok();
  };
  DSLA_RETURN_IF_ERROR(raise_due(0));
  while (static_cast<int>(result.tokens.size()) < options.max_tokens) {
    const auto allowed = mask.has_value() ? mask->allowed() : std::span<const uint32_t>();
    DSLA_ASSIGN_OR_RETURN(const Sampler::Choice choice,
                          sampler.Sample(logits_.span(), length(), {}, allowed));
    if (result.tokens.empty()) result.seconds_to_first_token = NowSeconds() - start;
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), choice.token) !=
        options.stop_ids.end()) {
      result.finish = FinishReason::kStop;
      break;
    }
    result.tokens.push_back(choice.token);
    sampler.Accept(choice.token);
    if (options.on_token && !options.on_token(choice.token, choice.logprob)) {
      result.finish = FinishReason::kCancelled;
      break;
    }
    if (mask.has_value()) {
      mask->Accept(choice.token);
      DSLA_RETURN_IF_ERROR(mask->Await(/*may_end=*/true));
      if (mask->complete()) {
        result.finish = FinishReason::kStop;
        break;
      }
    }
    const int generated = static_cast<int>(result.tokens.size());
    if (generated == options.max_tokens) break;
    if (length() == model_->max_positions()) {
      result.finish = FinishReason::kContext;
      break;
    }
    DSLA_RETURN_IF_ERROR(raise_due(generated));
    const size_t changes = level_changes_.size();
    const double step_start = NowSeconds();
    DSLA_RETURN_IF_ERROR(Step({&choice.token, 1}));
    result.decode_seconds += NowSeconds() - step_start;
    for (size_t i = changes; i < level_changes_.size(); ++i)
      result.decode_seconds -= level_changes_[i].seconds;
    ++result.decode_steps;
  }
  return result;
}

CacheBytes Session::cache_bytes() const {
  const LedgerConfig& config = pool_->ledger().config();
  return {.pages = cache_.page_count() * config.page_bytes,
          .states = cache_.slot_count() * config.slot_bytes};
}

}  // namespace dsla
