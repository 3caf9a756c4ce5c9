// The stages that measure: order and evaluate.
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>

#include "base/bootstrap.h"
#include "base/clock.h"
#include "base/files.h"
#include "base/half.h"
#include "base/mapped_file.h"
#include "distill/distill_run.h"
#include "format/json.h"

namespace dsla::distill {
namespace {

constexpr int kMaxOrderRows = 4;  // sequences in one pass, so that a small device can take them

std::vector<std::vector<int>> LevelSets(const std::vector<int>& ladder,
                                        const std::vector<int>& levels) {
  std::vector<std::vector<int>> sets;
  for (const int level : levels) sets.emplace_back(ladder.begin(), ladder.begin() + level);
  return sets;
}

void Add(Divergence& to, const Divergence& from) {
  to.kl += from.kl, to.agree += from.agree, to.tokens += from.tokens;
  to.hits += from.hits, to.teacher_hits += from.teacher_hits, to.asked += from.asked;
  to.row_kl.insert(to.row_kl.end(), from.row_kl.begin(), from.row_kl.end());
}

}  // namespace

Status Run::NeedOrder() {
  if (order_) return Status::Ok();
  const std::string path = Path("order.json");
  if (!std::filesystem::exists(path))
    return InvalidArgument("'{}': the stage order has not run", work_);
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 16 << 20));
  DSLA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path));
  if (json.value("settings", "") != SettingsOf('o'))
    return InvalidArgument("'{}' was made with other settings: name another --work", path);
  DSLA_ASSIGN_OR_RETURN(OrderState state, OrderState::FromJson(json, model_.config().L, path));
  if (static_cast<int>(state.ladder.size()) != model_.config().L)
    return InvalidArgument("'{}': the stage order has not run to its end", work_);
  order_ = std::move(state);
  return Status::Ok();
}

Status Run::Order() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  if (NeedOrder().ok()) return Status::Ok();
  DSLA_ASSIGN_OR_RETURN(const std::vector<float> values, ResultOf("align", 'a'));
  DSLA_RETURN_IF_ERROR(NeedNetwork());
  network_->SetValues(values);
  const int L = model_.config().L;
  const std::string path = Path("order.json");
  const double begin = NowSeconds();
  OrderState state;
  if (std::filesystem::exists(path)) {  // as far as an earlier run came
    DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 16 << 20));
    DSLA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path));
    if (json.value("settings", "") == SettingsOf('o')) {
      DSLA_ASSIGN_OR_RETURN(state, OrderState::FromJson(json, L, path));
    }
  }
  const auto save = [&]() -> Status {
    nlohmann::json json = state.ToJson();
    json["settings"] = SettingsOf('o');
    return WriteFileAtomically(path, json.dump(1) + "\n");
  };
  state.method = config_.order_method;
  const int length = config_.order_length;
  if (state.entropy.empty())
    state.entropy =
        network_->AttentionEntropy(valid_->Text(Stream::kOrder, 1000, kMaxOrderRows, length));
  if (state.method == "entropy") state.ladder = Ascending(state.entropy);
  if (state.method == "given") state.ladder = config_.order_layers;
  if (state.method == "random") state.ladder = RandomOrder(L, config_.seed);
  if (state.method == "uniform") state.ladder = UniformOrder(L);

  // Half the cost is text and half is copying, which text alone shows too little.
  std::vector<TokenBatch> text, recall;
  const int recall_rows = std::max(1, config_.order_sequences / 4);
  for (int rows = std::max(1, config_.order_sequences - recall_rows), i = 0; rows > 0; ++i) {
    text.push_back(train_->Text(Stream::kOrder, i, std::min(rows, kMaxOrderRows), length));
    rows -= text.back().rows;
  }
  for (int rows = recall_rows, i = 0; rows > 0; ++i) {
    recall.push_back(train_->RecallBatch(Recall::kCopy, Stream::kOrder, i,
                                         std::min(rows, kMaxOrderRows), length));
    rows -= recall.back().rows;
  }
  const MeasureSets measure = [&](const std::vector<std::vector<int>>& sets) {
    std::vector<double> costs(sets.size(), 0);
    for (const std::vector<TokenBatch>* batches : {&text, &recall}) {
      std::vector<Divergence> sums(sets.size());
      for (const TokenBatch& batch : *batches) {
        const std::vector<Divergence> found = network_->Measure(batch, sets);
        for (size_t i = 0; i < sets.size(); ++i) Add(sums[i], found[i]);
      }
      for (size_t i = 0; i < sets.size(); ++i) costs[i] += 0.5 * sums[i].kl / sums[i].tokens;
    }
    return costs;
  };
  while (static_cast<int>(state.ladder.size()) < L) {
    AdvanceGreedy(state, L, config_.order_candidates, measure);
    DSLA_RETURN_IF_ERROR(save());
    const double share = static_cast<double>(state.ladder.size()) / L;
    log_->Progress("order", share, fmt::format("{} of {} layers", state.ladder.size(), L),
                   SecondsLeft(NowSeconds() - begin, share));
    if (static_cast<int>(state.ladder.size()) < L && MustStop()) {
      stopped_ = true;
      return Status::Ok();
    }
  }
  DSLA_RETURN_IF_ERROR(save());
  order_ = state;
  log_->Say(fmt::format("order ({}): {}", state.method,
                        fmt::join(state.ladder.begin(), state.ladder.end(), " ")));
  nlohmann::json fields = state.ToJson();
  fields["seconds"] = NowSeconds() - begin;
  if (!state.single.empty())
    fields["rank_correlation"] = RankCorrelation(state.single, state.entropy);
  return Done("order", std::move(fields));
}

Status Run::Evaluate() {
  DSLA_RETURN_IF_ERROR(NeedTokens());
  DSLA_RETURN_IF_ERROR(NeedOrder());
  DSLA_ASSIGN_OR_RETURN(std::vector<float> values, ResultOf("chain", 'c'));
  DSLA_RETURN_IF_ERROR(NeedNetwork());
  const double begin = NowSeconds();
  for (float& value : values) value = ToFloat(ToBf16(value));  // what the adapter file will hold
  network_->SetValues(values);
  const std::vector<int>& levels = config_.evaluate_levels;
  const auto sets = LevelSets(order_->ladder, levels);

  // Long documents unpacked; without any, text over document ends.
  std::vector<TokenBatch> batches;
  int length = config_.evaluate_length, documents = 0;
  const int rows_at_once = std::max(1, config_.tokens_per_step / length);
  for (int64_t i = valid_first_; i < valid_last_ && documents < config_.evaluate_documents; ++i) {
    if (valid_tokens_->length(i) < length) continue;
    if (batches.empty() || batches.back().rows == rows_at_once) {
      batches.emplace_back();
      batches.back().length = length;
    }
    TokenBatch& batch = batches.back();
    batch.ids.resize(batch.ids.size() + length);
    valid_tokens_->Read(valid_tokens_->begin(i),
                        std::span<int32_t>(batch.ids).last(static_cast<size_t>(length)));
    ++batch.rows, ++documents;
  }
  const bool packed = documents == 0;
  if (packed) {
    documents = config_.evaluate_documents;
    for (int left = documents, i = 0; left > 0; ++i) {
      batches.push_back(valid_->Text(Stream::kEvaluate, i, std::min(left, rows_at_once), length));
      left -= batches.back().rows;
    }
  }
  std::vector<Divergence> whole(sets.size()), suffix(sets.size()), switched(sets.size());
  const int half = length / 2;
  const bool folds = config_.adapter.op != Operator::kPaper;  // from a KV cache
  for (size_t b = 0; b < batches.size(); ++b) {
    TokenBatch& batch = batches[b];
    const auto from_start = network_->Measure(batch, sets);
    const auto after_switch =
        folds ? network_->Measure(batch, sets, half) : std::vector<Divergence>(sets.size());
    batch.count_from = half;
    const auto second_half = network_->Measure(batch, sets);
    for (size_t i = 0; i < sets.size(); ++i) {
      Add(whole[i], from_start[i]);
      Add(switched[i], after_switch[i]);
      Add(suffix[i], second_half[i]);
    }
    const double share = static_cast<double>(b + 1) / static_cast<double>(batches.size());
    log_->Progress("evaluate", share, fmt::format("{} documents", documents),
                   SecondsLeft(NowSeconds() - begin, share));
  }
  nlohmann::json rows = nlohmann::json::array();
  for (size_t i = 0; i < sets.size(); ++i) {
    const std::vector<double> ones(whole[i].row_kl.size(), 1);
    const Estimate interval = Bootstrap(whole[i].row_kl, ones, static_cast<uint64_t>(config_.seed));
    rows.push_back({{"level", levels[i]},
                    {"kl", whole[i].kl / whole[i].tokens},
                    {"kl_low", interval.low},
                    {"kl_high", interval.high},
                    {"agreement", whole[i].agree / whole[i].tokens},
                    {"kl_suffix", suffix[i].kl / suffix[i].tokens},
                    {"kl_switched", folds ? nlohmann::json(switched[i].kl / switched[i].tokens)
                                          : nlohmann::json()},
                    {"tokens", whole[i].tokens}});
  }
  nlohmann::json recall = nlohmann::json::array();
  const auto measure_recall = [&](Recall kind, int recall_length, int gap) {
    if (config_.evaluate_recall == 0) return;
    std::vector<Divergence> sums(sets.size());
    for (int left = config_.evaluate_recall, i = 0; left > 0; ++i) {
      const TokenBatch batch = valid_->RecallBatch(
          kind, Stream::kEvaluate, i,
          std::min(left, std::max(1, config_.tokens_per_step / recall_length)), recall_length, gap);
      left -= batch.rows;
      const auto found = network_->Measure(batch, sets);
      for (size_t s = 0; s < sets.size(); ++s) Add(sums[s], found[s]);
    }
    nlohmann::json hits = nlohmann::json::array();
    for (size_t s = 0; s < sets.size(); ++s)
      hits.push_back({{"level", levels[s]}, {"accuracy", sums[s].hits / sums[s].asked}});
    recall.push_back({{"kind", Name(kind)},
                      {"length", recall_length},
                      {"gap", gap},
                      {"teacher", sums[0].teacher_hits / sums[0].asked},
                      {"levels", hits}});
  };
  for (const int gap : {64, 512, 2048})
    if (gap + 2 * 96 <= length) measure_recall(Recall::kCopy, gap + 2 * 96 + 16, gap);
  for (const int recall_length : {1024, 4096}) {
    if (recall_length > length) continue;
    measure_recall(Recall::kKeyValue, recall_length, 0);
    measure_recall(Recall::kNeedle, recall_length, 0);
  }
  const nlohmann::json result = {{"documents", documents}, {"length", length},
                                 {"packed", packed},       {"held_out", held_out_},
                                 {"levels", rows},         {"recall", recall},
                                 {"switched_at", half},    {"teacher", network_->TeacherHash()}};
  DSLA_RETURN_IF_ERROR(WriteFileAtomically(Path("evaluate.json"), result.dump(1) + "\n"));
  for (const auto& row : rows)
    log_->Say(fmt::format(
        "level {:3}: KL {:.4f}, top-1 agreement {:.3f}, switched {}", row["level"].get<int>(),
        row["kl"].get<double>(), row["agreement"].get<double>(),
        folds ? fmt::format("{:.4f}", row["kl_switched"].get<double>()) : std::string("never")));
  return Done("evaluate", {{"seconds", NowSeconds() - begin}});
}

}  // namespace dsla::distill
