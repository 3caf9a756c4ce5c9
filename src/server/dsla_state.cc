#include "server/dsla_state.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace dsla {
namespace {

using Json = nlohmann::ordered_json;

// By layer: what it is for a sequence that starts at `level`.
Json KindsAt(const LadderInfo& ladder, int level) {
  Json kinds(std::vector<std::string>(ladder.ladder.size(), "softmax"));
  for (int rank = 0; rank < std::min<int>(level, ladder.ladder.size()); ++rank) {
    kinds[ladder.ladder[rank]] = "dsla";
  }
  return kinds;
}

Json FactorsJson(const EngineState& state) {
  return {{"prefill", state.cost_factors.prefill},
          {"decode", state.cost_factors.decode},
          {"fold", state.cost_factors.fold}};
}

// Where there is one, or nothing is decided by it.
void AddCost(const MeasuredCost& cost, const EngineState& state, Json& json) {
  if (cost.source == CostSource::kNone) return;
  json["cost_model"] = {
      {"source", Name(cost.source)}, {"measured_at", nullptr}, {"doubtful", state.cost_doubtful}};
  if (cost.measured_at > 0) json["cost_model"]["measured_at"] = cost.measured_at;
}

Json ControllerJson(const EngineState& state, const PolicyOptions& options) {
  Json json{{"policy", state.policy},
            {"target_level", state.target_level},
            {"max_level", state.max_level}};
  if (state.policy == "fixed") json["fixed_level"] = options.fixed_level;
  if (state.policy == "slo") {
    json["slo"] = {{"ttft_seconds", options.slo.ttft},
                   {"tpot_seconds", options.slo.tpot},
                   {"cooldown_seconds", options.slo.up_cooldown},
                   {"calm_seconds", options.slo.calm_seconds}};
    json["cost_factors"] = FactorsJson(state);
  }
  AddCost(options.cost, state, json);
  if (state.policy == "paper") {
    json["paper"] = {{"queue", options.paper.queue},
                     {"prompt_tokens", options.paper.prompt_tokens},
                     {"cooldown_seconds", options.paper.cooldown},
                     {"max_share", options.paper.max_share},
                     {"raise_running", options.paper.raise_running}};
  }
  return json;
}

Json EventsJson(const EngineState& state) {
  Json events = Json::array();
  for (const LevelEvent& event : state.events) {
    Json json{{"age_seconds", std::max(0.0, state.now - event.time)},
              {"scope", event.request_id.empty() ? "target" : "sequence"},
              {"request_id", nullptr},
              {"position", nullptr},
              {"from", event.from},
              {"to", event.to},
              {"seconds", event.seconds},
              {"reason", event.reason}};
    if (!event.request_id.empty()) {
      json["request_id"] = event.request_id;
      json["position"] = event.position;
    }
    if (event.replica >= 0) json["replica"] = event.replica;
    events.push_back(std::move(json));
  }
  return events;
}

Json ProgressJson(const EngineState& state) {
  return {
      {"idle", state.idle},
      {"draining", state.draining},
      {"seconds_since_progress", state.idle ? 0 : std::max(0.0, state.now - state.last_progress)}};
}

Json LoadJson(const EngineState& state) {
  return {{"running", {{"count", state.running}, {"by_level", state.rows_per_level}}},
          {"queue",
           {{"requests", state.queued},
            {"tokens", state.queued_tokens},
            {"oldest_wait_seconds", state.oldest_wait_seconds}}},
          {"memory",
           {{"budget_bytes", state.budget_bytes},
            {"page_bytes", state.page_bytes},
            {"state_bytes", state.state_bytes},
            {"prefix_cache_bytes", state.prefix_cache_bytes}}},
          {"throughput",
           {{"prefill_tokens_per_second", state.prefill_tokens_per_second},
            {"decode_tokens_per_second", state.decode_tokens_per_second}}},
          {"totals",
           {{"steps", state.steps},
            {"busy_seconds", state.busy_seconds},
            {"model_seconds", state.model_seconds},
            {"prompt_tokens", state.prompt_tokens},
            {"cached_tokens", state.cached_tokens},
            {"prefill_tokens", state.prefill_tokens},
            {"generated_tokens", state.generated_tokens},
            {"finished", state.finished},
            {"preemptions", state.preemptions},
            {"raises", state.raises},
            {"target_changes", state.target_changes},
            {"numerical_errors", state.numerical_errors}}}};
}

Json ReplicasJson(const EngineState& state, const std::vector<MeasuredCost>& costs) {
  Json replicas = Json::array();
  for (const EngineState& replica : state.replicas) {
    Json json{{"replica", replicas.size()}, {"device", replica.device}, {"failed", nullptr}};
    if (!replica.device_error.empty()) json["failed"] = replica.device_error;
    json.update(ProgressJson(replica));
    json["target_level"] = replica.target_level;
    json["cost_factors"] = FactorsJson(replica);
    if (replicas.size() < costs.size()) AddCost(costs[replicas.size()], replica, json);
    json.update(LoadJson(replica));
    replicas.push_back(std::move(json));
  }
  return replicas;
}

}  // namespace

DslaControl::DslaControl(Engine* engine, LadderInfo ladder, PolicyOptions options,
                         std::vector<MeasuredCost> costs)
    : engine_(engine),
      ladder_(std::move(ladder)),
      costs_(std::move(costs)),
      options_(std::move(options)) {}

PolicyOptions DslaControl::options() const {
  const std::lock_guard lock(mutex_);
  return options_;
}

std::string DslaControl::StateJson() const {
  const std::lock_guard lock(mutex_);
  EngineState state = engine_->state();
  // The engine takes up a change with its next step; whoever asked for it sees it at once.
  state.policy = options_.policy;
  state.max_level = options_.max_level;
  return DslaStateJson(state, ladder_, options_, costs_);
}

Status DslaControl::Apply(const DslaCommand& command) {
  const std::lock_guard lock(mutex_);
  PolicyOptions options = options_;
  if (command.max_level) options.max_level = *command.max_level;
  if (command.policy || command.level) options.policy = command.policy.value_or("fixed");
  if (command.level) {
    options.fixed_level = *command.level;
  } else if (options.policy == "fixed" && options_.policy != "fixed") {
    // Stays where it is.
    options.fixed_level = std::min(engine_->state().target_level, options.max_level);
  }
  std::vector<std::unique_ptr<LevelPolicy>> policies(std::max<size_t>(1, costs_.size()));
  for (size_t r = 0; r < policies.size(); ++r) {
    PolicyOptions of_replica = options;
    if (!costs_.empty()) of_replica.cost = costs_[r];
    DSLA_ASSIGN_OR_RETURN(policies[r], MakePolicy(of_replica));
  }
  engine_->SetMaxLevel(options.max_level);
  // A bound alone leaves the policy what it has learnt.
  if (command.policy || command.level)
    engine_->SetPolicy([&](int replica) { return std::move(policies.at(replica)); });
  options_ = std::move(options);
  return Status::Ok();
}

std::string DslaStateJson(const EngineState& state, const LadderInfo& ladder,
                          const PolicyOptions& options, const std::vector<MeasuredCost>& costs) {
  Json json{{"model", ladder.model}, {"adapter", ladder.adapter}};
  json.update(ProgressJson(state));
  json["ladder"] = {
      {"layers", ladder.ladder}, {"top_level", ladder.top_level}, {"max_level", ladder.max_level}};
  json["controller"] = ControllerJson(state, options);
  json["kinds_at_target"] = KindsAt(ladder, state.target_level);
  json.update(LoadJson(state));
  json["events"] = EventsJson(state);
  if (!state.replicas.empty()) json["replicas"] = ReplicasJson(state, costs);
  // A request's id comes from its client: what is not UTF-8 is replaced.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace dsla
