// Network: the teacher, frozen, and the adapter under training beside it, on one device, in
// libtorch. The teacher's weights are never written; the adapter's parameters, their gradients and
// AdamW's moments are fp32 arrays of the parameter layout, whatever type the products run in.
//
// Gradients of Align and Chain add up until Update. Nothing waits for the device but TakeLosses,
// State and what returns numbers. Not thread-safe. Running out of memory leaves by exception
// (std::bad_alloc on the CPU, c10::Error on a GPU).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "distill/parameters.h"
#include "distill/ranks.h"
#include "format/model_file.h"

namespace dsla {

struct NetworkOptions {
  std::string device = "cpu";  // cpu, cuda or cuda:N
  std::string dtype = "auto";  // of products: fp32, bf16; auto: bf16 on a GPU, fp32 on the CPU
  int threads = 0;             // on the CPU; 0: all cores
  // Who trains together: batches are then parts of the whole (PartOf), and all ranks call Align,
  // Chain, Update and TakeLosses in the same order. Must outlive the network; null: this process
  // alone.
  Ranks* ranks = nullptr;
  // Chain keeps of so many layers only their input and runs them again in its backward pass, to the
  // same bits: a third more time for what is kept per layer. 0: keeps all.
  int checkpoint_layers = 0;
};

// Sequences of equal length. With fewer tokens in a row than `length` the rest is padding at its
// end, which counts nowhere.
struct TokenBatch {
  int rows = 0, length = 0;
  int count_from = 0;            // positions before this one count nowhere
  std::vector<int32_t> ids;      // [rows, length]
  std::vector<int32_t> counts;   // [rows] tokens that are none of the padding; empty: all
  std::vector<int32_t> targets;  // recall: [rows, length], the token that the position must
                                 // predict, -1 where nothing is asked; empty: no recall
  // Of the whole batch, where this is a part of one that several ranks train on; 0: it is whole.
  int all_rows = 0;
  std::vector<int32_t> all_counts;  // [all_rows]; empty: all tokens

  // Positions from `begin` on that count, of the whole batch.
  int64_t Counted(int begin) const;
};

// Part `part` of `parts` of a batch: consecutive rows, as even as can be. There are no fewer rows
// than parts.
TokenBatch PartOf(const TokenBatch& batch, int part, int parts);

struct ChainStep {
  std::vector<int> converted;  // layers that run as DSLA
  std::vector<int> trained;    // those of them that learn; empty: all
  int switch_at = 0;           // the teacher runs the tokens before, the hybrid goes on from folds
  double kl_weight = 1;
  double align_weight = 0;   // of the converted layers' normalised errors, mean over them
  double cosine_weight = 0;  // lambda of the paper's cos(G_history, G_recency), mean over them
};

struct UpdateOptions {
  double low_rank_lr = 0, lr = 0;  // of the deltas, of everything else
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
  double clip = 1;              // largest norm of the gradient; 0: no limit
  bool clip_per_layer = false;  // the norm of each layer's, not of all
};

// AdamW's whole state. Sizes are the layout's.
struct OptimizerState {
  std::vector<float> values, first, second;  // parameters, moments
  std::vector<float> steps;                  // [L] updates that each layer had
};

// Sums over positions; divide by `tokens` (or `asked`).
struct Divergence {
  double kl = 0;     // forward KL(teacher || hybrid), nats
  double agree = 0;  // positions with the same most likely token
  double tokens = 0;
  double hits = 0, teacher_hits = 0, asked = 0;  // recall: right answers, and of how many
  std::vector<double> row_kl;                    // [rows] mean of each row
};

class Network {
 public:
  // Reads the whole model. Errors: those of ModelFile::Read; kInvalidArgument for an unknown device
  // or type; kUnavailable where libtorch's CUDA part or a GPU is not there; kUnsupported for models
  // with a sliding window; kResourceExhausted, with the figures, for weights larger than the GPU.
  static Expected<std::unique_ptr<Network>> Create(const ModelFile& file,
                                                   const ParameterLayout& layout,
                                                   const NetworkOptions& options);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  const ParameterLayout& layout() const;
  std::string device_name() const;  // for people
  // Hex SHA-256 over the teacher's weights as they lie on the device.
  std::string TeacherHash() const;

  OptimizerState State() const;
  void SetState(const OptimizerState& state);
  // Parameters with moments and step counts at zero.
  void SetValues(std::span<const float> values);

  // Asked before each layer of a pass; a yes ends it without a result.
  using Stop = std::function<bool()>;
  // The mean over the batch of the window's log-sum-exp, by layer and query head [L, H]; 0 without
  // a window.
  std::optional<std::vector<float>> MeanWindowLse(const TokenBatch& batch, const Stop& stop);
  // The scale by which each layer's DSLA output fits the teacher's best, [L].
  std::vector<double> OutputScales(const TokenBatch& batch);
  // The natural log of the scale (1e-6 at least) by which each query head's attention fits the
  // teacher's best, [L, H].
  std::optional<std::vector<float>> LogHeadScales(const TokenBatch& batch, const Stop& stop);
  // The paper's sensitivity: entropy in bits of the last query's attention, mean over heads and
  // rows, by layer [L].
  std::vector<double> AttentionEntropy(const TokenBatch& batch);

  // Adds the gradient of every layer's normalised error, ||y - o||^2 / ||o||^2 on the teacher's own
  // input, and notes the mean over layers as this step's loss.
  void Align(const TokenBatch& batch);
  // Adds the gradient of the weighted losses of one hybrid, and notes their sum.
  void Chain(const TokenBatch& batch, const ChainStep& step);
  // One AdamW step (Loshchilov, Hutter, ICLR 2019) of the layers that have gradients, which are
  // cleared.
  void Update(const UpdateOptions& options);
  // The gradients that have added up since the last update, in the layout's order; of several
  // ranks this one's share, which Update sums.
  std::vector<float> Gradients() const;
  // The losses noted since the last call, in order; of the whole batches.
  std::vector<double> TakeLosses();

  // No gradients. With `switch_at` the teacher runs the positions before, which do not count.
  Divergence Measure(const TokenBatch& batch, const std::vector<int>& converted, int switch_at = 0);
  // As Measure, for several sets of converted layers at once, running the teacher once.
  std::vector<Divergence> Measure(const TokenBatch& batch,
                                  const std::vector<std::vector<int>>& sets, int switch_at = 0);
  // The mean over layers of the normalised error.
  double AlignmentError(const TokenBatch& batch);

 private:
  struct Impl;
  explicit Network(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
