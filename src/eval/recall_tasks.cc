#include "eval/recall_tasks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace dsla {
namespace {

constexpr int kLead = 16;  // tokens of text before the first string of a copy
constexpr int kCopied = 96, kCopyPrompt = 8;
constexpr int kNeedleTokens = 24, kNeedlePrompt = 8;
constexpr int kKey = 2, kValue = 2, kPair = kKey + kValue, kMaxPairs = 32;

int Pairs(int length) { return std::clamp(length / 32, 1, kMaxPairs); }

// Where in a text of `length` tokens, the question among them, the needle of this depth begins.
int NeedlePlace(int length, double depth) {
  return static_cast<int>(std::lround(depth * (length - 2 * kNeedleTokens)));
}

class Writer {
 public:
  Writer(std::span<const int32_t> filler, int64_t V, Random random)
      : filler_(filler), V_(V), random_(random) {
    DSLA_CHECK(!filler.empty());
  }

  void AppendText(int count, std::vector<int32_t>& to) {
    size_t at = random_.Below(filler_.size());
    for (int i = 0; i < count; ++i, ++at) to.push_back(filler_[at % filler_.size()]);
  }

  std::vector<int32_t> RandomTokens(int count) {
    std::vector<int32_t> tokens(count);
    const int64_t low = V_ / 49, high = std::max(low, V_ * 4 / 5 - 1);
    for (int32_t& token : tokens) token = static_cast<int32_t>(random_.Between(low, high));
    return tokens;
  }

  Random& random() { return random_; }

 private:
  std::span<const int32_t> filler_;
  int64_t V_;
  Random random_;
};

// `said` again, its tokens from number `prompt` on being asked.
RecallQuestion Again(const std::vector<int32_t>& said, int prompt) {
  RecallQuestion question;
  question.tokens = said;
  question.targets.assign(said.size(), -1);
  for (size_t i = prompt; i < said.size(); ++i) question.targets[i - 1] = said[i];
  // The last token is only an answer: nothing follows it.
  question.tokens.pop_back();
  question.targets.pop_back();
  return question;
}

RecallText Copy(const RecallTask& task, Writer& writer) {
  RecallText text;
  writer.AppendText(kLead, text.context);
  const std::vector<int32_t> said = writer.RandomTokens(kCopied);
  text.context.insert(text.context.end(), said.begin(), said.end());
  writer.AppendText(task.gap, text.context);
  text.questions.push_back(Again(said, kCopyPrompt));
  return text;
}

RecallText KeyValue(const RecallTask& task, Writer& writer) {
  const int pairs = Pairs(task.length), block = pairs * kPair;
  const int context = std::max(block, task.length - block);
  const std::vector<int32_t> table = writer.RandomTokens(block);
  const int at = static_cast<int>(writer.random().Between(0, context - block));
  RecallText text;
  writer.AppendText(at, text.context);
  text.context.insert(text.context.end(), table.begin(), table.end());
  writer.AppendText(context - block - at, text.context);

  std::vector<int> order(pairs);
  std::iota(order.begin(), order.end(), 0);
  for (int i = pairs - 1; i > 0; --i) std::swap(order[i], order[writer.random().Between(0, i)]);
  RecallQuestion question;
  for (const int pair : order) {
    const auto first = table.begin() + pair * kPair;
    question.tokens.insert(question.tokens.end(), first, first + kPair);
    question.targets.insert(question.targets.end(), kPair, -1);
    std::copy(first + kKey, first + kPair, question.targets.end() - kValue - 1);
  }
  question.tokens.pop_back();
  question.targets.pop_back();
  text.questions.push_back(std::move(question));
  return text;
}

RecallText Needles(const RecallTask& task, Writer& writer) {
  RecallText text;
  writer.AppendText(task.length - kNeedleTokens, text.context);
  for (const double depth : task.depths) {
    const std::vector<int32_t> needle = writer.RandomTokens(kNeedleTokens);
    std::copy(needle.begin(), needle.end(), text.context.begin() + NeedlePlace(task.length, depth));
    text.questions.push_back(Again(needle, kNeedlePrompt));
    text.questions.back().depth = depth;
  }
  return text;
}

}  // namespace

const char* Name(RecallKind kind) {
  switch (kind) {
    case RecallKind::kCopy:
      return "copy";
    case RecallKind::kKeyValue:
      return "key-value";
    case RecallKind::kNeedle:
      return "needle";
  }
  return "?";
}

std::string RecallTask::Title() const {
  return kind == RecallKind::kCopy ? fmt::format("copy, gap {}", gap)
                                   : fmt::format("{}, {} tokens", Name(kind), length);
}

RecallTask CopyTask(int gap) {
  DSLA_CHECK(gap >= 0);
  return {.kind = RecallKind::kCopy, .gap = gap, .length = kLead + 2 * kCopied + gap, .depths = {}};
}

RecallTask KeyValueTask(int length) {
  DSLA_CHECK(length >= 2 * kPair);
  return {.kind = RecallKind::kKeyValue, .gap = 0, .length = length, .depths = {}};
}

bool NeedlesFit(int length, std::span<const double> depths) {
  if (depths.empty() || length < 2 * kNeedleTokens) return false;
  std::vector<int> places;
  for (const double depth : depths) places.push_back(NeedlePlace(length, depth));
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i)
    if (places[i] - places[i - 1] < kNeedleTokens) return false;
  return true;
}

RecallTask NeedleTask(int length, std::vector<double> depths) {
  DSLA_CHECK(NeedlesFit(length, depths));
  return {.kind = RecallKind::kNeedle, .gap = 0, .length = length, .depths = std::move(depths)};
}

RecallText MakeRecallText(const RecallTask& task, std::span<const int32_t> filler, int64_t V,
                          uint64_t seed, int index) {
  Writer writer(filler, V,
                Random(seed, {0x4eca11, static_cast<uint64_t>(task.kind),
                              static_cast<uint64_t>(task.length), static_cast<uint64_t>(index)}));
  switch (task.kind) {
    case RecallKind::kCopy:
      return Copy(task, writer);
    case RecallKind::kKeyValue:
      return KeyValue(task, writer);
    case RecallKind::kNeedle:
      return Needles(task, writer);
  }
  return {};
}

}  // namespace dsla
