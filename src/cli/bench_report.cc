#include "cli/bench_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/quantile.h"
#include "eval/cost.h"

namespace dsla {
namespace {

BenchTest Prefill(const HybridModel& model, const MachineLimits& machine, int level, int64_t tokens,
                  int64_t depth, std::vector<double> seconds) {
  BenchTest test{.level = level,
                 .n_prompt = tokens,
                 .n_depth = depth,
                 .seconds = std::move(seconds),
                 .work = PrefillFlops(model, level, tokens, depth)};
  test.share = test.work / test.median() / machine.gemm_flops;
  return test;
}

// `seconds` of one step; the test is `count` of them.
BenchTest Decode(const HybridModel& model, const MachineLimits& machine, int level, int sequences,
                 int64_t count, int64_t length, int64_t depth, std::vector<double> seconds) {
  for (double& s : seconds) s *= static_cast<double>(count);
  BenchTest test{.level = level,
                 .sequences = sequences,
                 .n_gen = count,
                 .n_depth = depth,
                 .seconds = std::move(seconds),
                 .work = static_cast<double>(DecodeBytes(model, level, length, sequences))};
  test.share =
      test.work * static_cast<double>(count) / test.median() / machine.read_bytes_per_second;
  return test;
}

struct MeanAndDeviation {
  double mean, deviation;
};
MeanAndDeviation Moments(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, n > 1 ? std::sqrt(squares / (n - 1)) : 0};
}

// Stage by stage the mean of `runs` runs.
std::vector<std::pair<std::string, double>> MeanStages(const StageTimes& times, double runs) {
  std::vector<std::pair<std::string, double>> means;
  for (const auto& [name, seconds] : times.stages()) means.emplace_back(name, seconds / runs);
  return means;
}

void PrintServing(const std::vector<BenchTest>& tests, bool markdown) {
  std::vector<std::vector<std::string>> cells = {{"serve", "level", "requests", "tok/s",
                                                  "written/s", "first token p50, s", "p95, s",
                                                  "per token p50, ms", "p95, ms"}};
  for (const BenchTest& test : tests) {
    if (!test.serves()) continue;
    const double written = static_cast<double>(test.n_gen * test.sequences) / test.median();
    cells.push_back({fmt::format("{} + {}", test.n_prompt, test.n_gen),
                     fmt::format("{}", test.level), fmt::format("{}", test.sequences),
                     fmt::format("{:.1f}", test.rate()), fmt::format("{:.1f}", written),
                     fmt::format("{:.2f}", Quantile(test.first_token, 0.5)),
                     fmt::format("{:.2f}", Quantile(test.first_token, 0.95)),
                     fmt::format("{:.1f}", 1e3 * Quantile(test.per_token, 0.5)),
                     fmt::format("{:.1f}", 1e3 * Quantile(test.per_token, 0.95))});
  }
  if (cells.size() == 1) return;
  fmt::print("\n");
  PrintTable(cells, markdown);
}

std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

}  // namespace

double BenchTest::median() const { return Quantile(seconds, 0.5); }

std::vector<BenchTest> TestsOf(const HybridModel& model, const MachineLimits& machine,
                               const DepthOptions& options, const std::vector<DepthSpeed>& speeds) {
  std::vector<BenchTest> tests;
  for (const DepthSpeed& speed : speeds) {
    if (!speed.prefill.empty()) {
      tests.push_back(
          Prefill(model, machine, speed.level, options.prefill_tokens, speed.depth, speed.prefill));
      tests.back().stages =
          MeanStages(speed.prefill_stages, static_cast<double>(speed.prefill.size()));
    }
    tests.push_back(Decode(model, machine, speed.level, speed.sequences, options.decode_tokens,
                           speed.depth + 1 + options.decode_tokens / 2, speed.depth, speed.decode));
    tests.back().stages = MeanStages(
        speed.decode_stages, static_cast<double>(speed.decode.size()) * options.decode_tokens);
  }
  return tests;
}

std::vector<BenchTest> TestsOf(const HybridModel& model, const MachineLimits& machine,
                               int64_t tokens, const SpeedOptions& options,
                               const std::vector<LevelSpeed>& speeds) {
  std::vector<BenchTest> tests;
  for (const LevelSpeed& speed : speeds) {
    tests.push_back(Prefill(model, machine, speed.level, tokens, 0, speed.prefill_runs));
    tests.push_back(Decode(model, machine, speed.level, 1, 1, tokens + options.decode_tokens / 2,
                           tokens, speed.decode_steps));
  }
  return tests;
}

std::vector<BenchTest> TestsOf(const ServeOptions& options, const std::vector<ServeSpeed>& speeds) {
  std::vector<BenchTest> tests;
  for (const ServeSpeed& speed : speeds) {
    tests.push_back({.level = speed.level,
                     .sequences = options.requests,
                     .n_prompt = speed.prompt_tokens,
                     .n_gen = options.reply_tokens,
                     .seconds = speed.seconds,
                     .first_token = speed.first_token,
                     .per_token = speed.per_token});
  }
  return tests;
}

void PrintCsv(const LoadedModel& loaded, const std::string& kv,
              const std::vector<BenchTest>& tests) {
  fmt::print(
      "model_type,weights,type_kv,n_threads,level,sequences,n_prompt,n_gen,n_depth,runs,avg_ns,"
      "stddev_ns,avg_ts,stddev_ts,median_ns,median_ts,flops,bytes,share\n");
  for (const BenchTest& test : tests) {
    std::vector<double> rates = test.seconds;
    for (double& rate : rates) rate = test.tokens() / rate;
    const auto time = Moments(test.seconds), rate = Moments(rates);
    const bool prefill = test.n_prompt > 0;
    fmt::print(
        "{},{},{},{},{},{},{},{},{},{},{:.0f},{:.0f},{:.2f},{:.2f},{:.0f},{:.2f},{:.0f},"
        "{:.0f},{:.4f}\n",
        Quoted(loaded.model->config().name), Name(loaded.model->options().weights), kv,
        loaded.ctx.threads, test.level, test.sequences, test.n_prompt, test.n_gen, test.n_depth,
        test.seconds.size(), time.mean * 1e9, time.deviation * 1e9, rate.mean, rate.deviation,
        test.median() * 1e9, test.rate(), prefill ? test.work : 0.0, prefill ? 0.0 : test.work,
        test.share);
  }
}

void PrintTests(const std::vector<BenchTest>& tests, bool markdown) {
  std::vector<std::vector<std::string>> cells = {
      {"test", "depth", "level", "sequences", "tok/s", "   ms", "GFLOP or MB", "of the limit"}};
  for (const BenchTest& test : tests) {
    if (test.serves()) continue;
    const bool prefill = test.n_prompt > 0;
    const double steps = prefill ? 1 : static_cast<double>(test.n_gen);
    cells.push_back(
        {prefill ? fmt::format("prefill {}", test.n_prompt) : fmt::format("decode {}", test.n_gen),
         fmt::format("{}", test.n_depth), fmt::format("{}", test.level),
         fmt::format("{}", test.sequences), fmt::format("{:.1f}", test.rate()),
         fmt::format("{:.2f}", test.median() / steps * 1e3),
         fmt::format("{:.0f}", test.work / (prefill ? 1e9 : 1e6)),
         fmt::format("{:.0f}%", test.share * 100)});
  }
  PrintTable(cells, markdown);
  PrintServing(tests, markdown);
}

void PrintStages(const std::vector<BenchTest>& tests, bool markdown) {
  for (const BenchTest& test : tests) {
    if (test.stages.empty()) continue;
    fmt::print("\n{} at depth {}, level {}, {} sequence{}\n\n",
               test.n_prompt > 0 ? fmt::format("prefill {}", test.n_prompt) : "decode step",
               test.n_depth, test.level, test.sequences, test.sequences == 1 ? "" : "s");
    double all = 0;
    for (const auto& [name, seconds] : test.stages) all += seconds;
    std::vector<std::vector<std::string>> cells = {{"stage", "ms", "share"}};
    const auto add = [&](const std::string& name, double seconds) {
      cells.push_back({name, fmt::format("{:.3f}", seconds * 1e3),
                       fmt::format("{:.1f}%", 100 * seconds / all)});
    };
    for (const auto& [name, seconds] : test.stages) add(name, seconds);
    add("all", all);
    PrintTable(cells, markdown);
  }
}

nlohmann::json ToJson(const std::vector<BenchTest>& tests) {
  nlohmann::json list = nlohmann::json::array();
  for (const BenchTest& test : tests) {
    const bool prefill = test.n_prompt > 0;
    list.push_back({{"test", test.serves() ? "serve"
                             : prefill     ? "prefill"
                                           : "decode"},
                    {"level", test.level},
                    {"sequences", test.sequences},
                    {"n_prompt", test.n_prompt},
                    {"n_gen", test.n_gen},
                    {"n_depth", test.n_depth},
                    {"seconds", test.seconds},
                    {"tokens_per_second", test.rate()}});
    if (test.serves()) {
      list.back()["first_token_seconds"] = test.first_token;
      list.back()["per_token_seconds"] = test.per_token;
      continue;
    }
    list.back()[prefill ? "flops" : "bytes_per_step"] = test.work;
    list.back()[prefill ? "share_of_gemm" : "share_of_bandwidth"] = test.share;
    for (const auto& [name, seconds] : test.stages) list.back()["stages"][name] = seconds;
  }
  return list;
}

void PrintTable(const std::vector<std::vector<std::string>>& rows, bool markdown) {
  const std::string separator = markdown ? " | " : "  ", edge = markdown ? "| " : "";
  std::vector<size_t> width(rows[0].size());
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  for (size_t r = 0; r < rows.size(); ++r) {
    std::string line = edge;
    for (size_t c = 0; c < rows[r].size(); ++c) {
      line += fmt::format("{:>{}}", rows[r][c], width[c]);
      line += c + 1 < rows[r].size() ? separator : (markdown ? " |" : "");
    }
    fmt::print("{}\n", line);
    if (r == 0 && markdown) {
      std::string rule = "|";
      for (size_t c = 0; c < rows[0].size(); ++c) rule += " ---: |";
      fmt::print("{}\n", rule);
    }
  }
}

}  // namespace dsla
