// SloPolicy: the lowest target level at which, by the cost model, the sequences that wait and run
// keep to the targets for time to first token and time per token and fit the memory.
//
// Where no level meets a target, the lowest that comes close to the best there is; where levels
// gain next to nothing (short contexts), none is raised for it. Memory goes before time: a level at
// which the sequences do not fit is not chosen while there is one at which they do.
//
// Running sequences follow by folding where that pays: memory for one that is past its break-even
// length, while memory is short; time where the seconds that the rest of the sequence saves exceed
// the fold's own, while a time target binds. Largest saving per second of folding first; folds may
// take a bounded share of the time, and no more than a bounded pause between two steps.
//
// The cost model is the one measured at the start, corrected by the steps and folds that ran since
// (cost_correction.h), so that a calibration gone wrong does not last.
//
// Prompts short of their break-even length start at level 0: a higher one takes more memory and
// gains next to no time.
//
// Where clients see more than the estimate says, and more than a target, the level goes up a step.
// Of a first token only what the load added counts, as in the estimate. What began before the last
// rise says what that was for, not what it gave, and does not count.
//
// Beside replies, prompts are cut into chunks as small as costs next to nothing by the cost model,
// and smaller where the target per token asks for it, as far as the loss is bounded: quality is not
// spent on what smaller chunks give.
//
// Up: at once, then after a cool-down. Down: when a lower level has sufficed with a margin for
// calm_seconds without a break, to the highest that was needed in that time, and by a quarter of
// the ladder or more, as every level has prefixes of its own; with the load gone the target is 0
// after two such spans at most.
#pragma once

#include <string>
#include <vector>

#include "adapt/cost_correction.h"
#include "adapt/cost_model.h"
#include "adapt/load_estimate.h"
#include "adapt/make_policy.h"
#include "adapt/policy.h"
#include "base/quantile.h"

namespace dsla {

class SloPolicy final : public LevelPolicy {
 public:
  SloPolicy(const SloOptions& options, MeasuredCost cost, int max_level);

  const char* name() const override { return "slo"; }
  LevelDecision Decide(const LoadSnapshot& load) override;
  void SetMaxLevel(int level) override;
  void ObserveStep(const StepTime& step) override { correction_.ObserveStep(measured_, step); }
  void ObserveFold(const FoldPoint& fold) override { correction_.ObserveFold(measured_, fold); }
  void ObserveFirstToken(const FirstToken& token) override;
  void ObserveToken(double now, double seconds) override;
  CostFactors cost_factors() const override { return correction_.factors(); }
  bool cost_doubtful() const override { return correction_.doubtful(); }

 private:
  // Levels that single criteria ask for, and what follows from them together.
  struct Want {
    int level = 0;
    int ttft = 0, tpot = 0;  // lowest that each time target asks for
    const char* word = "";   // of kReasonWords: what binds
  };

  // A possible raise of one running sequence.
  struct Candidate {
    int64_t id;
    int from, to;
    double layer_seconds;  // of one layer's fold
    double bytes;          // freed by the whole raise
    double value;          // bytes or seconds saved per second of folding
  };

  int PrefillLimit(const LoadSnapshot& load) const;
  Want WantedLevel(const LoadSnapshot& load, double margin) const;
  void ApplyFeedback(const LoadSnapshot& load, Want& want) const;
  std::string UpReason(const LoadSnapshot& load, const Want& want) const;
  void MoveTarget(const LoadSnapshot& load, const Want& want, LevelDecision& decision);
  std::vector<Candidate> Candidates(const LoadSnapshot& load, bool memory) const;
  void ChooseRaises(const LoadSnapshot& load, const Want& want, LevelDecision& decision);

  const SloOptions options_;
  const CostModel measured_;   // at the start
  CostCorrection correction_;  // by what was seen since
  CostModel cost_;             // the two together, as of the last look
  int max_level_;
  std::vector<LoadEstimate> estimates_;  // [max_level + 1], of the last look

  SlidingQuantile ttft_, tpot_;         // what clients saw since the last rise
  double ttft_p95_ = 0, tpot_p95_ = 0;  // of that, at the last look

  int target_ = 0;
  int prefill_limit_ = 0;    // tokens, of the last look
  double last_rise_;         // of the target, seconds; -inf before the first
  double last_look_;         // likewise
  double last_change_;       // of the target
  double calm_since_ = 0;    // with calm_
  bool calm_ = false;        // a lower target has sufficed since
  int calm_level_ = 0;       // the highest wanted since
  double fold_credit_ = 0;   // seconds that folds may take now
  int64_t preemptions_ = 0;  // seen at the last look
  bool preempted_ = false;   // since the look before
};

}  // namespace dsla
