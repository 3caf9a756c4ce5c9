// The fold of a paged cache against the fp64 recurrence and against a DSLA layer that ran from the
// start.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "ops/dsla/dsla_testing.h"
#include "ops/simd/each_target.h"

namespace dsla {
namespace {

DslaShape Shape(int H, int Hkv, int D, int F, int states, int W, int S, DType dtype) {
  DslaShape s;
  s.H = H;
  s.Hkv = Hkv;
  s.D = D;
  s.F = F;
  s.states = states;
  s.window = W;
  s.sinks = S;
  s.kv_dtype = dtype;
  s.gate_floor = -2.5f;
  return s;
}

// Sequences in pages that are handed out in random order; pages of nobody hold NaN.
class PagedCache {
 public:
  PagedCache(const DslaShape& shape, int page_size, const std::vector<const TestTokens*>& sequences,
             const std::vector<int32_t>& pos, uint32_t seed, bool quantized = false)
      : shape_(shape), pos_(pos) {
    page_start_.push_back(0);
    for (const int32_t p : pos)
      page_start_.push_back(page_start_.back() + (p + page_size - 1) / page_size);
    pages_.resize(static_cast<size_t>(page_start_.back()) + 3);
    std::iota(pages_.begin(), pages_.end(), 0);
    std::mt19937 rng(seed);
    std::shuffle(pages_.begin(), pages_.end(), rng);
    kv_ = {.page_size = page_size,
           .Hkv = shape.Hkv,
           .D = shape.D,
           .dtype = quantized ? DType::kI8 : shape.kv_dtype};
    kv_.page_stride = shape.Hkv * kv_.HeadStride() + 64;
    k_.assign(static_cast<size_t>(kv_.page_stride * SizeOf(kv_.dtype)) * pages_.size(),
              std::byte{0xff});
    v_ = k_;
    kv_.k = k_.data();
    kv_.v = v_.data();
    const auto from = [&](int t, int h) {
      return static_cast<size_t>((int64_t{t} * shape.Hkv + h) * shape.D * SizeOf(shape.kv_dtype));
    };
    for (size_t n = 0; n < pos.size(); ++n) {
      for (int t = 0; t < pos[n]; ++t) {
        const int64_t page = pages_[static_cast<size_t>(page_start_[n] + t / page_size)];
        for (int h = 0; h < shape.Hkv; ++h) {
          Put(k_, &sequences[n]->k[from(t, h)], page, h, t % page_size);
          Put(v_, &sequences[n]->v[from(t, h)], page, h, t % page_size);
        }
      }
    }
  }

  DslaFoldArgs Args(const TestLayer& layer, TestPool& pool, const std::vector<int32_t>& slots) {
    DslaFoldArgs args;
    args.shape = shape_;
    args.params = layer.Params();
    args.rows = {static_cast<int>(pos_.size()), nullptr, pos_.data()};
    args.tables = {page_start_.data(), pages_.data()};
    args.kv = kv_;
    args.slots = slots.data();
    args.states = pool.View();
    return args;
  }

 private:
  // A row of the slots' dtype, in int8 rounded to 1/127 of its largest.
  void Put(std::vector<std::byte>& to, const std::byte* row, int64_t page, int h, int s) {
    std::byte* at = &to[static_cast<size_t>(kv_.Row(page, h, s) * SizeOf(kv_.dtype))];
    if (kv_.dtype != DType::kI8) {
      std::memcpy(at, row, static_cast<size_t>(shape_.D * SizeOf(shape_.kv_dtype)));
      return;
    }
    std::vector<float> x(static_cast<size_t>(shape_.D));
    float most = 0;
    for (size_t d = 0; d < x.size(); ++d) {
      bf16 narrow;
      std::memcpy(&narrow, row + 2 * d, sizeof(narrow));
      x[d] = ToFloat(narrow);
      most = std::max(most, std::abs(x[d]));
    }
    const float scale = most / 127.f;
    for (size_t d = 0; d < x.size(); ++d)
      at[d] = static_cast<std::byte>(static_cast<int8_t>(std::nearbyint(x[d] / scale)));
    std::memcpy(&to[static_cast<size_t>(kv_.Scale(page, h, s))], &scale, sizeof(scale));
  }

  DslaShape shape_;
  std::vector<int32_t> pos_, page_start_, pages_;
  PagedKvView kv_;
  std::vector<std::byte> k_, v_;
};

void FoldCpu(const DslaFoldArgs& args, int threads = 2) {
  Workspace workspace;
  DslaFoldCpu({threads, &workspace}, args);
}

std::vector<float> Forward(const TestLayer& layer, TestPool& pool, const TestPart& part) {
  TestBatch batch(layer, pool, {&part, 1});
  Workspace workspace;
  DslaForwardCpu({2, &workspace}, batch.args());
  return batch.out();
}

const std::vector<DslaShape> kShapes = {
    Shape(9, 3, 64, 128, 2, 64, 4, DType::kBF16), Shape(9, 3, 64, 64, 2, 256, 4, DType::kF32),
    Shape(4, 4, 32, 64, 1, 0, 0, DType::kBF16),   Shape(8, 2, 128, 128, 2, 8, 4, DType::kF32),
    Shape(1, 1, 16, 16, 2, 3, 17, DType::kF32),
};

// Sequences of every length around the window's end, in one call, into slots that held others.
void ExpectFoldMatchesReference(bool quantized) {
  for (const DslaShape& shape : kShapes) {
    if (quantized && shape.kv_dtype != DType::kBF16) continue;
    SCOPED_TRACE("D " + std::to_string(shape.D) + " W " + std::to_string(shape.window));
    const int W = shape.window, S = shape.sinks;
    const std::vector<int32_t> pos = {
        0, 1, W, W + S, W + S + 1, W + 2 * kDslaChunk, W + 3 * kDslaChunk + 7};
    const TestLayer layer(shape, TestGates::kMixed, pos.back(), 1);
    std::vector<TestTokens> tokens;
    std::vector<const TestTokens*> sequences;
    std::vector<int32_t> slots;
    for (size_t n = 0; n < pos.size(); ++n) {
      tokens.emplace_back(shape, pos[n], static_cast<uint32_t>(2 + n));
      slots.push_back(static_cast<int32_t>((n * 3 + 1) % 8));
    }
    for (const TestTokens& x : tokens) sequences.push_back(&x);
    PagedCache cache(shape, 16, sequences, pos, 20, quantized);
    TestPool want(shape, 8);
    DslaFoldRef(cache.Args(layer, want, slots));
    ForEachTarget([&] {
      TestPool got(shape, 8);
      FoldCpu(cache.Args(layer, got, slots));
      for (const int32_t slot : slots) {
        SCOPED_TRACE("slot " + std::to_string(slot));
        ExpectClose(got.State(slot), want.State(slot), DslaTolerance(shape));
        ExpectClose(got.Norm(slot), want.Norm(slot), DslaTolerance(shape));
        EXPECT_TRUE(got.Cache(slot) == want.Cache(slot)) << "ring or sinks";
      }
      EXPECT_TRUE(got.Bytes(6) == want.Bytes(6)) << "a slot of nobody";
      EXPECT_TRUE(got.Intact());
    });
  }
}

TEST(DslaFold, MatchesReference) { ExpectFoldMatchesReference(false); }
// The slot's ring and sinks are bf16 then.
TEST(DslaFold, OfAnInt8CacheMatchesReference) { ExpectFoldMatchesReference(true); }

// A prompt that a DSLA layer took in one call leaves the same slot, bit for bit: the chunks are the
// same. From there on the two sequences cannot differ.
TEST(DslaFold, EqualsForwardBitForBit) {
  for (const DslaShape& shape : kShapes) {
    const std::vector<int32_t> pos = {shape.window + 2 * kDslaChunk + 21};
    const TestLayer layer(shape, TestGates::kTrained, pos[0], 21);
    const TestTokens tokens(shape, pos[0], 22);
    PagedCache cache(shape, 16, {&tokens}, pos, 23);
    const std::vector<int32_t> slots = {0};
    TestPool fold(shape, 1), forward(shape, 1);
    FoldCpu(cache.Args(layer, fold, slots));
    forward.Reset(0);
    Forward(layer, forward, {&tokens, 0, pos[0], 0});
    EXPECT_TRUE(fold.Bytes(0) == forward.Bytes(0));
  }
}

// Fold at t, then go on, against DSLA over those K and V from the start in the recurrent form.
TEST(DslaFold, ThenDecodeEqualsFromStart) {
  for (const DslaShape& shape : kShapes) {
    const int t = shape.window + kDslaChunk + 9, count = t + 6;
    const TestLayer layer(shape, TestGates::kTrained, count, 24);
    const TestTokens tokens(shape, count, 25);
    TestPool steps(shape, 1), folded(shape, 1);
    steps.Reset(0);
    PagedCache cache(shape, 32, {&tokens}, {t}, 26);
    const std::vector<int32_t> slots = {0};
    FoldCpu(cache.Args(layer, folded, slots));
    for (int i = 0; i < count; ++i) {
      const TestPart part = {&tokens, i, 1, 0};
      const auto want = Forward(layer, steps, part);
      if (i >= t) ExpectClose(Forward(layer, folded, part), want, DslaTolerance(shape));
    }
  }
}

TEST(DslaFold, LongSequencesInSeveralWavesDoNotDependOnThreadsOrCompany) {
  const DslaShape shape = Shape(4, 4, 64, 128, 2, 8, 4, DType::kBF16);
  const std::vector<int32_t> pos = {3000, 100, 2777}, slots = {0, 1, 2};
  const TestLayer layer(shape, TestGates::kTrained, 3000, 27);
  std::vector<TestTokens> tokens;
  for (size_t n = 0; n < 3; ++n) tokens.emplace_back(shape, pos[n], static_cast<uint32_t>(28 + n));
  PagedCache cache(shape, 16, {&tokens[0], &tokens[1], &tokens[2]}, pos, 31);
  TestPool together(shape, 3), one_thread(shape, 3), alone(shape, 3);
  FoldCpu(cache.Args(layer, together, slots), 3);
  FoldCpu(cache.Args(layer, one_thread, slots), 1);
  PagedCache last(shape, 16, {&tokens[2]}, {pos[2]}, 32);
  const std::vector<int32_t> slot = {2};
  FoldCpu(last.Args(layer, alone, slot));
  for (int n = 0; n < 3; ++n) EXPECT_TRUE(together.Bytes(n) == one_thread.Bytes(n));
  EXPECT_TRUE(together.Bytes(2) == alone.Bytes(2));
}

}  // namespace
}  // namespace dsla
