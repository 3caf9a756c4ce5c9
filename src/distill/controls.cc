#include "distill/controls.h"

namespace dsla {

int64_t TokenBytes(const DistillConfig& config, const ModelConfig& model) {
  const AdapterSettings& a = config.adapter;
  const int64_t states =
      config.op == "window" ? 0 : int64_t{a.states} * a.features_per_channel * model.D;
  return a.window + a.sinks + states;
}

const std::vector<Control>& Controls() {
  static const std::vector<Control> controls = {
      {"ours", "the settings as given"},
      {"single-state", "one state of equal bytes in place of two"},
      {"dual-state", "two states in place of one, the window shorter: equal bytes"},
      {"window", "a trained window of equal bytes, no states"},
      {"entropy-order", "order by attention entropy"},
      {"random-order", "random order"},
      {"uniform-order", "order spread evenly over depth"},
      {"paper-recipe", "the paper's training, on our operator"},
      {"paper-operator", "the paper's training and operator, which cannot be folded from a cache"}};
  return controls;
}

bool IsControlOf(const std::string& name, const DistillConfig& config) {
  if (name == "single-state") return config.adapter.states == 2;
  if (name == "dual-state") return config.adapter.states == 1;
  return true;
}

Status ApplyControl(const std::string& name, const ModelConfig& model, DistillConfig* config) {
  DistillConfig& c = *config;
  AdapterSettings& a = c.adapter;
  if (name == "ours") return Status::Ok();
  if (name == "single-state") {
    if (a.states != 2 || a.features_per_channel != 1)
      return InvalidArgument(
          "single-state: equal bytes need 2 states with 1 feature a channel, not {} with {}",
          a.states, a.features_per_channel);
    a.states = 1, a.features_per_channel = 2;
    c.cosine_weight = 0;
    return Status::Ok();
  }
  if (name == "dual-state") {
    const int features = a.features_per_channel * model.D;
    if (a.states != 1 || a.window <= features)
      return InvalidArgument(
          "dual-state: equal bytes need 1 state and a window of more than {} tokens, not {} with "
          "{}",
          features, a.states, a.window);
    a.states = 2, a.window -= features;
    return Status::Ok();
  }
  if (name == "window") {
    a.window = static_cast<int>(TokenBytes(c, model)) - a.sinks;
    c.op = "window";
    c.cosine_weight = 0;
    return Status::Ok();
  }
  for (const char* order : {"entropy", "random", "uniform"}) {
    if (name != fmt::format("{}-order", order)) continue;
    c.order_method = order;
    return Status::Ok();
  }
  if (name == "paper-recipe") return ApplyRecipe("paper", config);
  if (name == "paper-operator") return ApplyRecipe("paper-operator", config);
  std::string known;
  for (const Control& control : Controls())
    known += fmt::format("{}{}", known.empty() ? "" : ", ", control.name);
  return InvalidArgument("control '{}' is not one of {}", name, known);
}

}  // namespace dsla
