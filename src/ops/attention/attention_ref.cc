#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/half.h"
#include "ops/attention/attention.h"
#include "ops/attention/paging.h"

namespace dsla {
namespace {

// Row i of sequence n, query head h.
template <typename T>
void AttendRow(const PagedAttentionArgs& a, int n, int i, int h) {
  const int D = a.kv.D, kv_head = h / (a.H / a.kv.Hkv);
  const int64_t row = a.rows.row_start[n] + i;
  const float* q = a.q + row * a.q_stride + static_cast<int64_t>(h) * D;
  const int t = a.rows.pos[n] + i, first = FirstVisibleKey(t, a.sliding_window);

  std::vector<double> score(static_cast<size_t>(t - first + 1));
  double max = -std::numeric_limits<double>::infinity();
  for (int s = first; s <= t; ++s) {
    const T* k = KeyRow<T>(a.kv, a.tables, n, kv_head, s);
    double dot = 0;
    for (int d = 0; d < D; ++d) dot += double{q[d]} * double{ToFloat(k[d])};
    score[static_cast<size_t>(s - first)] = dot * double{a.scale};
    max = std::max(max, dot * double{a.scale});
  }
  double sum = 0;
  std::vector<double> out(static_cast<size_t>(D), 0.0);
  for (int s = first; s <= t; ++s) {
    const T* v = ValueRow<T>(a.kv, a.tables, n, kv_head, s);
    const double p = std::exp(score[static_cast<size_t>(s - first)] - max);
    sum += p;
    for (int d = 0; d < D; ++d) out[static_cast<size_t>(d)] += p * double{ToFloat(v[d])};
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
      for (int h = 0; h < args.H; ++h) {
        if (args.kv.dtype == DType::kBF16)
          AttendRow<bf16>(args, n, i, h);
        else
          AttendRow<float>(args, n, i, h);
      }
    }
  }
}

}  // namespace dsla
