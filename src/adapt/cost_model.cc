#include "adapt/cost_model.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "adapt/least_squares.h"
#include "base/check.h"

namespace dsla {
namespace {

using Features = std::array<double, kMaxFeatures>;

double Dot(const Features& features, std::span<const double> x) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += features[i] * x[i];
  return sum;
}

// Keys that n tokens after c others read: n c + n^2/2, to the half key that does not matter.
double Keys(double n, double c) { return n * (c + n / 2); }

Features PrefillFeatures(int layers, int level, int64_t tokens, int64_t context) {
  const auto n = static_cast<double>(tokens), c = static_cast<double>(context);
  return {1, n * (layers - level), n * level, (layers - level) * Keys(n, c)};
}

Features DecodeFeatures(int layers, std::span<const DecodeRow> rows) {
  Features f{1};
  for (const DecodeRow& row : rows) {
    f[1] += layers - row.level;
    f[2] += row.level;
    f[3] += (layers - row.level) * static_cast<double>(row.length);
  }
  return f;
}

Features FoldFeatures(int from, int to, int64_t length) {
  const double converted = to - from;
  return {converted, converted * static_cast<double>(length)};
}

Status CheckSeconds(const char* what, double seconds) {
  if (std::isfinite(seconds) && seconds > 0) return Status::Ok();
  return InvalidArgument("cost model: a {} took {} s, which cannot be", what, seconds);
}

template <size_t N>
double WorstError(const std::vector<Observation>& observations, const std::array<double, N>& x) {
  double worst = 0;
  for (const Observation& o : observations) {
    worst = std::max(worst, std::abs(Dot(o.features, x) / o.value - 1));
  }
  return worst;
}

template <size_t N>
Status ReadCoefficients(const nlohmann::json& json, const char* key, std::array<double, N>& out) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_array() || it->size() != N) {
    return DataLoss("cost model: '{}' is not a list of {} numbers", key, N);
  }
  for (size_t i = 0; i < N; ++i) {
    const nlohmann::json& value = (*it)[i];
    if (!value.is_number()) return DataLoss("cost model: '{}' has something not a number", key);
    out[i] = value.get<double>();
    if (!std::isfinite(out[i]) || out[i] < 0) {
      return DataLoss("cost model: '{}' has {}, not a number of seconds", key, out[i]);
    }
  }
  return Status::Ok();
}

}  // namespace

CostFactors FactorsBy(const CostModel& model, const CostModel& other, const CostFactors& factors) {
  // Work of which every part counts.
  constexpr int64_t kTokens = 512, kContext = 1024;
  const auto by = [](double factor, double seconds, double by_other) {
    return seconds > 0 && by_other > 0 ? factor * by_other / seconds : factor;
  };
  const DecodeRow row{.level = 0, .length = kContext};
  return {
      .prefill = by(factors.prefill, model.PrefillSeconds(0, kTokens, kContext),
                    other.PrefillSeconds(0, kTokens, kContext)),
      .decode = by(factors.decode, model.DecodeSeconds({&row, 1}), other.DecodeSeconds({&row, 1})),
      .fold =
          by(factors.fold, model.FoldSeconds(0, 1, kContext), other.FoldSeconds(0, 1, kContext))};
}

const char* Name(CostSource source) {
  switch (source) {
    case CostSource::kNone:
      return "none";
    case CostSource::kMeasured:
      return "measured";
    case CostSource::kKept:
      return "kept";
    case CostSource::kFile:
      return "file";
  }
  return "none";
}

Expected<CostModel> CostModel::Fit(int layers, const CostMeasurements& measured) {
  if (layers < 1) return InvalidArgument("cost model: {} layers", layers);
  if (measured.prefill.size() < 2 || measured.decode.size() < 2) {
    return InvalidArgument("cost model: {} prefill and {} decode points, at least 2 each needed",
                           measured.prefill.size(), measured.decode.size());
  }
  std::vector<Observation> prefill, decode, fold;
  for (const PrefillPoint& p : measured.prefill) {
    DSLA_RETURN_IF_ERROR(CheckSeconds("prefill", p.seconds));
    prefill.push_back({PrefillFeatures(layers, p.level, p.tokens, p.context), p.seconds});
  }
  for (const DecodePoint& p : measured.decode) {
    DSLA_RETURN_IF_ERROR(CheckSeconds("decode step", p.seconds));
    decode.push_back({DecodeFeatures(layers, p.rows), p.seconds});
  }
  for (const FoldPoint& p : measured.fold) {
    DSLA_RETURN_IF_ERROR(CheckSeconds("fold", p.seconds));
    fold.push_back({FoldFeatures(p.from, p.to, p.length), p.seconds});
  }
  const Features fold_fit = FitNonNegative(fold);
  CostModel model = FromCoefficients(layers, FitNonNegative(prefill), FitNonNegative(decode),
                                     {fold_fit[0], fold_fit[1]});
  model.max_error_ = std::max({WorstError(prefill, model.prefill_),
                               WorstError(decode, model.decode_), WorstError(fold, model.fold_)});
  return model;
}

CostModel CostModel::FromCoefficients(int layers, const std::array<double, 4>& prefill,
                                      const std::array<double, 4>& decode,
                                      const std::array<double, 2>& fold) {
  CostModel model;
  model.layers_ = layers;
  model.prefill_ = prefill;
  model.decode_ = decode;
  model.fold_ = fold;
  return model;
}

double CostModel::PrefillSeconds(int level, int64_t tokens, int64_t context) const {
  return tokens <= 0 ? 0 : Dot(PrefillFeatures(layers_, level, tokens, context), prefill_);
}

double CostModel::PromptSeconds(int level, int64_t tokens, int64_t context, int64_t chunk) const {
  DSLA_DCHECK(chunk > 0);
  if (tokens <= 0) return 0;
  // Every feature but the first adds up over the chunks to that of the whole prompt.
  const int64_t chunks = (tokens + chunk - 1) / chunk;
  return PrefillSeconds(level, tokens, context) + static_cast<double>(chunks - 1) * prefill_[0];
}

double CostModel::DecodeSeconds(std::span<const DecodeRow> rows) const {
  return rows.empty() ? 0 : Dot(DecodeFeatures(layers_, rows), decode_);
}

double CostModel::RowSeconds(int level, int64_t length) const {
  const double softmax = layers_ - level;
  return softmax * (decode_[1] + decode_[3] * static_cast<double>(length)) + level * decode_[2];
}

CostModel CostModel::Scaled(const CostFactors& factors) const {
  CostModel scaled = *this;
  for (double& x : scaled.prefill_) x *= factors.prefill;
  for (double& x : scaled.decode_) x *= factors.decode;
  for (double& x : scaled.fold_) x *= factors.fold;
  return scaled;
}

double CostModel::FoldSeconds(int from, int to, int64_t length) const {
  return to <= from ? 0 : Dot(FoldFeatures(from, to, length), fold_);
}

std::string CostModel::ToJson() const {
  return nlohmann::json({{"layers", layers_},
                         {"prefill", prefill_},
                         {"decode", decode_},
                         {"fold", fold_},
                         {"max_error", max_error_}})
      .dump(2);
}

Expected<CostModel> CostModel::FromJson(std::string_view text) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return DataLoss("cost model: not a JSON object");
  const auto layers = json.find("layers");
  if (layers == json.end() || !layers->is_number_integer() || *layers < 1 || *layers > 100000) {
    return DataLoss("cost model: 'layers' is not a number of layers");
  }
  CostModel model;
  model.layers_ = layers->get<int>();
  DSLA_RETURN_IF_ERROR(ReadCoefficients(json, "prefill", model.prefill_));
  DSLA_RETURN_IF_ERROR(ReadCoefficients(json, "decode", model.decode_));
  DSLA_RETURN_IF_ERROR(ReadCoefficients(json, "fold", model.fold_));
  if (const auto it = json.find("max_error"); it != json.end() && it->is_number()) {
    model.max_error_ = it->get<double>();
  }
  return model;
}

std::string CostModel::Summary() const {
  const DecodeRow row{.level = 0, .length = 1024};
  return fmt::format(
      "level 0: prefill {:.0f} tokens/s, decode step {:.1f} ms at 1024 tokens; a layer more: "
      "prefill {:+.2f}%, decode {:+.2f} ms, fold {:.1f} ms; largest error of the fit {:.0f}%",
      layers_ == 0 ? 0 : 512 / std::max(PrefillSeconds(0, 512, 1024), 1e-9),
      1e3 * DecodeSeconds({&row, 1}),
      100 * (PrefillSeconds(1, 512, 1024) / std::max(PrefillSeconds(0, 512, 1024), 1e-9) - 1),
      1e3 * (RowSeconds(1, 1024) - RowSeconds(0, 1024)), 1e3 * FoldSeconds(0, 1, 1024),
      100 * max_error_);
}

}  // namespace dsla
