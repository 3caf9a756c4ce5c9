// PagedAttentionCpu against the fp64 reference on every target of this CPU, and its promises: a
// row's result depends neither on the batch, nor on the cut of its prompt, nor on the threads.
#include "ops/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "base/half.h"
#include "ops/attention/cache_row_ref.h"
#include "ops/attention/paging.h"
#include "ops/attention/plan.h"
#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int H = 9, Hkv = 3, D = 64;
  int page_size = 16;
  DType dtype = DType::kBF16;
  int window = 0;
  float score_size = 1;  // standard deviation of the scores

  friend std::ostream& operator<<(std::ostream& out, const Shape& s) {
    return out << "H " << s.H << " Hkv " << s.Hkv << " D " << s.D << " page " << s.page_size << " "
               << Name(s.dtype) << " window " << s.window << " scores " << s.score_size;
  }
};

// Scores err by a sum of D terms at their own size, which is a relative error of the weights; then
// come the sums over the keys.
Tolerance AttentionTolerance(const Shape& shape, int keys) {
  return {SumTolerance(keys).relative + shape.score_size * SumTolerance(shape.D).relative};
}

struct Sequence {
  int cached, rows;
  int tokens() const { return cached + rows; }
};

// New rows [first, last) of one sequence in a call.
struct Segment {
  int n, first, last;
};

struct Output {
  std::vector<float> out, lse;  // of all rows, in the order of the sequences

  bool SameBits(const Output& other) const {
    return out.size() == other.out.size() && lse.size() == other.lse.size() &&
           std::memcmp(out.data(), other.out.data(), out.size() * sizeof(float)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

// A cache with pages in shuffled order, in which everything but the given tokens is NaN.
class Cache {
 public:
  Cache(const Shape& shape, int pages) {
    kv_.page_size = shape.page_size;
    kv_.Hkv = shape.Hkv;
    kv_.D = shape.D;
    kv_.dtype = shape.dtype;
    kv_.page_stride = shape.Hkv * kv_.HeadStride() + 8;  // pages need not touch
    // In every type all ones are a NaN, in int8 that of the scale.
    k_.assign(static_cast<size_t>(pages * kv_.page_stride * SizeOf(shape.dtype)), std::byte{0xff});
    v_ = k_;
    kv_.k = k_.data();
    kv_.v = v_.data();
  }
  const PagedKvView& view() const { return kv_; }

  // k and v: [Hkv, D]
  void Put(const PageTables& tables, int n, int s, const float* k, const float* v) {
    for (int h = 0; h < kv_.Hkv; ++h) {
      PutRow(kv_.k, tables, n, h, s, k + h * kv_.D);
      PutRow(kv_.v, tables, n, h, s, v + h * kv_.D);
    }
  }

 private:
  void PutRow(void* base, const PageTables& tables, int n, int h, int s, const float* x) {
    float* const scale = kv_.dtype == DType::kI8 ? RowScale(kv_, base, tables, n, h, s) : nullptr;
    PutCacheRowRef(kv_.dtype, x, kv_.D, base, RowOffset(kv_, tables, n, h, s), scale);
  }
  PagedKvView kv_;
  std::vector<std::byte> k_, v_;
};

struct Tables {
  std::vector<int32_t> page_start{0}, pages;
  PageTables view() const { return {page_start.data(), pages.data()}; }
};

// Pages for sequences of the given lengths, in shuffled order out of a larger pool.
Tables ShuffledTables(const std::vector<int>& tokens, int page_size, std::mt19937& rng,
                      int* pool_pages) {
  Tables t;
  for (const int n : tokens)
    t.page_start.push_back(t.page_start.back() + (n + page_size - 1) / page_size);
  *pool_pages = t.page_start.back() + 3;
  t.pages.resize(static_cast<size_t>(*pool_pages));
  std::iota(t.pages.begin(), t.pages.end(), 0);
  std::shuffle(t.pages.begin(), t.pages.end(), rng);
  return t;
}

class Batch {
 public:
  Batch(const Shape& shape, std::vector<Sequence> sequences, unsigned seed)
      : shape_(shape), sequences_(std::move(sequences)), rng_(seed) {
    std::normal_distribution<float> normal;
    // q . k / sqrt(D) of normal vectors has standard deviation 1.
    for (const Sequence& s : sequences_) {
      first_row_.push_back(rows_);
      rows_ += s.rows;
      q_.emplace_back(static_cast<size_t>(s.rows * shape.H * shape.D));
      k_.emplace_back(static_cast<size_t>(s.tokens() * shape.Hkv * shape.D));
      v_.emplace_back(k_.back().size());
      for (float& x : q_.back()) x = shape.score_size * normal(rng_);
      for (float& x : k_.back()) x = normal(rng_);
      for (float& x : v_.back()) x = normal(rng_);
    }
  }

  const std::vector<Sequence>& sequences() const { return sequences_; }
  std::vector<Segment> Whole() const {
    std::vector<Segment> all;
    for (int n = 0; n < static_cast<int>(sequences_.size()); ++n)
      all.push_back({n, 0, sequences_[static_cast<size_t>(n)].rows});
    return all;
  }
  Output Empty() const {
    Output o;
    o.out.assign(static_cast<size_t>(rows_ * shape_.H * shape_.D), kNaN);
    o.lse.assign(static_cast<size_t>(rows_ * shape_.H), kNaN);
    return o;
  }

  // One call with these segments in this order, results into `to`. Tokens that come after a
  // segment are not in the cache.
  void Call(const std::vector<Segment>& segments, int threads, Output& to) {
    std::vector<int> tokens;
    for (const Segment& g : segments) tokens.push_back(at(g).cached + g.last);
    int pool = 0;
    const Tables tables = ShuffledTables(tokens, shape_.page_size, rng_, &pool);
    Cache cache(shape_, pool);
    std::vector<int32_t> row_start{0}, pos;
    std::vector<float> q;
    const size_t row = static_cast<size_t>(shape_.H * shape_.D), gap = 8;
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& g = segments[i];
      const auto n = static_cast<size_t>(g.n);
      for (int s = 0; s < tokens[i]; ++s)
        cache.Put(tables.view(), static_cast<int>(i), s, &k_[n][Token(s)], &v_[n][Token(s)]);
      row_start.push_back(row_start.back() + g.last - g.first);
      pos.push_back(at(g).cached + g.first);
      for (int r = g.first; r < g.last; ++r) {
        const float* from = &q_[n][static_cast<size_t>(r) * row];
        q.insert(q.end(), from, from + row);
        q.insert(q.end(), gap, kNaN);
      }
    }
    const auto total = static_cast<size_t>(row_start.back());
    std::vector<float> out(total * row, kNaN), lse(total * static_cast<size_t>(shape_.H), kNaN);
    PagedAttentionArgs a;
    a.rows = {static_cast<int>(segments.size()), row_start.data(), pos.data()};
    a.tables = tables.view();
    a.kv = cache.view();
    a.H = shape_.H;
    a.scale = 1 / std::sqrt(static_cast<float>(shape_.D));
    a.sliding_window = shape_.window;
    a.q = q.data();
    a.q_stride = static_cast<int64_t>(row + gap);
    a.out = out.data();
    a.lse = lse.data();
    if (threads == 0) {
      PagedAttentionRef(a);
    } else {
      PagedAttentionCpu(ExecContext{threads, &workspace_}, a);
      const std::vector<float> with_lse = out;
      a.lse = nullptr;
      PagedAttentionCpu(ExecContext{threads, &workspace_}, a);
      EXPECT_EQ(with_lse, out) << "asking for lse changes the output";
      const Workspace::Scope scope(workspace_);
      const PagedAttentionPlan plan = PlanPagedAttention(a, workspace_);
      a.plan = &plan;
      std::fill(out.begin(), out.end(), kNaN);
      PagedAttentionCpu(ExecContext{threads, &workspace_}, a);
      EXPECT_EQ(with_lse, out) << "planning ahead changes the output";
    }
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& g = segments[i];
      const auto from = static_cast<size_t>(row_start[i]);
      const auto count = static_cast<size_t>(g.last - g.first);
      const auto dest = static_cast<size_t>(first_row_[static_cast<size_t>(g.n)] + g.first);
      std::copy_n(out.data() + from * row, count * row, to.out.data() + dest * row);
      const auto H = static_cast<size_t>(shape_.H);
      std::copy_n(lse.data() + from * H, count * H, to.lse.data() + dest * H);
    }
  }

  Output Reference() {
    Output o = Empty();
    Call(Whole(), 0, o);
    return o;
  }
  Output Cpu(int threads = 1) {
    Output o = Empty();
    Call(Whole(), threads, o);
    return o;
  }
  // All sequences alone and in calls of `rows` rows.
  Output CpuInParts(int rows) {
    Output o = Empty();
    for (const Segment& whole : Whole())
      for (int first = 0; first < whole.last; first += rows)
        Call({{whole.n, first, std::min(first + rows, whole.last)}}, 1, o);
    return o;
  }

  // Sequence by sequence, since the sums' lengths differ.
  void ExpectNear(const Output& got, const Output& want) const {
    for (size_t n = 0; n < sequences_.size(); ++n) {
      SCOPED_TRACE(::testing::Message() << "sequence " << n << ": cached " << sequences_[n].cached
                                        << " rows " << sequences_[n].rows);
      const auto begin = static_cast<size_t>(first_row_[n]);
      const auto count = static_cast<size_t>(sequences_[n].rows);
      const auto H = static_cast<size_t>(shape_.H), row = H * static_cast<size_t>(shape_.D);
      const Tolerance tolerance = AttentionTolerance(shape_, sequences_[n].tokens());
      const auto part = [&](const std::vector<float>& x, size_t width) {
        return std::span<const float>(x).subspan(begin * width, count * width);
      };
      ExpectClose(part(got.out, row), part(want.out, row), tolerance);
      ExpectClose(part(got.lse, H), part(want.lse, H), tolerance);
    }
  }

 private:
  const Sequence& at(const Segment& g) const { return sequences_[static_cast<size_t>(g.n)]; }
  size_t Token(int s) const { return static_cast<size_t>(s * shape_.Hkv * shape_.D); }

  Shape shape_;
  std::vector<Sequence> sequences_;
  std::mt19937 rng_;
  int rows_ = 0;
  std::vector<int> first_row_;
  std::vector<std::vector<float>> q_, k_, v_;  // per sequence
  Workspace workspace_;
};

// Lengths around the cuts at 128 and 256 keys, all forms, an absent one among them.
std::vector<Sequence> RandomSequences(std::mt19937& rng) {
  const auto draw = [&rng](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  std::vector<Sequence> s = {{draw(0, 600), 1},
                             {draw(0, 300), 0},
                             {draw(0, 300), draw(2, kDecodePositions)},
                             {0, draw(1, 130)},
                             {draw(100, 400), draw(5, 90)},
                             {draw(250, 260), 1},
                             {0, 1}};
  std::shuffle(s.begin(), s.end(), rng);
  return s;
}

TEST(PagedAttention, MatchesTheReference) {
  constexpr int kHeads[][2] = {{9, 3}, {4, 4}, {8, 2}, {1, 1}, {10, 2}};
  constexpr int kDims[] = {64, 16, 128, 8, 24, 256};
  constexpr int kPages[] = {16, 1, 64};
  constexpr int kWindows[] = {0, 1, 7, 100, 300};
  constexpr DType kTypes[] = {DType::kBF16, DType::kF32, DType::kI8};
  ForEachTarget([&] {
    for (unsigned i = 0; i < 36; ++i) {
      Shape shape;
      shape.H = kHeads[i % 5][0];
      shape.Hkv = kHeads[i % 5][1];
      shape.D = kDims[i % 6];
      shape.page_size = kPages[(i / 6 + i) % 3];
      shape.dtype = kTypes[i / 2 % 3];
      shape.window = kWindows[(i / 5 + i) % 5];
      std::mt19937 rng(100 + i);
      Batch batch(shape, RandomSequences(rng), 200 + i);
      SCOPED_TRACE(::testing::Message() << "seed " << 100 + i << ": " << shape);
      batch.ExpectNear(batch.Cpu(2), batch.Reference());
      if (::testing::Test::HasFailure()) return;
    }
  });
}

TEST(PagedAttention, LongContextWithLargeScores) {
  for (const int window : {0, 1500}) {
    Shape shape{.H = 3, .Hkv = 1, .window = window, .score_size = 20};  // the largest about +-80
    Batch batch(shape, {{4000, 1}, {3000, 20}}, 31);
    SCOPED_TRACE(::testing::Message() << "seed 31: " << shape);
    batch.ExpectNear(batch.Cpu(2), batch.Reference());
  }
}

TEST(PagedAttention, ThreadsDoNotChangeABit) {
  std::mt19937 rng(41);
  Batch batch(Shape{}, RandomSequences(rng), 42);
  const Output one = batch.Cpu(1);
  EXPECT_TRUE(one.SameBits(batch.Cpu(2)));
  EXPECT_TRUE(one.SameBits(batch.Cpu(3)));
}

TEST(PagedAttention, TheBatchDoesNotChangeABit) {
  ForEachTarget([] {
    std::mt19937 rng(51);
    for (const int window : {0, 90}) {
      Batch batch(Shape{.H = 8, .Hkv = 2, .window = window}, RandomSequences(rng), 52);
      const Output want = batch.Cpu(2);
      std::vector<Segment> order = batch.Whole();
      std::shuffle(order.begin(), order.end(), rng);
      Output permuted = batch.Empty(), alone = batch.Empty();
      batch.Call(order, 2, permuted);
      for (const Segment& s : order) batch.Call({s}, 1, alone);
      EXPECT_TRUE(want.SameBits(permuted)) << "window " << window;
      EXPECT_TRUE(want.SameBits(alone)) << "window " << window;
    }
  });
}

TEST(PagedAttention, APromptMayBeCutAnywhere) {
  ForEachTarget([] {
    for (const DType dtype : {DType::kBF16, DType::kF32, DType::kI8}) {
      for (const int window : {0, 50}) {
        const Shape shape{.H = 3, .Hkv = 1, .dtype = dtype, .window = window};
        Batch batch(shape, {{0, 150}, {77, 100}}, 61);
        const Output whole = batch.Cpu();
        for (const int rows : {20, 64, 100}) {  // 150 and 100 leave no rest of 1..4 rows
          SCOPED_TRACE(::testing::Message() << shape << " rows per call " << rows);
          EXPECT_TRUE(whole.SameBits(batch.CpuInParts(rows)));
        }
        Batch small(shape, {{0, 40}, {110, 30}}, 62);
        const Output small_whole = small.Cpu();
        EXPECT_TRUE(small_whole.SameBits(small.CpuInParts(5))) << shape;
        for (const int rows : {1, 3, 7}) small.ExpectNear(small.CpuInParts(rows), small_whole);
      }
    }
  });
}

TEST(PagedAttention, DecodeMayBeCutAnywhere) {
  ForEachTarget([] {
    for (const int H : {3, 6, 15}) {
      for (const DType dtype : {DType::kBF16, DType::kI8}) {
        const Shape shape{.H = H, .Hkv = 3, .page_size = 1, .dtype = dtype, .window = 400};
        Batch batch(shape, {{510, 4}, {0, 4}}, 71);
        const Output four = batch.CpuInParts(4);
        EXPECT_TRUE(four.SameBits(batch.CpuInParts(1))) << shape;
        EXPECT_TRUE(four.SameBits(batch.CpuInParts(2))) << shape;
        EXPECT_TRUE(four.SameBits(batch.CpuInParts(3))) << shape;
      }
    }
  });
}

TEST(PagedAttention, NothingToDo) {
  Workspace workspace;
  PagedAttentionArgs a;
  const int32_t zero[3] = {0, 0, 0};
  a.H = a.kv.Hkv = 1;
  a.kv.D = 8;
  a.kv.page_size = 16;
  a.rows = {0, zero, zero};
  a.tables = {zero, nullptr};
  PagedAttentionCpu(ExecContext{2, &workspace}, a);
  a.rows.N = 2;  // two sequences without a row
  PagedAttentionCpu(ExecContext{2, &workspace}, a);
}

}  // namespace
}  // namespace dsla
