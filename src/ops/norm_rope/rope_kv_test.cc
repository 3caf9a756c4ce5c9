// RopeKvCpu against the fp64 reference on every target of this CPU.
#include "ops/norm_rope/rope_kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "ops/attention/paging.h"
#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int H = 9, Hkv = 3, D = 64;
  DType cache = DType::kBF16, rows = DType::kBF16;
  bool norm = false, turn = true;
  int page_size = 16;
};

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(20250102 + seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

// Angles of 0 leave every number as it is, so that nothing but the rounding to the cache is left.
RopeTable Table(const Case& c) {
  std::vector<double> frequencies(static_cast<size_t>(c.D / 2), 0.0);
  for (int i = 0; c.turn && i < c.D / 2; ++i)
    frequencies[static_cast<size_t>(i)] = std::pow(1e4, -2. * i / c.D);
  return RopeTable(frequencies, 300);
}

// Paged and other rows of several sequences, with what they are written to: all NaN at first, pages
// in shuffled order.
struct Memory {
  std::vector<float> qkv;
  std::vector<std::byte> key_pages, value_pages, k, v;
};
class Batch {
 public:
  explicit Batch(const Case& c) : c_(c), table_(Table(c)) {
    const std::vector<std::pair<int, int>> sequences = {{5, 70}, {40, 0}, {15, 2}, {0, 90}, {9, 1}};
    for (const auto& [cached, rows] : sequences) {
      pos_.push_back(cached);
      row_start_.push_back(row_start_.back() + rows);
      page_start_.push_back(page_start_.back() + (cached + rows + c.page_size - 1) / c.page_size);
      for (int i = 0; i < rows; ++i) positions_.push_back(cached + i);
    }
    for (int i = 0; i < 40; ++i) positions_.push_back(i * 7 % 300);  // DSLA rows
    pages_.resize(static_cast<size_t>(page_start_.back() + 3));
    std::iota(pages_.begin(), pages_.end(), 0);
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(3));
    kv_ = {.page_size = c.page_size, .Hkv = c.Hkv, .D = c.D, .dtype = c.cache};
    kv_.page_stride = c.Hkv * kv_.HeadStride() + 8;
    norm_ = Random(2 * c.D, 2);
  }
  int64_t T() const { return static_cast<int64_t>(positions_.size()); }
  int64_t paged() const { return row_start_.back(); }
  int64_t stride() const { return int64_t{c_.H + 2 * c_.Hkv} * c_.D + 5; }

  Memory Fresh() const {
    Memory m;
    m.qkv = Random(T() * stride(), 1);
    const size_t pages = pages_.size() * static_cast<size_t>(kv_.page_stride * SizeOf(c_.cache)),
                 rows = static_cast<size_t>(T() * c_.Hkv * c_.D * SizeOf(c_.rows));
    for (auto* bytes : {&m.key_pages, &m.value_pages}) bytes->assign(pages, std::byte{0xff});
    for (auto* bytes : {&m.k, &m.v}) bytes->assign(rows, std::byte{0xff});
    return m;
  }
  RopeKvArgs Args(Memory& m) const {
    RopeKvArgs a{.qkv = m.qkv.data(),
                 .stride = stride(),
                 .T = T(),
                 .H = c_.H,
                 .Hkv = c_.Hkv,
                 .positions = positions_.data(),
                 .table = &table_,
                 .norm_eps = 1e-6f,
                 .paged = {static_cast<int>(pos_.size()), row_start_.data(), pos_.data()},
                 .tables = {page_start_.data(), pages_.data()},
                 .kv = kv_,
                 .row_type = c_.rows,
                 .k = m.k.data(),
                 .v = m.v.data()};
    a.kv.k = m.key_pages.data();
    a.kv.v = m.value_pages.data();
    if (c_.norm) a.q_norm = norm_.data(), a.k_norm = norm_.data() + c_.D;
    return a;
  }

  // The keys of a call, as floats: of each row [Hkv, D].
  std::vector<float> Keys(Memory& m) const {
    const RopeKvArgs a = Args(m);
    std::vector<float> keys;
    int n = 0;
    for (int64_t t = 0; t < T(); ++t) {
      while (t < paged() && t >= a.paged.row_start[n + 1]) ++n;
      for (int h = 0; h < c_.Hkv; ++h) {
        for (int d = 0; d < c_.D; ++d) {
          if (t >= paged()) {
            keys.push_back(Element(c_.rows, a.k, (t * c_.Hkv + h) * c_.D + d));
            continue;
          }
          const int s = a.positions[t];
          const float x = Element(c_.cache, a.kv.k, RowOffset(a.kv, a.tables, n, h, s) + d);
          keys.push_back(c_.cache == DType::kI8 ? x * *RowScale(a.kv, a.kv.k, a.tables, n, h, s)
                                                : x);
        }
      }
    }
    return keys;
  }

 private:
  static float Element(DType type, const void* base, int64_t at) {
    if (type == DType::kF32) return static_cast<const float*>(base)[at];
    if (type == DType::kBF16) return ToFloat(static_cast<const bf16*>(base)[at]);
    return static_cast<const int8_t*>(base)[at];
  }

  const Case c_;
  RopeTable table_;
  PagedKvView kv_;
  std::vector<int32_t> pos_, row_start_{0}, page_start_{0}, pages_, positions_;
  std::vector<float> norm_;
};

// A step of a type, by which numbers that lie next to a tie may differ; an int8 row's is a 127th of
// its largest, which is below five deviations.
double StepOf(DType type) {
  return type == DType::kF32 ? 0 : type == DType::kBF16 ? 0x1p-7 : 5. / 127;
}

TEST(RopeKvTest, EqualsReference) {
  constexpr int kDims[] = {64, 8, 72, 128};
  constexpr DType kCaches[] = {DType::kBF16, DType::kF32, DType::kI8};
  ForEachTarget([&] {
    for (int i = 0; i < 24; ++i) {
      Case c;
      c.D = kDims[i % 4];
      c.cache = kCaches[i % 3];
      c.rows = c.cache == DType::kF32 ? DType::kF32 : DType::kBF16;
      c.norm = i / 4 % 2 == 1;
      c.turn = i / 8 % 3 != 0;
      SCOPED_TRACE(testing::Message() << "D " << c.D << " " << Name(c.cache)
                                      << (c.norm ? ", norm" : "") << (c.turn ? "" : ", no turn"));
      const Batch batch(c);
      Memory got = batch.Fresh(), want = batch.Fresh();
      Workspace workspace;
      RopeKvCpu({3, &workspace}, batch.Args(got));
      RopeKvRef(batch.Args(want));
      const Tolerance exact = c.norm ? SumTolerance(c.D) : RoundingTolerance(4);
      ExpectClose(got.qkv, want.qkv, exact);  // queries; keys and values as they were
      const std::vector<float> keys = batch.Keys(got), want_keys = batch.Keys(want);
      ExpectClose(keys, want_keys, {exact.relative + std::max(StepOf(c.cache), StepOf(c.rows))});
      EXPECT_EQ(got.value_pages, want.value_pages);
      EXPECT_EQ(got.v, want.v);
      if (c.norm || c.turn) continue;
      // To the bit, and nothing beside the rows.
      EXPECT_EQ(got.qkv, want.qkv);
      EXPECT_EQ(got.key_pages, want.key_pages);
      EXPECT_EQ(got.k, want.k);
    }
  });
}

// The bits that NormRope leaves, rounded; on any number of threads.
TEST(RopeKvTest, TurnsAsNormRope) {
  const Case c{.cache = DType::kF32, .rows = DType::kF32, .norm = true};
  const Batch batch(c);
  Memory one = batch.Fresh(), two = batch.Fresh(), plain = batch.Fresh();
  Workspace workspace;
  RopeKvCpu({1, &workspace}, batch.Args(one));
  RopeKvCpu({2, &workspace}, batch.Args(two));
  EXPECT_EQ(one.qkv, two.qkv);
  EXPECT_EQ(one.key_pages, two.key_pages);
  EXPECT_EQ(one.k, two.k);
  const RopeKvArgs a = batch.Args(plain);
  RopeArgs rope{.x = a.qkv,
                .stride = a.stride,
                .T = a.T,
                .heads = a.H,
                .positions = a.positions,
                .table = a.table,
                .norm_weight = a.q_norm,
                .norm_eps = a.norm_eps};
  NormRope({2, &workspace}, rope);
  EXPECT_EQ(plain.qkv, one.qkv);
  rope.x = a.qkv + c.H * c.D;
  rope.heads = c.Hkv;
  rope.norm_weight = a.k_norm;
  NormRope({2, &workspace}, rope);
  std::vector<float> keys;
  for (int64_t t = 0; t < a.T; ++t)
    keys.insert(keys.end(), rope.x + t * a.stride, rope.x + t * a.stride + c.Hkv * c.D);
  EXPECT_EQ(batch.Keys(one), keys);
}

// What has no integer leaves a NaN in what attends to it, not a number.
TEST(RopeKvTest, ARowThatIsNotFiniteIsNaNInAnInt8Cache) {
  ForEachTarget([] {
    const Case c{.cache = DType::kI8, .turn = false};
    const Batch batch(c);
    for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
      Memory m = batch.Fresh();
      const RopeKvArgs a = batch.Args(m);
      m.qkv[static_cast<size_t>((c.H + c.Hkv) * c.D + 3)] = bad;  // a value of the first row
      Workspace workspace;
      RopeKvCpu({1, &workspace}, a);
      EXPECT_TRUE(std::isnan(*RowScale(a.kv, a.kv.v, a.tables, 0, 0, a.positions[0])));
      EXPECT_FALSE(std::isnan(*RowScale(a.kv, a.kv.k, a.tables, 0, 0, a.positions[0])));
    }
  });
}

TEST(RopeKvDeathTest, PositionBeyondTheTable) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Batch batch(Case{});
  Memory m = batch.Fresh();
  RopeKvArgs a = batch.Args(m);
  const int32_t position = 300;
  a.positions = &position;
  a.T = 1;
  Workspace workspace;
  EXPECT_DEATH(RopeKvCpu({1, &workspace}, a), "check failed");
}

}  // namespace
}  // namespace dsla
