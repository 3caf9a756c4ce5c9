#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/kv_write.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "hwy/highway.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"
#include "ops/simd/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dsla {
namespace HWY_NAMESPACE {

template <typename T>
void WriteRow(const KvWriteArgs& a, int n, int s, int64_t row) {
  const auto D = static_cast<size_t>(a.kv.D);
  for (int head = 0; head < a.kv.Hkv; ++head) {
    const int64_t offset = static_cast<int64_t>(head) * a.kv.D;
    ConvertRow(a.k + row * a.k_stride + offset, KeyRow<T>(a.kv, a.tables, n, head, s), D);
    ConvertRow(a.v + row * a.v_stride + offset, ValueRow<T>(a.kv, a.tables, n, head, s), D);
  }
}

// Rows [begin, end) of the batch.
void WriteRows(const KvWriteArgs& a, int64_t begin, int64_t end) {
  int n = 0;
  for (int64_t row = begin; row < end; ++row) {
    while (row >= a.rows.row_start[n + 1]) ++n;
    const int s = a.rows.pos[n] + static_cast<int>(row - a.rows.row_start[n]);
    if (a.kv.dtype == DType::kBF16)
      WriteRow<bf16>(a, n, s, row);
    else
      WriteRow<float>(a, n, s, row);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace dsla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(WriteRows);

void KvWriteCpu(const ExecContext& ctx, const KvWriteArgs& args) {
  if (args.rows.N == 0) return;
  // Below 64 rows a thread's start costs more than the copy.
  ParallelRanges(ctx, args.rows.row_start[args.rows.N], 64, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(WriteRows)(args, begin, end);
  });
}

}  // namespace dsla
#endif  // HWY_ONCE
