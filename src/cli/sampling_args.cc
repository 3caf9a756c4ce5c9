#include "cli/sampling_args.h"

namespace dsla {

void AddSamplingArgs(CLI::App& command, SamplingParams& sampling, const char* group) {
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
}

}  // namespace dsla
