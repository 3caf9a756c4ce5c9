// Free-running generation: what a hybrid writes by itself, greedily, beside what level 0 writes.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/bootstrap.h"
#include "base/exec.h"
#include "base/status.h"
#include "eval/comparison.h"

namespace dsla {

// The first of the largest.
int32_t LikeliestToken(std::span<const float> logits);

// Runs `prompt` on `cache` and goes on greedily, token by token, for `count` tokens or until
// `keep_going` refuses one (which is among the result). End tokens are written on like any other.
Expected<std::vector<int32_t>> WriteGreedily(
    const ExecContext& ctx, const Subject& subject, SequenceCache& cache,
    std::span<const int32_t> prompt, int count,
    const std::function<bool(int32_t token)>& keep_going = {});

// The share of runs of four tokens that came before in `tokens`; 0 for fewer than five.
double RepetitionRate(std::span<const int32_t> tokens);

struct GenerationOptions {
  int prompt = 512;  // tokens of each document, at most half of it
  int tokens = 64;   // to write
  uint64_t seed = 1;
};

struct GenerationScore {
  Estimate repetition;        // RepetitionRate of what was written
  Estimate same;              // tokens before the first that is not level 0's
  Estimate identical;         // share of documents without any such
  bool has_switched = false;  // else the rest is 0
  Estimate same_switched;     // level 0 reads the prompt and is folded before it writes
  Estimate repetition_switched;
};

struct GenerationReport {
  int64_t documents = 0;
  std::vector<GenerationScore> scores;  // level 0 first, then the subjects
};

// Continues the beginning of each document. Subjects of `model` itself also run switched.
Expected<GenerationReport> MeasureGeneration(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const Subject> subjects, std::span<const std::vector<int32_t>> documents,
    const GenerationOptions& options, const std::function<void(int64_t done)>& progress = {});

}  // namespace dsla
