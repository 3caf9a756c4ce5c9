#include "server/openai/parse_common.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <set>

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

void ParseSampling(const Fields& fields, const Limits& limits, Common* common) {
  SamplingParams& sampling = common->sampling;
  sampling = limits.sampling;
  fields.Number("temperature", 0, 2, &sampling.temperature);
  fields.Number("top_p", 0, 1, &sampling.top_p, /*low_open=*/true);
  fields.Number("min_p", 0, 1, &sampling.min_p);
  fields.Number("presence_penalty", -2, 2, &sampling.presence_penalty);
  fields.Number("frequency_penalty", -2, 2, &sampling.frequency_penalty);
  fields.Number("repetition_penalty", 0, 100, &sampling.repetition_penalty, /*low_open=*/true);
  int top_k = 0;  // -1 is how vLLM's clients say "off"
  if (fields.Int("top_k", -1, std::numeric_limits<int32_t>::max(), &top_k))
    sampling.top_k = std::max(top_k, 0);
  int64_t seed = 0;
  if (fields.Int("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(),
                 &seed)) {
    common->seed = static_cast<uint64_t>(seed);
  }
  const auto bias = fields.Object("logit_bias");
  if (!bias) return;
  if (bias->size() > static_cast<size_t>(limits.max_logit_bias)) {
    fields.error()->Set(InvalidRequestError(fmt::format("'logit_bias' has {} entries, more than {}",
                                                        bias->size(), limits.max_logit_bias),
                                            "logit_bias", "object_above_max_properties"));
    return;
  }
  std::set<int32_t> seen;  // "1" and "01" are two keys and one token
  for (const dom::key_value_pair entry : *bias) {
    int32_t id = -1;
    const char* end = entry.key.data() + entry.key.size();
    const auto [ptr, ec] = std::from_chars(entry.key.data(), end, id);
    if (ec != std::errc() || ptr != end || id < 0 || id >= limits.vocab_size ||
        !seen.insert(id).second) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'logit_bias' has the key '{}', which is no token id of its own in [0, {})",
                      entry.key.substr(0, 32), limits.vocab_size),
          "logit_bias"));
      return;
    }
    double value = 0;
    if (!ReadNumber(entry.value, fmt::format("logit_bias.{}", id), -100, 100, false, &value,
                    fields.error())) {
      return;
    }
    sampling.logit_bias.emplace_back(id, static_cast<float>(value));
  }
}

void ParseStop(const Fields& fields, const Limits& limits, Common* common) {
  const auto add = [&](Element value, const std::string& path) {
    std::string text;
    if (!ReadString(value, path, limits.max_stop_bytes, &text, fields.error())) return;
    if (text.empty()) {
      fields.error()->Set(InvalidRequestError(fmt::format("'{}' is an empty string", path), path));
    }
    common->stop.push_back(std::move(text));
  };
  if (const auto value = fields.Find("stop"); value && value->is_array()) {
    const dom::array list(*value);
    if (list.size() > static_cast<size_t>(limits.max_stop)) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'stop' has {} strings, more than {}", list.size(), limits.max_stop), "stop",
          "array_above_max_length"));
      return;
    }
    for (const Element text : list) add(text, fmt::format("stop[{}]", common->stop.size()));
  } else if (value && value->is_string()) {
    add(*value, "stop");
  } else if (value) {
    SetTypeError("stop", "a string or an array of strings", *value, fields.error());
  }
  const auto ids = fields.Find("stop_token_ids");
  if (!ids ||
      !ReadTokens(*ids, "stop_token_ids", limits.vocab_size, &common->stop_ids, fields.error())) {
    return;
  }
  if (common->stop_ids.size() > static_cast<size_t>(limits.max_stop_ids)) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'stop_token_ids' has {} ids, more than {}",
                                        common->stop_ids.size(), limits.max_stop_ids),
                            "stop_token_ids", "array_above_max_length"));
  }
}

void ParseStream(const Fields& fields, Common* common) {
  fields.Bool("stream", &common->stream);
  const auto options = fields.Object("stream_options");
  if (!options) return;
  if (!common->stream) {
    fields.error()->Set(InvalidRequestError(
        "'stream_options' is only for requests with 'stream': true", "stream_options"));
    return;
  }
  const Fields stream(*options, "stream_options.", fields.error());
  stream.Bool("include_usage", &common->include_usage);
  stream.Bool("continuous_usage_stats", &common->continuous_usage);
}

HttpError NotOneOf(const std::string& path, const std::string& got, const char* values) {
  return InvalidRequestError(
      fmt::format("'{}' must be one of {}, not '{}'", path, values, got.substr(0, 64)), path);
}

void ParseDsla(const Fields& fields, dom::object object, const Limits& limits, Common* common) {
  const Fields dsla(object, "dsla.", fields.error());
  dsla.RefuseOthers({"level", "tier"}, "'dsla' has 'level' or 'tier'");
  std::string tier;
  const bool has_tier = dsla.String("tier", kMaxNameBytes, &tier);
  const bool has_level = dsla.Int("level", 0, limits.max_level, &common->level);
  if (has_level && has_tier) {
    fields.error()->Set(InvalidRequestError("'dsla' has either 'level' or 'tier'", "dsla"));
  } else if (has_level) {
    common->tier = Tier::kExact;
  } else if (has_tier) {
    if (tier == "full") {
      common->tier = Tier::kFull;
    } else if (tier == "auto") {
      common->tier = Tier::kAuto;
    } else if (tier == "economy") {
      common->tier = Tier::kEconomy;
    } else {
      fields.error()->Set(NotOneOf("dsla.tier", tier, "'full', 'auto', 'economy'"));
    }
  }
}

// OpenAI's service_tier, or `dsla` where it says nothing of its own.
void ParseTier(const Fields& fields, const Limits& limits, Common* common) {
  common->tier = limits.default_tier;
  std::string tier;
  bool chosen = false;
  if (fields.String("service_tier", kMaxNameBytes, &tier)) {
    chosen = tier == "priority" || tier == "flex";
    if (tier == "priority") {
      common->tier = Tier::kFull;
    } else if (tier == "flex") {
      common->tier = Tier::kEconomy;
    } else if (tier == "auto") {
      common->tier = Tier::kAuto;
    } else if (tier != "default") {
      fields.error()->Set(NotOneOf("service_tier", tier, "'auto', 'default', 'flex', 'priority'"));
    }
  }
  if (const auto object = fields.Object("dsla"); object && object->size() > 0) {
    if (chosen) {
      fields.error()->Set(InvalidRequestError(
          fmt::format("'service_tier': '{}' and 'dsla' contradict each other", tier), "dsla"));
    }
    ParseDsla(fields, *object, limits, common);
  }
  if (fields.error()->ok() && common->tier == Tier::kEconomy && !limits.adapter) {
    const char* param = chosen ? "service_tier" : "dsla.tier";
    fields.error()->Set(InvalidRequestError(
        "tier economy needs an adapter, and this server has none", param, "unsupported_value"));
  }
}

void RefuseUnsupported(const Fields& fields, const Limits& limits, const Common& common) {
  fields.Refuse({"guided_json", "guided_regex", "guided_choice", "guided_grammar",
                 "guided_decoding", "prompt_embeds", "length_penalty", "logits_processors",
                 "prompt_logprobs", "kv_transfer_params", "vllm_xargs", "thinking_token_budget",
                 "allowed_token_ids"});
  int best_of = 0;
  if (fields.Int("best_of", 1, limits.max_n, &best_of)) {
    fields.RefuseUnless("best_of", best_of == common.n);
  }
  for (const char* name : {"use_beam_search", "include_stop_str_in_output"}) {
    bool on = false;
    if (fields.Bool(name, &on)) fields.RefuseUnless(name, !on);
  }
  fields.RefuseUnless("bad_words", IsEmptyArray(fields, "bad_words"));
  // llama.cpp's names, with what they say where they ask for nothing.
  for (const char* name : {"typical_p", "repeat_penalty"}) {
    float value = 1;
    if (fields.Number(name, 0, 100, &value)) fields.RefuseUnless(name, value == 1);
  }
  for (const char* name : {"mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"}) {
    float value = 0;
    if (fields.Number(name, 0, 100, &value)) fields.RefuseUnless(name, value == 0);
  }
  int n_predict = -1;
  if (fields.Int("n_predict", -2, kMaxTokens, &n_predict)) {
    fields.RefuseUnless("n_predict", n_predict == -1);
  }
  bool skip_special = true;
  if (fields.Bool("skip_special_tokens", &skip_special)) {
    fields.RefuseUnless("skip_special_tokens", skip_special);
  }
  int64_t priority = 0;
  if (fields.Int("priority", std::numeric_limits<int64_t>::min(),
                 std::numeric_limits<int64_t>::max(), &priority)) {
    fields.RefuseUnless("priority", priority == 0);
  }
}

}  // namespace

void ParseCommon(const Fields& fields, const Limits& limits, Common* common) {
  fields.String("model", kMaxNameBytes, &common->model);
  ParseSampling(fields, limits, common);
  fields.Int("n", 1, limits.max_n, &common->n);
  fields.Int("min_tokens", 0, limits.max_context, &common->min_tokens);
  fields.Bool("ignore_eos", &common->ignore_eos);
  ParseStop(fields, limits, common);
  ParseStream(fields, common);
  ParseTier(fields, limits, common);
  if (fields.String("cache_salt", kMaxNameBytes, &common->cache_salt) &&
      common->cache_salt.empty()) {
    fields.error()->Set(InvalidRequestError("'cache_salt' is an empty string", "cache_salt"));
  }
  float timeout = 0;
  if (fields.Number("timeout", 0, limits.max_timeout, &timeout, /*low_open=*/true)) {
    common->timeout = timeout;
  }
  fields.Int("truncate_prompt_tokens", 1, limits.max_context, &common->truncate_prompt);
  fields.Bool("return_token_ids", &common->return_token_ids);
  ParseGrammar(fields, common);
  RefuseUnsupported(fields, limits, *common);
}

bool IsEmptyArray(const Fields& fields, std::string_view name) {
  const auto value = fields.Find(name);
  return value && value->is_array() && dom::array(*value).size() == 0;
}

void SetMissing(const Fields& fields, std::string_view name) {
  const std::string path = fields.Path(name);
  fields.error()->Set(InvalidRequestError(fmt::format("'{}' is missing", path), path,
                                          "missing_required_parameter"));
}

void CheckTotals(const Fields& fields, const Limits& limits, int64_t choices,
                 std::string_view param, const Common& common) {
  if (choices > limits.max_choices) {
    fields.error()->Set(InvalidRequestError(
        fmt::format("{} replies are asked for, 'n' = {} to each prompt; no more than {} may wait "
                    "in the server's queue",
                    choices, common.n, limits.max_choices),
        common.n > 1 ? "n" : "prompt", "integer_above_max_value"));
  }
  if (!common.max_tokens) return;
  if (common.min_tokens > *common.max_tokens) {
    fields.error()->Set(
        InvalidRequestError(fmt::format("'min_tokens' must be at most '{}', {}, not {}", param,
                                        *common.max_tokens, common.min_tokens),
                            "min_tokens", "integer_above_max_value"));
  }
  const int64_t total = choices * *common.max_tokens;
  if (total <= limits.max_total_tokens) return;
  fields.error()->Set(InvalidRequestError(
      fmt::format("{} replies of {} tokens are {}, more than the {} that one request may ask for",
                  choices, *common.max_tokens, total, limits.max_total_tokens),
      std::string(param), "integer_above_max_value"));
}

Parsed<double> ParseTimeoutHeader(std::string_view value, const Limits& limits) {
  double seconds = 0;
  const char* end = value.data() + value.size();
  const auto [ptr, ec] = std::from_chars(value.data(), end, seconds);
  if (ec == std::errc() && ptr == end && seconds > 0 && seconds <= limits.max_timeout) {
    return seconds;
  }
  return InvalidRequestError(fmt::format("the header {} must be seconds above 0 and at most {}",
                                         kTimeoutHeader, limits.max_timeout),
                             kTimeoutHeader);
}

}  // namespace dsla::openai
