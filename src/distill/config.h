// The settings of a training run. One table (ConfigKeys) names each with its unit, default and
// meaning; the TOML file, the command-line flags, the help text and the record of a run all follow
// from it, so that they cannot disagree.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "distill/parameters.h"
#include "format/config.h"

namespace dsla {

struct DistillConfig {
  std::string op = "dsla";  // CompleteConfig sets adapter.op by it
  AdapterSettings adapter;
  HalfLives half_lives;
  int top_level = 0;  // 0: three quarters of the layers

  std::vector<int> lengths = {1024, 4096};
  std::vector<double> length_shares = {0.2, 0.8};
  int tokens_per_step = 24576;
  std::string documents = "concatenate";
  double long_share = 0.7;
  double recall_share = 0.15;
  int held_out = 64;

  int64_t align_tokens = 12'000'000;
  double align_low_rank_lr = 1e-3, align_lr = 5e-3;

  std::string order_method = "greedy";
  std::vector<int> order_layers;
  int order_sequences = 5, order_length = 1024, order_candidates = 8;

  std::string chain_method = "nested";
  int64_t chain_tokens = 100'000'000;
  double chain_low_rank_lr = 1.25e-3, chain_lr = 5e-3;
  std::vector<int> chain_levels;
  double chain_level_share = 0.9, chain_switch_share = 0.3;
  double kl_weight = 1, align_weight = 0, cosine_weight = 0;

  std::vector<int> evaluate_levels;
  int evaluate_documents = 16, evaluate_length = 4096, evaluate_recall = 32;

  int64_t seed = 1;
  std::string device = "cpu", dtype = "auto";
  int threads = 0;
  int warmup_steps = 30;
  double lr_floor = 0.005, clip = 1;
  int checkpoint_layers = 0;
  int log_every = 10;
  double checkpoint_seconds = 60;
};

struct ConfigKey {
  using Value =
      std::variant<int*, int64_t*, double*, std::string*, std::vector<int>*, std::vector<double>*>;
  std::string name;  // "align.tokens": table and key of the TOML file; the flag is --align-tokens
  std::string unit;  // empty: none
  std::string help;
  Value value;
  // Stages whose result depends on it: letters of "iaoce" (init, align, order, chain, evaluate).
  std::string stages;

  std::string flag() const;  // "--align-tokens"
};

// The table, bound to the fields of `config`, which must outlive it.
std::vector<ConfigKey> ConfigKeys(DistillConfig& config);

std::string ValueText(const ConfigKey& key);  // as TOML writes it
// A flag's text. kInvalidArgument, naming the flag, if it is no such value.
Status SetFromText(const ConfigKey& key, const std::string& text);

// Reads a TOML file over `config`. kInvalidArgument naming file, line and key for what is unknown
// or of the wrong type; kNotFound.
Status ReadToml(const std::string& path, DistillConfig* config);
// Every key with its value, unit and meaning, as a TOML file.
std::string WriteToml(const DistillConfig& config);

// "default", "paper" or "paper-operator". The paper's: no window, dual states, entropy order,
// layers chained one by one, KL + lambda cos; on this project's operator or on its own.
Status ApplyRecipe(const std::string& name, DistillConfig* config);

// Fills in what depends on the model (levels, top level) and checks all values against each other
// and the model. kInvalidArgument naming the key.
Status CompleteConfig(const ModelConfig& model, DistillConfig* config);

// The values that the result of a stage (letter as in ConfigKey::stages) and those before it depend
// on, as text: work made with other ones cannot be continued.
std::string StageSettings(const DistillConfig& config, char stage);

}  // namespace dsla
