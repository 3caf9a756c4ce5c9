#include "ops/attention/plan.h"

#include <algorithm>

#include "base/check.h"
#include "ops/attention/paging.h"

namespace dsla {
namespace {

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

// A plan that is being made.
struct Draft {
  const PagedAttentionArgs& args;
  AttentionTask* tasks;
  AttentionMerge* merges;
  PagedAttentionPlan plan;

  void AddDecode(int n);
  void AddPrefill(int n);
};

void Draft::AddDecode(int n) {
  const PagedAttentionArgs& a = args;
  const int G = a.H / a.kv.Hkv, begin = FirstKey(a, n, 0), end = EndKey(a, n, a.rows.count(n));
  const int splits = DecodeSplits(a, n), first_split = begin / kDecodeKeys;
  const int64_t stride = int64_t{a.rows.count(n)} * G * PartialRow(a.kv.D);
  for (int head = 0; head < a.kv.Hkv; ++head) {
    merges[plan.num_merges++] = {n, head, splits, plan.partials, stride};
    for (int i = 0; i < splits; ++i, plan.partials += stride) {
      const int from = std::max(begin, (first_split + i) * kDecodeKeys);
      const int to = std::min(end, (first_split + i + 1) * kDecodeKeys);
      tasks[plan.num_tasks++] = {
          int64_t{to - from} * a.rows.count(n) * G, n, head, from, to, plan.partials};
    }
  }
  plan.decode = true;
}

void Draft::AddPrefill(int n) {
  const PagedAttentionArgs& a = args;
  const int G = a.H / a.kv.Hkv, positions = PrefillPositions(a);
  for (int first = 0; first < a.rows.count(n); first += positions) {
    const int last = std::min(first + positions, a.rows.count(n));
    const int64_t keys = EndKey(a, n, last) - FirstKey(a, n, first);
    for (int head = 0; head < a.kv.Hkv; ++head)
      tasks[plan.num_tasks++] = {keys * (last - first) * G, n, head, first, last, -1};
  }
  plan.prefill = true;
}

}  // namespace

PagedAttentionPlan PlanPagedAttention(const PagedAttentionArgs& args, Workspace& workspace) {
  const RaggedRows& rows = args.rows;
  int64_t num_tasks = 0, num_merges = 0;
  for (int n = 0; n < rows.N; ++n) {
    if (rows.count(n) == 0) continue;
    if (IsDecode(args, n)) {
      num_tasks += int64_t{args.kv.Hkv} * DecodeSplits(args, n);
      num_merges += args.kv.Hkv;
    } else {
      const int positions = PrefillPositions(args);
      num_tasks += int64_t{args.kv.Hkv} * ((rows.count(n) + positions - 1) / positions);
    }
  }
  Draft draft{.args = args,
              .tasks = workspace.Take<AttentionTask>(num_tasks),
              .merges = workspace.Take<AttentionMerge>(num_merges),
              .plan = {}};
  for (int n = 0; n < rows.N; ++n) {
    if (rows.count(n) == 0) continue;
    if (IsDecode(args, n))
      draft.AddDecode(n);
    else
      draft.AddPrefill(n);
  }
  DSLA_CHECK(draft.plan.num_tasks == num_tasks && draft.plan.num_merges == num_merges);
  // Largest first, so that no thread is left alone with a long task at the end. Among equals the
  // plan's own order, which follows the cache.
  std::sort(draft.tasks, draft.tasks + num_tasks,
            [](const AttentionTask& x, const AttentionTask& y) {
              if (x.cost != y.cost) return x.cost > y.cost;
              if (x.n != y.n) return x.n < y.n;
              return x.head != y.head ? x.head < y.head : x.begin < y.begin;
            });
  draft.plan.tasks = draft.tasks;
  draft.plan.merges = draft.merges;
  return draft.plan;
}

}  // namespace dsla
