// Prometheus metrics of the server. Counters and gauges that the engine keeps come from the
// EngineState passed to Render; histograms and what only HTTP knows are kept here.
//
// A registry of our own rather than prometheus-cpp: most counters here are totals that the engine
// already keeps, which that library's counters cannot take over (they only add), and the engine's
// thread must not wait for a scrape: recording is a few relaxed atomic adds.
//
// Thread-safe. Names and their meaning stand in the text itself (# HELP).
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace dsla {

// A Prometheus histogram with fixed upper bounds; +Inf is added.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);  // ascending
  void Observe(double value, int64_t count = 1);   // `count` times the same value

  std::span<const double> bounds() const { return bounds_; }
  // Cumulative counts [bounds + 1], the last is all.
  std::vector<int64_t> Cumulative() const;
  double sum() const { return sum_.load(std::memory_order_relaxed); }

 private:
  std::vector<double> bounds_;
  std::unique_ptr<std::atomic<int64_t>[]> counts_;  // [bounds + 1], each its own bucket
  std::atomic<double> sum_{0};
};

struct MetricsOptions {
  std::string model;         // label of dsla_build_info and of vLLM's names
  std::string version;       // of the program
  bool vllm_compat = false;  // vLLM's names besides our own
};

class ServerMetrics {
 public:
  explicit ServerMetrics(MetricsOptions options);

  // To be called by the engine's FinishObserver.
  void ObserveRequest(const RequestResult& result);

  void CountRejection(Rejection::Kind kind);
  // `route`: the pattern that matched ("/v1/completions"), never the client's text, so that the
  // number of series is bounded; "other" where none did. status: as sent; 499 where the client was
  // gone first. seconds: to the last byte.
  void CountHttp(std::string_view route, int status, double seconds);
  // How many requests or connections are open now: +1, later -1.
  void AddHttpInFlight(int delta) { http_in_flight_.fetch_add(delta, std::memory_order_relaxed); }
  void AddConnections(int delta) { connections_.fetch_add(delta, std::memory_order_relaxed); }

  // Text exposition format 0.0.4. Content-Type: kContentType. Of several replicas, what an engine
  // keeps is each one's, with the label engine="0"; the rest is of all together.
  std::string Render(const EngineState& state);
  static constexpr const char* kContentType = "text/plain; version=0.0.4; charset=utf-8";

 private:
  struct RequestKey {  // how requests ended
    std::string finish;
    Tier tier;
    auto operator<=>(const RequestKey&) const = default;
  };
  struct SwitchKey {
    std::string scope, dir, reason;
    auto operator<=>(const SwitchKey&) const = default;
  };

  struct Seen {  // of an engine, by the last Render
    int64_t raises = 0, target_changes = 0;
  };

  void CountSwitches(const EngineState& state, Seen& seen);  // the events since the last Render
  void RenderEngine(const EngineState& state, std::string& out) const;
  void RenderRequests(std::string& out) const;
  void RenderHttp(std::string& out) const;
  void RenderVllm(const EngineState& state, std::string& out) const;

  const MetricsOptions options_;
  Histogram ttft_, tpot_, e2e_, queue_time_, prefill_time_, decode_time_,
      inference_time_;  // seconds
  Histogram prompt_tokens_, generated_tokens_;
  Histogram http_seconds_;
  std::atomic<int64_t> http_in_flight_{0}, connections_{0};

  mutable std::mutex mutex_;  // of what follows
  std::map<RequestKey, int64_t> requests_;
  std::map<Rejection::Kind, int64_t> rejections_;
  std::map<std::pair<std::string, int>, int64_t> http_requests_;
  std::map<SwitchKey, int64_t> switches_;
  std::vector<Seen> seen_;  // [engines]
};

}  // namespace dsla
