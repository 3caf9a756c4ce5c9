// What `dsla bench` prints: tests of one kind each, as rows of a table, CSV or JSON.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cli/model_args.h"
#include "eval/machine.h"
#include "eval/speed.h"
#include "eval/speed_depths.h"
#include "eval/speed_serve.h"

namespace dsla {

// Reading n_prompt tokens, or decoding n_gen tokens of each of `sequences`, after n_depth cached
// ones; or serving `sequences` requests at once, each of n_prompt tokens and a reply of n_gen.
struct BenchTest {
  int level = 0, sequences = 1;
  int64_t n_prompt = 0, n_gen = 0, n_depth = 0;
  std::vector<double> seconds;  // of each repetition, the whole test
  double work = 0;              // operations of a prefill, bytes of a decode step
  double share = 0;             // of the machine's GEMM rate or read bandwidth, at the median
  std::vector<double> first_token = {}, per_token = {};  // of serving, seconds of each request
  // Mean seconds by stage of one prefill or one decode step; empty if they were not asked for.
  std::vector<std::pair<std::string, double>> stages = {};

  bool serves() const { return n_prompt > 0 && n_gen > 0; }
  double median() const;
  double tokens() const {
    return static_cast<double>(n_prompt + n_gen) * static_cast<double>(sequences);
  }
  double rate() const { return tokens() / median(); }  // tokens/s
};

// The tests of MeasureDepths, and those of MeasureSpeed on a text of `tokens` tokens.
std::vector<BenchTest> TestsOf(const HybridModel& model, const MachineLimits& machine,
                               const DepthOptions& options, const std::vector<DepthSpeed>& speeds);
std::vector<BenchTest> TestsOf(const HybridModel& model, const MachineLimits& machine,
                               int64_t tokens, const SpeedOptions& options,
                               const std::vector<LevelSpeed>& speeds);
std::vector<BenchTest> TestsOf(const ServeOptions& options, const std::vector<ServeSpeed>& speeds);

// A header and one line a test, with llama-bench's names of columns where they mean the same.
void PrintCsv(const LoadedModel& loaded, const std::string& kv,
              const std::vector<BenchTest>& tests);
// Those that do not serve, then those that do.
void PrintTests(const std::vector<BenchTest>& tests, bool markdown);
// For each test that has stages, a table of them.
void PrintStages(const std::vector<BenchTest>& tests, bool markdown);
nlohmann::json ToJson(const std::vector<BenchTest>& tests);

// Cells right-aligned under their names, which are rows[0].
void PrintTable(const std::vector<std::vector<std::string>>& rows, bool markdown);

}  // namespace dsla
