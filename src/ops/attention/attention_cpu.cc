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

struct Task {
  int64_t cost;  // rows times keys, to start the largest first
  int32_t n, head;
  int32_t begin, end;  // rows of the sequence (prefill) or keys (decode)
  float* partial;      // where a decode task's result goes; null for prefill
};

// The decode tasks of one (sequence, KV head), which are merged in ascending order of keys.
struct Merge {
  int32_t n, head, splits;
  float* partials;
  int64_t split_stride;
};

struct Plan {
  Task* tasks;
  Merge* merges;
  int64_t num_tasks = 0, num_merges = 0;
  bool prefill = false, decode = false;  // which forms occur
};

bool IsDecode(const PagedAttentionArgs& a, int n) { return a.rows.count(n) <= kDecodePositions; }

// The keys that some row of [first, last) sees are [FirstKey, LastKey).
int FirstKey(const PagedAttentionArgs& a, int n, int first) {
  return FirstVisibleKey(a.rows.pos[n] + first, a.sliding_window);
}
int EndKey(const PagedAttentionArgs& a, int n, int last) { return a.rows.pos[n] + last; }

int DecodeSplits(const PagedAttentionArgs& a, int n) {
  const int end = EndKey(a, n, a.rows.count(n));
  return (end + kDecodeKeys - 1) / kDecodeKeys - FirstKey(a, n, 0) / kDecodeKeys;
}

void PlanDecode(const PagedAttentionArgs& a, int n, Workspace& workspace, Plan& plan) {
  const int G = a.H / a.kv.Hkv, begin = FirstKey(a, n, 0), end = EndKey(a, n, a.rows.count(n));
  const int splits = DecodeSplits(a, n), first_split = begin / kDecodeKeys;
  const int64_t stride = int64_t{a.rows.count(n)} * G * PartialRow(a.kv.D);
  for (int head = 0; head < a.kv.Hkv; ++head) {
    float* partials = workspace.Take<float>(splits * stride);
    plan.merges[plan.num_merges++] = {n, head, splits, partials, stride};
    for (int i = 0; i < splits; ++i) {
      const int from = std::max(begin, (first_split + i) * kDecodeKeys);
      const int to = std::min(end, (first_split + i + 1) * kDecodeKeys);
      plan.tasks[plan.num_tasks++] = {
          int64_t{to - from} * a.rows.count(n) * G, n, head, from, to, partials + i * stride};
    }
  }
  plan.decode = true;
}

void PlanPrefill(const PagedAttentionArgs& a, int n, Plan& plan) {
  const int G = a.H / a.kv.Hkv, positions = PrefillPositions(a);
  for (int first = 0; first < a.rows.count(n); first += positions) {
    const int last = std::min(first + positions, a.rows.count(n));
    const int64_t keys = EndKey(a, n, last) - FirstKey(a, n, first);
    for (int head = 0; head < a.kv.Hkv; ++head)
      plan.tasks[plan.num_tasks++] = {keys * (last - first) * G, n, head, first, last, nullptr};
  }
  plan.prefill = true;
}

Plan MakePlan(const PagedAttentionArgs& a, Workspace& workspace) {
  int64_t tasks = 0, merges = 0;
  for (int n = 0; n < a.rows.N; ++n) {
    if (a.rows.count(n) == 0) continue;
    if (IsDecode(a, n)) {
      tasks += int64_t{a.kv.Hkv} * DecodeSplits(a, n);
      merges += a.kv.Hkv;
    } else {
      const int positions = PrefillPositions(a);
      tasks += int64_t{a.kv.Hkv} * ((a.rows.count(n) + positions - 1) / positions);
    }
  }
  Plan plan;
  plan.tasks = workspace.Take<Task>(tasks);
  plan.merges = workspace.Take<Merge>(merges);
  for (int n = 0; n < a.rows.N; ++n) {
    if (a.rows.count(n) == 0) continue;
    if (IsDecode(a, n))
      PlanDecode(a, n, workspace, plan);
    else
      PlanPrefill(a, n, plan);
  }
  DSLA_CHECK(plan.num_tasks == tasks && plan.num_merges == merges);
  // Largest first, so that no thread is left alone with a long task at the end. Among equals the
  // plan's own order, which follows the cache.
  std::sort(plan.tasks, plan.tasks + tasks, [](const Task& x, const Task& y) {
    if (x.cost != y.cost) return x.cost > y.cost;
    if (x.n != y.n) return x.n < y.n;
    return x.head != y.head ? x.head < y.head : x.begin < y.begin;
  });
  return plan;
}

}  // namespace

void PagedAttentionCpu(const ExecContext& ctx, const PagedAttentionArgs& args) {
  DSLA_CHECK(ctx.workspace != nullptr);
  DSLA_CHECK(args.kv.Hkv > 0 && args.H > 0 && args.H % args.kv.Hkv == 0);
  DSLA_CHECK(args.kv.D > 0 && args.kv.D % 8 == 0 && args.kv.D <= kMaxHeadDim &&
             args.kv.page_size > 0);
  const Workspace::Scope scope(*ctx.workspace);
  const Plan plan = MakePlan(args, *ctx.workspace);
  const int64_t scratch_size = RoundUp64(
      std::max(plan.prefill ? PrefillScratch(args) : 0, plan.decode ? DecodeScratch(args) : 0), 16);
  float* scratch = ctx.workspace->Take<float>(scratch_size * std::max(ctx.threads, 1));
  ParallelFor(ctx, plan.num_tasks, [&](int64_t i, int thread) {
    const Task& task = plan.tasks[i];
    float* mine = scratch + thread * scratch_size;
    if (task.partial) HWY_DYNAMIC_DISPATCH(RunDecode)
    (args, task.n, task.head, task.begin, task.end, task.partial, mine);
    else HWY_DYNAMIC_DISPATCH(RunPrefill)(args, task.n, task.head, task.begin, task.end, mine);
  });
  ParallelRanges(ctx, plan.num_merges, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Merge& m = plan.merges[i];
      HWY_DYNAMIC_DISPATCH(RunMerge)(args, m.n, m.head, m.partials, m.splits, m.split_stride);
    }
  });
}

}  // namespace dsla
#endif  // HWY_ONCE
