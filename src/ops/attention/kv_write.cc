#include <algorithm>
#include <cmath>

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

// One row to integers with its scale: the largest becomes 127. A NaN or an infinity makes the
// scale, and with it the row, NaN.
void QuantizeRow(const float* from, int8_t* to, float* scale, int D) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  auto largest = hn::Zero(d), not_finite = hn::Zero(d);
  int i = 0;
  for (; i + lanes <= D; i += lanes) {
    const auto x = hn::LoadU(d, from + i);
    largest = hn::Max(largest, hn::Abs(x));
    not_finite = hn::MulAdd(x, hn::Zero(d), not_finite);
  }
  float most = hn::GetLane(hn::MaxOfLanes(d, largest));
  float nan = hn::GetLane(hn::SumOfLanes(d, not_finite));
  for (int j = i; j < D; ++j) {
    most = std::max(most, std::abs(from[j]));
    nan += from[j] * 0.f;
  }
  *scale = most / 127.f + nan;
  const float inverse = most > 1e-30f && nan == 0.f ? 127.f / most : 0.f;
  const auto by = hn::Set(d, inverse);
  for (i = 0; i + lanes <= D && inverse > 0; i += lanes) {
    const auto q = hn::NearestInt(hn::Mul(by, hn::LoadU(d, from + i)));
    hn::StoreU(hn::DemoteTo(d8, q), d8, to + i);
  }
  for (; i < D; ++i)
    to[i] = inverse > 0 ? static_cast<int8_t>(std::nearbyint(from[i] * inverse)) : int8_t{0};
}

void WriteQuantizedRow(const KvWriteArgs& a, int n, int s, int64_t row) {
  for (int head = 0; head < a.kv.Hkv; ++head) {
    const int64_t offset = static_cast<int64_t>(head) * a.kv.D;
    QuantizeRow(a.k + row * a.k_stride + offset, KeyRow<int8_t>(a.kv, a.tables, n, head, s),
                RowScale(a.kv, a.kv.k, a.tables, n, head, s), a.kv.D);
    QuantizeRow(a.v + row * a.v_stride + offset, ValueRow<int8_t>(a.kv, a.tables, n, head, s),
                RowScale(a.kv, a.kv.v, a.tables, n, head, s), a.kv.D);
  }
}

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
    switch (a.kv.dtype) {
      case DType::kF32:
        WriteRow<float>(a, n, s, row);
        break;
      case DType::kBF16:
        WriteRow<bf16>(a, n, s, row);
        break;
      case DType::kI8:
        WriteQuantizedRow(a, n, s, row);
        break;
    }
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
