// One run of Distill: what the stages share. Internal to the room.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "distill/checkpoint.h"
#include "distill/distill.h"
#include "distill/network.h"
#include "distill/order.h"
#include "distill/run_log.h"
#include "distill/sampler.h"
#include "distill/token_file.h"

namespace dsla::distill {

class Run {
 public:
  Run(const ExecContext& ctx, const ModelFile& model, const DistillJob& job)
      : ctx_(ctx), model_(model), job_(job), config_(job.config) {}

  Expected<DistillOutcome> All();

 private:
  struct Stage {
    const char* name;
    Status (Run::*run)();
    bool together = false;  // by all ranks, not by rank 0 alone
  };
  static const std::vector<Stage>& AllStages();

  Expected<DistillOutcome> Stages(DistillOutcome outcome);
  Status Setup();
  Status Prepare();
  Status Init();
  Status Align();
  Status Order();
  Status Chain();
  Status Evaluate();
  Status Export();

  // What stages need of those before them, made or read once.
  Status NeedTokens();
  Status NeedNetwork();
  Status NeedOrder();
  // The parameters that a stage left behind; kInvalidArgument if it has not run.
  Expected<std::vector<float>> ResultOf(const char* stage, char letter);
  // Settings text of a stage, the model and the data included.
  std::string SettingsOf(char letter) const;

  // The steps of a training stage from where they stand.
  struct Training {
    const char* stage;
    char letter;
    Stream stream;
    int64_t steps;
    // One step's gradients, and how they are applied.
    std::function<UpdateOptions(int64_t step)> step;
  };
  Status Train(const Training& training, const std::vector<float>& start);
  Status CheckLosses(const Training& training, int64_t first_step,
                     const std::vector<double>& losses) const;
  // What rank 0 does before the others do the same; alone, what this process does.
  Status InTurn(const std::function<Status()>& action);
  bool Leads() const { return ranks_ == nullptr || ranks_->rank() == 0; }
  // This rank's part of a batch.
  TokenBatch Own(TokenBatch batch) const {
    return ranks_ == nullptr ? batch : PartOf(batch, ranks_->rank(), ranks_->size());
  }
  bool MustStop() const;
  bool Interrupted() const { return job_.interrupted && job_.interrupted(); }
  Status Done(const char* stage, nlohmann::json fields = nlohmann::json::object());

  Expected<std::string> PrepareOne(const std::vector<std::string>& inputs, const char* name);

  std::string Path(const std::string& name) const { return work_ + "/" + name; }

  const ExecContext& ctx_;
  const ModelFile& model_;
  const DistillJob& job_;
  DistillConfig config_;
  std::string work_, fingerprint_;
  double started_ = 0;
  bool stopped_ = false;
  std::optional<RunLog> log_;
  std::optional<ParameterLayout> layout_;
  std::unique_ptr<Ranks> ranks_;  // null: alone. Outlives the network
  std::unique_ptr<Network> network_;
  std::optional<TokenFile> train_tokens_, valid_tokens_;
  std::string data_hash_;
  std::optional<Sampler> train_, valid_;
  int64_t valid_first_ = 0, valid_last_ = 0;
  bool held_out_ = true;
  std::optional<OrderState> order_;
};

}  // namespace dsla::distill
