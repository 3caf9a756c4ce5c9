#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/half.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"

namespace dsla {
namespace {

// K or V of one token.
std::vector<double> ReadRow(const PagedAttentionArgs& a, void* base, int n, int head, int s) {
  std::vector<double> row(static_cast<size_t>(a.kv.D));
  const int64_t at = RowOffset(a.kv, a.tables, n, head, s);
  for (size_t d = 0; d < row.size(); ++d) {
    const auto i = at + static_cast<int64_t>(d);
    switch (a.kv.dtype) {
      case DType::kF32:
        row[d] = static_cast<const float*>(base)[i];
        break;
      case DType::kBF16:
        row[d] = ToFloat(static_cast<const bf16*>(base)[i]);
        break;
      case DType::kI8:
        row[d] = static_cast<double>(static_cast<const int8_t*>(base)[i]) *
                 *RowScale(a.kv, base, a.tables, n, head, s);
        break;
    }
  }
  return row;
}

// Row i of sequence n, query head h.
void AttendRow(const PagedAttentionArgs& a, int n, int i, int h) {
  const int D = a.kv.D, kv_head = h / (a.H / a.kv.Hkv);
  const int64_t row = a.rows.row_start[n] + i;
  const float* q = a.q + row * a.q_stride + static_cast<int64_t>(h) * D;
  const int t = a.rows.pos[n] + i, first = FirstVisibleKey(t, a.sliding_window);

  std::vector<double> score(static_cast<size_t>(t - first + 1));
  double max = -std::numeric_limits<double>::infinity();
  for (int s = first; s <= t; ++s) {
    const std::vector<double> k = ReadRow(a, a.kv.k, n, kv_head, s);
    double dot = 0;
    for (int d = 0; d < D; ++d) dot += double{q[d]} * k[static_cast<size_t>(d)];
    score[static_cast<size_t>(s - first)] = dot * double{a.scale};
    max = std::max(max, dot * double{a.scale});
  }
  double sum = 0;
  std::vector<double> out(static_cast<size_t>(D), 0.0);
  for (int s = first; s <= t; ++s) {
    const std::vector<double> v = ReadRow(a, a.kv.v, n, kv_head, s);
    const double p = std::exp(score[static_cast<size_t>(s - first)] - max);
    sum += p;
    for (int d = 0; d < D; ++d) out[static_cast<size_t>(d)] += p * v[static_cast<size_t>(d)];
  }
  for (int d = 0; d < D; ++d)
    a.out[(row * a.H + h) * D + d] = static_cast<float>(out[static_cast<size_t>(d)] / sum);
  if (a.lse) a.lse[row * a.H + h] = static_cast<float>(max + std::log(sum));
}

}  // namespace

void PagedAttentionRef(const PagedAttentionArgs& args) {
  DSLA_CHECK(args.kv.Hkv > 0 && args.H % args.kv.Hkv == 0);
  for (int n = 0; n < args.rows.N; ++n) {
    for (int i = 0; i < args.rows.count(n); ++i) {
      for (int h = 0; h < args.H; ++h) AttendRow(args, n, i, h);
    }
  }
}

}  // namespace dsla
