// A level policy: from what the engine looks like now to the level that new sequences start at and
// the running sequences to raise. Pure: no clock, no threads, no randomness of its own; everything
// comes in through LoadSnapshot, so that a policy can be simulated by the thousand steps.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "adapt/cost_model.h"
#include "base/status.h"
#include "cache/block_sizes.h"

namespace dsla {

// One running or waiting sequence.
struct SequenceLoad {
  int64_t id = 0;
  int cached_tokens = 0;     // in its cache
  int pending_tokens = 0;    // prompt tokens that are not in the cache yet
  int remaining_tokens = 0;  // at most so many more will be generated
  int level = 0;             // of a waiting one: the lowest it may start at
  int max_level = 0;         // the highest its tier allows; level == max_level: not to be raised
  double arrival = 0;        // seconds, the clock of LoadSnapshot::now
  bool has_first_token = false;  // what is pending then was pre-empted, and is computed again
};

// Taken between two steps.
struct LoadSnapshot {
  double now = 0;  // seconds, monotonic
  std::vector<SequenceLoad> running;
  std::vector<SequenceLoad> waiting;  // in the order in which they will be admitted
  int64_t budget_bytes = 0;           // of cache memory
  BlockSizes sizes;
  int64_t preemptions = 0;  // since the start
};

struct LevelDecision {
  int target = 0;  // level at which auto sequences start from now on
  struct Raise {
    int64_t id;
    int level;
  };
  std::vector<Raise> raises;  // in order; each to a higher level within its bounds
  // Prompt tokens of a step that writes replies too; 0 = as many as a step holds.
  int prefill_limit = 0;
  // Auto sequences with prompts of fewer tokens start at their lowest level, whatever the target.
  int short_prompt = 0;
  // Why the target or the raises changed, one line: a word from the list below, a colon, figures
  // ("ttft: 12 waiting, 8.1 s at level 0, target 2.0 s"). Empty when nothing changed.
  std::string reason;
};

// What a finished step did, and how long it took without the folds before it.
struct StepTime {
  std::vector<PrefillPoint> prefill;  // its chunks; their own seconds mean nothing here
  std::vector<DecodeRow> decode;
  double seconds = 0;
};

// When a request's client had its first token, and what its prompt took.
struct FirstToken {
  double now = 0;      // the clock of LoadSnapshot::now
  double seconds = 0;  // since its arrival
  int prompt_tokens = 0;
  int cached_tokens = 0;  // of those, found in the prefix cache
};

// The words that reasons begin with; metrics count changes by them. "admin" is the operator's.
inline constexpr const char* kReasonWords[] = {"ttft",   "tpot", "memory", "queue",
                                               "prompt", "calm", "fixed",  "admin"};

class LevelPolicy {
 public:
  virtual ~LevelPolicy() = default;
  virtual const char* name() const = 0;  // "slo", "paper", "fixed"
  // To be called before each step and, with nothing to do, four times a second while the target is
  // above 0, so that it goes back when the load is gone. Cheap enough for that: most calls change
  // nothing.
  virtual LevelDecision Decide(const LoadSnapshot& load) = 0;
  // Of tier auto, from now on: the operator's. A target above it comes down to it; whatever else
  // the policy knows stays.
  virtual void SetMaxLevel(int /*level*/) {}

  // Every step and every fold of a running sequence, for a policy that predicts them.
  virtual void ObserveStep(const StepTime& /*step*/) {}
  virtual void ObserveFold(const FoldPoint& /*fold*/) {}
  // What clients see: every reply's first token, and each one after it, `seconds` after the last.
  virtual void ObserveFirstToken(const FirstToken& /*token*/) {}
  virtual void ObserveToken(double /*now*/, double /*seconds*/) {}
  // By what its cost model is corrected now; 1 where there is none.
  virtual CostFactors cost_factors() const { return {}; }
  // They have been so far off for so long that it should be measured anew.
  virtual bool cost_doubtful() const { return false; }
};

}  // namespace dsla
