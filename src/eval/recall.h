// Whether a hybrid still finds what was said earlier: accuracy on the tasks of recall_tasks.h, for
// level 0 and each subject.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/bootstrap.h"
#include "base/exec.h"
#include "base/status.h"
#include "eval/comparison.h"
#include "eval/recall_tasks.h"

namespace dsla {

struct RecallOptions {
  std::vector<int> gaps = {64, 512, 2048, 6000};      // of copies, tokens
  std::vector<int> lengths = {1024, 4096};            // of key-value and needle texts, tokens
  std::vector<double> depths = {0, .25, .5, .75, 1};  // of needles
  int texts = 8;                                      // of each task
  bool write = false;  // also let each text's first answer be written freely
  uint64_t seed = 1;
};

// Means over texts with intervals over texts.
struct RecallScore {
  Estimate accuracy;  // share of asked tokens that are the likeliest, the right ones before them
                      // given
  Estimate exact;     // share of whole answers of which that holds for every token
  bool has_switched = false;
  Estimate switched;  // accuracy where level 0 read the context and was folded before the question
  bool has_written = false;
  Estimate written;  // share of texts whose first answer comes out whole, greedily, token by token
};

struct RecallCell {
  RecallTask task;
  double depth = -1;  // needles: of this depth alone; -1: all questions of the task
  int texts = 0;
  int64_t asked = 0;                // tokens
  std::vector<RecallScore> scores;  // level 0 first, then the subjects
};

// The tasks that fit the model's context. kInvalidArgument if none does or a number is out of
// range.
Expected<std::vector<RecallTask>> RecallTasks(const RecallOptions& options, int max_positions);

// Subjects of `model` itself also answer switched. `filler`: running text, see MakeRecallText.
// `progress` is called after each text.
Expected<std::vector<RecallCell>> MeasureRecall(
    const ExecContext& ctx, const HybridModel& model, CachePool& pool,
    std::span<const Subject> subjects, std::span<const int32_t> filler,
    const RecallOptions& options,
    const std::function<void(int64_t done, int64_t all)>& progress = {});

}  // namespace dsla
