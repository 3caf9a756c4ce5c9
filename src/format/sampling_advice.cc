#include "format/sampling_advice.h"

#include <algorithm>
#include <cmath>

namespace dsla {
namespace {

constexpr double kMaxTopK = 1 << 30;

struct Range {
  double low, high;
  bool low_open = false;

  // False for NaN. What is just above 0 is 0 as the float that it becomes.
  bool Holds(double value) const {
    return value >= low && value <= high && !(low_open && static_cast<float>(value) <= low);
  }
};

Status ReadInRange(const char* key, Range range, const std::string& path, const NumberReader& read,
                   std::optional<double>* out) {
  DSLA_ASSIGN_OR_RETURN(*out, read(key));
  if (!out->has_value() || range.Holds(**out)) return Status::Ok();
  return DataLoss("'{}': {} is {}, not in {}{}, {}]", path, key, **out, range.low_open ? "(" : "[",
                  range.low, range.high);
}

}  // namespace

Expected<SamplingAdvice> ReadSamplingAdvice(const SamplingKeys& keys, const std::string& path,
                                            const NumberReader& read) {
  SamplingAdvice advice;
  std::optional<double> top_k;
  DSLA_RETURN_IF_ERROR(ReadInRange(keys.temperature, {0, 100}, path, read, &advice.temperature));
  DSLA_RETURN_IF_ERROR(ReadInRange(keys.top_k, {-1, kMaxTopK}, path, read, &top_k));
  DSLA_RETURN_IF_ERROR(ReadInRange(keys.top_p, {0, 1, true}, path, read, &advice.top_p));
  DSLA_RETURN_IF_ERROR(ReadInRange(keys.min_p, {0, 1}, path, read, &advice.min_p));
  DSLA_RETURN_IF_ERROR(
      ReadInRange(keys.repetition_penalty, {0, 100, true}, path, read, &advice.repetition_penalty));
  if (!top_k) return advice;
  if (*top_k != std::floor(*top_k))
    return DataLoss("'{}': {} is {}, not a whole number", path, keys.top_k, *top_k);
  advice.top_k = static_cast<int>(std::max(*top_k, 0.0));  // -1 is all tokens, too
  return advice;
}

std::vector<std::pair<const char*, double>> SamplingAdvice::Given() const {
  std::vector<std::pair<const char*, double>> given;
  const auto add = [&](const char* name, std::optional<double> value) {
    if (value) given.emplace_back(name, *value);
  };
  add("temperature", temperature);
  add("top_k", top_k);
  add("top_p", top_p);
  add("min_p", min_p);
  add("repetition_penalty", repetition_penalty);
  return given;
}

}  // namespace dsla
