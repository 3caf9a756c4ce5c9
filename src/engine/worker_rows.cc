// From the logits of a step to tokens, text and events.
#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "engine/worker.h"

namespace dsla {
namespace {

Status NumericalError(const Status& status) {
  return Error(StatusCode::kInternal, "{}: {}", kNumericalError, status.message());
}

}  // namespace

void Worker::LetDeviceChoose(const ActiveRequest& active, const PlannedRows& planned,
                             SequenceRows& rows) {
  const Request& request = active.request;
  if (planned.logits != RowLogits::kLast || request.top_logprobs > kMostDeviceTop) return;
  rows.sampling = &request.sampling;
  rows.edits = active.sampler.edits();
  rows.ruled_out = RuledOut(active);
  if (active.mask.has_value()) rows.allowed = active.mask->allowed();
  rows.top = std::max(request.top_logprobs, 0);
}

// So many first tokens of the reply are chosen with the host's help: their logits are changed by
// the token before, as by a grammar, or more is told than the token.
int Worker::HostTokens(const ActiveRequest& active) {
  const bool always = !active.sampler.edits().empty() || active.sampler.counts_output() ||
                      active.request.top_logprobs > 0 || active.mask.has_value();
  if (always) return std::numeric_limits<int>::max();
  return active.end_ids.empty() ? 0 : active.request.min_tokens;
}

// The end tokens while the reply must go on.
std::span<const int32_t> Worker::RuledOut(const ActiveRequest& active) {
  if (active.generated >= active.request.min_tokens) return {};
  return active.end_ids;
}

// Rows are independent: each writes its own sequence's choice or its own entry of the prompt's
// log-probabilities.
void Worker::VisitLogits(Flight& step, std::span<const LogitsRow> rows, float* logits,
                         const TokenChoice* choices) {
  if (logits == nullptr) {
    for (size_t i = 0; i < rows.size(); ++i) SetChoice(choices[i], step.outcomes[rows[i].sequence]);
    return;
  }
  const int64_t V = model_->config().V;
  ParallelFor(ctx_, static_cast<int64_t>(rows.size()), [&](int64_t i, int) {
    const LogitsRow& row = rows[i];
    const PlannedRows& planned = step.plan.rows[row.sequence];
    ActiveRequest& active = *row_requests_[row.sequence];
    Outcome& outcome = step.outcomes[row.sequence];
    const std::span<float> mine(logits + i * V, static_cast<size_t>(V));
    const int position = planned.cache->length() + row.row + 1;  // of the token that they are for
    const bool last = row.row + 1 == static_cast<int>(planned.tokens.size());
    Status status;
    try {  // no exception may leave a parallel section
      if (planned.logits == RowLogits::kAll) status = ReadPromptLogits(active, position, mine);
      if (status.ok() && last && planned.samples) status = Sample(active, position, mine, outcome);
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("out of memory while sampling a token");
    }
    if (status.ok()) return;
    const std::lock_guard lock(failure_mutex_);
    if (outcome.status.ok()) outcome.status = std::move(status);
  });
}

void Worker::SetChoice(const TokenChoice& choice, Outcome& outcome) {
  outcome.choice = {.token = choice.token, .logprob = choice.logprob};
  outcome.top.assign(choice.top.begin(), choice.top.end());
  if (!choice.broken) return;
  outcome.status = Error(StatusCode::kInternal, "{}: the logits are not numbers", kNumericalError);
}

Status Worker::ReadPromptLogits(ActiveRequest& active, int position,
                                std::span<const float> logits) const {
  const std::vector<int32_t>& prompt = active.request.prompt;
  if (position >= static_cast<int>(prompt.size())) return Status::Ok();
  // Read before a pre-emption: what the client gets does not change.
  if (position < static_cast<int>(active.prompt_logprobs_known)) return Status::Ok();
  PromptLogprob& entry = active.prompt_logprobs[position];
  entry.token = prompt[position];
  const auto own = LogprobOf(logits, entry.token);
  if (!own.ok()) return NumericalError(own.status());
  entry.logprob = own->logprob;
  if (active.request.top_logprobs <= 0) return Status::Ok();
  DSLA_ASSIGN_OR_RETURN(entry.top, TopLogprobs(logits, active.request.top_logprobs));
  return Status::Ok();
}

Status Worker::Sample(const ActiveRequest& active, int position, std::span<float> logits,
                      Outcome& outcome) const {
  const Request& request = active.request;
  if (request.max_tokens == 0) return Status::Ok();
  const auto allowed =
      active.mask.has_value() ? active.mask->allowed() : std::span<const uint32_t>();
  const auto choice = active.sampler.Sample(logits, position, RuledOut(active), allowed);
  if (!choice.ok()) return NumericalError(choice.status());
  outcome.choice = *choice;
  if (request.top_logprobs <= 0) return Status::Ok();
  DSLA_ASSIGN_OR_RETURN(outcome.top, TopLogprobs(logits, request.top_logprobs));
  return Status::Ok();
}

int Worker::EmitRows(Flight& step, double now) {
  const std::vector<PlannedRows>& planned = step.plan.rows;
  ResolveRequests(step.plan);
  results_.assign(planned.size(), {});
  AdvanceMasks(step);
  int tokens = 0;
  for (size_t i = 0; i < planned.size(); ++i) {
    if (row_requests_[i] == nullptr) continue;
    ActiveRequest& active = *row_requests_[i];
    Outcome& outcome = step.outcomes[i];
    const int before = active.generated;
    Status status = active.result.status.ok() ? outcome.status : active.result.status;
    try {
      if (status.ok()) EmitRow(planned[i], active, outcome, results_[i], now);
    } catch (const std::bad_alloc&) {
      status = ResourceExhausted("out of memory while a token was handed on");
    }
    tokens += active.generated - before;
    if (status.ok() && !results_[i].finish) status = active.result.status;
    if (status.ok()) continue;
    active.result.status = std::move(status);
    results_[i].finish = results_[i].failed = true;
  }
  if (model_->device() == nullptr) HandOnAll();  // nothing would run meanwhile
  return tokens;
}

// Those of all rows, so that they are made side by side while the tokens are handed on.
void Worker::AdvanceMasks(const Flight& step) {
  for (size_t i = 0; i < step.plan.rows.size(); ++i) {
    ActiveRequest* const active = row_requests_[i];
    if (active == nullptr || !active->mask.has_value() || !step.plan.rows[i].samples) continue;
    if (active->request.max_tokens == 0) continue;
    const Outcome& outcome = step.outcomes[i];
    if (!active->result.status.ok() || !outcome.status.ok()) continue;
    if (!EndsReply(*active, outcome.choice.token)) active->mask->Accept(outcome.choice.token);
  }
}

bool Worker::EndsReply(const ActiveRequest& active, int32_t token) {
  return active.generated >= active.request.min_tokens &&
         std::binary_search(active.end_ids.begin(), active.end_ids.end(), token);
}

void Worker::EmitRow(const PlannedRows& rows, ActiveRequest& active, Outcome& outcome,
                     RowResult& result, double now) {
  if (rows.logits == RowLogits::kAll) {
    const size_t known = rows.cache->length() + rows.tokens.size() + 1;
    active.prompt_logprobs_known =
        std::clamp(known, active.prompt_logprobs_known, active.prompt_logprobs.size());
  }
  if (!rows.samples) return;
  EmitPromptLogprobs(active);
  result.finish = !EmitToken(active, outcome, rows.cache->level(), now);
  result.token = outcome.choice.token;
}

void Worker::EmitPromptLogprobs(ActiveRequest& active) {
  if (active.prompt_logprobs.empty()) return;
  DSLA_CHECK(active.prompt_logprobs_known == active.prompt_logprobs.size());
  active.sink->OnPromptLogprobs(std::exchange(active.prompt_logprobs, {}));
}

// One more token, or the end of the reply; true if it goes on.
bool Worker::EmitToken(ActiveRequest& active, Outcome& outcome, int level, double now) {
  const Request& request = active.request;
  RequestResult& result = active.result;
  const int32_t token = outcome.choice.token;
  const auto finish = [&](FinishReason reason) {
    HandOn(active);
    result.finish = reason;
    if (!active.text.stop_string().has_value()) result.tail_text = active.text.Finish();
    return false;
  };
  if (request.max_tokens == 0) return finish(FinishReason::kLength);
  if (active.empty_reply) return finish(FinishReason::kStop);

  if (EndsReply(active, token)) {
    result.stop_token = token;
    return finish(FinishReason::kStop);
  }
  if (active.generated == 0) {
    active.first_token = now;
    policy_->ObserveFirstToken({.now = now,
                                .seconds = now - active.submitted,
                                .prompt_tokens = static_cast<int>(request.prompt.size()),
                                .cached_tokens = scheduler_.cached_tokens(active.id)});
  } else {
    policy_->ObserveToken(now, now - active.last_token);
  }
  active.last_token = now;

  active.sampler.Accept(token);
  ++active.generated;
  TokenOutput& output = active.unsent.emplace();
  output.token = token;
  if (request.top_logprobs >= 0) output.logprob = outcome.choice.logprob;
  output.top = std::move(outcome.top);
  output.level = level;
  if (!request.stop.empty()) {  // its text decides whether it goes on
    HandOn(active);
    if (const auto& stop = active.text.stop_string(); stop.has_value()) {
      result.stop_string = *stop;
      return finish(FinishReason::kStop);
    }
  }
  if (active.mask.has_value()) {
    result.status = active.mask->Await(/*may_end=*/active.generated >= request.min_tokens);
    if (!result.status.ok()) return true;  // the row fails
    if (active.mask->complete()) return finish(FinishReason::kStop);
  }
  if (active.generated == request.max_tokens) return finish(FinishReason::kLength);
  if (active.unsent.has_value()) unsent_.push_back(&active);
  return true;
}

// The text of its last token, and the token to its sink, if that has not been done. Where memory is
// used up, the request ends at its next row.
void Worker::HandOn(ActiveRequest& active) {
  if (!active.unsent.has_value()) return;
  try {
    TokenOutput output = *std::exchange(active.unsent, std::nullopt);
    output.text = active.text.Push(output.token, active.generated >= active.request.min_tokens);
    active.sink->OnToken(std::move(output));
  } catch (const std::bad_alloc&) {
    active.result.status = ResourceExhausted("out of memory while a token was handed on");
  }
}

// What need not be done before the next step begins is done while a device runs it.
void Worker::HandOnAll() {
  for (ActiveRequest* active : unsent_) HandOn(*active);
  unsent_.clear();
}

}  // namespace dsla
