// The layers of a step: which kernels run on which rows.
#include <algorithm>
#include <cmath>

#include "model/cuda/cuda_model.h"
#include "ops/attention/cuda/attention_cuda.h"
#include "ops/linear/cuda/linear_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla::cuda {
namespace {

// Of two layers' shapes.
bool SamePlan(const DslaShape& a, const DslaShape& b) {
  return a.F == b.F && a.states == b.states && a.window == b.window && a.sinks == b.sinks;
}

}  // namespace

void CudaModel::RunLayers(const Step& step) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const StepTables& tables = *step.tables;
  const int T = static_cast<int>(tables.T);
  Check(EmbedRows({.tokens = step.device + tables.tokens,
                   .feed = step.device + tables.feed,
                   .chosen = &choices_.as<RowChoice>()->token,
                   .chosen_stride = sizeof(RowChoice) / sizeof(int32_t),
                   .embedding = weights_->embedding.data.as(),
                   .bits = weights_->embedding.bits(),
                   .T = T,
                   .C = c.C,
                   .hidden = a.hidden},
                  stream_),
        "embedding");
  for (int l = 0; l < c.L; ++l) {
    if (step.begun != nullptr) MarkParts(*step.begun, l);
    const CudaLayer& layer = weights_->layers[static_cast<size_t>(l)];
    AddRmsNormArgs norm{.hidden = a.hidden,
                        .delta = l == 0 ? nullptr : a.delta,
                        .weight = layer.attn_norm.as<float>(),
                        .eps = c.norm_eps,
                        .T = T,
                        .C = c.C,
                        .normed = a.normed};
    Check(AddRmsNorm(norm, stream_), "norm");
    AttentionBlock(step, l);
    norm.delta = a.delta;
    norm.bias = c.o_bias ? layer.o_bias.as<float>() : nullptr;
    norm.weight = layer.mlp_norm.as<float>();
    Check(AddRmsNorm(norm, stream_), "norm");
    gemm_->RunGated(layer.gate_up, a.normed, T, a.gate_up, a.activation);
    gemm_->Run(layer.down, a.activation, c.ffn, T, a.delta, c.C);
  }
}

// Of the step's equal parts those that begin with the layer.
void CudaModel::MarkParts(const Begun& step, int l) {
  const auto parts = static_cast<int>(step.parts.size());
  const auto first = [&](int layer) {
    return (layer * parts + spec_.config.L - 1) / spec_.config.L;
  };
  for (int part = first(l); part < first(l + 1); ++part)
    Check(cudaEventRecord(step.parts[static_cast<size_t>(part)], stream_), "marking a layer");
}

void CudaModel::AttentionBlock(const Step& step, int l) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const StepTables& tables = *step.tables;
  const CudaLayer& layer = weights_->layers[static_cast<size_t>(l)];

  // A graph of mixed levels has both branches for all rows, another the one that all rows take;
  // without a graph the host knows where they part.
  const int rank = spec_.rank[static_cast<size_t>(l)];
  int softmax = step.level > rank ? 0 : tables.N;
  int64_t first = step.level == kMixed || step.level > rank ? 0 : tables.T;
  if (!step.padded) {
    softmax = step.rows->SoftmaxSequences(rank);
    first = step.rows->row_start[softmax];
  }
  const CudaDslaLayer* const dsla =
      first < tables.T ? &adapter_->layers[static_cast<size_t>(l)] : nullptr;
  const bool all = softmax == 0;

  QueriesKeysValues(step, dsla, all, l);
  Check(RopeKv(
            {.qkv = a.qkv,
             .bias = c.qkv_bias ? layer.qkv_bias.as<float>() : nullptr,
             .q_norm = c.qk_norm ? layer.q_norm.as<float>() : nullptr,
             .k_norm = c.qk_norm ? layer.k_norm.as<float>() : nullptr,
             .eps = c.norm_eps,
             .rope_cos = weights_->rope_cos.as<float>(),
             .rope_sin = weights_->rope_sin.as<float>(),
             .positions = step.device + tables.positions,
             .T = static_cast<int>(tables.T),
             .H = c.H,
             .Hkv = c.Hkv,
             .D = c.D,
             .softmax_rows = step.device + tables.softmax_rows + l,
             .sequence = step.device + tables.sequence,
             .tables = {.page_start = step.device + tables.page_start + int64_t{l} * (tables.N + 1),
                        .pages = step.device + tables.pages},
             .kv = step.cache.pages},
            stream_),
        "rotating queries and keys");
  if (softmax > 0) SoftmaxRows(step, l);
  if (dsla) DslaRows(step, l);
  Output(step, dsla, all, l);
}

// q, k, v = W x; of DSLA rows also the claims, and q += B_q A_q x.
void CudaModel::QueriesKeysValues(const Step& step, const CudaDslaLayer* dsla, bool all, int l) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const int64_t T = step.tables->T, stride = int64_t{c.H + 2 * c.Hkv} * c.D;
  const bool merged = all && !dsla->merged_qkv.empty();
  const Matrix& weight = merged ? dsla->merged_qkv : weights_->layers[static_cast<size_t>(l)].qkv;
  const int r = dsla && !merged ? dsla->r : 0, H = dsla && dsla->claims ? c.H : 0;
  if (r + H == 0) {
    gemm_->Run(weight, a.normed, c.C, T, a.qkv, stride);
    return;
  }
  AdapterInArgs in = FirstProduct(step, dsla->in, r, a.normed, l);
  if (merged) in.weight = dsla->in.data.as(2 * dsla->r * dsla->in.in);
  in.H = H;
  in.claim = a.claim;
  in.claim_bias = dsla->claim_bias.as<float>();
  gemm_->RunJoint(weight, a.qkv, stride, in);
  if (r > 0) SecondProduct(dsla->q_out, in, a.qkv, stride);
}

// delta = W out, of DSLA rows += B_o A_o out.
void CudaModel::Output(const Step& step, const CudaDslaLayer* dsla, bool all, int l) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const bool merged = all && !dsla->merged_o.empty();
  const Matrix& weight = merged ? dsla->merged_o : weights_->layers[static_cast<size_t>(l)].o;
  if (merged || dsla == nullptr || dsla->r == 0) {
    gemm_->Run(weight, a.attention, weight.in, step.tables->T, a.delta, c.C);
    return;
  }
  const AdapterInArgs in = FirstProduct(step, dsla->o_in, dsla->r, a.attention, l);
  gemm_->RunJoint(weight, a.delta, c.C, in);
  SecondProduct(dsla->o_out, in, a.delta, c.C);
}

// low_rank = A x, without claims, of the rows that are DSLA in layer l.
AdapterInArgs CudaModel::FirstProduct(const Step& step, const Matrix& weight, int r,
                                      const std::byte* x, int l) const {
  return {.weight = weight.data.as(),
          .in = static_cast<int>(weight.in),
          .r = r,
          .x = x,
          .x_stride = weight.in,
          .T = static_cast<int>(step.tables->T),
          .first_row = step.device + step.tables->softmax_rows + l,
          .low_rank = step.a->low_rank};
}

// y += B low_rank, of the same rows.
void CudaModel::SecondProduct(const Matrix& weight, const AdapterInArgs& first, std::byte* y,
                              int64_t y_stride) {
  gemm_->Run(weight, first.low_rank, first.r, first.T, y, y_stride, Gemm::Out::kBf16,
             first.first_row);
}

void CudaModel::SoftmaxRows(const Step& step, int l) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const StepTables& tables = *step.tables;
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D, stride = q + 2 * kv;
  const float scale = 1.f / std::sqrt(static_cast<float>(c.D));
  const int32_t* const starts = step.device + tables.page_start + int64_t{l} * (tables.N + 1);
  const int32_t* const pages = step.device + tables.pages;

  const auto decode = [&](int first, int count, int64_t first_row, const int32_t* limit) {
    if (!step.padded) Grow(*step.scratch, DecodeAttentionWorkspaceBytes(count, c.H, c.Hkv, c.D));
    Check(DecodeAttention({.N = count,
                           .rows = limit,
                           .pos = step.device + tables.pos + first,
                           .tables = {.page_start = starts + first, .pages = pages},
                           .kv = step.cache.pages,
                           .H = c.H,
                           .scale = scale,
                           .sliding_window = c.sliding_window,
                           .q = a.qkv + 2 * first_row * stride,
                           .q_stride = stride,
                           .out = a.attention + 2 * first_row * q,
                           .workspace = step.scratch->as(),
                           .workspace_bytes = step.scratch->bytes()},
                          stream_),
          "attention of single rows");
  };
  if (step.padded) {
    decode(0, tables.N, 0, step.device + tables.softmax_rows + l);
    return;
  }
  const int rank = spec_.rank[static_cast<size_t>(l)];
  for (size_t g = 0; g < tables.groups.size(); ++g) {
    const RowGroup& group = tables.groups[g];
    if (step.rows->sequences[static_cast<size_t>(group.first)]->cache->level() > rank) break;
    if (group.single) {
      // The last entry of its row starts is the number of its rows.
      decode(group.first, group.count, group.first_row,
             step.device + group.row_start + group.count);
      continue;
    }
    if (plans_.size() <= g) plans_.resize(g + 1);
    const int64_t bytes = PrefillAttentionWorkspaceBytes(group.count, group.rows, c.H, c.Hkv, c.D);
    Grow(plans_[g], bytes);
    // The first layer of the step that has this group makes its plan.
    const bool new_plan = !planned_[g];
    planned_[g] = true;
    Check(PrefillAttention({.rows = {.N = group.count,
                                     .row_start = step.device + group.row_start,
                                     .pos = step.device + tables.pos + group.first},
                            .host_row_start = step.host + group.row_start,
                            .host_pos = step.host + tables.pos + group.first,
                            .tables = {.page_start = starts + group.first, .pages = pages},
                            .kv = step.cache.pages,
                            .H = c.H,
                            .scale = scale,
                            .sliding_window = c.sliding_window,
                            .q = a.qkv + 2 * group.first_row * stride,
                            .q_stride = stride,
                            .k = a.qkv + 2 * (group.first_row * stride + q),
                            .v = a.qkv + 2 * (group.first_row * stride + q + kv),
                            .k_stride = stride,
                            .v_stride = stride,
                            .out = a.attention + 2 * group.first_row * q,
                            .workspace = plans_[g].as(),
                            .workspace_bytes = plans_[g].bytes()},
                           new_plan, stream_),
          "attention of prompts");
  }
}

void CudaModel::DslaRows(const Step& step, int l) {
  const ModelConfig& c = spec_.config;
  const Activations& a = *step.a;
  const StepTables& tables = *step.tables;
  const auto layer = static_cast<size_t>(l);
  const CudaDslaLayer& dsla = adapter_->layers[layer];
  const DslaShape& shape = adapter_->shapes[layer];
  const int64_t q = int64_t{c.H} * c.D, kv = int64_t{c.Hkv} * c.D, stride = q + 2 * kv;

  const auto run = [&](const RowGroup& group, DeviceBuffer& scratch, bool has_plan) {
    const std::byte* const rows = a.qkv + 2 * group.first_row * stride;
    DslaCudaArgs args{.shape = shape,
                      .layout = adapter_->layouts[layer],
                      .weights = {.packed = dsla.packed.as(),
                                  .mix = dsla.mix.as<float>(),
                                  .rope_cos = weights_->rope_cos.as<float>(),
                                  .rope_sin = weights_->rope_sin.as<float>()},
                      .rows = {.N = group.count,
                               .row_start = step.device + group.row_start,
                               .pos = step.device + tables.pos + group.first},
                      .T = static_cast<int>(group.rows),
                      .slots = step.device + tables.slots + int64_t{l} * tables.N + group.first,
                      .states = step.cache.slots,
                      .q = rows,
                      .k = rows + 2 * q,
                      .v = rows + 2 * (q + kv),
                      .q_stride = stride,
                      .k_stride = stride,
                      .v_stride = stride,
                      .claim = dsla.claims ? a.claim + group.first_row * c.H : nullptr,
                      .out = a.attention + 2 * group.first_row * q,
                      .has_plan = has_plan};
    if (!step.padded && !has_plan) {
      Grow(scratch, group.single ? DecodeWorkspaceBytes(shape, group.count)
                                 : PrefillWorkspaceBytes(shape, group.count, group.rows));
    }
    args.workspace = scratch.as();
    args.workspace_bytes = scratch.bytes();
    Check(group.single ? Decode(args, stream_) : Prefill(args, stream_),
          "dual-state linear attention");
  };
  if (step.padded) {
    run({.first = 0, .count = tables.N, .first_row = 0, .rows = tables.N, .single = true},
        *step.scratch, false);
    return;
  }
  const int rank = spec_.rank[layer];
  for (const RowGroup& group : tables.groups) {
    if (step.rows->sequences[static_cast<size_t>(group.first)]->cache->level() <= rank) continue;
    if (group.single) {
      run(group, *step.scratch, false);
      continue;
    }
    // The plan of the rows is in its workspace until another group, or shape, takes that.
    const bool has_plan = chunked_ == &group && SamePlan(adapter_->shapes[chunked_layer_], shape);
    run(group, chunk_scratch_, has_plan);
    chunked_ = &group;
    chunked_layer_ = layer;
  }
}

void CudaModel::Fold(const CacheViews& cache, const SequenceCache& sequence, int l, int32_t slot) {
  cudaSetDevice(device_);
  const auto layer = static_cast<size_t>(l);
  const CudaDslaLayer& dsla = adapter_->layers[layer];
  const DslaShape& shape = adapter_->shapes[layer];
  const auto pages = sequence.pages(l);
  const auto count = static_cast<int32_t>(pages.size());
  // pos, slot, page_start [2], pages.
  Check(cudaEventSynchronize(tables_sent_), "waiting for a copy");
  host_tables_.Grow(4 * int64_t{4 + count});
  auto* const host = host_tables_.as<int32_t>();
  host[0] = sequence.length();
  host[1] = slot;
  host[2] = 0;
  host[3] = count;
  std::copy(pages.begin(), pages.end(), host + 4);
  Grow(tables_, 4 * int64_t{4 + count});
  Check(cudaMemcpyAsync(tables_.as(), host, static_cast<size_t>(4 * (4 + count)),
                        cudaMemcpyHostToDevice, stream_),
        "sending a page table");
  Check(cudaEventRecord(tables_sent_, stream_), "marking a copy");
  const auto* const device = tables_.as<int32_t>();
  Grow(scratch_, FoldWorkspaceBytes(shape, 1, sequence.length()));
  Check(cuda::Fold({.shape = shape,
                    .layout = adapter_->layouts[layer],
                    .weights = {.packed = dsla.packed.as(),
                                .mix = dsla.mix.as<float>(),
                                .rope_cos = weights_->rope_cos.as<float>(),
                                .rope_sin = weights_->rope_sin.as<float>()},
                    .rows = {.N = 1, .row_start = nullptr, .pos = device},
                    .T = sequence.length(),
                    .tables = {.page_start = device + 2, .pages = device + 4},
                    .kv = cache.pages,
                    .slots = device + 1,
                    .states = cache.slots,
                    .workspace = scratch_.as(),
                    .workspace_bytes = scratch_.bytes()},
                   stream_),
        "folding a cache");
}

}  // namespace dsla::cuda
