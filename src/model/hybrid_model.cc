#include "model/hybrid_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/half.h"
#include "ops/attention/attention.h"

namespace dsla {

// Rows are sorted by level, so that each layer's softmax rows come first and its DSLA rows last.
struct HybridModel::Step {
  Products products = Products::kFastest;
  const QueryVisitor* visit_queries = nullptr;
  int64_t T = 0;
  int N = 0;
  std::vector<const SequenceRows*> sequences;  // [N] by level, then by place in the batch
  std::vector<int> order;                      // [N] place in the batch
  std::vector<int32_t> row_start;              // [N + 1]
  std::vector<int32_t> pos;                    // [N]
  std::vector<int32_t> positions;              // [T]
  float* hidden = nullptr;                     // [T, C] residual stream
  float* normed = nullptr;                     // [T, C]
  float* delta = nullptr;       // [T, C] a block's output, added to hidden by the next norm
  float* qkv = nullptr;         // [T, (H + 2 Hkv) D]
  float* attention = nullptr;   // [T, H D]
  float* gate_up = nullptr;     // [T, 2 ffn]
  float* activation = nullptr;  // [T, ffn]

  std::vector<LogitsRow> wanted;     // whose logits were asked for, in the batch's order
  std::vector<int64_t> wanted_rows;  // where they are in the step
};

Expected<std::unique_ptr<HybridModel>> HybridModel::Load(const ExecContext& ctx,
                                                         const ModelFile& file,
                                                         std::shared_ptr<const Adapter> adapter,
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
  DSLA_ASSIGN_OR_RETURN(ModelWeights weights, LoadWeights(ctx, file, options.weights));
  model->weights_ = std::make_shared<const ModelWeights>(std::move(weights));
  model->Bind(std::move(adapter));
  return model;
}

// Everything that follows from the adapter and the options.
void HybridModel::Bind(std::shared_ptr<const Adapter> adapter) {
  ladder_.resize(config_.L);
  std::iota(ladder_.begin(), ladder_.end(), 0);
  if (adapter != nullptr) {
    DSLA_CHECK(static_cast<int>(adapter->layers.size()) == config_.L);
    ladder_ = adapter->ladder;
    adapter_ = BindAdapter(config_, std::move(adapter), options_.weights, options_.kv_dtype);
  }
  rank_.resize(config_.L);
  for (int rank = 0; rank < config_.L; ++rank) rank_[ladder_[rank]] = rank;
  rope_ = RopeTable(config_.rope.Frequencies(config_.D),
                    options_.max_positions > 0 ? options_.max_positions : config_.max_position);
}

std::unique_ptr<HybridModel> HybridModel::WithAdapter(
    std::shared_ptr<const Adapter> adapter) const {
  DSLA_CHECK(this->adapter() != nullptr && adapter != nullptr);
  std::unique_ptr<HybridModel> model(new HybridModel);
  model->config_ = config_;
  model->options_ = options_;
  model->weights_ = weights_;
  model->Bind(std::move(adapter));
  return model;
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

// [T, n] fp32 rows with a stride -> dense rows in the cache's dtype: K and V exactly as a cache
// would hold them.
void PackRows(const ExecContext& ctx, const float* x, int64_t stride, int64_t T, int64_t n,
              DType dtype, void* out) {
  constexpr int64_t kGrain = 16;  // rows: enough work to pay for waking a thread
  ParallelRanges(ctx, T, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      if (dtype == DType::kF32) {
        std::memcpy(static_cast<float*>(out) + t * n, x + t * stride, n * sizeof(float));
      } else {
        bf16* row = static_cast<bf16*>(out) + t * n;
        for (int64_t i = 0; i < n; ++i) row[i] = ToBf16(x[t * stride + i]);
      }
    }
  });
}

}  // namespace

void HybridModel::SoftmaxRows(const ExecContext& ctx, CachePool& pool, const Step& step, int layer,
                              int sequences) const {
  Workspace::Scope scope(*ctx.workspace);
  int32_t* page_start = ctx.workspace->Take<int32_t>(sequences + 1);
  page_start[0] = 0;
  for (int n = 0; n < sequences; ++n) {
    page_start[n + 1] =
        page_start[n] + static_cast<int32_t>(step.sequences[n]->cache->pages(layer).size());
  }
  int32_t* pages = ctx.workspace->Take<int32_t>(page_start[sequences]);
  for (int n = 0; n < sequences; ++n) {
    const auto table = step.sequences[n]->cache->pages(layer);
    std::copy(table.begin(), table.end(), pages + page_start[n]);
    const int first_new = step.pos[n] / options_.page_size;
    pool.Touch(BlockKind::kPage, table.subspan(first_new));
  }
  const int64_t stride = int64_t{config_.H + 2 * config_.Hkv} * config_.D;
  const float* k = step.qkv + int64_t{config_.H} * config_.D;
  const RaggedRows rows{.N = sequences, .row_start = step.row_start.data(), .pos = step.pos.data()};
  const PageTables tables{.page_start = page_start, .pages = pages};
  KvWriteCpu(ctx, {.rows = rows,
                   .tables = tables,
                   .kv = pool.pages(),
                   .k = k,
                   .v = k + int64_t{config_.Hkv} * config_.D,
                   .k_stride = stride,
                   .v_stride = stride});
  PagedAttentionCpu(ctx, {.rows = rows,
                          .tables = tables,
                          .kv = pool.pages(),
                          .H = config_.H,
                          .scale = 1.f / std::sqrt(static_cast<float>(config_.D)),
                          .sliding_window = config_.sliding_window,
                          .q = step.qkv,
                          .q_stride = stride,
                          .out = step.attention,
                          .lse = nullptr});
}

void HybridModel::DslaRows(const ExecContext& ctx, CachePool& pool, const Step& step, int layer,
                           int first_sequence) const {
  Workspace::Scope scope(*ctx.workspace);
  const DslaLayer& dsla = adapter_.layers[layer];
  const int N = step.N - first_sequence;
  const int64_t first_row = step.row_start[first_sequence], T = step.T - first_row;
  int32_t* row_start = ctx.workspace->Take<int32_t>(N + 1);
  int32_t* slots = ctx.workspace->Take<int32_t>(N);
  for (int n = 0; n < N; ++n) {
    row_start[n] = step.row_start[first_sequence + n] - static_cast<int32_t>(first_row);
    slots[n] = step.sequences[first_sequence + n]->cache->slot(layer);
  }
  row_start[N] = static_cast<int32_t>(T);

  const int64_t kv = int64_t{config_.Hkv} * config_.D, q = int64_t{config_.H} * config_.D,
                stride = q + 2 * kv;
  const float* rows = step.qkv + first_row * stride;
  char* k = ctx.workspace->Take<char>(T * kv * SizeOf(options_.kv_dtype));
  char* v = ctx.workspace->Take<char>(T * kv * SizeOf(options_.kv_dtype));
  PackRows(ctx, rows + q, stride, T, kv, options_.kv_dtype, k);
  PackRows(ctx, rows + q + kv, stride, T, kv, options_.kv_dtype, v);
  float* claim = nullptr;
  if (!dsla.claim.empty()) {
    claim = ctx.workspace->Take<float>(T * config_.H);
    dsla.claim.Forward(ctx, step.normed + first_row * config_.C, config_.C, T, claim, config_.H,
                       Accumulate::kNo, step.products);
  }
  DslaForwardCpu(ctx,
                 {.shape = dsla.shape,
                  .params = LayerParams(layer),
                  .rows = {.N = N, .row_start = row_start, .pos = step.pos.data() + first_sequence},
                  .slots = slots,
                  .states = pool.slots(),
                  .q = rows,
                  .q_stride = stride,
                  .k = k,
                  .v = v,
                  .claim = claim,
                  .out = step.attention + first_row * q});
}

void HybridModel::AttentionBlock(const ExecContext& ctx, CachePool& pool, Step& step,
                                 int layer) const {
  const LayerWeights& weights = weights_->layers[layer];
  const int64_t C = config_.C, q = int64_t{config_.H} * config_.D,
                kv = int64_t{config_.Hkv} * config_.D;
  const int64_t stride = q + 2 * kv;
  weights.qkv.Forward(ctx, step.normed, C, step.T, step.qkv, stride, Accumulate::kNo,
                      step.products);

  // The layer is DSLA for the sequences whose level is above its rank: the last ones of the sorted
  // batch.
  const auto first_dsla = std::partition_point(
      step.sequences.begin(), step.sequences.end(),
      [&](const SequenceRows* s) { return s->cache->level() <= rank_[layer]; });
  const int softmax_sequences = static_cast<int>(first_dsla - step.sequences.begin());
  const int64_t m = step.row_start[softmax_sequences], dsla_rows = step.T - m;
  if (dsla_rows > 0) {
    adapter_.layers[layer].q_delta.AddTo(ctx, step.normed + m * C, C, dsla_rows,
                                         step.qkv + m * stride, stride, step.products);
  }

  RopeArgs rope{.x = step.qkv,
                .stride = stride,
                .T = step.T,
                .heads = config_.H,
                .positions = step.positions.data(),
                .table = &rope_,
                .norm_weight = config_.qk_norm ? weights.q_norm.data() : nullptr,
                .norm_eps = config_.norm_eps};
  NormRope(ctx, rope);
  rope.x = step.qkv + q;
  rope.heads = config_.Hkv;
  rope.norm_weight = config_.qk_norm ? weights.k_norm.data() : nullptr;
  NormRope(ctx, rope);

  if (softmax_sequences > 0) SoftmaxRows(ctx, pool, step, layer, softmax_sequences);
  if (dsla_rows > 0) DslaRows(ctx, pool, step, layer, softmax_sequences);
  if (step.visit_queries != nullptr)
    (*step.visit_queries)(layer, {step.qkv, static_cast<size_t>(q)});

  weights.o.Forward(ctx, step.attention, q, step.T, step.delta, C, Accumulate::kNo, step.products);
  if (dsla_rows > 0) {
    adapter_.layers[layer].o_delta.AddTo(ctx, step.attention + m * q, q, dsla_rows,
                                         step.delta + m * C, C, step.products);
  }
}

void HybridModel::PlaceRows(CachePool& pool, std::span<const SequenceRows> batch,
                            Step& step) const {
  step.N = static_cast<int>(batch.size());
  step.order.resize(batch.size());
  std::iota(step.order.begin(), step.order.end(), 0);
  std::stable_sort(step.order.begin(), step.order.end(),
                   [&](int a, int b) { return batch[a].cache->level() < batch[b].cache->level(); });
  step.row_start.push_back(0);
  std::vector<int64_t> first_row(batch.size());
  for (int index : step.order) {
    const SequenceRows& rows = batch[index];
    DSLA_CHECK(!rows.tokens.empty());
    first_row[index] = step.row_start.back();
    step.sequences.push_back(&rows);
    step.pos.push_back(rows.cache->length());
    for (size_t i = 0; i < rows.tokens.size(); ++i) {
      step.positions.push_back(rows.cache->length() + static_cast<int32_t>(i));
    }
    step.row_start.push_back(static_cast<int32_t>(step.positions.size()));
    DSLA_CHECK(step.positions.back() < rope_.positions());
    const std::vector<int32_t> fresh = rows.cache->TakeFreshSlots();
    if (fresh.empty()) continue;
    pool.Touch(BlockKind::kSlot, fresh);
    for (int layer = 0; layer < config_.L; ++layer) {
      if (std::find(fresh.begin(), fresh.end(), rows.cache->slot(layer)) != fresh.end()) {
        DslaResetSlot(adapter_.layers[layer].shape, pool.slots(), rows.cache->slot(layer));
      }
    }
  }
  step.T = static_cast<int64_t>(step.positions.size());
  for (size_t n = 0; n < batch.size(); ++n) {
    const int count = static_cast<int>(batch[n].tokens.size());
    DSLA_CHECK(batch[n].logits_rows >= 0 && batch[n].logits_rows <= count);
    for (int row = count - batch[n].logits_rows; row < count; ++row) {
      step.wanted.push_back({static_cast<int>(n), row});
      step.wanted_rows.push_back(first_row[n] + row);
    }
  }
}

void HybridModel::RunLayers(const ExecContext& ctx, CachePool& pool, Step& step) const {
  const int64_t T = step.T, C = config_.C;
  const Products products = step.products;
  Workspace& workspace = *ctx.workspace;
  step.hidden = workspace.Take<float>(T * C);
  step.normed = workspace.Take<float>(T * C);
  step.delta = workspace.Take<float>(T * C);
  step.qkv = workspace.Take<float>(T * (config_.H + 2 * config_.Hkv) * config_.D);
  step.attention = workspace.Take<float>(T * config_.H * config_.D);
  step.gate_up = workspace.Take<float>(T * 2 * config_.ffn);
  step.activation = workspace.Take<float>(T * config_.ffn);

  for (int n = 0; n < step.N; ++n) {
    for (size_t i = 0; i < step.sequences[n]->tokens.size(); ++i) {
      const int32_t token = step.sequences[n]->tokens[i];
      DSLA_CHECK(token >= 0 && token < config_.V);
      weights_->embedding.ReadRow(token,
                                  step.hidden + (step.row_start[n] + static_cast<int64_t>(i)) * C);
    }
  }
  for (int layer = 0; layer < config_.L; ++layer) {
    const LayerWeights& weights = weights_->layers[layer];
    if (layer == 0) {
      RmsNorm(ctx, step.hidden, weights.attn_norm.data(), config_.norm_eps, T, C, step.normed);
    } else {
      AddRmsNorm(ctx, step.hidden, step.delta, weights.attn_norm.data(), config_.norm_eps, T, C,
                 step.normed);
    }
    AttentionBlock(ctx, pool, step, layer);
    AddRmsNorm(ctx, step.hidden, step.delta, weights.mlp_norm.data(), config_.norm_eps, T, C,
               step.normed);
    weights.gate_up.Forward(ctx, step.normed, C, T, step.gate_up, 2 * config_.ffn, Accumulate::kNo,
                            products);
    SiluMul(ctx, step.gate_up, T, config_.ffn, step.activation);
    weights.down.Forward(ctx, step.activation, config_.ffn, T, step.delta, C, Accumulate::kNo,
                         products);
  }
  AddRmsNorm(ctx, step.hidden, step.delta, weights_->final_norm.data(), config_.norm_eps, T, C,
             step.normed);
}

// The step's `rows` through the output head. logits: [rows, V].
void HybridModel::Logits(const ExecContext& ctx, const Step& step, std::span<const int64_t> rows,
                         float* logits) const {
  const Workspace::Scope scope(*ctx.workspace);
  const auto count = static_cast<int64_t>(rows.size()), C = int64_t{config_.C};
  float* gathered = ctx.workspace->Take<float>(count * C);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(gathered + i * C, step.normed + rows[i] * C, C * sizeof(float));
  weights_->output().Forward(ctx, gathered, C, count, logits, config_.V, Accumulate::kNo,
                             step.products);
}

void HybridModel::Forward(const ExecContext& ctx, CachePool& pool,
                          std::span<const SequenceRows> batch, Buffer<float>& logits,
                          Products products) const {
  const Workspace::Scope scope(*ctx.workspace);
  Step step;
  step.products = products;
  PlaceRows(pool, batch, step);
  RunLayers(ctx, pool, step);
  logits.Resize(static_cast<int64_t>(step.wanted.size()) * config_.V);
  Logits(ctx, step, step.wanted_rows, logits.data());
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
  DSLA_RETURN_IF_ERROR(cache.Reserve(1));
  const Workspace::Scope scope(*ctx.workspace);
  const SequenceRows rows{.cache = &cache, .tokens = {&token, 1}, .logits_rows = 0};
  Step step;
  step.visit_queries = &visit;
  PlaceRows(pool, {&rows, 1}, step);
  RunLayers(ctx, pool, step);
  cache.Commit(1);
  return Status::Ok();
}

void HybridModel::Forward(const ExecContext& ctx, CachePool& pool,
                          std::span<const SequenceRows> batch, Products products,
                          const LogitsVisitor& visit) const {
  const Workspace::Scope scope(*ctx.workspace);
  Step step;
  step.products = products;
  PlaceRows(pool, batch, step);
  RunLayers(ctx, pool, step);
  const auto wanted = static_cast<int64_t>(step.wanted.size());
  float* logits = ctx.workspace->Take<float>(std::min(wanted, kLogitsTileRows) * config_.V);
  for (int64_t begin = 0; begin < wanted; begin += kLogitsTileRows) {
    const auto count = static_cast<size_t>(std::min(kLogitsTileRows, wanted - begin));
    Logits(ctx, step, std::span(step.wanted_rows).subspan(begin, count), logits);
    visit(std::span(step.wanted).subspan(begin, count), logits);
  }
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
        DslaResetSlot(adapter_.layers[layer].shape, pool.slots(), slot);
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
  return Status::Ok();
}

}  // namespace dsla
