#include "cli/sampling_args.h"

namespace dsla {

void SamplingArgs::AddTo(CLI::App& command, const char* group) {
  command_ = &command;
  SamplingParams& sampling = params;
  command.add_option("--temperature", sampling.temperature, "0 = always the likeliest token")
      ->capture_default_str()
      ->group(group);
  command.add_option("--top-k", sampling.top_k, "keep the K likeliest tokens; 0 = all")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--top-p", sampling.top_p, "keep the likeliest tokens of this total probability")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--min-p", sampling.min_p,
                  "drop tokens under this share of the likeliest one's probability")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--repetition-penalty", sampling.repetition_penalty,
                  "divides the logits of tokens seen; 1 = off")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--presence-penalty", sampling.presence_penalty,
                  "subtracted once from tokens of the reply")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--frequency-penalty", sampling.frequency_penalty,
                  "subtracted from tokens of the reply, each time")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--generation-config", generation_config,
                  "auto: what the model advises (generation_config.json, or general.sampling in a "
                  "GGUF file) are the defaults of these; none: it is not asked")
      ->type_name("auto|none")
      ->check(CLI::IsMember({"auto", "none"}))
      ->capture_default_str()
      ->group(group);
}

SamplingParams SamplingArgs::With(const SamplingAdvice& advice) const {
  SamplingParams result = params;
  if (generation_config == "none") return result;
  const auto take = [&](const char* option, const auto& advised, auto& value) {
    if (advised && command_->get_option(option)->count() == 0)
      value = static_cast<std::decay_t<decltype(value)>>(*advised);
  };
  take("--temperature", advice.temperature, result.temperature);
  take("--top-k", advice.top_k, result.top_k);
  take("--top-p", advice.top_p, result.top_p);
  take("--min-p", advice.min_p, result.min_p);
  take("--repetition-penalty", advice.repetition_penalty, result.repetition_penalty);
  return result;
}

}  // namespace dsla
