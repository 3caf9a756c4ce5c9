// HybridModel: a Llama-family decoder whose attention layers are softmax or DSLA, sequence by
// sequence. One Forward runs a ragged batch of rows at any mix of levels: one product per
// projection for all rows; rows are sorted by level, so each layer's rows are two contiguous
// ranges, softmax [0, m) and DSLA [m, T), and the adapter's deltas touch the second alone.
//
// Immutable after Load; Forward and Raise may be called from several threads as long as each has
// its own ExecContext and its own CachePool; on a device (ModelOptions::device) from one at a time.
// There they throw what device.h says, and of an ExecContext Forward uses the workspace alone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/exec.h"
#include "base/status.h"
#include "cache/cache_pool.h"
#include "cache/sequence_cache.h"
#include "format/config.h"
#include "model/device.h"
#include "model/placed_rows.h"
#include "model/weights.h"
#include "ops/linear/linear.h"
#include "ops/norm_rope/norm_rope.h"

namespace dsla {

struct ModelOptions {
  WeightFormat weights = WeightFormat::kBF16;
  DType kv_dtype = DType::kBF16;
  int page_size = 64;     // tokens per KV page
  int max_positions = 0;  // longest sequence; 0 = the model's context length
  // Where the model runs; null: on the CPU. A device holds weights in bf16, fp8, int8 or int4 and
  // the cache in bf16.
  std::shared_ptr<Device> device = nullptr;
  // There: weights in int8 or int4 also in bf16, for steps of many rows, if there is memory to
  // spare.
  bool also_unpacked = true;
};

// Rows with their logits [rows.size(), V], which may be changed and are gone afterwards; or, where
// SequenceRows::sampling allows it, with their choices, logits then being null.
using LogitsVisitor = DeviceLogitsVisitor;

class HybridModel {
 public:
  // `adapter` may be null: then the model only runs at level 0. Its base fingerprint is the
  // caller's to check. Its tensors are copied into the form that the operators take.
  static Expected<std::unique_ptr<HybridModel>> Load(const ExecContext& ctx, const ModelFile& file,
                                                     const Adapter* adapter,
                                                     const ModelOptions& options);

  // The same weights, shared, with another adapter in place of this model's own (there must be
  // one): for what is measured against it, such as another ladder.
  Expected<std::unique_ptr<HybridModel>> WithAdapter(const Adapter& adapter) const;

  const ModelConfig& config() const { return config_; }
  const ModelOptions& options() const { return options_; }
  const AdapterInfo* adapter() const {  // null: none
    return adapter_.layers.empty() ? nullptr : &adapter_.info;
  }
  const DslaShape& dsla_shape(int layer) const { return adapter_.layers[layer].shape; }
  int64_t delta_rank(int layer) const { return adapter_.layers[layer].q_delta.rank(); }
  int max_level() const { return adapter() == nullptr ? 0 : config_.L; }
  int max_positions() const { return static_cast<int>(rope_.positions()); }
  CacheGeometry cache_geometry() const;
  BlockMemory& memory() const;                              // where its cache pools must lie
  Device* device() const { return options_.device.get(); }  // null: the CPU
  // Until all that Forward began is done: on a device it returns before that if no logits were
  // asked for. What is timed needs it.
  void Wait() const {
    if (options_.device != nullptr) options_.device->Synchronize();
  }
  SequenceCache NewSequence(CachePool& pool, int level) const;

  // Bytes that a decode step reads besides the cache: weights, and the adapter's of the converted
  // layers.
  int64_t weight_bytes(int level) const;
  // About the most of a device's memory that steps of up to `rows` rows, and raises, take beside
  // weights and cache when the model has just been loaded; 0 on the CPU.
  int64_t step_bytes(int64_t rows) const {
    return on_device_ == nullptr ? 0 : on_device_->step_bytes(rows);
  }

  // Runs all rows through all layers, writing their K and V and advancing the states; the caller
  // then commits the tokens to each cache. logits: for each sequence in the batch's order
  // [logits_rows, V]. With Products::kInvariant a sequence's results are the same bits whatever it
  // is batched with, as long as its own tokens are cut in the same way.
  void Forward(const ExecContext& ctx, CachePool& pool, std::span<const SequenceRows> batch,
               Buffer<float>& logits, Products products = Products::kFastest) const;

  // One sequence by itself: reserves room, runs its tokens and commits them. kResourceExhausted if
  // the cache memory is used up; then nothing has changed.
  Status Append(const ExecContext& ctx, CachePool& pool, SequenceCache& cache,
                std::span<const int32_t> tokens, int logits_rows, Buffer<float>& logits,
                Products products = Products::kFastest) const;

  // As Append of one token to a sequence at level 0, for what is measured on the attention itself:
  // `visit` gets each layer's rotated queries of the token, [H, D], when the cache holds its K and
  // V. kUnsupported on a device.
  using QueryVisitor = std::function<void(int layer, std::span<const float> q)>;
  Status AppendVisiting(const ExecContext& ctx, CachePool& pool, SequenceCache& cache,
                        int32_t token, const QueryVisitor& visit) const;

  // As the first Forward, but the logits are handed out by tiles of at most kLogitsTileRows rows,
  // in the batch's order, so that a prompt's are never held at once. `launched`: see LaunchedHook;
  // the CPU has no such moment, and does not call it.
  static constexpr int64_t kLogitsTileRows = 64;
  void Forward(const ExecContext& ctx, CachePool& pool, std::span<const SequenceRows> batch,
               Products products, const LogitsVisitor& visit,
               const LaunchedHook& launched = {}) const;

  // Memory behind the blocks that a step of these rows writes, which the step would ask for itself.
  // Throws std::bad_alloc if a device has none left; then nothing else has happened.
  void Back(CachePool& pool, std::span<const SequenceRows> batch) const;

  // A step in which at most most_choices() sequences (0: the CPU has no such steps) ask for the
  // logits of their last row, with `sampling` alone, and the others for none. Begin returns when
  // the device has been told of it, and End waits for the oldest step that was begun and gives the
  // batch's choices, where there are any. Two may be under way: the second takes tokens from the
  // first (SequenceRows::feed), whose rows the caches must count by then. Forward may not come
  // between the two, nor a step after one that was not begun because it threw. What else is asked
  // of the device meanwhile, it does after them.
  int most_choices() const { return on_device_ == nullptr ? 0 : on_device_->most_choices(); }
  void Begin(const ExecContext& ctx, CachePool& pool, std::span<const SequenceRows> batch) const;
  void End(std::span<TokenChoice> choices) const { on_device_->End(choices); }
  // Until the step that was begun last has no more than about so long to go, as far as that can be
  // told; a decode step's end is near at once.
  void AwaitNearlyDone(double seconds) const { on_device_->AwaitNearlyDone(seconds); }

  // Raises a sequence by folding the pages of the layers that convert, one layer after another, so
  // that one free slot is enough. On kResourceExhausted the sequence stands at the level reached,
  // whole and usable.
  Status Raise(const ExecContext& ctx, CachePool& pool, SequenceCache& cache, int level) const;

 private:
  struct Step;  // one Forward's arrays

  HybridModel() = default;
  void Bind(const Adapter* adapter);
  Status LoadOnDevice(const ExecContext& ctx, const ModelFile& file, const Adapter* adapter);
  DeviceModelSpec DeviceSpec(const Adapter* adapter) const;
  PlacedRows Place(CachePool& pool, std::span<const SequenceRows> batch,
                   Workspace& workspace) const;
  Step BeginStep(const ExecContext& ctx, CachePool& pool, std::span<const SequenceRows> batch,
                 Products products) const;
  void RunLayers(const ExecContext& ctx, Step& step) const;
  void Logits(const ExecContext& ctx, const Step& step, std::span<const int64_t> rows,
              float* logits) const;
  void AttentionBlock(const ExecContext& ctx, Step& step, int layer) const;
  void SoftmaxRows(const ExecContext& ctx, const Step& step, int layer) const;
  void DslaRows(const ExecContext& ctx, Step& step, int layer) const;
  void Norm(const ExecContext& ctx, Step& step, const float* delta, const Buffer<float>& weight,
            const Linear& consumer) const;
  DslaParams LayerParams(int layer) const;
  int64_t qkv_width() const { return (config_.H + int64_t{2} * config_.Hkv) * config_.D; }

  ModelConfig config_;
  ModelOptions options_;
  std::shared_ptr<const ModelWeights> weights_;  // null on a device
  BoundAdapter adapter_;
  std::vector<int> ladder_;  // the adapter's, or 0 .. L-1
  std::vector<int> rank_;    // by layer: its place in the ladder
  RopeTable rope_;
  std::unique_ptr<DeviceModel> on_device_;
};

}  // namespace dsla
