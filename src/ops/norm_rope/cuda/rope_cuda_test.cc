// RopeKv against the fp64 reference. Pages are NaN before a call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "ops/norm_rope/cuda/norm_rope_cuda.h"
#include "ops/norm_rope/cuda/norm_rope_cuda_testing.cuh"
#include "ops/norm_rope/norm_rope.h"

namespace dsla {
namespace {

constexpr int kPositions = 1024;
constexpr float kEps = 1e-6f;
constexpr uint16_t kPoison = 0xFFFF;

struct Case {
  const char* name;
  int H, Hkv, D, page;
  bool bias, norm;
};

// T rows: runs of consecutive positions of sequences, padding rows between them; the first
// `softmax_rows` also go to pages. Row t is the same for every T.
struct Input {
  Input(const Case& c, int rows, int softmax)
      : shape(c),
        T(rows),
        softmax_rows(softmax),
        heads(c.H + 2 * c.Hkv),
        qkv(RandomExact(int64_t{rows} * heads * c.D, 1)),
        bias(Random(int64_t{heads} * c.D, 2)),
        q_norm(Random(c.D, 3)),
        k_norm(Random(c.D, 4)),
        page_start{0} {
    for (int t = 0; t < T; ++t) {
      const int n = t / kRun, start = n * 131 % 700;
      positions.push_back(t % 10 == 6 ? -1 - t : start + t % kRun);
      sequence.push_back(n);
    }
    // Tables of sequences have room for a few tokens more than they hold.
    for (int n = 0; n <= T / kRun; ++n)
      page_start.push_back(page_start.back() + (n * 131 % 700 + kRun + 2 + c.page) / c.page);
    for (int i = 0; i < page_start.back(); ++i) pages.push_back(i);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(5));
    for (int d = 0; d < c.D / 2; ++d) frequencies.push_back(std::pow(1e4, -2. * d / c.D));
    table = RopeTable(frequencies, kPositions);
  }

  static constexpr int kRun = 37;
  Case shape;
  int T, softmax_rows, heads;
  std::vector<float> qkv, bias, q_norm, k_norm;
  std::vector<int32_t> page_start, pages, positions, sequence;
  std::vector<double> frequencies;
  RopeTable table;
};

struct Result {
  std::vector<uint16_t> qkv, k, v;
};

Result RunRopeKv(const Input& in, int T) {
  const Case& c = in.shape;
  const int64_t angles = int64_t{kPositions} * c.D / 2;
  // Another layer's part lies between the pages of this one.
  const int64_t stride = 2 * int64_t{c.Hkv} * c.page * c.D;
  const DeviceBytes qkv(Bits(in.qkv)), bias(in.bias), q_norm(in.q_norm), k_norm(in.k_norm),
      cos(std::span<const float>(in.table.cos(), static_cast<size_t>(angles))),
      sin(std::span<const float>(in.table.sin(), static_cast<size_t>(angles))),
      positions(in.positions), sequence(in.sequence), page_start(in.page_start), pages(in.pages),
      softmax_rows(std::vector<int32_t>{in.softmax_rows}),
      k(stride * static_cast<int64_t>(in.pages.size()) * 2), v(k.bytes());
  cuda::RopeKvArgs args;
  args.qkv = qkv.as<void>();
  if (c.bias) args.bias = bias.as<float>();
  if (c.norm) args.q_norm = q_norm.as<float>(), args.k_norm = k_norm.as<float>();
  args.eps = kEps;
  args.rope_cos = cos.as<float>();
  args.rope_sin = sin.as<float>();
  args.positions = positions.as<int32_t>();
  args.T = T;
  args.H = c.H;
  args.Hkv = c.Hkv;
  args.D = c.D;
  args.softmax_rows = softmax_rows.as<int32_t>();
  args.sequence = sequence.as<int32_t>();
  args.tables = {page_start.as<int32_t>(), pages.as<int32_t>()};
  args.kv = {k.as<void>(), v.as<void>(), stride, c.page, c.Hkv, c.D, DType::kBF16};
  CheckCuda(cuda::RopeKv(args, nullptr));
  return {ReadBits(qkv), ReadBits(k), ReadBits(v)};
}

// What rows hold afterwards, fp64 rounded to fp32; rows of padding as they were.
std::vector<float> Reference(const Input& in) {
  const Case& c = in.shape;
  std::vector<float> want = in.qkv;
  const int64_t width = int64_t{in.heads} * c.D;
  for (int t = 0; t < in.T; ++t) {
    if (in.positions[static_cast<size_t>(t)] < 0) continue;
    float* row = want.data() + t * width;
    if (c.bias)
      for (int64_t i = 0; i < width; ++i) row[i] += in.bias[static_cast<size_t>(i)];
    RopeArgs args{.x = row,
                  .stride = width,
                  .T = 1,
                  .heads = c.H,
                  .positions = &in.positions[static_cast<size_t>(t)],
                  .table = &in.table,
                  .norm_weight = c.norm ? in.q_norm.data() : nullptr,
                  .norm_eps = kEps};
    NormRopeRef(args);
    args.x += c.H * c.D;
    args.heads = c.Hkv;
    if (c.norm) args.norm_weight = in.k_norm.data();
    NormRopeRef(args);
  }
  return want;
}

// Pages hold exactly what the rows of the result hold, and nothing else was written.
void ExpectPages(const Input& in, const Result& got) {
  const Case& c = in.shape;
  std::vector<uint16_t> k(got.k.size(), kPoison), v = k;
  for (int t = 0; t < std::min(in.T, in.softmax_rows); ++t) {
    const int position = in.positions[static_cast<size_t>(t)];
    if (position < 0) continue;
    const int first = in.page_start[static_cast<size_t>(in.sequence[static_cast<size_t>(t)])];
    const int64_t page = in.pages[static_cast<size_t>(first + position / c.page)];
    const int64_t row = int64_t{t} * in.heads * c.D + c.H * c.D;
    for (int h = 0; h < c.Hkv; ++h) {
      const int64_t to =
          page * 2 * c.Hkv * c.page * c.D + (int64_t{h} * c.page + position % c.page) * c.D;
      std::copy_n(got.qkv.begin() + row + h * c.D, c.D, k.begin() + to);
      std::copy_n(got.qkv.begin() + row + (c.Hkv + h) * c.D, c.D, v.begin() + to);
    }
  }
  EXPECT_TRUE(got.k == k) << "pages of K differ";
  EXPECT_TRUE(got.v == v) << "pages of V differ";
}

class RopeKvTest : public GpuTest, public ::testing::WithParamInterface<Case> {};

TEST_P(RopeKvTest, EqualsReference) {
  const Case& c = GetParam();
  for (const int T : {1, 7, 64, 300})
    for (const int softmax : {0, T / 2, T}) {
      SCOPED_TRACE(testing::Message() << "T " << T << ", to pages " << softmax);
      const Input in(c, T, softmax);
      const Result got = RunRopeKv(in, T);
      const std::vector<float> want = Reference(in);
      // Without a norm 4 operations on values that stay within 4 rms.
      const Tolerance fp32 = c.norm ? SumTolerance(c.D) : RoundingTolerance(16);
      const double u = UnitRoundoff(DType::kBF16);
      ExpectClose(Floats(got.qkv), want, {u * (1 + fp32.relative) + fp32.relative});
      // Rows of padding, and V, of which at most one addition is asked, are exact.
      const std::vector<uint16_t> exact = Bits(want);
      const int64_t width = int64_t{in.heads} * c.D, v = int64_t{c.H + c.Hkv} * c.D;
      for (int t = 0; t < T; ++t) {
        const int64_t from = in.positions[static_cast<size_t>(t)] < 0 ? 0 : v;
        EXPECT_TRUE(std::equal(got.qkv.begin() + t * width + from,
                               got.qkv.begin() + (t + 1) * width, exact.begin() + t * width + from))
            << "row " << t;
      }
      ExpectPages(in, got);
      const Result again = RunRopeKv(in, T);
      EXPECT_TRUE(got.qkv == again.qkv && got.k == again.k && got.v == again.v)
          << "two runs differ";
    }
}

// A row does not depend on how many others there are.
TEST_P(RopeKvTest, RowsAreIndependent) {
  const Input in(GetParam(), 300, 300);
  const Result all = RunRopeKv(in, 300), few = RunRopeKv(in, 5);
  const auto row = static_cast<std::ptrdiff_t>(in.heads * GetParam().D);
  EXPECT_TRUE(std::equal(all.qkv.begin(), all.qkv.begin() + 5 * row, few.qkv.begin()));
  const std::vector<uint16_t> rest = Bits(in.qkv);
  EXPECT_TRUE(std::equal(few.qkv.begin() + 5 * row, few.qkv.end(), rest.begin() + 5 * row))
      << "rows beyond T were written";
}

INSTANTIATE_TEST_SUITE_P(Shapes, RopeKvTest,
                         ::testing::Values(Case{"small", 9, 3, 64, 16, false, false},
                                           Case{"small_norm_bias", 9, 3, 64, 64, true, true},
                                           Case{"wide", 32, 8, 128, 64, false, false},
                                           Case{"wide_norm", 32, 8, 128, 16, false, true},
                                           Case{"wide_bias", 7, 1, 128, 64, true, false},
                                           Case{"heads_of_80", 4, 4, 80, 16, true, true},
                                           Case{"heads_of_256", 2, 1, 256, 16, false, true},
                                           Case{"heads_of_20", 4, 2, 20, 16, true, true},
                                           Case{"heads_of_6", 3, 1, 6, 16, false, true}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace dsla
