// The forward on the CPU against the fp64 recurrence, and the properties every caller relies on.
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>

#include "ops/dsla/dsla_testing.h"
#include "ops/simd/each_target.h"
#include "ops/testing/expect_close.h"

namespace dsla {
namespace {

std::vector<float> RunCpu(const TestLayer& layer, TestPool& pool, std::vector<TestPart> parts,
                          int threads = 1) {
  TestBatch batch(layer, pool, parts);
  Workspace workspace;
  DslaForwardCpu({threads, &workspace}, batch.args());
  return batch.out();
}

std::vector<float> RunRef(const TestLayer& layer, TestPool& pool, std::vector<TestPart> parts) {
  TestBatch batch(layer, pool, parts);
  DslaForwardRef(batch.args());
  return batch.out();
}

void ExpectSameSlots(const DslaShape& shape, TestPool& got, TestPool& want, int slot) {
  ExpectClose(got.State(slot), want.State(slot), DslaTolerance(shape));
  ExpectClose(got.Norm(slot), want.Norm(slot), DslaTolerance(shape));
  EXPECT_TRUE(got.Cache(slot) == want.Cache(slot)) << "ring or sinks";
  EXPECT_TRUE(got.Intact());
}

struct Case {
  int H, Hkv, D, F, states, window, sinks;
  DType dtype;
  TestGates gates;

  DslaShape Shape() const {
    DslaShape s;
    s.H = H;
    s.Hkv = Hkv;
    s.D = D;
    s.F = F;
    s.states = states;
    s.window = window;
    s.sinks = sinks;
    s.kv_dtype = dtype;
    s.gate_floor = -2.5f;
    return s;
  }
};

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  constexpr const char* kGates[] = {"trained", "floor", "slow", "mixed"};
  std::ostringstream name;
  name << "H" << c.H << "_" << c.Hkv << "_D" << c.D << "_F" << c.F << "_states" << c.states << "_W"
       << c.window << "_S" << c.sinks << "_" << Name(c.dtype) << "_"
       << kGates[static_cast<int>(c.gates)];
  return name.str();
}

class DslaForward : public testing::TestWithParam<Case> {};

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;
INSTANTIATE_TEST_SUITE_P(Shapes, DslaForward,
                         testing::Values(Case{9, 3, 64, 128, 2, 64, 4, kBF16, TestGates::kTrained},
                                         Case{9, 3, 64, 64, 2, 64, 4, kF32, TestGates::kTrained},
                                         Case{9, 3, 64, 128, 2, 256, 4, kF32, TestGates::kMixed},
                                         Case{9, 3, 64, 64, 2, 256, 4, kBF16, TestGates::kTrained},
                                         Case{4, 4, 32, 32, 2, 8, 4, kBF16, TestGates::kMixed},
                                         Case{4, 4, 32, 64, 1, 0, 0, kF32, TestGates::kTrained},
                                         Case{8, 2, 128, 128, 2, 64, 4, kBF16, TestGates::kMixed},
                                         Case{8, 2, 128, 256, 2, 64, 0, kF32, TestGates::kTrained},
                                         Case{8, 2, 16, 16, 1, 8, 0, kF32, TestGates::kMixed},
                                         Case{1, 1, 16, 32, 2, 3, 4, kF32, TestGates::kTrained},
                                         Case{1, 1, 64, 64, 1, 0, 0, kBF16, TestGates::kMixed},
                                         Case{20, 1, 32, 32, 2, 40, 17, kF32, TestGates::kTrained},
                                         Case{2, 1, 80, 160, 2, 1, 1, kF32, TestGates::kMixed},
                                         Case{1, 1, 256, 512, 2, 8, 4, kF32, TestGates::kTrained},
                                         Case{9, 3, 64, 128, 2, 64, 4, kF32, TestGates::kFloor},
                                         Case{4, 4, 32, 64, 2, 0, 0, kF32, TestGates::kFloor},
                                         Case{9, 3, 64, 128, 2, 64, 4, kF32, TestGates::kSlow},
                                         Case{4, 4, 32, 32, 1, 0, 0, kF32, TestGates::kSlow}),
                         CaseName);

// A prompt over several chunks, a few decode steps, and a further prompt from an odd position.
TEST_P(DslaForward, MatchesReference) {
  const DslaShape shape = GetParam().Shape();
  const int prompt = shape.window + kDslaChunk + 13, steps = 3, more = 37;
  const TestLayer layer(shape, GetParam().gates, prompt + steps + more, 1);
  const TestTokens tokens(shape, prompt + steps + more, 2);
  std::vector<TestPart> calls = {{&tokens, 0, prompt, 0}};
  for (int i = 0; i < steps; ++i) calls.push_back({&tokens, prompt + i, 1, 0});
  calls.push_back({&tokens, prompt + steps, more, 0});

  TestPool want_pool(shape, 1);
  want_pool.Reset(0);
  std::vector<std::vector<float>> want;
  for (const TestPart& call : calls) want.push_back(RunRef(layer, want_pool, {call}));
  ForEachTarget([&] {
    TestPool pool(shape, 1);
    pool.Reset(0);
    for (size_t i = 0; i < calls.size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      ExpectOutputs(shape, RunCpu(layer, pool, {calls[i]}, 2), want[i]);
    }
    ExpectSameSlots(shape, pool, want_pool, 0);
  });
}

TEST_P(DslaForward, ChunksEqualSteps) {
  const DslaShape shape = GetParam().Shape();
  const int count = shape.window + kDslaChunk + 9;
  const TestLayer layer(shape, GetParam().gates, count, 3);
  const TestTokens tokens(shape, count, 4);
  TestPool steps(shape, 1), chunks(shape, 1);
  steps.Reset(0);
  chunks.Reset(0);
  std::vector<float> want;
  for (int t = 0; t < count; ++t) {
    const auto out = RunCpu(layer, steps, {{&tokens, t, 1, 0}});
    want.insert(want.end(), out.begin(), out.end());
  }
  ExpectOutputs(shape, RunCpu(layer, chunks, {{&tokens, 0, count, 0}}), want);
  ExpectSameSlots(shape, chunks, steps, 0);
}

TEST_P(DslaForward, SplitAnywhereEqualsWhole) {
  const DslaShape shape = GetParam().Shape();
  const int count = shape.window + kDslaChunk + 30;
  const TestLayer layer(shape, GetParam().gates, count, 5);
  const TestTokens tokens(shape, count, 6);
  TestPool whole(shape, 1);
  whole.Reset(0);
  const auto want = RunCpu(layer, whole, {{&tokens, 0, count, 0}});
  std::mt19937 rng(7);
  for (int trial = 0; trial < 4; ++trial) {
    TestPool pool(shape, 1);
    pool.Reset(0);
    std::vector<float> got;
    for (int t = 0; t < count;) {
      const int longest = trial < 2 ? 9 : count;
      const int step =
          std::min(count - t, 1 + static_cast<int>(rng() % static_cast<uint32_t>(longest)));
      const auto out = RunCpu(layer, pool, {{&tokens, t, step, 0}});
      got.insert(got.end(), out.begin(), out.end());
      t += step;
    }
    ExpectOutputs(shape, got, want);
    ExpectSameSlots(shape, pool, whole, 0);
  }
}

// Queries of zero give every key the weight 1, which bf16 holds: outputs are as exact as fp32 then.
TEST_P(DslaForward, EqualWeightsAreExact) {
  const DslaShape shape = GetParam().Shape();
  const int count = shape.window + kDslaChunk + 11;
  const TestLayer layer(shape, GetParam().gates, count, 30);
  TestTokens tokens(shape, count, 31);
  tokens.q.assign(tokens.q.size(), 0.f);
  const std::vector<TestPart> calls = {{&tokens, 0, 21, 0}, {&tokens, 21, count - 21, 0}};
  TestPool want_pool(shape, 1);
  want_pool.Reset(0);
  std::vector<std::vector<float>> want;
  for (const TestPart& call : calls) want.push_back(RunRef(layer, want_pool, {call}));
  ForEachTarget([&] {
    TestPool pool(shape, 1);
    pool.Reset(0);
    for (size_t i = 0; i < calls.size(); ++i)
      ExpectClose(RunCpu(layer, pool, {calls[i]}), want[i], DslaTolerance(shape));
  });
}

const DslaShape kSmall = Case{6, 2, 32, 64, 2, 24, 4, kBF16, TestGates::kTrained}.Shape();

// Gates at the floor for so long that e^R S and the first keys of a chunk are subnormal or zero.
TEST(DslaForwardCpu, FloorForLongMatchesReference) {
  for (const int window : {0, 8}) {
    DslaShape shape = kSmall;
    shape.window = window;
    shape.sinks = window > 0 ? 4 : 0;
    shape.kv_dtype = kF32;
    const int count = 400;
    const TestLayer layer(shape, TestGates::kFloor, count, 8);
    const TestTokens tokens(shape, count, 9);
    TestPool got(shape, 1), want(shape, 1);
    got.Reset(0);
    want.Reset(0);
    ExpectClose(RunCpu(layer, got, {{&tokens, 0, count, 0}}),
                RunRef(layer, want, {{&tokens, 0, count, 0}}), DslaTolerance(shape));
    ExpectSameSlots(shape, got, want, 0);
  }
}

// The first tokens: none in the states, then one, then some; windows not yet full.
TEST(DslaForwardCpu, ShortPromptsMatchReference) {
  const TestLayer layer(kSmall, TestGates::kTrained, 64, 10);
  const TestTokens tokens(kSmall, 64, 11);
  for (int count = 1; count <= kSmall.window + kSmall.sinks + 3; ++count) {
    TestPool got(kSmall, 1), want(kSmall, 1);
    got.Reset(0);
    want.Reset(0);
    SCOPED_TRACE("count " + std::to_string(count));
    ExpectOutputs(kSmall, RunCpu(layer, got, {{&tokens, 0, count, 0}}),
                  RunRef(layer, want, {{&tokens, 0, count, 0}}));
    ExpectClose(RunCpu(layer, got, {{&tokens, count, 1, 0}}),
                RunRef(layer, want, {{&tokens, count, 1, 0}}), DslaTolerance(kSmall));
    ExpectSameSlots(kSmall, got, want, 0);
  }
}

TEST(DslaForwardCpu, RingWrapsAround) {
  DslaShape shape = kSmall;
  shape.window = 5;
  const TestLayer layer(shape, TestGates::kTrained, 64, 12);
  const TestTokens tokens(shape, 64, 13);
  TestPool got(shape, 1), want(shape, 1);
  got.Reset(0);
  want.Reset(0);
  for (int t = 0; t < 64; t += t % 3 == 0 ? 1 : 2) {
    const int count = std::min(64 - t, t % 3 == 0 ? 1 : 2);
    ExpectOutputs(shape, RunCpu(layer, got, {{&tokens, t, count, 0}}),
                  RunRef(layer, want, {{&tokens, t, count, 0}}));
    ExpectSameSlots(shape, got, want, 0);
  }
}

// Splits at chunk boundaries, as waves make them, change no bit.
TEST(DslaForwardCpu, SplitAtChunksIsBitEqual) {
  DslaShape shape = kSmall;
  shape.H = 16;
  shape.Hkv = 16;  // many chunks per wave would not fit: several waves
  const int count = 2000, cut = 15 * kDslaChunk + shape.window;
  const TestLayer layer(shape, TestGates::kTrained, count, 14);
  const TestTokens tokens(shape, count, 15);
  TestPool whole(shape, 1), split(shape, 1);
  whole.Reset(0);
  split.Reset(0);
  const auto want = RunCpu(layer, whole, {{&tokens, 0, count, 0}});
  auto got = RunCpu(layer, split, {{&tokens, 0, cut, 0}});
  const auto rest = RunCpu(layer, split, {{&tokens, cut, count - cut, 0}});
  got.insert(got.end(), rest.begin(), rest.end());
  EXPECT_EQ(got, want);
  EXPECT_TRUE(split.Bytes(0) == whole.Bytes(0));
}

TEST(DslaForwardCpu, MovedSlotContinues) {
  const TestLayer layer(kSmall, TestGates::kTrained, 200, 16);
  const TestTokens tokens(kSmall, 200, 17);
  TestPool a(kSmall, 1), b(kSmall, 3);
  a.Reset(0);
  RunCpu(layer, a, {{&tokens, 0, 101, 0}});
  b.Write(2, a.Bytes(0));
  for (const TestPart& part : {TestPart{&tokens, 101, 1, 0}, TestPart{&tokens, 102, 60, 0}}) {
    TestPart moved = part;
    moved.slot = 2;
    EXPECT_EQ(RunCpu(layer, a, {part}), RunCpu(layer, b, {moved}));
    EXPECT_TRUE(a.Bytes(0) == b.Bytes(2));
  }
}

// A batch of prompts, decode rows and a sequence without rows.
struct Mixed {
  DslaShape shape = kSmall;
  TestLayer layer{shape, TestGates::kTrained, 400, 18};
  std::vector<TestTokens> tokens;
  std::vector<TestPart> parts;  // slot i is sequence i
  Mixed() {
    constexpr int kBegin[] = {0, 70, 3, 40, 0, 100, 37, 0, 250, 64};
    constexpr int kCount[] = {90, 1, 1, 0, 1, 33, 2, 300, 1, 64};
    for (uint32_t i = 0; i < 10; ++i) tokens.emplace_back(shape, 400, 20 + i);
    for (int i = 0; i < 10; ++i)
      parts.push_back({&tokens[static_cast<size_t>(i)], kBegin[i], kCount[i], i});
  }
  // A pool in which every sequence stands at its begin.
  TestPool Pool() const {
    TestPool pool(shape, 12);
    for (const TestPart& part : parts) {
      pool.Reset(part.slot);
      if (part.begin > 0) RunCpu(layer, pool, {{part.tokens, 0, part.begin, part.slot}});
    }
    return pool;
  }
};

TEST(DslaForwardCpu, BatchEqualsEachAloneInAnyOrder) {
  Mixed mixed;
  TestPool alone = mixed.Pool();
  std::vector<std::vector<float>> want;
  for (const TestPart& part : mixed.parts) want.push_back(RunCpu(mixed.layer, alone, {part}, 1));
  std::mt19937 rng(40);
  for (int trial = 0; trial < 4; ++trial) {
    std::vector<TestPart> parts = mixed.parts;
    std::shuffle(parts.begin(), parts.end(), rng);
    TestPool pool = mixed.Pool();
    TestBatch batch(mixed.layer, pool, parts);
    Workspace workspace;
    DslaForwardCpu({1 + trial, &workspace}, batch.args());
    for (size_t i = 0; i < parts.size(); ++i) {
      const auto out = batch.out(static_cast<int>(i));
      EXPECT_EQ(std::vector<float>(out.begin(), out.end()),
                want[static_cast<size_t>(parts[i].slot)]);
      EXPECT_TRUE(pool.Bytes(parts[i].slot) == alone.Bytes(parts[i].slot));
    }
  }
}

TEST(DslaForwardCpu, MixedBatchMatchesReference) {
  Mixed mixed;
  TestPool got = mixed.Pool(), want = mixed.Pool();
  ForEachTarget([&] {
    got = mixed.Pool();
    TestPool reference = mixed.Pool();
    ExpectOutputs(mixed.shape, RunCpu(mixed.layer, got, mixed.parts),
                  RunRef(mixed.layer, reference, mixed.parts));
    for (const TestPart& part : mixed.parts)
      ExpectSameSlots(mixed.shape, got, reference, part.slot);
  });
}

TEST(DslaForwardCpu, ThreadsChangeNoBit) {
  Mixed mixed;
  TestPool one = mixed.Pool();
  const auto want = RunCpu(mixed.layer, one, mixed.parts, 1);
  for (const int threads : {2, 3, 7, 16}) {
    TestPool pool = mixed.Pool();
    EXPECT_EQ(RunCpu(mixed.layer, pool, mixed.parts, threads), want) << threads << " threads";
    for (const TestPart& part : mixed.parts)
      EXPECT_TRUE(pool.Bytes(part.slot) == one.Bytes(part.slot));
  }
}

TEST(DslaForwardCpu, ScratchContentsAndOtherSlotsDoNotMatter) {
  Mixed mixed;
  TestPool clean = mixed.Pool(), pool = mixed.Pool();
  const auto want = RunCpu(mixed.layer, clean, mixed.parts);
  const auto before = pool.Bytes(10);
  Workspace workspace;
  {
    Workspace::Scope scope(workspace);
    constexpr int64_t kBytes = int64_t{64} << 20;
    std::memset(workspace.Take<char>(kBytes), 0xff, kBytes);  // NaN
  }
  for (int repeat = 0; repeat < 2; ++repeat) {  // then with what the first call left behind
    TestPool again = mixed.Pool();
    TestBatch batch(mixed.layer, again, mixed.parts);
    DslaForwardCpu({2, &workspace}, batch.args());
    EXPECT_EQ(batch.out(), want);
    for (const int slot : {3, 10, 11}) EXPECT_TRUE(again.Bytes(slot) == pool.Bytes(slot));
    EXPECT_TRUE(again.Intact());
  }
  EXPECT_TRUE(pool.Bytes(10) == before);
}

TEST(DslaForwardCpu, NothingToDo) {
  const TestLayer layer(kSmall, TestGates::kTrained, 8, 50);
  const TestTokens tokens(kSmall, 8, 51);
  TestPool pool(kSmall, 2);
  pool.Reset(0);
  const auto before = pool.Bytes(0);
  EXPECT_TRUE(RunCpu(layer, pool, {}).empty());
  EXPECT_TRUE(RunCpu(layer, pool, {{&tokens, 5, 0, 0}}).empty());
  EXPECT_TRUE(pool.Bytes(0) == before);
}

TEST(DslaSlot, LayoutIsAlignedAndDisjoint) {
  const DslaShape shape = Case{9, 3, 64, 128, 2, 64, 4, kBF16, TestGates::kTrained}.Shape();
  const DslaSlotLayout layout = MakeSlotLayout(shape);
  EXPECT_EQ(layout.state, 0);
  EXPECT_EQ(layout.norm, 3 * 256 * 64 * 4);
  EXPECT_EQ(layout.ring_k, layout.norm + 3 * 256 * 4);
  EXPECT_EQ(layout.ring_v, layout.ring_k + 3 * 64 * 64 * 2);
  EXPECT_EQ(layout.sink_k, layout.ring_v + 3 * 64 * 64 * 2);
  EXPECT_EQ(layout.sink_v, layout.sink_k + 3 * 4 * 64 * 2);
  EXPECT_EQ(layout.bytes, layout.sink_v + 3 * 4 * 64 * 2);
  DslaShape odd = shape;
  odd.sinks = 1;
  odd.D = 16;
  odd.F = 16;
  odd.Hkv = odd.H = 1;
  odd.window = 3;
  const DslaSlotLayout small = MakeSlotLayout(odd);
  for (const int64_t offset : {small.state, small.norm, small.ring_k, small.ring_v, small.sink_k,
                               small.sink_v, small.bytes})
    EXPECT_EQ(offset % 64, 0);
}

TEST(DslaSlotDeathTest, RefusesWhatItIsNotWrittenFor) {
  DslaShape shape = kSmall;
  shape.D = 24;
  EXPECT_DEATH(CheckDslaShape(shape), "D % 16 == 0");
  shape = kSmall;
  shape.window = 0;
  EXPECT_DEATH(CheckDslaShape(shape), "window > 0");
  shape = kSmall;
  shape.gate_floor = -3.125f;
  EXPECT_DEATH(CheckDslaShape(shape), "gate_floor");
  shape = kSmall;
  shape.Hkv = 4;
  EXPECT_DEATH(CheckDslaShape(shape), "H % shape.Hkv");
}

}  // namespace
}  // namespace dsla
