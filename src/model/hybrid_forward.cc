// The layers on the CPU.
#include <cmath>
#include <cstring>

#include "model/hybrid_model.h"
#include "model/hybrid_step.h"
#include "ops/attention/attention.h"
#include "ops/norm_rope/rope_kv.h"

namespace dsla {
void HybridModel::SoftmaxRows(const ExecContext& ctx, const Step& step, int layer) const {
  PagedAttentionCpu(ctx, {.rows = step.plan.softmax_rows(layer),
                          .tables = step.plan.tables(layer),
                          .kv = step.kv,
                          .H = config_.H,
                          .scale = 1.f / std::sqrt(static_cast<float>(config_.D)),
                          .sliding_window = config_.sliding_window,
                          .q = step.qkv,
                          .q_stride = qkv_width(),
                          .out = step.attention,
                          .lse = nullptr,
                          .plan = &step.plan.split(layer).attention});
}

void HybridModel::DslaRows(const ExecContext& ctx, const Step& step, int layer) const {
  Workspace::Scope scope(*ctx.workspace);
  const DslaLayer& dsla = adapter_.layers[layer];
  const int64_t first_row = step.plan.split(layer).softmax_rows, T = step.rows.T() - first_row;
  float* claim = nullptr;
  if (!dsla.claim.empty()) {
    claim = ctx.workspace->Take<float>(step.rows.T() * config_.H);
    dsla.claim.Forward(ctx, step.normed + first_row * config_.C, config_.C, T,
                       claim + first_row * config_.H, config_.H, Accumulate::kNo, step.products);
  }
  DslaForwardCpu(ctx, {.shape = dsla.shape,
                       .params = LayerParams(layer),
                       .rows = step.plan.dsla_rows(layer),
                       .slots = step.plan.dsla_slots(layer),
                       .states = step.states,
                       .q = step.qkv,
                       .q_stride = qkv_width(),
                       .k = step.k,
                       .v = step.v,
                       .claim = claim,
                       .out = step.attention});
}

void HybridModel::AttentionBlock(const ExecContext& ctx, Step& step, int layer) const {
  const LayerWeights& weights = weights_->layers[layer];
  const int64_t C = config_.C, q = int64_t{config_.H} * config_.D, stride = qkv_width();
  weights.qkv.Forward(ctx, step.normed, C, step.rows.T(), step.qkv, stride, Accumulate::kNo,
                      step.products);
  step.clock.Mark("qkv");

  // The layer is DSLA for the sequences whose level is above its rank: the last ones of the sorted
  // batch.
  const int64_t m = step.plan.split(layer).softmax_rows, dsla_rows = step.rows.T() - m;
  if (dsla_rows > 0) {
    adapter_.layers[layer].q_delta.AddTo(ctx, step.normed + m * C, C, dsla_rows,
                                         step.qkv + m * stride, stride, step.products);
    step.clock.Mark("adapter's deltas");
  }

  RopeKvCpu(ctx, {.qkv = step.qkv,
                  .stride = stride,
                  .T = step.rows.T(),
                  .H = config_.H,
                  .Hkv = config_.Hkv,
                  .positions = step.rows.positions.data(),
                  .table = &rope_,
                  .q_norm = config_.qk_norm ? weights.q_norm.data() : nullptr,
                  .k_norm = config_.qk_norm ? weights.k_norm.data() : nullptr,
                  .norm_eps = config_.norm_eps,
                  .paged = step.plan.softmax_rows(layer),
                  .tables = step.plan.tables(layer),
                  .kv = step.kv,
                  .row_type = DslaRowType(options_.kv_dtype),
                  .k = step.k,
                  .v = step.v});
  step.clock.Mark("norms, RoPE");

  if (m > 0) {
    SoftmaxRows(ctx, step, layer);
    step.clock.Mark("softmax attention");
  }
  if (dsla_rows > 0) {
    DslaRows(ctx, step, layer);
    step.clock.Mark("DSLA");
  }
  if (step.visit_queries != nullptr)
    (*step.visit_queries)(layer, {step.qkv, static_cast<size_t>(q)});

  weights.o.Forward(ctx, step.attention, q, step.rows.T(), step.delta, C, Accumulate::kNo,
                    step.products);
  step.clock.Mark("o");
  if (dsla_rows > 0) {
    adapter_.layers[layer].o_delta.AddTo(ctx, step.attention + m * q, q, dsla_rows,
                                         step.delta + m * C, C, step.products);
    step.clock.Mark("adapter's deltas");
  }
}

// Places the batch's rows, plans them and takes the step's memory.
HybridModel::Step HybridModel::BeginStep(const ExecContext& ctx, CachePool& pool,
                                         std::span<const SequenceRows> batch,
                                         Products products) const {
  Workspace& workspace = *ctx.workspace;
  Step step;
  step.products = products;
  step.kv = pool.pages();
  step.states = pool.slots();
  step.rows = Place(pool, batch, workspace);
  step.plan = PlanStep(step.rows, config_, options_.page_size, ladder_, workspace);
  const int64_t T = step.rows.T(), C = config_.C;
  step.hidden = workspace.Take<float>(T * C);
  step.normed = workspace.Take<float>(T * C);
  step.delta = workspace.Take<float>(T * C);
  step.qkv = workspace.Take<float>(T * qkv_width());
  if (step.rows.sequences.back()->cache->level() > 0) {
    const int64_t bytes = T * config_.Hkv * config_.D * SizeOf(DslaRowType(options_.kv_dtype));
    step.k = workspace.Take<std::byte>(bytes);
    step.v = workspace.Take<std::byte>(bytes);
  }
  step.attention = workspace.Take<float>(T * config_.H * config_.D);
  step.gate_up = workspace.Take<float>(T * 2 * config_.ffn);
  step.activation = workspace.Take<float>(T * config_.ffn);
  return step;
}

void HybridModel::RunLayers(const ExecContext& ctx, Step& step) const {
  const int64_t T = step.rows.T(), C = config_.C;
  const Products products = step.products;
  step.clock = StageClock(ctx.stages);
  for (int n = 0; n < step.rows.N(); ++n) {
    for (size_t i = 0; i < step.rows.sequences[n]->tokens.size(); ++i) {
      const int32_t token = step.rows.sequences[n]->tokens[i];
      DSLA_CHECK(token >= 0 && token < config_.V);
      weights_->embedding.ReadRow(
          token, step.hidden + (step.rows.row_start[n] + static_cast<int64_t>(i)) * C);
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
    step.clock.Mark("norms, RoPE");
    AttentionBlock(ctx, step, layer);
    AddRmsNorm(ctx, step.hidden, step.delta, weights.mlp_norm.data(), config_.norm_eps, T, C,
               step.normed);
    step.clock.Mark("norms, RoPE");
    weights.gate_up.Forward(ctx, step.normed, C, T, step.gate_up, 2 * config_.ffn, Accumulate::kNo,
                            products);
    step.clock.Mark("gate and up");
    SiluMul(ctx, step.gate_up, T, config_.ffn, step.activation);
    step.clock.Mark("SiLU");
    weights.down.Forward(ctx, step.activation, config_.ffn, T, step.delta, C, Accumulate::kNo,
                         products);
    step.clock.Mark("down");
  }
  AddRmsNorm(ctx, step.hidden, step.delta, weights_->final_norm.data(), config_.norm_eps, T, C,
             step.normed);
}

// The step's `rows` through the output head. logits: [rows, V].
void HybridModel::Logits(const ExecContext& ctx, const Step& step, std::span<const int64_t> rows,
                         float* logits) const {
  const Workspace::Scope scope(*ctx.workspace);
  StageClock clock(ctx.stages);
  const auto count = static_cast<int64_t>(rows.size()), C = int64_t{config_.C};
  float* gathered = ctx.workspace->Take<float>(count * C);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(gathered + i * C, step.normed + rows[i] * C, C * sizeof(float));
  weights_->output().Forward(ctx, gathered, C, count, logits, config_.V, Accumulate::kNo,
                             step.products);
  clock.Mark("head");
}

}  // namespace dsla
