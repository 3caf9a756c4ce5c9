// Several hybrids beside level 0 on one document, token by token: how far their next-token
// distributions are from level 0's (the teacher's), by position, from the start and after a switch
// in mid-document. Sums of one document, from which means and their intervals are made.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "model/hybrid_model.h"

namespace dsla {

// One hybrid to compare. What it names must outlive the comparison; a pool belongs to the model
// whose cache geometry it has.
struct Subject {
  const HybridModel* model = nullptr;
  CachePool* pool = nullptr;
  int level = 0;
};

// Positions are counted in buckets: [kPositionBounds[i], kPositionBounds[i + 1]), the last without
// an end.
inline constexpr std::array<int, 5> kPositionBounds = {0, 512, 1024, 2048, 4096};
inline constexpr int kPositionBuckets = static_cast<int>(kPositionBounds.size());

struct PositionSums {
  int64_t tokens = 0;
  double kl = 0;        // nats
  double agree = 0;     // tokens with the same likeliest successor
  double loss = 0;      // cross-entropy of the document's own next token, nats
  int64_t targets = 0;  // tokens that have a next one
};

// Over the tokens from the switch on.
struct SwitchSums {
  int64_t tokens = 0;
  double kl_start = 0;     // run at the level from the first token on
  double kl_switched = 0;  // level 0 up to the switch, then folded
};

struct SubjectSums {
  std::array<PositionSums, kPositionBuckets> positions;
  std::vector<SwitchSums> switches;  // in the order of the shares; empty where there were none

  PositionSums Total() const;
};

struct DocumentSums {
  int64_t tokens = 0;
  SubjectSums teacher;  // of its positions only loss, tokens and targets count
  std::vector<SubjectSums> subjects;
};

struct ComparisonOptions {
  std::vector<double> switches;  // shares of the document, each in [0, 1), where subjects of the
                                 // teacher's own model fold; rounded down to whole tokens
  int chunk = 128;               // rows per step; the logits of two runs are held for so many
};

// The teacher is `model` at level 0. `tokens`: at least 2, and they fit the context.
Expected<DocumentSums> CompareDocument(const ExecContext& ctx, const HybridModel& model,
                                       CachePool& pool, std::span<const int32_t> tokens,
                                       std::span<const Subject> subjects,
                                       const ComparisonOptions& options);

}  // namespace dsla
