#include "model/hybrid_model.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "model/hybrid_step.h"

namespace dsla {

Expected<std::unique_ptr<HybridModel>> HybridModel::Load(const ExecContext& ctx,
                                                         const ModelFile& file,
                                                         const Adapter* adapter,
                                                         const ModelOptions& options) {
  std::unique_ptr<HybridModel> model(new HybridModel);
  const ModelConfig& config = file.config();
  if (options.max_positions < 0 || options.max_positions > config.max_position) {
    return InvalidArgument("context of {} tokens: the model has {}", options.max_positions,
                           config.max_position);
  }
  // What the operators' vector code is built for.
  constexpr int kMaxHeadDim = 256, kHeadDimStep = 8, kDslaHeadDimStep = 16;
  if (config.D > kMaxHeadDim ||
      config.D % (adapter == nullptr ? kHeadDimStep : kDslaHeadDimStep) != 0) {
    return Unsupported(
        "head dim {}: have multiples of {} up to {}, with an adapter multiples of {}", config.D,
        kHeadDimStep, kMaxHeadDim, kDslaHeadDimStep);
  }
  model->config_ = config;
  model->options_ = options;
  if (options.device == nullptr) {
    if (options.weights == WeightFormat::kFp8)
      return Unsupported("weights in fp8 are for GPUs of compute capability 9.0");
    DSLA_ASSIGN_OR_RETURN(ModelWeights weights, LoadWeights(ctx, file, options.weights));
    model->weights_ = std::make_shared<const ModelWeights>(std::move(weights));
  }
  model->Bind(adapter);
  if (options.device != nullptr) DSLA_RETURN_IF_ERROR(model->LoadOnDevice(ctx, file, adapter));
  return model;
}

Status HybridModel::LoadOnDevice(const ExecContext& ctx, const ModelFile& file,
                                 const Adapter* adapter) {
  if (options_.weights == WeightFormat::kF32 || options_.kv_dtype != DType::kBF16) {
    return Unsupported("{}: weights are held in bf16, fp8, int8 or int4 there, the cache in bf16",
                       options_.device->name());
  }
  const auto read = [&](const std::string& name, std::span<float> out) {
    return file.Read(name, out);
  };
  const auto parallel = [&](int64_t tasks, const std::function<void(int64_t)>& task) {
    ParallelFor(ctx, tasks, [&](int64_t i, int) { task(i); });
  };
  DSLA_ASSIGN_OR_RETURN(on_device_, options_.device->Load(DeviceSpec(adapter), read, parallel));
  return Status::Ok();
}

DeviceModelSpec HybridModel::DeviceSpec(const Adapter* adapter) const {
  DeviceModelSpec spec{.config = config_,
                       .weights = options_.weights,
                       .pack = PackWeight,
                       .also_unpacked = options_.also_unpacked,
                       .rope_cos = rope_.cos(),
                       .rope_sin = rope_.sin(),
                       .positions = rope_.positions(),
                       .adapter = adapter,
                       .shapes = {},
                       .layouts = {},
                       .rank = rank_};
  for (const DslaLayer& layer : adapter_.layers) {
    spec.shapes.push_back(layer.shape);
    spec.layouts.push_back(MakeSlotLayout(layer.shape));
  }
  return spec;
}

// Everything that follows from the adapter and the options.
void HybridModel::Bind(const Adapter* adapter) {
  ladder_.resize(config_.L);
  std::iota(ladder_.begin(), ladder_.end(), 0);
  if (adapter != nullptr) {
    DSLA_CHECK(static_cast<int>(adapter->layers.size()) == config_.L);
    ladder_ = adapter->ladder;
    adapter_ = BindAdapter(config_, *adapter, options_.weights, options_.kv_dtype);
  }
  rank_.resize(config_.L);
  for (int rank = 0; rank < config_.L; ++rank) rank_[ladder_[rank]] = rank;
  rope_ = RopeTable(config_.rope.Frequencies(config_.D),
                    options_.max_positions > 0 ? options_.max_positions : config_.max_position);
}

Expected<std::unique_ptr<HybridModel>> HybridModel::WithAdapter(const Adapter& adapter) const {
  DSLA_CHECK(this->adapter() != nullptr);
  std::unique_ptr<HybridModel> model(new HybridModel);
  model->config_ = config_;
  model->options_ = options_;
  model->weights_ = weights_;
  model->Bind(&adapter);
  if (on_device_ != nullptr) {
    DSLA_ASSIGN_OR_RETURN(model->on_device_, on_device_->WithAdapter(model->DeviceSpec(&adapter)));
  }
  return model;
}

BlockMemory& HybridModel::memory() const {
  return options_.device == nullptr ? HostMemory() : options_.device->memory();
}

CacheGeometry HybridModel::cache_geometry() const {
  return {.page_size = options_.page_size,
          .Hkv = config_.Hkv,
          .D = config_.D,
          .kv_dtype = options_.kv_dtype,
          .slot_bytes = adapter_.slot_bytes};
}

SequenceCache HybridModel::NewSequence(CachePool& pool, int level) const {
  DSLA_CHECK(level >= 0 && level <= max_level());
  return SequenceCache(&pool.ledger(), ladder_, options_.page_size, level);
}

int64_t HybridModel::weight_bytes(int level) const {
  if (on_device_ != nullptr) return on_device_->weight_bytes(level);
  int64_t bytes = weights_->bytes();
  if (!weights_->head.empty()) bytes -= weights_->embedding.bytes();  // only one row of it is read
  for (int rank = 0; rank < level; ++rank) bytes += adapter_.layers[ladder_[rank]].bytes();
  return bytes;
}

DslaParams HybridModel::LayerParams(int layer) const {
  DslaParams params = adapter_.layers[layer].params();
  params.rope_cos = rope_.cos();
  params.rope_sin = rope_.sin();
  return params;
}

namespace {
CacheViews Views(const CachePool& pool) { return {pool.pages(), pool.slots()}; }
}  // namespace

void HybridModel::Back(CachePool& pool, std::span<const SequenceRows> batch) const {
  for (const SequenceRows& rows : batch) {
    const int first_new = rows.cache->length() / options_.page_size;
    for (int layer = 0; layer < config_.L; ++layer) {
      if (!rows.cache->is_dsla(layer))
        pool.Touch(BlockKind::kPage, rows.cache->pages(layer).subspan(first_new));
    }
    pool.Touch(BlockKind::kSlot, rows.cache->fresh_slots());
  }
}

PlacedRows HybridModel::Place(CachePool& pool, std::span<const SequenceRows> batch,
                              Workspace& workspace) const {
  Back(pool, batch);
  const PlacedRows placed = PlaceRows(batch, workspace);
  for (const SequenceRows* rows : placed.sequences) {
    DSLA_CHECK(rows->cache->length() + static_cast<int64_t>(rows->tokens.size()) <=
               rope_.positions());
    for (const int32_t token : rows->tokens) DSLA_CHECK(token >= 0 && token < config_.V);
    const std::vector<int32_t> fresh = rows->cache->TakeFreshSlots();
    if (!fresh.empty()) pool.ZeroBlocks(BlockKind::kSlot, fresh);
  }
  return placed;
}

void HybridModel::Forward(const ExecContext& ctx, CachePool& pool,
                          std::span<const SequenceRows> batch, Buffer<float>& logits,
                          Products products) const {
  const int64_t V = config_.V;
  const Workspace::Scope scope(*ctx.workspace);
  if (on_device_ != nullptr) {
    std::vector<SequenceRows> all(batch.begin(), batch.end());
    std::vector<int64_t> first_row(batch.size());  // of each sequence in logits
    int64_t rows = 0;
    for (size_t n = 0; n < all.size(); ++n) {
      all[n].sampling = nullptr;
      first_row[n] = rows + all[n].logits_rows - static_cast<int64_t>(all[n].tokens.size());
      rows += all[n].logits_rows;
    }
    logits.Resize(rows * V);
    on_device_->Forward(
        Views(pool), Place(pool, all, *ctx.workspace),
        [&](std::span<const LogitsRow> wanted, float* from, auto) {
          for (size_t i = 0; i < wanted.size(); ++i) {
            std::copy_n(from + static_cast<int64_t>(i) * V, V,
                        logits.data() + (first_row[wanted[i].sequence] + wanted[i].row) * V);
          }
        },
        {});
    return;
  }
  Step step = BeginStep(ctx, pool, batch, products);
  RunLayers(ctx, step);
  logits.Resize(static_cast<int64_t>(step.rows.wanted.size()) * V);
  Logits(ctx, step, step.rows.wanted_rows, logits.data());
}

Status HybridModel::Append(const ExecContext& ctx, CachePool& pool, SequenceCache& cache,
                           std::span<const int32_t> tokens, int logits_rows, Buffer<float>& logits,
                           Products products) const {
  const int count = static_cast<int>(tokens.size());
  DSLA_RETURN_IF_ERROR(cache.Reserve(count));
  const SequenceRows rows{.cache = &cache, .tokens = tokens, .logits_rows = logits_rows};
  Forward(ctx, pool, {&rows, 1}, logits, products);
  cache.Commit(count);
  return Status::Ok();
}

Status HybridModel::AppendVisiting(const ExecContext& ctx, CachePool& pool, SequenceCache& cache,
                                   int32_t token, const QueryVisitor& visit) const {
  DSLA_CHECK(cache.level() == 0);
  if (on_device_ != nullptr)
    return Unsupported("{}: queries cannot be looked at there", options_.device->name());
  DSLA_RETURN_IF_ERROR(cache.Reserve(1));
  const Workspace::Scope scope(*ctx.workspace);
  const SequenceRows rows{.cache = &cache, .tokens = {&token, 1}, .logits_rows = 0};
  Step step = BeginStep(ctx, pool, {&rows, 1}, Products::kFastest);
  step.visit_queries = &visit;
  RunLayers(ctx, step);
  cache.Commit(1);
  return Status::Ok();
}

void HybridModel::Forward(const ExecContext& ctx, CachePool& pool,
                          std::span<const SequenceRows> batch, Products products,
                          const LogitsVisitor& visit, const LaunchedHook& launched) const {
  const Workspace::Scope scope(*ctx.workspace);
  if (on_device_ != nullptr)
    return on_device_->Forward(Views(pool), Place(pool, batch, *ctx.workspace), visit, launched);
  Step step = BeginStep(ctx, pool, batch, products);
  RunLayers(ctx, step);
  const auto wanted = static_cast<int64_t>(step.rows.wanted.size());
  float* logits = ctx.workspace->Take<float>(std::min(wanted, kLogitsTileRows) * config_.V);
  for (int64_t begin = 0; begin < wanted; begin += kLogitsTileRows) {
    const auto count = static_cast<size_t>(std::min(kLogitsTileRows, wanted - begin));
    Logits(ctx, step, step.rows.wanted_rows.subspan(begin, count), logits);
    visit(step.rows.wanted.subspan(begin, count), logits, nullptr);
  }
}

void HybridModel::Begin(const ExecContext& ctx, CachePool& pool,
                        std::span<const SequenceRows> batch) const {
  const Workspace::Scope scope(*ctx.workspace);
  for (const SequenceRows& rows : batch) {
    DSLA_CHECK(rows.logits_rows <= 1 && (rows.logits_rows == 0 || rows.sampling != nullptr));
    DSLA_CHECK(rows.feed < 0 || rows.tokens.size() == 1);
  }
  on_device_->Begin(Views(pool), Place(pool, batch, *ctx.workspace));
}

Status HybridModel::Raise(const ExecContext& ctx, CachePool& pool, SequenceCache& cache,
                          int level) const {
  if (level > max_level())
    return InvalidArgument("level {}: the adapter has levels 0 to {}", level, max_level());
  if (level < cache.level())
    return InvalidArgument("level {}: the sequence is at {} and levels only rise", level,
                           cache.level());
  for (int next = cache.level() + 1; next <= level; ++next) {
    DSLA_ASSIGN_OR_RETURN(const auto conversions, cache.BeginRaise(next));
    for (const auto& [layer, slot] : conversions) {
      pool.Touch(BlockKind::kSlot, {&slot, 1});
      if (cache.length() == 0) {
        pool.ZeroBlocks(BlockKind::kSlot, {&slot, 1});
        continue;
      }
      if (on_device_ != nullptr) {
        on_device_->Fold(Views(pool), cache, layer, slot);
        continue;
      }
      const auto pages = cache.pages(layer);
      const int32_t page_start[2] = {0, static_cast<int32_t>(pages.size())};
      const int32_t row_start[2] = {0, 0};
      const int32_t pos = cache.length();
      DslaFoldCpu(ctx, {.shape = adapter_.layers[layer].shape,
                        .params = LayerParams(layer),
                        .rows = {.N = 1, .row_start = row_start, .pos = &pos},
                        .tables = {.page_start = page_start, .pages = pages.data()},
                        .kv = pool.pages(),
                        .slots = &slot,
                        .states = pool.slots()});
    }
    cache.CommitRaise();
  }
  Wait();
  return Status::Ok();
}

}  // namespace dsla
