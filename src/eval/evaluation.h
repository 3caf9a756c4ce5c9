// What dsla eval measures: an adapter at several levels, and its controls, against level 0 of the
// same model; on text, on recall and on what it writes by itself.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/bootstrap.h"
#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "eval/comparison.h"
#include "eval/controls.h"
#include "eval/generation.h"
#include "eval/recall.h"
#include "model/hybrid_model.h"

namespace dsla {

struct EvaluationOptions {
  std::vector<int> levels;
  std::vector<double> switches = {0.5};  // shares of each document; the adapter's own levels only
  std::vector<Control> controls;         // each at every level
  std::vector<int> order;                // for Control::kGivenOrder
  bool measure_recall = false;
  RecallOptions recall;
  bool measure_generation = false;
  GenerationOptions generation;
  int64_t control_memory_bytes = 0;  // the cache of each control
  uint64_t seed = 1;                 // of intervals and of the random order
};

// Estimates are means over tokens with intervals over documents.
struct PositionResult {
  int from = 0, to = 0;  // positions [from, to); to = 0: without an end
  int64_t tokens = 0;
  double teacher_loss = 0;
  Estimate kl, loss_gap, agreement;
};

struct SwitchResult {
  double share = 0;
  int64_t tokens = 0;  // after the switch
  Estimate kl_start, kl_switched;
};

struct SubjectResult {
  std::string control;  // empty: the adapter as it is
  int level = 0;
  int64_t layer_tokens = 0;  // tokens of bf16 KV cache that a converted layer's memory equals
  std::vector<int> order;    // of order controls: the layers that are converted
  int64_t tokens = 0;
  Estimate kl;                            // nats per token
  Estimate loss_gap;                      // cross-entropy beyond level 0's, nats per token
  Estimate agreement;                     // top-1
  std::vector<PositionResult> positions;  // those with tokens
  std::vector<SwitchResult> switches;

  std::string Title() const;  // "level 15", "level 15, window"
};

struct Evaluation {
  int64_t documents = 0, tokens = 0;
  double teacher_loss = 0;
  std::vector<SubjectResult> subjects;  // the adapter's levels, then control by control
  std::vector<RecallCell> recall;       // scores: level 0, then as in `subjects`
  GenerationReport generation;          // likewise
};

// `adapter` is the model's own: controls are made of its tensors. `documents`: token sequences of 2
// tokens to the context's length; recall takes its running text from them. `progress` gets a line
// on what is going on.
Expected<Evaluation> Evaluate(const ExecContext& ctx, const HybridModel& model,
                              const Adapter& adapter, CachePool& pool,
                              std::span<const std::vector<int32_t>> documents,
                              const EvaluationOptions& options,
                              const std::function<void(const std::string&)>& progress = {});

}  // namespace dsla
