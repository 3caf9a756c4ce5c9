// The layers on the CPU.
#include <cmath>

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
                          .out = step.attention_rows,
                          .lse = nullptr,
                          .plan = &step.plan.split(layer).attention});
}

void HybridModel::DslaRows(const ExecContext& ctx, Step& step, int layer) const {
  Workspace::Scope scope(*ctx.workspace);
  const DslaLayer& dsla = adapter_.layers[layer];
  const int64_t m = step.plan.split(layer).softmax_rows;
  float* claim = nullptr;
  if (!dsla.claim.empty()) {
    claim = ctx.workspace->Take<float>(step.rows.T() * config_.H);
    dsla.claim.Forward(ctx, step.normed, m, claim + m * config_.H, config_.H);
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
                       .out = step.attention_rows});
}

void HybridModel::AttentionBlock(const ExecContext& ctx, Step& step, int layer) const {
  const LayerWeights& weights = weights_->layers[layer];
  const int64_t C = config_.C, q = int64_t{config_.H} * config_.D, stride = qkv_width();
  weights.qkv.Forward(ctx, step.normed, 0, step.qkv, stride);
  step.clock.Mark("qkv");

  // The layer is DSLA for the sequences whose level is above its rank: the last ones of the sorted
  // batch.
  const int64_t m = step.plan.split(layer).softmax_rows, dsla_rows = step.rows.T() - m;
  if (dsla_rows > 0) {
    adapter_.layers[layer].q_delta.AddTo(ctx, step.normed, m, step.qkv + m * stride, stride);
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

  step.attention.Set(step.attention_rows, q, step.rows.T());
  weights.o.Forward(ctx, step.attention, 0, step.delta, C);
  step.clock.Mark("o");
  if (dsla_rows > 0) {
    adapter_.layers[layer].o_delta.AddTo(ctx, step.attention, m, step.delta + m * C, C);
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
  step.normed_rows = workspace.Take<float>(T * C);
  step.delta = workspace.Take<float>(T * C);
  step.qkv = workspace.Take<float>(T * qkv_width());
  if (T > 0 && step.rows.sequences.back()->cache->level() > 0) {
    const int64_t bytes = T * config_.Hkv * config_.D * SizeOf(DslaRowType(options_.kv_dtype));
    step.k = workspace.Take<std::byte>(bytes);
    step.v = workspace.Take<std::byte>(bytes);
  }
  step.attention_rows = workspace.Take<float>(T * config_.H * config_.D);
  step.gate_up = workspace.Take<float>(T * 2 * config_.ffn);
  step.activation_rows = workspace.Take<float>(T * config_.ffn);
  step.normed = LinearInput(workspace, T, C, products);
  step.attention = LinearInput(workspace, T, int64_t{config_.H} * config_.D, products);
  step.activation = LinearInput(workspace, T, config_.ffn, products);
  return step;
}

// hidden += delta, its norm to step.normed, as `consumer` multiplies it.
void HybridModel::Norm(const ExecContext& ctx, Step& step, const float* delta,
                       const Buffer<float>& weight, const Linear& consumer) const {
  const int64_t C = config_.C;
  step.normed.Fill(ctx, step.normed_rows, C, step.rows.T(), consumer, LinearInput::Cut::kRows,
                   [&](int64_t t, int64_t, int64_t) {
                     AddRmsNormRow(step.hidden + t * C, delta != nullptr ? delta + t * C : nullptr,
                                   weight.data(), config_.norm_eps, C, step.normed_rows + t * C);
                   });
  step.clock.Mark("norms, RoPE");
}

void HybridModel::RunLayers(const ExecContext& ctx, Step& step) const {
  const int64_t T = step.rows.T(), C = config_.C, ffn = config_.ffn;
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
    Norm(ctx, step, layer == 0 ? nullptr : step.delta, weights.attn_norm, weights.qkv);
    AttentionBlock(ctx, step, layer);
    Norm(ctx, step, step.delta, weights.mlp_norm, weights.gate_up);
    weights.gate_up.Forward(ctx, step.normed, 0, step.gate_up, 2 * ffn);
    step.clock.Mark("gate and up");
    step.activation.Fill(ctx, step.activation_rows, ffn, T, weights.down, LinearInput::Cut::kPieces,
                         [&](int64_t t, int64_t begin, int64_t end) {
                           SiluMulRow(step.gate_up + t * 2 * ffn, ffn, begin, end,
                                      step.activation_rows + t * ffn);
                         });
    step.clock.Mark("SiLU");
    weights.down.Forward(ctx, step.activation, 0, step.delta, C);
    step.clock.Mark("down");
  }
}

// The step's `rows` through the last norm and the output head, each once. logits: [rows, V].
void HybridModel::Logits(const ExecContext& ctx, const Step& step, std::span<const int64_t> rows,
                         float* logits) const {
  const Workspace::Scope scope(*ctx.workspace);
  StageClock clock(ctx.stages);
  const auto count = static_cast<int64_t>(rows.size()), C = int64_t{config_.C};
  const Linear& head = weights_->output();
  float* const normed = ctx.workspace->Take<float>(count * C);
  LinearInput input(*ctx.workspace, count, C, step.products);
  input.Fill(ctx, normed, C, count, head, LinearInput::Cut::kRows,
             [&](int64_t i, int64_t, int64_t) {
               AddRmsNormRow(step.hidden + rows[i] * C, step.delta + rows[i] * C,
                             weights_->final_norm.data(), config_.norm_eps, C, normed + i * C);
             });
  head.Forward(ctx, input, 0, logits, config_.V);
  clock.Mark("head");
}

}  // namespace dsla
