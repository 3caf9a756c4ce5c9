#include "server/metrics.h"

#include <gmock/gmock.h>

#include <cmath>
#include <regex>
#include <set>
#include <sstream>
#include <thread>

namespace dsla {
namespace {

// A reader of the text exposition format that fails the test on anything the format does not allow.
struct Sample {
  std::map<std::string, std::string> labels;
  double value = 0;
};
struct Family {
  std::string type, help;
  std::map<std::string, std::vector<Sample>> samples;  // by full name
};
using Families = std::map<std::string, Family>;

// {a="b",c="d"} with \\, \" and \n escaped.
std::map<std::string, std::string> ParseLabels(const std::string& text) {
  std::map<std::string, std::string> labels;
  size_t at = 1;
  while (at < text.size() - 1) {
    const size_t equal = text.find("=\"", at);
    EXPECT_NE(equal, std::string::npos) << text;
    const std::string key = text.substr(at, equal - at);
    EXPECT_TRUE(std::regex_match(key, std::regex("[a-zA-Z_][a-zA-Z0-9_]*"))) << text;
    std::string value;
    for (at = equal + 2; text[at] != '"'; ++at) {
      if (text[at] == '\\')
        value += text[++at] == 'n' ? '\n' : text[at];
      else
        value += text[at];
    }
    EXPECT_TRUE(labels.emplace(key, value).second) << text;
    ++at;
    EXPECT_TRUE(text[at] == ',' || text[at] == '}') << text;
    ++at;
  }
  return labels;
}

double ParseValue(const std::string& text) {
  if (text == "+Inf") return INFINITY;
  size_t used = 0;
  const double value = std::stod(text, &used);
  EXPECT_EQ(used, text.size()) << text;
  return value;
}

Families Parse(const std::string& text) {
  Families families;
  std::set<std::string> series;
  std::string family;
  EXPECT_TRUE(text.ends_with('\n'));
  std::istringstream lines(text);
  const std::regex sample("([a-zA-Z_:][a-zA-Z0-9_:]*)(\\{.*\\})? ([^ ]+)");
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (std::regex_match(line, match, std::regex("# HELP ([^ ]+) (.+)"))) {
      family = match[1];
      EXPECT_FALSE(families.contains(family)) << "twice or in two places: " << line;
      families[family].help = match[2];
    } else if (std::regex_match(line, match, std::regex("# TYPE ([^ ]+) (\\w+)"))) {
      EXPECT_EQ(match[1], family) << line;
      families[family].type = match[2];
    } else if (std::regex_match(line, match, sample)) {
      std::string base = match[1];
      if (families[family].type == "histogram") {
        base = std::regex_replace(base, std::regex("_(bucket|sum|count)$"), "");
      }
      EXPECT_EQ(base, family) << line;
      EXPECT_TRUE(series.insert(match[1].str() + match[2].str()).second) << "twice: " << line;
      const std::string labels = match[2];
      families[family].samples[match[1]].push_back(
          {labels.empty() ? std::map<std::string, std::string>{} : ParseLabels(labels),
           ParseValue(match[3])});
    } else {
      ADD_FAILURE() << "not a line of the format: " << line;
    }
  }
  for (const auto& [name, f] : families) {
    EXPECT_TRUE(f.type == "counter" || f.type == "gauge" || f.type == "histogram") << name;
    if (f.type == "counter" && name != "vllm:admission_rejections") {
      EXPECT_TRUE(name.ends_with("_total")) << name;
    }
    if (f.type != "histogram") continue;
    const auto& buckets = f.samples.at(name + "_bucket");
    double bound = -INFINITY, count = 0;
    for (const Sample& s : buckets) {
      const double le = ParseValue(s.labels.at("le"));
      EXPECT_GT(le, bound) << name;
      EXPECT_GE(s.value, count) << name;
      bound = le;
      count = s.value;
    }
    EXPECT_TRUE(std::isinf(bound)) << name;
    EXPECT_EQ(count, f.samples.at(name + "_count")[0].value) << name;
    EXPECT_EQ(f.samples.at(name + "_sum").size(), 1u) << name;
  }
  return families;
}

// The value of the one sample with these labels, others in between ignored; -1: there is none.
double Value(const Families& families, const std::string& name,
             const std::map<std::string, std::string>& labels = {}) {
  const auto family = families.find(name);
  if (family == families.end()) return -1;
  for (const Sample& s : family->second.samples.begin()->second) {
    if (std::includes(s.labels.begin(), s.labels.end(), labels.begin(), labels.end())) {
      return s.value;
    }
  }
  return -1;
}

EngineState SomeState() {
  EngineState s;
  s.now = 100;
  s.last_progress = 98.5;
  s.idle = false;
  s.policy = "slo";
  s.target_level = 7;
  s.max_level = 22;
  s.rows_per_level = {3, 0, 2};
  s.running = 5;
  s.queued = 4;
  s.queued_tokens = 4000;
  s.budget_bytes = 1000;
  s.page_bytes = 300;
  s.state_bytes = 200;
  s.prefix_cache_bytes = 100;
  s.prompt_tokens = 5000;
  s.cached_tokens = 1250;
  s.generated_tokens = 123456789;
  s.preemptions = 6;
  s.cost_factors = {.prefill = 1.5, .decode = 0.5, .fold = 2};
  s.cost_doubtful = true;
  return s;
}

RequestResult SomeResult() {
  RequestResult r;
  r.tier = Tier::kEconomy;
  r.finish = FinishReason::kLength;
  r.prompt_tokens = 100;
  r.generated_tokens = 11;
  r.queue_seconds = 0.5;
  r.first_token_seconds = 1.5;
  r.total_seconds = 3.5;
  return r;
}

TEST(Histogram, BucketsAreInclusiveAndCumulative) {
  Histogram h({1, 2, 5});
  for (const double v : {0.5, 1.0, 1.5, 5.0, 7.0}) h.Observe(v);
  h.Observe(2.0, 3);
  h.Observe(std::nan(""));
  EXPECT_THAT(h.Cumulative(), testing::ElementsAre(2, 6, 7, 8));
  EXPECT_DOUBLE_EQ(h.sum(), 21.0);
}

TEST(Metrics, EmptyServerIsWellFormed) {
  ServerMetrics metrics({.model = "m", .version = "1"});
  const Families families = Parse(metrics.Render(EngineState{}));
  EXPECT_EQ(Value(families, "dsla_requests_running"), 0);
  EXPECT_EQ(Value(families, "dsla_seconds_since_progress"), 0);
  for (const auto& [name, family] : families) EXPECT_TRUE(name.starts_with("dsla_")) << name;
}

TEST(Metrics, EngineState) {
  ServerMetrics metrics({.model = "a \"model\"\n\\", .version = "1.2"});
  const Families f = Parse(metrics.Render(SomeState()));
  EXPECT_EQ(Value(f, "dsla_build_info", {{"model", "a \"model\"\n\\"}, {"version", "1.2"}}), 1);
  EXPECT_EQ(Value(f, "dsla_target_level"), 7);
  EXPECT_EQ(Value(f, "dsla_max_level"), 22);
  EXPECT_EQ(Value(f, "dsla_policy", {{"policy", "slo"}}), 1);
  EXPECT_EQ(Value(f, "dsla_level_sequences", {{"level", "0"}}), 3);
  EXPECT_EQ(Value(f, "dsla_level_sequences", {{"level", "2"}}), 2);
  EXPECT_EQ(Value(f, "dsla_memory_bytes", {{"kind", "pages"}}), 300);
  EXPECT_EQ(Value(f, "dsla_memory_bytes", {{"kind", "states"}}), 200);
  EXPECT_EQ(Value(f, "dsla_memory_bytes", {{"kind", "prefix_cache"}}), 100);
  EXPECT_EQ(Value(f, "dsla_cached_tokens_total"), 1250);
  EXPECT_EQ(Value(f, "dsla_generated_tokens_total"), 123456789);
  EXPECT_EQ(Value(f, "dsla_seconds_since_progress"), 1.5);
  EXPECT_EQ(Value(f, "dsla_cost_factor", {{"kind", "prefill"}}), 1.5);
  EXPECT_EQ(Value(f, "dsla_cost_factor", {{"kind", "fold"}}), 2);
  EXPECT_EQ(Value(f, "dsla_cost_doubtful"), 1);
}

TEST(Metrics, Requests) {
  ServerMetrics metrics({});
  metrics.ObserveRequest(SomeResult());
  RequestResult failed;
  failed.status = ResourceExhausted("no memory");
  metrics.ObserveRequest(failed);
  RequestResult late;
  late.status = Error(StatusCode::kCancelled, "gone");
  metrics.ObserveRequest(late);
  metrics.CountRejection(Rejection::Kind::kQueueFull);
  metrics.CountRejection(Rejection::Kind::kQueueFull);
  metrics.CountHttp("/v1/completions", 200, 0.25);
  metrics.CountHttp("/v1/completions", 429, 0.001);
  metrics.AddHttpInFlight(3);
  metrics.AddHttpInFlight(-1);
  const Families f = Parse(metrics.Render(EngineState{}));
  EXPECT_EQ(Value(f, "dsla_requests_total", {{"finish", "length"}, {"tier", "economy"}}), 1);
  EXPECT_EQ(Value(f, "dsla_requests_total", {{"finish", "error"}, {"tier", "auto"}}), 1);
  EXPECT_EQ(Value(f, "dsla_requests_total", {{"finish", "cancelled"}}), 1);
  EXPECT_EQ(Value(f, "dsla_rejections_total", {{"reason", "queue_full"}}), 2);
  EXPECT_EQ(Value(f, "dsla_http_requests_total", {{"route", "/v1/completions"}, {"code", "429"}}),
            1);
  EXPECT_EQ(Value(f, "dsla_http_in_flight"), 2);
  const auto& ttft = f.at("dsla_ttft_seconds").samples;
  EXPECT_EQ(ttft.at("dsla_ttft_seconds_count")[0].value, 1);  // the failed ones had no token
  EXPECT_DOUBLE_EQ(ttft.at("dsla_ttft_seconds_sum")[0].value, 1.5);
  const auto& tpot = f.at("dsla_tpot_seconds").samples;
  EXPECT_DOUBLE_EQ(tpot.at("dsla_tpot_seconds_sum")[0].value, 0.2);  // 2 s over 10 tokens
  EXPECT_EQ(Value(f, "dsla_tpot_seconds", {{"le", "0.1"}}), 0);
  EXPECT_EQ(Value(f, "dsla_tpot_seconds", {{"le", "0.5"}}), 1);
}

TEST(Metrics, SwitchesAreCountedOnceEach) {
  ServerMetrics metrics({});
  EngineState s;
  const auto event = [](const char* id, int from, int to, const char* reason) {
    LevelEvent e;
    e.request_id = id;
    e.from = from;
    e.to = to;
    e.reason = reason;
    return e;
  };
  s.events = {event("", 0, 5, "ttft: 12 waiting"), event("r1", 0, 5, "memory: 3 MB")};
  s.raises = 1;
  s.target_changes = 1;
  Parse(metrics.Render(s));
  s.events.push_back(event("", 5, 0, "calm: nothing"));
  s.events.push_back(event("r2", 0, 5, "strange reason"));
  s.raises = 2;
  s.target_changes = 2;
  Parse(metrics.Render(s));
  Families f = Parse(metrics.Render(s));  // nothing new
  const auto count = [&](const char* scope, const char* dir, const char* reason) {
    return Value(f, "dsla_switch_total", {{"scope", scope}, {"dir", dir}, {"reason", reason}});
  };
  EXPECT_EQ(count("target", "up", "ttft"), 1);
  EXPECT_EQ(count("sequence", "up", "memory"), 1);
  EXPECT_EQ(count("target", "down", "calm"), 1);
  EXPECT_EQ(count("sequence", "up", "other"), 1);
  s.raises = 102;  // more than the engine lists
  f = Parse(metrics.Render(s));
  EXPECT_EQ(count("sequence", "up", "memory"), 2);
  EXPECT_EQ(count("sequence", "up", "unlogged"), 98);
}

TEST(Metrics, VllmNames) {
  ServerMetrics metrics({.model = "smol", .version = "1", .vllm_compat = true});
  metrics.ObserveRequest(SomeResult());
  const Families f = Parse(metrics.Render(SomeState()));
  const std::map<std::string, std::string> model{{"model_name", "smol"}};
  EXPECT_EQ(Value(f, "vllm:num_requests_running", model), 5);
  EXPECT_EQ(Value(f, "vllm:num_requests_waiting", model), 4);
  EXPECT_EQ(Value(f, "vllm:kv_cache_usage_perc", model), 0.5);
  EXPECT_EQ(Value(f, "vllm:prefix_cache_hits_total", model), 1250);
  // Two of vLLM's are one of ours.
  EXPECT_EQ(Value(f, "vllm:prefix_cache_queries_total", model), 5000);
  EXPECT_EQ(Value(f, "vllm:prompt_tokens_total", model), 5000);
  EXPECT_EQ(Value(f, "vllm:generation_tokens_total", model), 123456789);
  EXPECT_EQ(Value(f, "vllm:num_preemptions_total", model), 6);
  EXPECT_EQ(f.at("vllm:num_preemptions_total").type, "counter");
  EXPECT_EQ(f.at("vllm:num_requests_waiting").type, "gauge");
  EXPECT_EQ(Value(f, "vllm:request_success_total", {{"finished_reason", "length"}}), 1);
  EXPECT_EQ(Value(f, "vllm:request_success_total", {{"finished_reason", "stop"}}), 0);
  for (const char* name :
       {"vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds", "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds", "vllm:request_inference_time_seconds",
        "vllm:request_prompt_tokens", "vllm:request_generation_tokens"}) {
    ASSERT_TRUE(f.contains(name)) << name;
    EXPECT_EQ(f.at(name).type, "histogram");
    EXPECT_EQ(f.at(name).samples.at(std::string(name) + "_count")[0].value, 1) << name;
  }
}

TEST(Metrics, ReplicasHaveSamplesOfTheirOwn) {
  ServerMetrics metrics({.model = "smol", .version = "1", .vllm_compat = true});
  EngineState all = SomeState();
  all.replicas = {SomeState(), SomeState()};
  EngineState& failed = all.replicas[1];
  failed.running = 0;
  failed.device_error = "an illegal access";
  for (int r = 0; r < 2; ++r) {
    LevelEvent event;
    event.to = 5;
    event.reason = "ttft: 12 waiting";
    all.replicas[r].events = {event};
    all.replicas[r].raises = 0;
    all.replicas[r].target_changes = 1;
  }
  metrics.ObserveRequest(SomeResult());
  Parse(metrics.Render(all));
  const Families f = Parse(metrics.Render(all));
  EXPECT_EQ(Value(f, "dsla_requests_running", {{"engine", "0"}}), 5);
  EXPECT_EQ(Value(f, "dsla_requests_running", {{"engine", "1"}}), 0);
  EXPECT_EQ(Value(f, "dsla_memory_bytes", {{"kind", "pages"}, {"engine", "1"}}), 300);
  EXPECT_EQ(Value(f, "dsla_level_sequences", {{"level", "0"}, {"engine", "0"}}), 3);
  EXPECT_EQ(Value(f, "dsla_policy", {{"policy", "slo"}, {"engine", "1"}}), 1);
  EXPECT_EQ(Value(f, "dsla_replica_up", {{"engine", "0"}}), 1);
  EXPECT_EQ(Value(f, "dsla_replica_up", {{"engine", "1"}}), 0);
  EXPECT_EQ(Value(f, "vllm:num_requests_running", {{"model_name", "smol"}, {"engine", "1"}}), 0);
  EXPECT_EQ(Value(f, "vllm:kv_cache_usage_perc", {{"model_name", "smol"}, {"engine", "0"}}), 0.5);
  EXPECT_EQ(f.at("dsla_generated_tokens_total").samples.begin()->second.size(), 2u) << "no sum";
  EXPECT_EQ(Value(f, "dsla_switch_total", {{"scope", "target"}, {"dir", "up"}}), 2) << "of both";
  EXPECT_EQ(Value(f, "dsla_requests_total", {{"finish", "length"}}), 1) << "whoever had it";
  for (const auto& [name, family] : Parse(metrics.Render(SomeState()))) {
    EXPECT_NE(name, "dsla_replica_up");
    for (const auto& [full, samples] : family.samples)
      for (const Sample& sample : samples) EXPECT_FALSE(sample.labels.contains("engine")) << full;
  }
}

TEST(Metrics, RecordedFromManyThreadsWhileRead) {
  ServerMetrics metrics({});
  constexpr int kThreads = 4, kEach = 500;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&metrics] {
      for (int i = 0; i < kEach; ++i) {
        metrics.ObserveRequest(SomeResult());
        metrics.CountHttp("/health", 200, 0.001);
        metrics.CountRejection(Rejection::Kind::kInvalid);
        if (i % 100 == 0) metrics.Render(SomeState());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Families f = Parse(metrics.Render(SomeState()));
  EXPECT_EQ(Value(f, "dsla_requests_total"), kThreads * kEach);
  EXPECT_EQ(Value(f, "dsla_http_requests_total"), kThreads * kEach);
  EXPECT_EQ(Value(f, "dsla_rejections_total"), kThreads * kEach);
  EXPECT_DOUBLE_EQ(f.at("dsla_ttft_seconds").samples.at("dsla_ttft_seconds_sum")[0].value,
                   1.5 * kThreads * kEach);
}

}  // namespace
}  // namespace dsla
