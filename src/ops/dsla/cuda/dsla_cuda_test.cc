// The CUDA operator against the fp64 recurrence, on layers, queries and keys that bf16 holds
// exactly. All workspaces and outputs are NaN before a call.
#include "ops/dsla/cuda/dsla_cuda.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <tuple>

#include "ops/dsla/cuda/dsla_cuda_cases.cuh"
#include "ops/norm_rope/cuda/norm_rope_cuda.h"

namespace dsla {
namespace {

using cuda::DslaCudaFoldArgs;

class DslaCudaTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!HaveGpu()) GTEST_SKIP() << "SKIPPED: no CUDA device here";
  }
  DslaShape shape() const { return Shape(GetParam()); }
};

TEST_P(DslaCudaTest, PrefillThenMore) {
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 512, 7);
  // In two calls; a sequence may have no rows in one of them.
  const std::vector<int> first{63, 0, 64, 1, 65, 190, 128}, second{1, 65, 130, 64, 3, 0, 127};
  std::vector<int> lengths, slots;
  for (size_t i = 0; i < first.size(); ++i) {
    lengths.push_back(first[i] + second[i]);
    slots.push_back(static_cast<int>((i * 3) % first.size()));
  }
  const auto tokens = MakeSequences(s, lengths);
  const int N = static_cast<int>(first.size());
  TestPool want(s, N), got(s, N);
  for (int i = 0; i < N; ++i) {
    want.Reset(i);
    got.Reset(i);
  }
  for (int call = 0; call < 2; ++call) {
    SCOPED_TRACE("call " + std::to_string(call));
    std::vector<TestPart> parts;
    for (int i = 0; i < N; ++i) {
      const auto at = static_cast<size_t>(i);
      parts.push_back(
          {&tokens[at], call ? first[at] : 0, call ? second[at] : first[at], slots[at]});
    }
    TestBatch reference(layer.host, want, parts), input(layer.host, got, parts);
    DslaForwardRef(reference.args());
    GpuCall gpu(layer, input, got, N), again(layer, input, got, N);
    gpu.Prefill(cuda::MaxChunks(N, gpu.args.T));
    again.Prefill(call + 1);  // in waves of one or two chunks
    const std::vector<float> out = gpu.Out();
    EXPECT_EQ(out, again.Out()) << "results depend on the workspace's size";
    gpu.ReadPool(got);
    for (int i = 0; i < N; ++i) {
      if (parts[static_cast<size_t>(i)].count == 0) continue;
      SCOPED_TRACE("sequence " + std::to_string(i));
      const auto row = static_cast<size_t>(s.H * s.D);
      const auto begin = static_cast<size_t>(reference.args().rows.row_start[i]) * row;
      ExpectClose(std::span(out).subspan(begin, reference.out(i).size()), reference.out(i),
                  kChunkTolerance);
    }
    ExpectSlots(s.D, got, want, slots, GetParam().StateTolerance());
  }
}

TEST_P(DslaCudaTest, PrefillOfLargeQueries) {
  // Exponentials of features and of scores leave fp32 unless something is taken off them.
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 512, 7);
  auto tokens = MakeSequences(s, {330, 70});
  for (float& x : tokens[0].q) x *= 64;
  for (float& x : tokens[1].q) x *= 16;
  const std::vector<TestPart> parts{{&tokens[0], 0, 330, 0}, {&tokens[1], 0, 70, 1}};
  TestPool want(s, 2), got(s, 2);
  for (int i = 0; i < 2; ++i) {
    want.Reset(i);
    got.Reset(i);
  }
  TestBatch reference(layer.host, want, parts), input(layer.host, got, parts);
  DslaForwardRef(reference.args());
  GpuCall gpu(layer, input, got, 2);
  gpu.Prefill(cuda::MaxChunks(2, gpu.args.T));
  ExpectClose(gpu.Out(), reference.out(), kChunkTolerance);
}

struct Prefilled {
  std::vector<float> out, want;
};
// One sequence from its beginning, whose states are compared.
Prefilled PrefillAlone(const GpuLayer& layer, const TestTokens& tokens, int count) {
  const DslaShape& s = layer.host.shape;
  TestPool want(s, 1), got(s, 1);
  want.Reset(0);
  got.Reset(0);
  const std::vector<TestPart> parts{{&tokens, 0, count, 0}};
  TestBatch reference(layer.host, want, parts), input(layer.host, got, parts);
  DslaForwardRef(reference.args());
  GpuCall gpu(layer, input, got, 1);
  gpu.Prefill(cuda::MaxChunks(1, count));
  gpu.ReadPool(got);
  ExpectSlots(s.D, got, want, {0}, kStateTolerance);
  return {gpu.Out(), reference.out()};
}

void EnlargeLogits(TestLayer& layer, float factor) {
  for (float& w : layer.phi_k) w *= factor;
}
TEST_P(DslaCudaTest, PrefillOfLargeKeyLogits) {
  // Logits of keys' features whose exponentials fp32 does not have.
  const DslaShape s = shape();
  const int count = s.window + 200;
  TestLayer host(s, GetParam().gates, count, 7);
  EnlargeLogits(host, 100);
  const GpuLayer layer(std::move(host));
  const auto tokens = MakeSequences(s, {count});
  const Prefilled x = PrefillAlone(layer, tokens[0], count);
  ExpectClose(x.out, x.want, kChunkTolerance);
}

// Two dimensions that RoPE hardly turns are larger than any fp16, with both signs, so infinities
// would cancel to NaN. Features are 0 or 1, and gates of weights that SeparateGates has changed at
// an end of their range: what a key is clamped to does not matter.
void EnlargeKeys(const DslaShape& s, TestTokens& tokens, int count) {
  auto* keys = reinterpret_cast<bf16*>(tokens.k.data());
  for (int i = 0; i < count * s.Hkv; ++i) {
    const float large = i % 3 == 0 ? -1e5f : 1e5f;
    keys[i * s.D + s.D / 2 - 1] = ToBf16(large);
    keys[i * s.D + s.D / 2 - 2] = ToBf16(-large);
  }
}

// What the two dimensions add to a gate's logit is more than any bias of TestLayer.
void SeparateGates(TestLayer& layer) {
  const auto D = static_cast<size_t>(layer.shape.D), F = static_cast<size_t>(layer.shape.F);
  for (size_t row = 0; row < layer.gate_weight.size(); row += D * F)
    for (size_t f = 0; f < F; ++f) {
      float& last = layer.gate_weight[row + (D / 2 - 1) * F + f];
      last += std::copysign(0.1f, last);
      layer.gate_weight[row + (D / 2 - 2) * F + f] = last / 2;
    }
}

TEST_P(DslaCudaTest, PrefillOfKeysBeyondHalf) {
  const DslaShape s = shape();
  const int count = s.window + 200;
  TestLayer host(s, GetParam().gates, count, 7);
  SeparateGates(host);
  const GpuLayer layer(std::move(host));
  auto tokens = MakeSequences(s, {count});
  EnlargeKeys(s, tokens[0], count);
  for (const float x : PrefillAlone(layer, tokens[0], count).out) ASSERT_TRUE(std::isfinite(x));
}

TEST_P(DslaCudaTest, Decode) {
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 512, 8);
  const std::vector<int> before{0,  1,  63, 64, 100, s.window, s.window + s.sinks, 3, 17, 18, 19,
                                20, 21, 22, 23, 24,  25};
  const int steps = 3, N = static_cast<int>(before.size());
  std::vector<int> lengths, slots;
  for (int n : before) lengths.push_back(n + steps);
  for (int i = 0; i < N; ++i) slots.push_back(N - 1 - i);
  const auto tokens = MakeSequences(s, lengths);
  TestPool want(s, N), got(s, N);
  std::vector<TestPart> parts;
  for (int i = 0; i < N; ++i) {
    want.Reset(i);
    const auto at = static_cast<size_t>(i);
    parts.push_back({&tokens[at], 0, before[at], slots[at]});
  }
  TestBatch past(layer.host, want, parts);
  DslaForwardRef(past.args());
  for (int i = 0; i < N; ++i) got.Write(i, want.Bytes(i));
  for (int step = 0; step < steps; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    for (int i = 0; i < N; ++i) {
      const auto at = static_cast<size_t>(i);
      parts[at] = {&tokens[at], before[at] + step, 1, slots[at]};
    }
    TestBatch reference(layer.host, want, parts), input(layer.host, got, parts);
    DslaForwardRef(reference.args());
    GpuCall gpu(layer, input, got, N), again(layer, input, got, N);
    gpu.Decode();
    again.Decode();
    const std::vector<float> out = gpu.Out();
    EXPECT_EQ(out, again.Out()) << "two runs differ";
    const int row = s.H * s.D;
    for (int i : {0, 5, N - 1}) {
      TestBatch single(layer.host, got, std::span(&parts[static_cast<size_t>(i)], 1));
      GpuCall alone(layer, single, got, N);
      alone.Decode();
      EXPECT_EQ(std::vector<float>(out.begin() + i * row, out.begin() + (i + 1) * row), alone.Out())
          << "row " << i << " depends on the others";
    }
    gpu.ReadPool(got);
    ExpectClose(out, reference.out(), kDecodeTolerance);
    ExpectSlots(s.D, got, want, slots, kDecodeStateTolerance);
  }
}

TEST_P(DslaCudaTest, DecodeOfManyRows) {
  // The same few rows over and over, with padding rows between them: as many as a GPU has a cluster
  // of four, of two or a multiprocessor for, one more, and many more. A row has the bits that it
  // has among few.
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 512, 12);
  const std::vector<int> before{0, 3, 100, s.window + s.sinks};
  const size_t few = before.size(), many = 200;
  std::vector<int> lengths;
  for (int n : before) lengths.push_back(n + 1);
  const auto tokens = MakeSequences(s, lengths);
  std::vector<TestPart> past, parts;
  std::vector<int32_t> slots;
  for (size_t i = 0; i < many; ++i) {
    const int slot = static_cast<int>(i);
    if (i < few) past.push_back({&tokens[i], 0, before[i], slot});
    parts.push_back({&tokens[i % few], before[i % few], 1, slot});
    slots.push_back(i % 7 == 5 ? -1 : slot);
  }
  TestPool pool(s, static_cast<int>(many));
  for (size_t i = 0; i < few; ++i) pool.Reset(static_cast<int>(i));
  TestBatch first(layer.host, pool, past);
  DslaForwardRef(first.args());
  for (size_t i = few; i < many; ++i)
    pool.Write(static_cast<int>(i), pool.Bytes(static_cast<int>(i % few)));

  const auto decode = [&](size_t rows) {
    TestBatch batch(layer.host, pool, std::span(parts).first(rows));
    GpuCall gpu(layer, batch, pool, static_cast<int>(rows));
    const DeviceBytes device_slots(std::span<const int32_t>(slots).first(rows));
    gpu.args.slots = device_slots.as<int32_t>();
    gpu.Decode();
    TestPool after(s, static_cast<int>(rows));
    gpu.ReadPool(after);
    return std::pair(gpu.Out(), std::move(after));
  };
  const auto [want, want_pool] = decode(few);
  const auto row = static_cast<size_t>(s.H * s.D);
  int multiprocessors = 0;
  CheckCuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  std::vector<size_t> counts{many};
  for (int blocks : {4, 2, 1}) {
    const auto most = static_cast<size_t>(multiprocessors / (blocks * s.Hkv));
    for (size_t rows : {most, most + 1})
      if (rows > few && rows < many) counts.push_back(rows);
  }
  for (size_t rows : counts) {
    SCOPED_TRACE("of " + std::to_string(rows));
    const auto [got, got_pool] = decode(rows);
    for (size_t i = 0; i < rows; ++i) {
      SCOPED_TRACE("row " + std::to_string(i));
      const int slot = static_cast<int>(i), like = static_cast<int>(i % few);
      if (slots[i] < 0) {
        EXPECT_EQ(got_pool.Bytes(slot), pool.Bytes(slot));
        continue;
      }
      EXPECT_TRUE(std::equal(want.begin() + like * row, want.begin() + (like + 1) * row,
                             got.begin() + slot * row));
      EXPECT_EQ(got_pool.Bytes(slot), want_pool.Bytes(like));
    }
  }
}

TEST_P(DslaCudaTest, DecodeAwaitsItsRows) {
  // Rows that the kernel just before leaves, which a launch that overlaps with it must not read
  // early: the bits are those of rows that have lain there for long.
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 512, 13);
  for (const int N : {1, 6, 150}) {
    SCOPED_TRACE("of " + std::to_string(N));
    const int t = s.window + s.sinks + 1, C = (s.H + 2 * s.Hkv) * s.D;
    const auto tokens = MakeSequences(s, {t + 1});
    TestPool pool(s, N);
    std::vector<TestPart> parts;
    for (int i = 0; i < N; ++i) {
      pool.Reset(i);
      parts.push_back({&tokens[0], t, 1, i});
    }
    TestBatch batch(layer.host, pool, parts);
    std::vector<float> hidden(static_cast<size_t>(N * C));
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = static_cast<float>(i * 37 % 101) - 50;
    const DeviceBytes d_hidden(hidden), weight(std::vector<float>(static_cast<size_t>(C), 1.f));
    DeviceBytes rows(int64_t{N} * C * 2);
    const auto decode = [&](bool apart) {
      GpuCall gpu(layer, batch, pool, N);
      gpu.args.q = rows.as<bf16>();
      gpu.args.k = rows.as<bf16>() + s.H * s.D;
      gpu.args.v = rows.as<bf16>() + (s.H + s.Hkv) * s.D;
      gpu.args.q_stride = gpu.args.k_stride = gpu.args.v_stride = C;
      gpu.Work(cuda::DecodeWorkspaceBytes(s, N));
      rows.Poison();
      CheckCuda(cuda::AddRmsNorm({.hidden = d_hidden.as<float>(),
                                  .weight = weight.as<float>(),
                                  .eps = 1e-5f,
                                  .T = N,
                                  .C = C,
                                  .normed = rows.as<void>()},
                                 nullptr));
      if (apart) CheckCuda(cudaDeviceSynchronize());
      CheckCuda(cuda::Decode(gpu.args, nullptr));
      CheckCuda(cudaDeviceSynchronize());
      TestPool after(s, N);
      gpu.ReadPool(after);
      return std::pair(gpu.Out(), std::move(after));
    };
    const auto [want, want_pool] = decode(true);
    const auto [got, got_pool] = decode(false);
    EXPECT_EQ(got, want);
    for (int i = 0; i < N; ++i) EXPECT_EQ(got_pool.Bytes(i), want_pool.Bytes(i)) << "slot " << i;
  }
}

TEST_P(DslaCudaTest, DecodeLeavesPaddingRowsAlone) {
  const DslaShape s = shape();
  const GpuLayer layer(s, GetParam().gates, 64, 9);
  const auto tokens = MakeSequences(s, {1, 1});
  TestPool pool(s, 2);
  pool.Reset(0);
  pool.Reset(1);
  const std::vector<TestPart> parts{{&tokens[0], 0, 1, 0}, {&tokens[1], 0, 1, 1}};
  TestBatch batch(layer.host, pool, parts);
  GpuCall gpu(layer, batch, pool, 2);
  const std::vector<int32_t> slots{0, -1};
  const DeviceBytes device_slots(slots);
  gpu.args.slots = device_slots.as<int32_t>();
  const std::vector<std::byte> untouched = pool.Bytes(1);
  gpu.Decode();
  gpu.ReadPool(pool);
  EXPECT_EQ(pool.Bytes(1), untouched);
  const std::vector<float> out = gpu.Out();
  const size_t row = out.size() / 2;
  for (size_t i = 0; i < row; ++i) {
    ASSERT_FALSE(std::isnan(out[i]));
    ASSERT_TRUE(std::isnan(out[row + i])) << "a padding row was written";
  }
}

struct FoldOf {
  float logits = 1;                 // a factor of those of the keys' features
  std::optional<float> floor = {};  // of gates, other than the shape's
  bool keys_beyond_half = false;
};
void ExpectFold(const Case& c, const FoldOf& of) {
  DslaShape s = Shape(c);
  s.gate_floor = of.floor.value_or(s.gate_floor);
  TestLayer host(s, c.gates, 512, 10);
  EnlargeLogits(host, of.logits);
  if (of.keys_beyond_half) SeparateGates(host);
  const GpuLayer layer(std::move(host));
  const int W = s.window;
  const std::vector<int> lengths{0, 1, 63, 64, 65, W, W + 1, W + 63, W + 64, W + 65, 200, 321};
  const int N = static_cast<int>(lengths.size());
  for (const int page : {16, 20, 64, 96}) {
    SCOPED_TRACE("page size " + std::to_string(page));
    auto tokens = MakeSequences(s, lengths);
    for (int n = 0; n < N && of.keys_beyond_half; ++n)
      EnlargeKeys(s, tokens[static_cast<size_t>(n)], lengths[static_cast<size_t>(n)]);
    // Pages in scrambled order; what no token fills is NaN.
    std::vector<int32_t> start{0}, pages, pos(lengths.begin(), lengths.end()), slots;
    int total = 0;
    for (int n : lengths) total += (n + page - 1) / page;
    for (int n : lengths) {
      for (int i = 0; i < (n + page - 1) / page; ++i)
        pages.push_back(static_cast<int32_t>(pages.size()));
      start.push_back(static_cast<int32_t>(pages.size()));
      slots.push_back(static_cast<int32_t>(slots.size()));
    }
    std::shuffle(pages.begin(), pages.end(), std::mt19937(11));
    const int64_t stride = int64_t{s.Hkv} * page * s.D;
    std::vector<bf16> k(static_cast<size_t>(total * stride), bf16{0xFFFF}), v = k;
    for (int n = 0; n < N; ++n)
      for (int t = 0; t < lengths[static_cast<size_t>(n)]; ++t)
        for (int h = 0; h < s.Hkv; ++h) {
          const int64_t to =
              pages[static_cast<size_t>(start[static_cast<size_t>(n)] + t / page)] * stride +
              (int64_t{h} * page + t % page) * s.D;
          const int64_t from = (int64_t{t} * s.Hkv + h) * s.D * 2;
          std::memcpy(&k[static_cast<size_t>(to)], &tokens[static_cast<size_t>(n)].k[size_t(from)],
                      static_cast<size_t>(s.D) * 2);
          std::memcpy(&v[static_cast<size_t>(to)], &tokens[static_cast<size_t>(n)].v[size_t(from)],
                      static_cast<size_t>(s.D) * 2);
        }
    TestPool want(s, N), got(s, N);
    DslaFoldArgs ref;
    ref.shape = s;
    ref.params = layer.host.Params();
    ref.rows.N = N;
    ref.rows.pos = pos.data();
    ref.tables = {start.data(), pages.data()};
    ref.kv = {k.data(), v.data(), stride, page, s.Hkv, s.D, DType::kBF16};
    ref.slots = slots.data();
    ref.states = want.View();
    DslaFoldRef(ref);

    const DeviceBytes d_pos(pos), d_start(start), d_pages(pages), d_k(k), d_v(v), d_slots(slots);
    DeviceBytes states(got.View().slot_bytes * N);
    int64_t T = 0;
    for (int n : lengths) T += n;
    for (int chunks : {1, 5, cuda::MaxChunks(N, T)}) {
      SCOPED_TRACE("chunks per wave " + std::to_string(chunks));
      states.Write(TestPool(s, N).View().base);
      const DeviceBytes workspace(cuda::FoldWorkspaceBytes(s, N, T, chunks));
      DslaCudaFoldArgs args;
      args.shape = s;
      args.layout = MakeSlotLayout(s);
      args.weights = layer.weights();
      args.rows.N = N;
      args.rows.pos = d_pos.as<int32_t>();
      args.T = T;
      args.tables = {d_start.as<int32_t>(), d_pages.as<int32_t>()};
      args.kv = {d_k.as<void>(), d_v.as<void>(), stride, page, s.Hkv, s.D, DType::kBF16};
      args.slots = d_slots.as<int32_t>();
      args.states = {states.as<std::byte>(), got.View().slot_bytes};
      args.workspace = workspace.as<void>();
      args.workspace_bytes = workspace.bytes();
      CheckCuda(cuda::Fold(args, nullptr));
      CheckCuda(cudaDeviceSynchronize());
      states.Read(got.View().base);
      ExpectSlots(s.D, got, want, slots, c.StateTolerance());
    }
  }
}

TEST_P(DslaCudaTest, Fold) { ExpectFold(GetParam(), {}); }
// Logits of keys' features whose exponentials fp32 does not have.
TEST_P(DslaCudaTest, FoldOfLargeKeyLogits) { ExpectFold(GetParam(), {.logits = 100}); }
// Gates at such a floor are not all fast.
TEST_P(DslaCudaTest, FoldWithNearFloor) { ExpectFold(GetParam(), {.floor = -0.25f}); }
TEST_P(DslaCudaTest, FoldOfKeysBeyondHalf) { ExpectFold(GetParam(), {.keys_beyond_half = true}); }

INSTANTIATE_TEST_SUITE_P(
    Shapes, DslaCudaTest,
    ::testing::Values(Case{"typical", 4, 2, 64, 64, 2, 64, 4, TestGates::kTrained},
                      Case{"typical_floor", 4, 2, 64, 64, 2, 64, 4, TestGates::kFloor},
                      Case{"both_signs", 3, 1, 64, 128, 1, 64, 4, TestGates::kTrained},
                      Case{"no_window", 3, 1, 64, 128, 2, 0, 0, TestGates::kTrained},
                      Case{"no_window_floor", 3, 1, 64, 128, 2, 0, 0, TestGates::kFloor},
                      Case{"wide", 2, 2, 128, 128, 2, 80, 4, TestGates::kTrained},
                      Case{"wide_mixed", 2, 2, 128, 128, 2, 128, 0, TestGates::kMixed},
                      Case{"wide_floor", 2, 2, 128, 128, 2, 64, 4, TestGates::kFloor},
                      Case{"wide_still", 4, 1, 128, 128, 2, 64, 4, TestGates::kSlow},
                      Case{"wide_no_window", 3, 1, 128, 128, 2, 0, 0, TestGates::kTrained},
                      Case{"wide_seven", 7, 1, 128, 128, 2, 64, 4, TestGates::kTrained},
                      Case{"wide_one_floor", 2, 2, 128, 128, 1, 64, 0, TestGates::kFloor},
                      Case{"wide_slow", 4, 1, 128, 256, 1, 64, 4, TestGates::kSlow},
                      Case{"wide_largest", 1, 1, 128, 256, 2, 64, 1, TestGates::kTrained},
                      Case{"sinks_over_window", 5, 1, 64, 64, 1, 16, 20, TestGates::kMixed},
                      Case{"many_sinks", 3, 1, 128, 128, 1, 200, 40, TestGates::kTrained},
                      Case{"shipped", 9, 3, 64, 64, 1, 332, 4, TestGates::kTrained},
                      // Decode: one part of the keys has no states.
                      Case{"long_window", 8, 1, 64, 64, 1, 420, 4, TestGates::kTrained}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace dsla
