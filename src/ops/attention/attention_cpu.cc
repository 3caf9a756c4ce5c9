#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/attention_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/attention/decode-inl.h"
#include "ops/attention/prefill-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {
void RunPrefill(const PagedAttentionArgs& args, int n, int head, int first, int last,
                float* scratch) {
  PrefillTask(args, n, head, first, last, scratch);
}
void RunDecode(const PagedAttentionArgs& args, int n, int head, int begin, int end, float* partial,
               float* scratch) {
  DecodeTask(args, n, head, begin, end, partial, scratch);
}
void RunMerge(const PagedAttentionArgs& args, int n, int head, float* partials, int splits,
              int64_t split_stride) {
  DecodeMerge(args, n, head, partials, splits, split_stride);
}
}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>

#include "base/check.h"

namespace dsla {
namespace {

HWY_EXPORT(RunPrefill);
HWY_EXPORT(RunDecode);
HWY_EXPORT(RunMerge);
}  // namespace

void PagedAttentionCpu(const ExecContext& ctx, const PagedAttentionArgs& args) {
  DSLA_CHECK(ctx.workspace != nullptr);
  DSLA_CHECK(args.kv.Hkv > 0 && args.H > 0 && args.H % args.kv.Hkv == 0);
  DSLA_CHECK(args.kv.D > 0 && args.kv.D % 8 == 0 && args.kv.D <= kMaxHeadDim &&
             args.kv.page_size > 0);
  const Workspace::Scope scope(*ctx.workspace);
  const PagedAttentionPlan plan =
      args.plan != nullptr ? *args.plan : PlanPagedAttention(args, *ctx.workspace);
  float* const partials = ctx.workspace->Take<float>(plan.partials);
  const int64_t scratch_size = RoundUp64(
      std::max(plan.prefill ? PrefillScratch(args) : 0, plan.decode ? DecodeScratch(args) : 0), 16);
  float* scratch = ctx.workspace->Take<float>(scratch_size * std::max(ctx.threads, 1));
  ParallelFor(ctx, plan.num_tasks, [&](int64_t i, int thread) {
    const AttentionTask& task = plan.tasks[i];
    float* const mine = scratch + thread * scratch_size;
    if (task.partial >= 0) {
      HWY_DYNAMIC_DISPATCH(RunDecode)
      (args, task.n, task.head, task.begin, task.end, partials + task.partial, mine);
    } else {
      HWY_DYNAMIC_DISPATCH(RunPrefill)(args, task.n, task.head, task.begin, task.end, mine);
    }
  });
  ParallelRanges(ctx, plan.num_merges, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const AttentionMerge& m = plan.merges[i];
      HWY_DYNAMIC_DISPATCH(RunMerge)
      (args, m.n, m.head, partials + m.partial, m.splits, m.split_stride);
    }
  });
}

}  // namespace dsla
#endif  // HWY_ONCE
