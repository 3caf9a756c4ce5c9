// Sequences of many segments, and shapes without segments, against the fp64 recurrence; and that a
// sequence's bits depend neither on the size of the workspace nor on what it is batched with.
#include <numeric>

#include "ops/dsla/cuda/dsla_cuda.h"
#include "ops/dsla/cuda/dsla_cuda_cases.cuh"

namespace dsla {
namespace {

struct SegmentCase {
  Case layer;
  // Rows of each sequence in two calls in a row.
  std::vector<int> first, second;
  std::vector<int> waves;  // chunks per wave to compare with one wave of all
};

class SegmentsTest : public ::testing::TestWithParam<SegmentCase> {
 protected:
  void SetUp() override {
    if (!HaveGpu()) GTEST_SKIP() << "SKIPPED: no CUDA device here";
  }
};

// Slot `slot` of a pool on the device.
std::vector<std::byte> SlotBytes(const GpuCall& gpu, TestPool& pool, int slot) {
  gpu.ReadPool(pool);
  return pool.Bytes(slot);
}

TEST_P(SegmentsTest, Prefill) {
  const SegmentCase& c = GetParam();
  const DslaShape s = Shape(c.layer);
  const int N = static_cast<int>(c.first.size());
  std::vector<int> lengths, slots(c.first.size());
  for (size_t i = 0; i < c.first.size(); ++i) lengths.push_back(c.first[i] + c.second[i]);
  std::iota(slots.begin(), slots.end(), 0);
  const GpuLayer layer(s, c.layer.gates, *std::max_element(lengths.begin(), lengths.end()), 7);
  const auto tokens = MakeSequences(s, lengths);
  TestPool want(s, N), got(s, N), other(s, N);
  for (int i = 0; i < N; ++i) {
    want.Reset(i);
    got.Reset(i);
  }
  for (int call = 0; call < 2; ++call) {
    SCOPED_TRACE("call " + std::to_string(call));
    std::vector<TestPart> parts;
    for (int i = 0; i < N; ++i) {
      const auto at = static_cast<size_t>(i);
      parts.push_back({&tokens[at], call ? c.first[at] : 0, call ? c.second[at] : c.first[at], i});
    }
    TestBatch reference(layer.host, want, parts), input(layer.host, got, parts);
    DslaForwardRef(reference.args());
    GpuCall gpu(layer, input, got, N);
    gpu.Prefill(cuda::MaxChunks(N, gpu.args.T));
    const std::vector<float> out = gpu.Out();
    for (int wave : c.waves) {
      GpuCall again(layer, input, got, N);
      again.Prefill(wave);
      EXPECT_EQ(out, again.Out()) << "other results with " << wave << " chunks per wave";
      for (int i = 0; i < N; ++i)
        EXPECT_EQ(SlotBytes(gpu, other, i), SlotBytes(again, other, i)) << "slot " << i;
    }
    const auto row = static_cast<size_t>(s.H * s.D);
    const auto rows_of = [&](int i) {
      return std::span(out).subspan(static_cast<size_t>(reference.args().rows.row_start[i]) * row,
                                    reference.out(i).size());
    };
    for (int i = 0; i < N; ++i) {
      if (parts[static_cast<size_t>(i)].count == 0) continue;
      SCOPED_TRACE("sequence " + std::to_string(i));
      ExpectClose(rows_of(i), reference.out(i), kChunkTolerance);
      const std::vector<TestPart> one{parts[static_cast<size_t>(i)]};
      TestBatch alone_input(layer.host, got, one);
      std::vector<int> waves = c.waves;
      waves.push_back(cuda::MaxChunks(1, one[0].count));
      for (int wave : waves) {
        GpuCall alone(layer, alone_input, got, N);
        alone.Prefill(wave);
        const std::vector<float> alone_out = alone.Out();
        EXPECT_TRUE(
            std::equal(alone_out.begin(), alone_out.end(), rows_of(i).begin(), rows_of(i).end()))
            << "depends on the other sequences of the call, with " << wave << " chunks per wave";
        EXPECT_EQ(SlotBytes(gpu, other, i), SlotBytes(alone, other, i));
      }
    }
    gpu.ReadPool(got);
    ExpectSlots(s.D, got, want, slots, kStateTolerance);
  }
}

TEST_P(SegmentsTest, Fold) {
  const SegmentCase& c = GetParam();
  const DslaShape s = Shape(c.layer);
  const int N = static_cast<int>(c.first.size()), page = 64;
  const GpuLayer layer(s, c.layer.gates, *std::max_element(c.first.begin(), c.first.end()), 10);
  const auto tokens = MakeSequences(s, c.first);
  // Pages in reverse order; what no token fills is NaN.
  std::vector<int32_t> start{0}, pages, slots(c.first.size());
  for (int n : c.first) start.push_back(start.back() + (n + page - 1) / page);
  for (int i = 0; i < start.back(); ++i) pages.push_back(start.back() - 1 - i);
  std::iota(slots.begin(), slots.end(), 0);
  const int64_t stride = int64_t{s.Hkv} * page * s.D;
  std::vector<bf16> k(static_cast<size_t>(start.back() * stride), bf16{0xFFFF}), v = k;
  for (size_t n = 0; n < tokens.size(); ++n)
    for (int t = 0; t < tokens[n].count; ++t)
      for (int h = 0; h < s.Hkv; ++h) {
        const int64_t to = pages[static_cast<size_t>(start[n] + t / page)] * stride +
                           (int64_t{h} * page + t % page) * s.D;
        const int64_t from = (int64_t{t} * s.Hkv + h) * s.D * 2;
        const auto bytes = static_cast<size_t>(s.D) * 2;
        std::memcpy(&k[static_cast<size_t>(to)], &tokens[n].k[static_cast<size_t>(from)], bytes);
        std::memcpy(&v[static_cast<size_t>(to)], &tokens[n].v[static_cast<size_t>(from)], bytes);
      }
  TestPool want(s, N), got(s, N), alone(s, N);
  DslaFoldArgs ref;
  ref.shape = s;
  ref.params = layer.host.Params();
  ref.rows.N = N;
  ref.rows.pos = c.first.data();
  ref.tables = {start.data(), pages.data()};
  ref.kv = {k.data(), v.data(), stride, page, s.Hkv, s.D, DType::kBF16};
  ref.slots = slots.data();
  ref.states = want.View();
  DslaFoldRef(ref);

  const DeviceBytes d_pos(c.first), d_start(start), d_pages(pages), d_k(k), d_v(v), d_slots(slots);
  DeviceBytes states(got.View().slot_bytes * N);
  // Sequences [n, n + count) into their slots.
  const auto fold = [&](int n, int count, int chunks, TestPool& pool) {
    states.Write(TestPool(s, N).View().base);
    cuda::DslaCudaFoldArgs args;
    args.shape = s;
    args.layout = MakeSlotLayout(s);
    args.weights = layer.weights();
    args.rows.N = count;
    args.rows.pos = d_pos.as<int32_t>() + n;
    for (int i = n; i < n + count; ++i) args.T += c.first[static_cast<size_t>(i)];
    args.tables = {d_start.as<int32_t>() + n, d_pages.as<int32_t>()};
    args.kv = {d_k.as<void>(), d_v.as<void>(), stride, page, s.Hkv, s.D, DType::kBF16};
    args.slots = d_slots.as<int32_t>() + n;
    args.states = {states.as<std::byte>(), pool.View().slot_bytes};
    const int most = cuda::MaxChunks(count, args.T);
    const DeviceBytes workspace(
        cuda::FoldWorkspaceBytes(s, count, args.T, chunks > 0 ? chunks : most));
    args.workspace = workspace.as<void>();
    args.workspace_bytes = workspace.bytes();
    CheckCuda(cuda::Fold(args, nullptr));
    CheckCuda(cudaDeviceSynchronize());
    states.Read(pool.View().base);
  };
  fold(0, N, 0, got);
  ExpectSlots(s.D, got, want, slots, kStateTolerance);
  for (int wave : c.waves) {
    TestPool again(s, N);
    fold(0, N, wave, again);
    for (int i = 0; i < N; ++i)
      EXPECT_EQ(again.Bytes(i), got.Bytes(i))
          << "slot " << i << " differs with " << wave << " chunks per wave";
  }
  for (int i = 0; i < N; ++i) {
    fold(i, 1, 0, alone);
    EXPECT_EQ(alone.Bytes(i), got.Bytes(i)) << "slot " << i << " depends on the other sequences";
  }
}

const std::vector<int> kFirst{2500, 1, 700, 513, 0, 512, 4097},
    kSecond{1597, 1200, 3, 0, 577, 640, 1};

INSTANTIATE_TEST_SUITE_P(
    Shapes, SegmentsTest,
    ::testing::Values(
        SegmentCase{{"typical", 3, 1, 64, 128, 2, 64, 4, TestGates::kTrained},
                    kFirst,
                    kSecond,
                    {1, 24, 40}},
        SegmentCase{{"floor", 2, 1, 64, 128, 2, 64, 4, TestGates::kFloor}, kFirst, kSecond, {33}},
        SegmentCase{{"slow", 2, 1, 64, 128, 2, 64, 4, TestGates::kSlow}, kFirst, kSecond, {33}},
        SegmentCase{{"no_window", 1, 1, 64, 64, 1, 0, 0, TestGates::kMixed}, kFirst, kSecond, {17}},
        SegmentCase{{"wide", 2, 1, 128, 128, 2, 80, 4, TestGates::kTrained},
                    {1300, 40, 600},
                    {700, 0, 900},
                    {1, 20}},
        SegmentCase{{"wide_floor", 2, 1, 128, 128, 2, 64, 4, TestGates::kFloor},
                    {1300, 40, 600},
                    {700, 0, 900},
                    {17}},
        SegmentCase{{"wide_slow", 1, 1, 128, 128, 2, 0, 0, TestGates::kSlow},
                    {1300, 40, 600},
                    {700, 0, 900},
                    {17}},
        // With D and F 128 segments have 8 chunks here on compute capability 9.0, and 4 above.
        SegmentCase{{"wide_longer", 12, 12, 128, 128, 1, 64, 4, TestGates::kTrained},
                    {1100, 65},
                    {1025, 0},
                    {1, 40}},
        // 2700 rows of 24 KV heads are segments of 9.
        SegmentCase{{"wide_longest", 24, 24, 128, 128, 1, 64, 4, TestGates::kTrained},
                    {2700, 64},
                    {63, 1},
                    {1}},
        SegmentCase{{"largest", 2, 1, 128, 256, 2, 64, 1, TestGates::kTrained},
                    {900, 70, 400},
                    {300, 1, 500},
                    {1, 12}},
        SegmentCase{{"grouped", 5, 1, 128, 128, 1, 64, 4, TestGates::kTrained},
                    {1300, 40, 600},
                    {700, 0, 900},
                    {1, 20}},
        // A block of `queries` has several chunks here.
        SegmentCase{{"longer", 18, 6, 64, 128, 2, 64, 4, TestGates::kTrained},
                    {1500, 90, 1024},
                    {1100, 1025, 0},
                    {1, 40}},
        // 2600 rows of sixteen KV heads are segments of 6 chunks, 1500 of 4.
        SegmentCase{{"long_segments", 16, 16, 64, 128, 2, 64, 4, TestGates::kTrained},
                    {2600, 70, 1500},
                    {130, 2400, 1},
                    {1, 25}},
        // 24 have no segments in a prefill; a fold has more than a wave has room for.
        SegmentCase{{"none", 24, 24, 64, 128, 2, 64, 4, TestGates::kTrained},
                    {650, 63, 200, 1100, 70, 129, 0, 65, 64, 300},
                    {130, 1, 65, 0, 0, 0, 40, 0, 0, 0},
                    {1, 2, 5}}),
    [](const auto& info) { return std::string(info.param.layer.name); });

}  // namespace
}  // namespace dsla
