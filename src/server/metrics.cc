#include "server/metrics.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <variant>

#include "base/check.h"

namespace dsla {
namespace {

using Labels = std::initializer_list<std::pair<std::string_view, std::string_view>>;

std::string Escaped(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

std::string Number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  return fmt::format("{}", value);
}

// Writes families one after another: # HELP and # TYPE, then samples.
class Text {
 public:
  explicit Text(std::string& out) : out_(out) {}

  Text& Family(std::string_view name, std::string_view type, std::string_view help) {
    name_ = name;
    fmt::format_to(std::back_inserter(out_), "# HELP {} {}\n# TYPE {} {}\n", name, help, name,
                   type);
    return *this;
  }
  Text& Counter(std::string_view name, std::string_view help) {
    return Family(name, "counter", help);
  }
  Text& Gauge(std::string_view name, std::string_view help) { return Family(name, "gauge", help); }

  // `engine`: one label more, unless it is empty.
  Text& Sample(double value, Labels labels = {}, std::string_view engine = {}) {
    Line("", value, labels, {}, engine);
    return *this;
  }

  void Histogram(std::string_view name, std::string_view help, const dsla::Histogram& histogram,
                 Labels labels = {}) {
    Family(name, "histogram", help);
    const std::vector<int64_t> counts = histogram.Cumulative();
    for (size_t i = 0; i < counts.size(); ++i) {
      const std::string bound =
          i < histogram.bounds().size() ? Number(histogram.bounds()[i]) : "+Inf";
      Line("_bucket", static_cast<double>(counts[i]), labels, bound);
    }
    Line("_sum", histogram.sum(), labels);
    Line("_count", static_cast<double>(counts.back()), labels);
  }

 private:
  void Line(std::string_view suffix, double value, Labels labels, std::string_view le = {},
            std::string_view engine = {}) {
    out_.append(name_).append(suffix);
    char separator = '{';
    const auto label = [&](std::string_view key, std::string_view text) {
      out_ += separator;
      out_.append(key).append("=\"").append(Escaped(text)) += '"';
      separator = ',';
    };
    for (const auto& [key, text] : labels) label(key, text);
    if (!engine.empty()) label("engine", engine);
    if (!le.empty()) label("le", le);
    if (separator == ',') out_ += '}';
    out_.append(" ").append(Number(value)) += '\n';
  }

  std::string& out_;
  std::string name_;
};

// Half decades and thirds: 1, 2, 5, 10, ...
std::vector<double> OneTwoFive(double low, double high) {
  std::vector<double> bounds;
  for (double decade = low; decade <= high * 1.001; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      // Rounded to what its decimals say: 0.1 * 2 is not 0.2 after some multiplications.
      const double bound = std::stod(fmt::format("{:.6g}", decade * step));
      if (bound <= high * 1.001) bounds.push_back(bound);
    }
  }
  return bounds;
}

const char* KindName(Rejection::Kind kind) {
  switch (kind) {
    case Rejection::Kind::kInvalid:
      return "invalid";
    case Rejection::Kind::kContextLength:
      return "context_length";
    case Rejection::Kind::kTooLargeForCache:
      return "too_large_for_cache";
    case Rejection::Kind::kQueueFull:
      return "queue_full";
    case Rejection::Kind::kUnavailable:
      return "unavailable";
  }
  return "unknown";
}

// The word that a policy's reason begins with; "other" where it is none of the list.
std::string ReasonWord(const std::string& reason) {
  const std::string word = reason.substr(0, reason.find(':'));
  const auto known = std::find(std::begin(kReasonWords), std::end(kReasonWords), word);
  return known == std::end(kReasonWords) ? "other" : word;
}

std::string FinishName(const RequestResult& result) {
  if (result.status.ok()) return Name(result.finish);
  return result.status.code() == StatusCode::kCancelled ? Name(FinishReason::kCancelled) : "error";
}

// A number of the engine's state as it is. `vllm`: what vLLM calls it, where it has a name for it.
struct Figure {
  const char* type;
  std::variant<bool EngineState::*, int EngineState::*, int64_t EngineState::*,
               double EngineState::*>
      member;
  const char* name;
  const char* help;
  const char* vllm[2] = {};

  double Of(const EngineState& state) const {
    return std::visit([&](auto m) { return static_cast<double>(state.*m); }, member);
  }
};

constexpr Figure kFigures[] = {
    {"gauge",
     &EngineState::target_level,
     "dsla_target_level",
     "Level at which new sequences of tier auto start.",
     {}},
    {"gauge", &EngineState::max_level, "dsla_max_level", "Highest level of tier auto.", {}},
    {"gauge",
     &EngineState::running,
     "dsla_requests_running",
     "Sequences in the batch.",
     {"vllm:num_requests_running"}},
    {"gauge",
     &EngineState::queued,
     "dsla_requests_queued",
     "Requests that wait for their first step, or, pre-empted, for their next one.",
     {"vllm:num_requests_waiting"}},
    {"gauge",
     &EngineState::queued_tokens,
     "dsla_queued_tokens",
     "Prompt tokens of the requests that wait for their first step.",
     {}},
    {"gauge",
     &EngineState::oldest_wait_seconds,
     "dsla_oldest_wait_seconds",
     "Since the engine accepted the oldest queued request, as of the last step; of a "
     "pre-empted one that includes the time it ran.",
     {}},
    {"gauge", &EngineState::budget_bytes, "dsla_memory_budget_bytes", "Cache memory there is.", {}},
    {"counter", &EngineState::steps, "dsla_steps_total", "Steps of the engine.", {}},
    {"counter", &EngineState::busy_seconds, "dsla_step_seconds_total", "Time in steps.", {}},
    {"counter",
     &EngineState::model_seconds,
     "dsla_model_seconds_total",
     "Of it, in the model, folds and sampling.",
     {}},
    {"counter",
     &EngineState::prompt_tokens,
     "dsla_prompt_tokens_total",
     "Prompt tokens asked for.",
     {"vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"}},
    {"counter",
     &EngineState::cached_tokens,
     "dsla_cached_tokens_total",
     "Of them, found in the prefix cache.",
     {"vllm:prefix_cache_hits_total"}},
    {"counter",
     &EngineState::prefill_tokens,
     "dsla_prefill_tokens_total",
     "Prompt tokens computed, again after pre-emption included.",
     {}},
    {"counter",
     &EngineState::generated_tokens,
     "dsla_generated_tokens_total",
     "Tokens of replies.",
     {"vllm:generation_tokens_total"}},
    {"counter",
     &EngineState::preemptions,
     "dsla_preemptions_total",
     "Sequences put back to the queue for want of memory.",
     {"vllm:num_preemptions_total"}},
    {"counter",
     &EngineState::numerical_errors,
     "dsla_numerical_errors_total",
     "Requests ended by logits that are no numbers.",
     {}},
    {"gauge",
     &EngineState::prefill_tokens_per_second,
     "dsla_prefill_tokens_per_second",
     "Over the last seconds.",
     {}},
    {"gauge",
     &EngineState::decode_tokens_per_second,
     "dsla_decode_tokens_per_second",
     "Over the last seconds.",
     {}},
    {"gauge", &EngineState::draining, "dsla_draining", "1 while new requests are refused.", {}},
};

// An engine, and what it is called; a single one has no name.
struct Source {
  const EngineState& state;
  std::string name;
};
std::vector<Source> SourcesOf(const EngineState& state) {
  if (state.replicas.empty()) return {{state, ""}};
  std::vector<Source> sources;
  for (const EngineState& replica : state.replicas)
    sources.push_back({replica, std::to_string(sources.size())});
  return sources;
}

double Share(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(new std::atomic<int64_t>[bounds_.size() + 1]) {
  DSLA_CHECK(std::is_sorted(bounds_.begin(), bounds_.end()));
  for (size_t i = 0; i <= bounds_.size(); ++i) counts_[i].store(0, std::memory_order_relaxed);
}

void Histogram::Observe(double value, int64_t count) {
  if (std::isnan(value) || count <= 0) return;  // one NaN would spoil the sum for ever
  const auto bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[bucket].fetch_add(count, std::memory_order_relaxed);
  const double added = value * static_cast<double>(count);
  double sum = sum_.load(std::memory_order_relaxed);
  while (!sum_.compare_exchange_weak(sum, sum + added, std::memory_order_relaxed)) {
  }
}

std::vector<int64_t> Histogram::Cumulative() const {
  std::vector<int64_t> counts(bounds_.size() + 1);
  int64_t total = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    counts[i] = total += counts_[i].load(std::memory_order_relaxed);
  }
  return counts;
}

ServerMetrics::ServerMetrics(MetricsOptions options)
    : options_(std::move(options)),
      ttft_(OneTwoFive(0.001, 500)),
      tpot_(OneTwoFive(0.001, 10)),
      e2e_(OneTwoFive(0.01, 1000)),
      queue_time_(OneTwoFive(0.001, 500)),
      prefill_time_(OneTwoFive(0.001, 500)),
      decode_time_(OneTwoFive(0.01, 1000)),
      inference_time_(OneTwoFive(0.01, 1000)),
      prompt_tokens_(OneTwoFive(1, 200000)),
      generated_tokens_(OneTwoFive(1, 200000)),
      http_seconds_(OneTwoFive(0.0001, 1000)) {}

void ServerMetrics::ObserveRequest(const RequestResult& result) {
  {
    const std::lock_guard lock(mutex_);
    ++requests_[{FinishName(result), result.tier}];
  }
  prompt_tokens_.Observe(result.prompt_tokens);
  generated_tokens_.Observe(result.generated_tokens);
  e2e_.Observe(result.total_seconds);
  queue_time_.Observe(result.queue_seconds);
  if (result.first_token_seconds <= 0) return;
  const double decode = std::max(0.0, result.total_seconds - result.first_token_seconds);
  ttft_.Observe(result.first_token_seconds);
  prefill_time_.Observe(std::max(0.0, result.first_token_seconds - result.queue_seconds));
  decode_time_.Observe(decode);
  inference_time_.Observe(std::max(0.0, result.total_seconds - result.queue_seconds));
  if (result.generated_tokens > 1) tpot_.Observe(decode / (result.generated_tokens - 1));
}

void ServerMetrics::CountRejection(Rejection::Kind kind) {
  const std::lock_guard lock(mutex_);
  ++rejections_[kind];
}

void ServerMetrics::CountHttp(std::string_view route, int status, double seconds) {
  http_seconds_.Observe(seconds);
  const std::lock_guard lock(mutex_);
  ++http_requests_[{std::string(route), status}];
}

std::string ServerMetrics::Render(const EngineState& state) {
  std::string out;
  out.reserve(16 << 10);
  {
    const std::lock_guard lock(mutex_);
    const std::vector<Source> sources = SourcesOf(state);
    seen_.resize(sources.size());
    for (size_t i = 0; i < sources.size(); ++i) CountSwitches(sources[i].state, seen_[i]);
  }
  RenderEngine(state, out);
  RenderRequests(out);
  RenderHttp(out);
  if (options_.vllm_compat) RenderVllm(state, out);
  return out;
}

// The engine keeps totals and its last events. Changes that fell out of the list between two
// scrapes are counted all the same, with the reason "unlogged". With the mutex held.
void ServerMetrics::CountSwitches(const EngineState& state, Seen& seen) {
  int64_t raises = state.raises - seen.raises;
  int64_t changes = state.target_changes - seen.target_changes;
  if (raises < 0 || changes < 0) return;  // an older state than the last one
  seen = {.raises = state.raises, .target_changes = state.target_changes};
  for (auto event = state.events.rbegin(); event != state.events.rend(); ++event) {
    int64_t& left = event->request_id.empty() ? changes : raises;
    if (left == 0) continue;  // seen by the last scrape
    --left;
    ++switches_[{event->request_id.empty() ? "target" : "sequence",
                 event->to > event->from ? "up" : "down", ReasonWord(event->reason)}];
  }
  if (raises > 0) switches_[{"sequence", "up", "unlogged"}] += raises;
  if (changes > 0) switches_[{"target", "unlogged", "unlogged"}] += changes;
}

void ServerMetrics::RenderEngine(const EngineState& state, std::string& out) const {
  const std::vector<Source> engines = SourcesOf(state);
  Text text(out);
  text.Gauge("dsla_build_info", "Always 1; what is running.")
      .Sample(1, {{"version", options_.version}, {"model", options_.model}});
  text.Gauge("dsla_policy", "1 for the policy in force.");
  for (const auto& [s, name] : engines) text.Sample(1, {{"policy", s.policy}}, name);
  text.Gauge("dsla_cost_factor",
             "Measured times by what the cost model of the start said of them; 1: as it said.");
  for (const auto& [s, name] : engines) {
    text.Sample(s.cost_factors.prefill, {{"kind", "prefill"}}, name)
        .Sample(s.cost_factors.decode, {{"kind", "decode"}}, name)
        .Sample(s.cost_factors.fold, {{"kind", "fold"}}, name);
  }
  text.Gauge("dsla_cost_doubtful",
             "1: these have been far from 1 for long; the cost model should be measured anew.");
  for (const auto& [s, name] : engines) text.Sample(s.cost_doubtful ? 1 : 0, {}, name);
  text.Gauge("dsla_level_sequences", "Running sequences by level.");
  for (const auto& [s, name] : engines) {
    for (size_t level = 0; level < s.rows_per_level.size(); ++level)
      text.Sample(s.rows_per_level[level], {{"level", std::to_string(level)}}, name);
  }
  {
    const std::lock_guard lock(mutex_);
    text.Counter(
        "dsla_switch_total",
        "Changes of level: of the target for new sequences, and of running ones by folding.");
    for (const auto& [key, count] : switches_) {
      text.Sample(static_cast<double>(count),
                  {{"scope", key.scope}, {"dir", key.dir}, {"reason", key.reason}});
    }
  }
  text.Gauge("dsla_memory_bytes",
             "Cache memory in use: pages of softmax layers, states of dual-state layers, and what "
             "the prefix cache alone holds.");
  for (const auto& [s, name] : engines) {
    text.Sample(static_cast<double>(s.page_bytes), {{"kind", "pages"}}, name)
        .Sample(static_cast<double>(s.state_bytes), {{"kind", "states"}}, name)
        .Sample(static_cast<double>(s.prefix_cache_bytes), {{"kind", "prefix_cache"}}, name);
  }
  for (const Figure& figure : kFigures) {
    text.Family(figure.name, figure.type, figure.help);
    for (const auto& [s, name] : engines) text.Sample(figure.Of(s), {}, name);
  }
  text.Gauge("dsla_seconds_since_progress", "Since the last finished step; 0 with nothing to do.");
  for (const auto& [s, name] : engines)
    text.Sample(s.idle ? 0 : std::max(0.0, s.now - s.last_progress), {}, name);
  if (state.replicas.empty()) return;
  text.Gauge("dsla_replica_up", "0 once its device has failed.");
  for (const auto& [s, name] : engines) text.Sample(s.device_error.empty() ? 1 : 0, {}, name);
}

void ServerMetrics::RenderRequests(std::string& out) const {
  Text text(out);
  {
    const std::lock_guard lock(mutex_);
    text.Counter("dsla_requests_total", "Requests that ended, by how and by tier.");
    for (const auto& [key, count] : requests_) {
      text.Sample(static_cast<double>(count), {{"finish", key.finish}, {"tier", Name(key.tier)}});
    }
    text.Counter("dsla_rejections_total", "Requests refused before any work, by why.");
    for (const auto& [kind, count] : rejections_) {
      text.Sample(static_cast<double>(count), {{"reason", KindName(kind)}});
    }
  }
  text.Histogram(
      "dsla_ttft_seconds",
      "From the engine's acceptance of a request, read and tokenised, to its first token.", ttft_);
  text.Histogram("dsla_tpot_seconds", "Per token after the first, mean of each request.", tpot_);
  text.Histogram("dsla_e2e_seconds", "From the engine's acceptance of a request to its end.", e2e_);
  text.Histogram(
      "dsla_queue_seconds",
      "From the engine's acceptance of a request to its first step, or to its end without one.",
      queue_time_);
  text.Histogram("dsla_request_prompt_tokens", "Prompt tokens of a request.", prompt_tokens_);
  text.Histogram("dsla_request_generated_tokens", "Tokens of a reply.", generated_tokens_);
}

void ServerMetrics::RenderHttp(std::string& out) const {
  Text text(out);
  {
    const std::lock_guard lock(mutex_);
    text.Counter("dsla_http_requests_total", "HTTP requests by route and status code.");
    for (const auto& [key, count] : http_requests_) {
      text.Sample(static_cast<double>(count),
                  {{"route", key.first}, {"code", std::to_string(key.second)}});
    }
  }
  text.Histogram("dsla_http_seconds",
                 "From the first byte of an HTTP request to the last of its answer.",
                 http_seconds_);
  text.Gauge("dsla_http_in_flight", "HTTP requests being answered.")
      .Sample(static_cast<double>(http_in_flight_.load(std::memory_order_relaxed)));
  text.Gauge("dsla_http_connections", "Open connections.")
      .Sample(static_cast<double>(connections_.load(std::memory_order_relaxed)));
}

void ServerMetrics::RenderVllm(const EngineState& state, std::string& out) const {
  const std::vector<Source> engines = SourcesOf(state);
  Text text(out);
  const Labels model = {{"model_name", options_.model}};
  for (const Figure& figure : kFigures) {
    for (const char* name : figure.vllm) {
      if (name == nullptr) continue;
      text.Family(name, figure.type, fmt::format("As {}.", figure.name));
      for (const auto& [s, engine] : engines) text.Sample(figure.Of(s), model, engine);
    }
  }
  text.Gauge("vllm:kv_cache_usage_perc",
             "Share of the cache memory that sequences hold, 1 is all.");
  for (const auto& [s, engine] : engines)
    text.Sample(Share(s.page_bytes + s.state_bytes, s.budget_bytes), model, engine);
  {
    const std::lock_guard lock(mutex_);
    // vLLM knows stop, length and abort.
    std::map<std::string, int64_t> finished{{"stop", 0}, {"length", 0}, {"abort", 0}};
    for (const auto& [key, count] : requests_) {
      const bool length =
          key.finish == Name(FinishReason::kLength) || key.finish == Name(FinishReason::kContext);
      const bool stop = key.finish == Name(FinishReason::kStop);
      finished[stop ? "stop" : length ? "length" : "abort"] += count;
    }
    text.Counter("vllm:request_success_total", "As dsla_requests_total, in vLLM's words.");
    for (const auto& [reason, count] : finished) {
      text.Sample(static_cast<double>(count),
                  {{"model_name", options_.model}, {"finished_reason", reason}});
    }
    text.Counter("vllm:admission_rejections", "As dsla_rejections_total, in all.");
    int64_t rejected = 0;
    for (const auto& [kind, count] : rejections_) rejected += count;
    text.Sample(static_cast<double>(rejected), model);
  }
  const auto histogram = [&](const char* name, const char* help, const Histogram& values) {
    text.Histogram(name, help, values, model);
  };
  histogram("vllm:time_to_first_token_seconds", "As dsla_ttft_seconds.", ttft_);
  // Newer and older dashboards know it by one name each; both get each request's mean.
  histogram("vllm:inter_token_latency_seconds", "As dsla_tpot_seconds.", tpot_);
  histogram("vllm:time_per_output_token_seconds", "As dsla_tpot_seconds.", tpot_);
  histogram("vllm:e2e_request_latency_seconds", "As dsla_e2e_seconds.", e2e_);
  histogram("vllm:request_queue_time_seconds", "As dsla_queue_seconds.", queue_time_);
  histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.",
            prefill_time_);
  histogram("vllm:request_decode_time_seconds", "From the first token to the last.", decode_time_);
  histogram("vllm:request_inference_time_seconds", "From the first step to the end.",
            inference_time_);
  histogram("vllm:request_prompt_tokens", "As dsla_request_prompt_tokens.", prompt_tokens_);
  histogram("vllm:request_generation_tokens", "As dsla_request_generated_tokens.",
            generated_tokens_);
}

}  // namespace dsla
