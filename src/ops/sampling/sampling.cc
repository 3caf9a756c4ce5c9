#include "ops/sampling/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_set>
#include <utility>

#include "base/check.h"
#include "ops/sampling/draw.h"
#include "ops/sampling/philox.h"
#include "ops/sampling/sampling_kernels.h"

namespace dsla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The arithmetic of a penalised logit stays finite; -inf stays -inf.
float Saturate(float logit, float before) {
  if (before == -kInfinity) return before;
  constexpr float kMax = std::numeric_limits<float>::max();
  return std::clamp(logit, -kMax, kMax);
}

Status CheckLogits(std::span<const float> logits, const LogitBlocks& blocks) {
  if (!blocks.has_nan && std::isfinite(blocks.max)) return Status::Ok();
  const auto bad = std::find_if(logits.begin(), logits.end(),
                                [](float l) { return std::isnan(l) || l == kInfinity; });
  if (bad == logits.end())
    return Error(StatusCode::kInternal, "all {} logits are -inf: no token can be chosen",
                 logits.size());
  return Error(StatusCode::kInternal, "the logit of token {} is {}", bad - logits.begin(),
               std::isnan(*bad) ? "NaN" : "inf");
}

// log(sum(exp(l))) - max
double LogSumExp(std::span<const float> logits, const LogitBlocks& blocks) {
  double sums[LogitBlocks::kMaxBlocks];
  return std::log(SumExp(logits, blocks, 1.f, -kInfinity, sums));
}

float Logprob(float logit, const LogitBlocks& blocks, double lse) {
  return static_cast<float>(static_cast<double>(logit) - blocks.max - lse);
}

int32_t Argmax(std::span<const float> logits, const LogitBlocks& blocks) {
  const int64_t block =
      std::find(blocks.block_max, blocks.block_max + blocks.count, blocks.max) - blocks.block_max;
  const auto first = logits.begin() + block * blocks.size;
  return static_cast<int32_t>(std::find(first, logits.end(), blocks.max) - logits.begin());
}

// The logits, -inf where not allowed.
std::vector<float> Masked(std::span<const float> logits, std::span<const uint32_t> allowed) {
  DSLA_CHECK(allowed.size() == (logits.size() + 31) / 32);
  std::vector<float> masked(logits.size());
  for (size_t word = 0; word < allowed.size(); ++word) {
    const uint32_t bits = allowed[word];
    const size_t begin = 32 * word, count = std::min<size_t>(32, logits.size() - begin);
    for (size_t i = 0; i < count; ++i)
      masked[begin + i] = (bits >> i & 1) != 0 ? logits[begin + i] : -kInfinity;
  }
  return masked;
}

bool Within(float value, float low, float high) { return value >= low && value <= high; }

}  // namespace

Status Validate(const SamplingParams& p, int64_t V) {
  if (!Within(p.temperature, 0, 100))
    return InvalidArgument("temperature {}: must be from 0 to 100", p.temperature);
  if (p.top_k < 0) return InvalidArgument("top_k {}: must be 0 (off) or positive", p.top_k);
  if (!Within(p.top_p, 0, 1) || p.top_p == 0)
    return InvalidArgument("top_p {}: must be above 0 and at most 1", p.top_p);
  if (!Within(p.min_p, 0, 1)) return InvalidArgument("min_p {}: must be from 0 to 1", p.min_p);
  if (!Within(p.repetition_penalty, 0, 100) || p.repetition_penalty == 0)
    return InvalidArgument("repetition_penalty {}: must be above 0 and at most 100",
                           p.repetition_penalty);
  if (!Within(p.presence_penalty, -2, 2))
    return InvalidArgument("presence_penalty {}: must be from -2 to 2", p.presence_penalty);
  if (!Within(p.frequency_penalty, -2, 2))
    return InvalidArgument("frequency_penalty {}: must be from -2 to 2", p.frequency_penalty);
  std::unordered_set<int32_t> ids;
  for (const auto& [id, bias] : p.logit_bias) {
    if (id < 0 || id >= V)
      return InvalidArgument("logit_bias: token {} is not in the vocabulary of {}", id, V);
    if (!Within(bias, -100, 100))
      return InvalidArgument("logit_bias of token {} is {}: must be from -100 to 100", id, bias);
    if (!ids.insert(id).second) return InvalidArgument("logit_bias: token {} is given twice", id);
  }
  return Status::Ok();
}

Sampler::Sampler(const SamplingParams& params, int64_t V)
    : params_(params),
      V_(V),
      penalties_(params.repetition_penalty != 1 || params.presence_penalty != 0 ||
                 params.frequency_penalty != 0) {
  DSLA_CHECK(V > 0);
  for (const auto& [id, bias] : params_.logit_bias) EditOf(id).bias = bias;
}

LogitEdit& Sampler::EditOf(int32_t token) {
  DSLA_CHECK(token >= 0 && token < V_);
  const auto [place, is_new] = index_.try_emplace(token, edits_.size());
  return is_new ? edits_.emplace_back(LogitEdit{.token = token}) : edits_[place->second];
}

void Sampler::AddPrompt(std::span<const int32_t> tokens) {
  if (params_.repetition_penalty == 1) return;  // the others count the output alone
  for (const int32_t token : tokens) {
    LogitEdit& edit = EditOf(token);
    edit.outputs = std::max(edit.outputs, 0);
  }
}

void Sampler::Accept(int32_t token) {
  if (!penalties_) return;
  LogitEdit& edit = EditOf(token);
  edit.outputs = std::max(edit.outputs, 0) + 1;
}

float Sampler::Edited(const LogitEdit& edit, float logit) const {
  float l = logit;
  if (edit.outputs >= 0)
    l = l > 0 ? l / params_.repetition_penalty : l * params_.repetition_penalty;
  if (edit.outputs > 0) {
    l -= params_.presence_penalty;
    l -= params_.frequency_penalty * static_cast<float>(edit.outputs);
  }
  return Saturate(Saturate(l, logit) + edit.bias, logit);
}

std::vector<float> Sampler::Modify(std::span<float> logits,
                                   std::span<const int32_t> ruled_out) const {
  std::vector<float> before;
  before.reserve(edits_.size() + ruled_out.size());
  for (const LogitEdit& edit : edits_) {
    float& logit = logits[static_cast<size_t>(edit.token)];
    before.push_back(std::exchange(logit, Edited(edit, logit)));
  }
  for (const int32_t token : ruled_out)
    before.push_back(std::exchange(logits[static_cast<size_t>(token)], -kInfinity));
  return before;
}

// Backwards: a token may have been both edited and ruled out.
void Sampler::Restore(std::span<float> logits, std::span<const int32_t> ruled_out,
                      std::span<const float> before) const {
  for (size_t i = before.size(); i-- > 0;) {
    const int32_t token = i < edits_.size() ? edits_[i].token : ruled_out[i - edits_.size()];
    logits[static_cast<size_t>(token)] = before[i];
  }
}

Expected<Sampler::Choice> Sampler::Sample(std::span<float> logits, int64_t position,
                                          std::span<const int32_t> ruled_out,
                                          std::span<const uint32_t> allowed) const {
  DSLA_CHECK(static_cast<int64_t>(logits.size()) == V_ && position >= 0);
  LogitBlocks given;
  FindBlocks(logits, given);
  DSLA_RETURN_IF_ERROR(CheckLogits(logits, given));
  const double lse = LogSumExp(logits, given);

  const std::vector<float> before = Modify(logits, ruled_out);
  std::vector<float> masked;
  if (!allowed.empty()) masked = Masked(logits, allowed);
  const std::span<const float> left = allowed.empty() ? logits : std::span<const float>(masked);
  LogitBlocks modified;
  const bool changed = !before.empty() || !allowed.empty();
  if (changed) FindBlocks(left, modified);
  const LogitBlocks& blocks = changed ? modified : given;
  Status status = CheckLogits(left, blocks);
  Choice choice;
  if (status.ok())
    choice.token = params_.temperature < SamplingParams::kGreedyBelow
                       ? Argmax(left, blocks)
                       : Draw(params_, left, blocks, UniformAt(params_.seed, position));
  Restore(logits, ruled_out, before);
  DSLA_RETURN_IF_ERROR(status);
  choice.logprob = Logprob(logits[static_cast<size_t>(choice.token)], given, lse);
  return choice;
}

Expected<std::vector<Sampler::Choice>> TopLogprobs(std::span<const float> logits, int n) {
  DSLA_CHECK(!logits.empty() && n >= 0);
  LogitBlocks blocks;
  FindBlocks(logits, blocks);
  DSLA_RETURN_IF_ERROR(CheckLogits(logits, blocks));
  std::vector<Sampler::Choice> choices;
  if (n == 0) return choices;
  const double lse = LogSumExp(logits, blocks);
  std::vector<Candidate> top = Collect(logits, blocks, TopThreshold(blocks, n), 1);
  const size_t kept = std::min(top.size(), static_cast<size_t>(n));
  std::partial_sort(top.begin(), top.begin() + static_cast<int64_t>(kept), top.end(), RanksBefore);
  for (size_t i = 0; i < kept; ++i)
    choices.push_back({top[i].token, Logprob(top[i].logit, blocks, lse)});
  return choices;
}

Expected<Sampler::Choice> LogprobOf(std::span<const float> logits, int32_t token) {
  DSLA_CHECK(token >= 0 && token < static_cast<int64_t>(logits.size()));
  LogitBlocks blocks;
  FindBlocks(logits, blocks);
  DSLA_RETURN_IF_ERROR(CheckLogits(logits, blocks));
  return Sampler::Choice{
      token, Logprob(logits[static_cast<size_t>(token)], blocks, LogSumExp(logits, blocks))};
}

}  // namespace dsla
