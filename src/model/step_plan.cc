#include "model/step_plan.h"

#include <algorithm>

namespace dsla {
namespace {

// The splits in the order of the ladder: a layer that converts later is softmax for no fewer
// sequences.
void PlanSplits(const PlacedRows& rows, const ModelConfig& config, std::span<const int> ladder,
                Workspace& workspace, StepPlan& plan) {
  auto* const splits = workspace.Take<StepPlan::Split>(std::min(config.L, rows.N() + 1));
  auto* const split_of = workspace.Take<int32_t>(config.L);
  int count = 0;
  for (int rank = 0; rank < config.L; ++rank) {
    const int softmax = rows.SoftmaxSequences(rank);
    if (count == 0 || splits[count - 1].softmax_sequences != softmax) {
      PagedAttentionArgs args;
      args.rows = plan.rows;
      args.rows.N = softmax;
      args.H = config.H;
      args.kv.Hkv = config.Hkv;
      args.kv.D = config.D;
      args.sliding_window = config.sliding_window;
      splits[count++] = {.softmax_sequences = softmax,
                         .softmax_rows = rows.row_start[softmax],
                         .attention = PlanPagedAttention(args, workspace)};
    }
    split_of[ladder[rank]] = count - 1;
  }
  plan.splits = splits;
  plan.split_of = split_of;
}

// Where the sequences lie in the caches, layer by layer.
void PlanCaches(const PlacedRows& rows, int layers, int page_size, Workspace& workspace,
                StepPlan& plan) {
  const int N = rows.N();
  auto* const page_start = workspace.Take<int32_t>(N + 1);
  page_start[0] = 0;
  for (int n = 0; n < N; ++n) {
    const SequenceRows& of = *rows.sequences[n];
    const int64_t tokens = of.cache->length() + static_cast<int64_t>(of.tokens.size());
    page_start[n + 1] = page_start[n] + static_cast<int32_t>(PagesFor(tokens, page_size));
  }
  auto* const pages = workspace.Take<int32_t>(int64_t{layers} * page_start[N]);
  auto* const slots = workspace.Take<int32_t>(int64_t{layers} * N);
  for (int layer = 0; layer < layers; ++layer) {
    for (int n = 0; n < N; ++n) {
      const SequenceCache& cache = *rows.sequences[n]->cache;
      slots[int64_t{layer} * N + n] = cache.slot(layer);
      if (cache.is_dsla(layer)) continue;
      const int count = page_start[n + 1] - page_start[n];
      DSLA_CHECK(static_cast<int>(cache.pages(layer).size()) >= count);
      std::copy_n(cache.pages(layer).begin(), count,
                  pages + int64_t{layer} * page_start[N] + page_start[n]);
    }
  }
  plan.page_start = page_start;
  plan.pages = pages;
  plan.slots = slots;
}

}  // namespace

StepPlan PlanStep(const PlacedRows& rows, const ModelConfig& config, int page_size,
                  std::span<const int> ladder, Workspace& workspace) {
  StepPlan plan;
  plan.N = rows.N();
  plan.rows = {.N = plan.N, .row_start = rows.row_start.data(), .pos = rows.pos.data()};
  PlanCaches(rows, config.L, page_size, workspace, plan);
  PlanSplits(rows, config, ladder, workspace, plan);
  return plan;
}

}  // namespace dsla
