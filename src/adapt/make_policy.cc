#include "adapt/make_policy.h"

#include <cmath>

#include "adapt/load_estimate.h"
#include "adapt/paper_policy.h"
#include "adapt/slo_policy.h"

namespace dsla {
namespace {

class FixedPolicy final : public LevelPolicy {
 public:
  explicit FixedPolicy(int level) : level_(level) {}

  const char* name() const override { return "fixed"; }
  LevelDecision Decide(const LoadSnapshot&) override {
    return {.target = level_, .raises = {}, .reason = Reason()};
  }

 private:
  std::string Reason() {
    if (told_) return {};
    told_ = true;
    return fmt::format("fixed: level {}", level_);
  }

  const int level_;
  bool told_ = false;  // the first decision is the change
};

// Each option that must lie in a range, by the name a user knows.
struct Bound {
  const char* name;
  double value, low, high;
};

Status CheckBounds(std::initializer_list<Bound> bounds) {
  for (const Bound& b : bounds) {
    if (std::isfinite(b.value) && b.value >= b.low && b.value <= b.high) continue;
    return InvalidArgument("{} is {}, must be between {} and {}", b.name, b.value, b.low, b.high);
  }
  return Status::Ok();
}

constexpr double kDay = 86400;

Status CheckSlo(const SloOptions& o) {
  return CheckBounds({{"slo ttft", o.ttft, 1e-3, kDay},
                      {"slo tpot", o.tpot, 1e-5, kDay},
                      {"slo prefill chunk", static_cast<double>(o.prefill_chunk), 1, 1 << 20},
                      {"slo memory share", o.memory_share, 0.1, 1},
                      {"slo growth tokens", static_cast<double>(o.growth_tokens), 0, 1 << 20},
                      {"slo up cool-down", o.up_cooldown, 0, kDay},
                      {"slo calm seconds", o.calm_seconds, 0, kDay},
                      {"slo down margin", o.down_margin, 0.05, 1},
                      {"slo raise share", o.raise_share, 0, 1},
                      {"slo raise seconds", o.raise_seconds, 0, 60},
                      {"slo evaluate interval", o.evaluate_interval, 0, 60}});
}

Status CheckPaper(const PaperOptions& o) {
  return CheckBounds({{"paper queue", static_cast<double>(o.queue), 1, 1 << 30},
                      {"paper prompt tokens", static_cast<double>(o.prompt_tokens), 1, 1 << 30},
                      {"paper queue back", o.queue_back, 0, 1},
                      {"paper prompt back", o.prompt_back, 0, 1},
                      {"paper cool-down", o.cooldown, 0, kDay},
                      {"paper max share", o.max_share, 0, 1}});
}

}  // namespace

Expected<std::unique_ptr<LevelPolicy>> MakePolicy(const PolicyOptions& options) {
  if (options.max_level < 0 || options.max_level > options.layers) {
    return InvalidArgument("max level {}: the model has levels 0 to {}", options.max_level,
                           options.layers);
  }
  if (options.policy == "fixed") {
    if (options.fixed_level < 0 || options.fixed_level > options.max_level) {
      return InvalidArgument("fixed level {}: the highest for tier auto is {}", options.fixed_level,
                             options.max_level);
    }
    return std::unique_ptr<LevelPolicy>(std::make_unique<FixedPolicy>(options.fixed_level));
  }
  if (options.policy == "paper") {
    DSLA_RETURN_IF_ERROR(CheckPaper(options.paper));
    return std::unique_ptr<LevelPolicy>(
        std::make_unique<PaperPolicy>(options.paper, options.layers, options.max_level));
  }
  if (options.policy == "slo") {
    DSLA_RETURN_IF_ERROR(CheckSlo(options.slo));
    if (options.cost.model.layers() == 0) {
      return InvalidArgument("policy slo: no cost model was measured at the start");
    }
    if (options.cost.model.layers() != options.layers) {
      return InvalidArgument("policy slo: its cost model is of {} layers, the model has {}",
                             options.cost.model.layers(), options.layers);
    }
    return std::unique_ptr<LevelPolicy>(
        std::make_unique<SloPolicy>(options.slo, options.cost, options.max_level));
  }
  return InvalidArgument("policy '{}': must be slo, paper or fixed", options.policy);
}

}  // namespace dsla
